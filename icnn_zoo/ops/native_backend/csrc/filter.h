/* One axis of a window of pixels: what triangle and gaussian taps are made of. Comes after plane.h. */

/* to[i] (+)= sum over k of weight[k * order] * from[k * step + i], i in whole vectors. */
static inline __attribute__((always_inline)) void filter_some(const REAL *weight, index_t order, const int reads,
                                                              const REAL *from, index_t step, REAL *to, index_t length,
                                                              int add) {
    for (index_t at = 0; at < length; at += LANES) {
        vector total = add ? load(to + at) : all(0);
        for (int k = 0; k < reads; k++) total += all(weight[k * order]) * load(from + k * step + at);
        store(to + at, total);
    }
}

static inline void filter(const REAL *weight, index_t order, index_t reads, const REAL *from, index_t step, REAL *to,
                   index_t length, int add) {
#define READS(N) case N: filter_some(weight, order, N, from, step, to, length, add); break
    switch (reads) {
        READS(2);
        READS(3);
        READS(4);
        READS(5);
        READS(6);
        READS(7);
        READS(8);
        READS(9);
        READS(10);
    default:
        filter_some(weight, order, (int)reads, from, step, to, length, add);
    }
#undef READS
}
