/* What columns and stencils share: vectors, shifts, planes with zeros around them, and PyTorch's threads.
 *
 * Compiled once per data type with -DREAL=float or -DREAL=double (see build.py); plain C with the vector
 * extensions of GCC and Clang. Work is cut into units, taken one by one by whichever thread is free: a thread that others
 * hold up delays no more than its unit. Every sum has an order of its own, so results agree bit for bit whatever the
 * number of threads.
 *
 * Planes are copied into a frame with zeros around, its columns sorted by their remainder modulo the stride ("phases"),
 * so that neighboring outputs always read neighboring addresses.
 */

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Length of a vector, and how many rows of two vectors a matrix product keeps in registers. The widest vectors are best
 * for matrix products; where every read is unaligned (NARROW) half of it is, as fewer reads cross a cache line. */
#if defined(__AVX512F__) && !defined(NARROW)
enum { BYTES = 64, TILE_ROWS = 12 };
#elif defined(__AVX__)
enum { BYTES = 32, TILE_ROWS = 6 };
#else
enum { BYTES = 16, TILE_ROWS = 6 };
#endif
enum { LANES = BYTES / sizeof(REAL), TILE_COLUMNS = 2 * LANES };
typedef REAL vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
typedef int64_t index_t;

/* What GNU's OpenMP runtime, PyTorch's own on Linux, offers: runs body(data) on each of `threads` threads of its pool.
 * NULL where there is none: then the kernel starts threads of its own. */
typedef void (*parallel_t)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

typedef struct {
    index_t height, width;         /* input plane */
    index_t out_height, out_width; /* output plane */
    index_t stride_row, stride_col;
    index_t origin_row, origin_col; /* where position 0 of output 0 reads */
} sizes_t;

static inline vector load(const REAL *from) { return *(const vector *)from; }
static inline void store(REAL *to, vector value) { *(vector *)to = value; }
static inline void store_part(REAL *to, vector value, index_t count) { memcpy(to, &value, count * sizeof(REAL)); }
static inline vector all(REAL value) { return value - (vector){0}; }
static inline index_t largest(index_t a, index_t b) { return a > b ? a : b; }
static inline index_t smallest(index_t a, index_t b) { return a < b ? a : b; }

static inline index_t round_up(index_t a, index_t multiple) { return (a + multiple - 1) / multiple * multiple; }

static inline index_t floor_div(index_t a, index_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
static inline index_t floor_mod(index_t a, index_t b) { return a - floor_div(a, b) * b; }

/* In whole vectors: may write LANES elements past the end. */
static inline void fill(REAL *to, vector value, index_t length) {
    for (index_t at = 0; at < length; at += LANES) store(to + at, value);
}

static inline REAL sum_lanes(vector value) {
    REAL total = 0;
    for (int lane = 0; lane < LANES; lane++) total += value[lane];
    return total;
}

typedef struct {
    index_t row, col;
    REAL down, right; /* fractions in [0, 1), NaN for a position that is no number */
} shift_t;

/* The cell and the fraction of a position, as in interpolation.py.
 * Beyond the limit every read is outside the input: clamping there does not change the function. */
static inline index_t split(double position, index_t limit, index_t origin, REAL *fraction) {
    double low = __builtin_floor(position);
    *fraction = (REAL)(position - low);
    if (!(low >= -(double)limit)) low = low != low ? 0 : -(double)limit;
    if (low > (double)limit) low = (double)limit;
    return (index_t)low + origin;
}

static inline shift_t make_shift(const sizes_t *sizes, const double *position) {
    shift_t shift;
    index_t rows = (sizes->out_height - 1) * sizes->stride_row + sizes->height + 2 + llabs(sizes->origin_row);
    index_t cols = (sizes->out_width - 1) * sizes->stride_col + sizes->width + 2 + llabs(sizes->origin_col);
    shift.row = split(position[0], rows, sizes->origin_row, &shift.down);
    shift.col = split(position[1], cols, sizes->origin_col, &shift.right);
    return shift;
}

/* A position that is no number makes all that it feeds no number, also where it would have read zeros. */
static inline void spread_unknown(REAL unknown, REAL *plane, index_t length) {
    if (unknown == 0) return;
    for (index_t pixel = 0; pixel < length; pixel++) plane[pixel] += unknown;
}

/* One of the numbers of positions that are doubles, or floats. */
static inline double coordinate(const void *positions, index_t wide, index_t at) {
    return wide ? ((const double *)positions)[at] : ((const float *)positions)[at];
}

/* The gradients of a tap from the products of the output's gradient with each of its four cells. */
static inline void finish_tap(const double *product, double down, double right, double weight, REAL *by_weight,
                              double *by_shift) {
    double top = (1 - right) * product[0] + right * product[1], bottom = (1 - right) * product[2] + right * product[3];
    *by_weight = (REAL)((1 - down) * top + down * bottom);
    by_shift[0] = weight * (bottom - top);
    by_shift[1] = weight * ((1 - down) * (product[1] - product[0]) + down * (product[3] - product[2]));
}

/* ---- a plane with zeros around it -------------------------------------------------------------------------------- */

typedef struct {
    index_t top, left;     /* zeros before the first row and column */
    index_t rows, columns; /* with zeros */
    index_t step;          /* columns are sorted by their remainder modulo this */
    index_t phase, pitch;  /* length of a phase, of a row */
} frame_t;

static inline frame_t make_frame(index_t height, index_t width, index_t top, index_t bottom, index_t left, index_t right,
                          index_t step) {
    frame_t frame = {top, left, top + height + bottom, left + width + right, step, 0, 0};
    frame.phase = (frame.columns + step - 1) / step;
    /* A step beyond the row leaves phases of one column each. */
    frame.pitch = frame.phase == 1 ? frame.columns : frame.phase * step;
    return frame;
}

/* Vector loops read and add zeros past the end of a row: room for that after the last one. */
static inline index_t frame_length(const frame_t *frame) { return frame->rows * frame->pitch + 5 * LANES; }

static inline index_t frame_at(const frame_t *frame, index_t row, index_t col) {
    index_t column = col + frame->left;
    if (frame->step == 1) return (row + frame->top) * frame->pitch + column;
    return (row + frame->top) * frame->pitch + floor_mod(column, frame->step) * frame->phase +
           floor_div(column, frame->step);
}

/* memcpy for a row of a plane: short, and its length not known to the compiler. */
static inline void copy_row(REAL *to, const REAL *from, index_t count) {
    if (count < LANES) {
        for (index_t index = 0; index < count; index++) to[index] = from[index];
        return;
    }
    for (index_t index = 0; index < count - LANES; index += LANES) store(to + index, load(from + index));
    store(to + count - LANES, load(from + count - LANES));
}

/* A row of a plane into a frame of zeros. */
static inline void copy_to_frame(const frame_t *frame, REAL *buffer, const REAL *plane, index_t row, index_t width) {
    if (frame->step == 1) {
        copy_row(buffer + frame_at(frame, row, 0), plane + row * width, width);
        return;
    }
    for (index_t start = 0; start < smallest(frame->step, width); start++) {
        REAL *to = buffer + frame_at(frame, row, start);
        for (index_t col = start; col < width; col += frame->step) *to++ = plane[row * width + col];
    }
}

/* Rows [first, last) of a plane, and zeros where the frame has others. */
static inline void fill_rows(const frame_t *frame, REAL *buffer, const REAL *plane, index_t first, index_t last,
                             index_t width) {
    memset(buffer, 0, frame_length(frame) * sizeof(REAL));
    for (index_t row = first; row < last; row++) copy_to_frame(frame, buffer, plane, row, width);
}

static inline void fill_frame(const frame_t *frame, REAL *buffer, const REAL *plane, index_t height, index_t width) {
    fill_rows(frame, buffer, plane, 0, height, width);
}

static inline void read_frame(const frame_t *frame, const REAL *buffer, REAL *plane, index_t height, index_t width) {
    for (index_t row = 0; row < height; row++) {
        if (frame->step == 1) {
            copy_row(plane + row * width, buffer + frame_at(frame, row, 0), width);
            continue;
        }
        for (index_t start = 0; start < smallest(frame->step, width); start++) {
            const REAL *from = buffer + frame_at(frame, row, start);
            for (index_t col = start; col < width; col += frame->step) plane[row * width + col] = *from++;
        }
    }
}

/* ---- running on threads ------------------------------------------------------------------------------------------ */

typedef struct {
    void (*work)(const void *task, index_t unit, REAL *scratch);
    const void *task;
    index_t units, scratch_length;
    index_t next; /* units are handed out one by one; which thread takes which does not change a result */
    int failed;
} run_t;

static inline void run_body(void *data) {
    run_t *run = data;
    void *scratch; /* at a line of the cache, so that aligned vectors do not cross two */
    if (posix_memalign(&scratch, 64, run->scratch_length * sizeof(REAL))) {
        __atomic_store_n(&run->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (;;) {
        index_t unit = __atomic_fetch_add(&run->next, 1, __ATOMIC_RELAXED);
        if (unit >= run->units) break;
        run->work(run->task, unit, scratch);
    }
    free(scratch);
}

static void *run_thread(void *data) {
    run_body(data);
    return NULL;
}

/* As parallel_t does, with threads that live as long as the call. Fewer do where the system gives no more. */
static inline void run_own_threads(run_t *run, unsigned threads) {
    enum { MOST = 256 };
    pthread_t started[MOST];
    unsigned count = 0;
    while (count + 1 < threads && count < MOST && pthread_create(&started[count], NULL, run_thread, run) == 0) count++;
    run_body(run);
    while (count > 0) pthread_join(started[--count], NULL);
}

static inline int run_parallel(parallel_t parallel, unsigned threads, const void *task, index_t units, index_t scratch_length,
                        void (*work)(const void *, index_t, REAL *)) {
    run_t run = {work, task, units, scratch_length, 0, 0};
    if (threads > units) threads = units > 0 ? (unsigned)units : 1;
    if (threads > 1 && parallel != NULL) {
        parallel(run_body, &run, threads, 0);
    } else if (threads > 1) {
        run_own_threads(&run, threads);
    } else {
        run_body(&run);
    }
    return run.failed;
}
