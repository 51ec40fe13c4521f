/* A dense convolution, of kernels that were drawn into a box: what dense_planes.c and dense_cells.c share. */

#include "plane.h"

typedef struct {
    sizes_t sizes; /* origin: where the first cell of output 0 reads */
    index_t images, channels, outputs, groups;
    index_t rows, cols; /* cells of a kernel */
    const REAL *input;       /* [images, channels, height, width] */
    const REAL *cells;       /* [outputs, channels / groups, rows, cols] */
    const REAL *bias;        /* [outputs], or NULL */
    REAL *output;            /* [images, outputs, out_height, out_width] */
    const REAL *grad_output; /* as output */
    REAL *grad_input;        /* as input */
    REAL *grad_cells;        /* as cells */
    REAL *workspace;         /* what the function beside says */
} dense_t;

/* Numbers of copied planes, about, where one image does not have more. */
enum { WORKSPACE = (1 << 22) / sizeof(REAL) };

/* Threads that a call is worth: below about this many multiply-adds for each, starting them takes longer. */
static inline unsigned worthwhile(const dense_t *task, unsigned threads) {
    double pixels = (double)task->images * task->sizes.out_height * task->sizes.out_width;
    double wanted = pixels * task->outputs * (task->channels / task->groups) * task->rows * task->cols / (1 << 19);
    return wanted < threads ? (unsigned)wanted + 1 : threads;
}

/* After a row's sum: Clang would load what all rows need first, for which registers do not suffice. */
#if defined(__clang__) && defined(__AVX512F__)
#define KEEP_ORDER(sum) __asm__ volatile("" : "+v"(sum[0]), "+v"(sum[1]) : : "memory")
#else
#define KEEP_ORDER(sum) ((void)0)
#endif

/* Two groups of few planes share a vector: one number of the first, one of the second, and so on. */
static inline index_t groups_of_vector(index_t groups, index_t results) {
    return sizeof(REAL) == 4 && groups > 1 && 2 * results <= LANES ? 2 : 1;
}

/* A vector of what is at an address, and after it for a second group. */
static inline __attribute__((always_inline)) vector repeat(const REAL *from, const int sharing) {
    typedef int64_t pairs __attribute__((vector_size(BYTES)));
    int64_t pair = 0;
    if (sharing == 1) return all(*from);
    memcpy(&pair, from, 2 * sizeof(float));
    return (vector)(pair - (pairs){0});
}

/* The same plane of one or two groups as a frame, their pixels in turn; `step` from a group's plane to the next. */
static inline void fill_shared(const frame_t *frame, REAL *to, const REAL *from, index_t step, index_t height,
                               index_t width, index_t groups, index_t sharing) {
    if (sharing == 1) {
        fill_frame(frame, to, from, height, width);
        return;
    }
    memset(to, 0, sharing * frame_length(frame) * sizeof(REAL));
    for (index_t group = 0; group < groups; group++)
        for (index_t row = 0; row < height; row++)
            for (index_t col = 0; col < width; col++)
                to[(frame_at(frame, row, 0) + col) * sharing + group] = from[group * step + row * width + col];
}
