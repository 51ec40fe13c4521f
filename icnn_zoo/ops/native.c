/* The irregular convolution's memory-bound parts for CPUs: columns, their adjoint, and direct stencils.
 *
 * Compiled once per data type with -DREAL=float or -DREAL=double (see native_backend.py); plain C with the vector
 * extensions of GCC and Clang. A tap's shift is an integer part (row, col) and a fraction in [0, 1); positions that are
 * no number come as fraction NaN and integer part 0. Every plane is written by one thread in a fixed order, so results
 * agree bit for bit whatever the number of threads.
 *
 * Planes are copied into a buffer with zeros around, its columns sorted by their remainder modulo the stride ("phases"),
 * so that neighbouring outputs always read neighbouring addresses.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The widest vectors that there are, and how many rows of them a matrix product keeps in registers. */
#if defined(__AVX512F__)
enum { BYTES = 64, TILE_ROWS = 12 };
#elif defined(__AVX__)
enum { BYTES = 32, TILE_ROWS = 6 };
#else
enum { BYTES = 16, TILE_ROWS = 6 };
#endif
enum { LANES = BYTES / sizeof(REAL), TILE_COLUMNS = 2 * LANES };
typedef REAL vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
typedef int64_t index_t;

/* What PyTorch's own OpenMP runtime offers: runs body(data) on each of `threads` threads of its pool. */
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

static inline REAL sum_lanes(vector value) {
    REAL total = 0;
    for (int lane = 0; lane < LANES; lane++) total += value[lane];
    return total;
}

typedef struct {
    index_t row, col;
    REAL down, right; /* fractions in [0, 1), NaN for a position that is no number */
} shift_t;

/* Beyond the limit every read is outside the input: clamping there does not change the function. */
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
static void spread_unknown(REAL unknown, REAL *plane, index_t length) {
    if (unknown == 0) return;
    for (index_t pixel = 0; pixel < length; pixel++) plane[pixel] += unknown;
}

/* ---- a plane with zeros around it -------------------------------------------------------------------------------- */

typedef struct {
    index_t top, left;     /* zeros before the first row and column */
    index_t rows, columns; /* with zeros */
    index_t step;          /* columns are sorted by their remainder modulo this */
    index_t phase, pitch;  /* length of a phase, of a row */
} frame_t;

static frame_t make_frame(index_t height, index_t width, index_t top, index_t bottom, index_t left, index_t right,
                          index_t step) {
    frame_t frame = {top, left, top + height + bottom, left + width + right, step, 0, 0};
    frame.phase = (frame.columns + step - 1) / step;
    frame.pitch = frame.phase * step;
    return frame;
}

/* Vector loops read and add zeros past the end of a row: room for that after the last one. */
static index_t frame_length(const frame_t *frame) { return frame->rows * frame->pitch + 5 * LANES; }

static inline index_t frame_at(const frame_t *frame, index_t row, index_t col) {
    index_t column = col + frame->left;
    return (row + frame->top) * frame->pitch + floor_mod(column, frame->step) * frame->phase +
           floor_div(column, frame->step);
}

static void fill_frame(const frame_t *frame, REAL *buffer, const REAL *plane, index_t height, index_t width) {
    memset(buffer, 0, frame_length(frame) * sizeof(REAL));
    for (index_t row = 0; row < height; row++) {
        if (frame->step == 1) {
            memcpy(buffer + frame_at(frame, row, 0), plane + row * width, width * sizeof(REAL));
            continue;
        }
        for (index_t col = 0; col < width; col++) buffer[frame_at(frame, row, col)] = plane[row * width + col];
    }
}

static void read_frame(const frame_t *frame, const REAL *buffer, REAL *plane, index_t height, index_t width) {
    for (index_t row = 0; row < height; row++) {
        if (frame->step == 1) {
            memcpy(plane + row * width, buffer + frame_at(frame, row, 0), width * sizeof(REAL));
            continue;
        }
        for (index_t col = 0; col < width; col++) plane[row * width + col] = buffer[frame_at(frame, row, col)];
    }
}

/* Outputs [first, last) whose two neighbours lie within one row or column of zeros around the input. */
static void live_range(index_t shift, index_t stride, index_t size, index_t outputs, index_t *first, index_t *last) {
    *first = smallest(largest(floor_div(-1 - shift + stride - 1, stride), 0), outputs);
    *last = largest(smallest(floor_div(size - 1 - shift, stride) + 1, outputs), *first);
}

typedef struct {
    index_t row_first, row_last, col_first, col_last; /* live outputs */
    index_t top_left, top_right;                      /* addresses in the frame for output (row 0, col_first) */
    index_t row_step;                                 /* from one output row to the next in the frame */
    index_t below;                                    /* from a row of the frame to the next */
    REAL down, right;                                 /* fractions */
} tap_t;

static tap_t make_tap(const frame_t *frame, const sizes_t *sizes, const double *position) {
    shift_t shift = make_shift(sizes, position);
    index_t row = shift.row, col = shift.col;
    tap_t tap;
    tap.down = shift.down;
    tap.right = shift.right;
    live_range(row, sizes->stride_row, sizes->height, sizes->out_height, &tap.row_first, &tap.row_last);
    live_range(col, sizes->stride_col, sizes->width, sizes->out_width, &tap.col_first, &tap.col_last);
    if (tap.col_first == tap.col_last) tap.row_last = tap.row_first;
    index_t column = tap.col_first * sizes->stride_col + col;
    tap.top_left = frame_at(frame, row, column);
    tap.top_right = frame_at(frame, row, column + 1);
    tap.row_step = sizes->stride_row * frame->pitch;
    tap.below = frame->pitch;
    return tap;
}

/* ---- running on PyTorch's threads -------------------------------------------------------------------------------- */

typedef struct {
    void (*work)(const void *task, index_t unit, REAL *scratch);
    const void *task;
    index_t units, scratch_length;
    index_t next; /* units are handed out one by one; which thread takes which does not change a result */
    int failed;
} run_t;

static void run_body(void *data) {
    run_t *run = data;
    REAL *scratch = malloc(run->scratch_length * sizeof(REAL));
    if (scratch == NULL) {
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

static int run_parallel(parallel_t parallel, unsigned threads, const void *task, index_t units, index_t scratch_length,
                        void (*work)(const void *, index_t, REAL *)) {
    run_t run = {work, task, units, scratch_length, 0, 0};
    if (threads > units) threads = units > 0 ? (unsigned)units : 1;
    if (threads > 1) {
        parallel(run_body, &run, threads, 0);
    } else {
        run_body(&run);
    }
    return run.failed;
}

/* ---- matrix products --------------------------------------------------------------------------------------------- */

/* total += sum over depth of a[d, row] * b[d, column] for one tile; a is [depth, TILE_ROWS], b [depth, TILE_COLUMNS]. */
static void multiply_tile(index_t depth, const REAL *a, const REAL *b, REAL *total, index_t pitch) {
    vector sum[TILE_ROWS][2];
    for (int row = 0; row < TILE_ROWS; row++) sum[row][0] = sum[row][1] = all(0);
    for (index_t d = 0; d < depth; d++, a += TILE_ROWS, b += TILE_COLUMNS) {
        vector left = load(b), right = load(b + LANES);
#pragma GCC unroll 12
        for (int row = 0; row < TILE_ROWS; row++) {
            vector scale = all(a[row]);
            sum[row][0] += scale * left;
            sum[row][1] += scale * right;
        }
    }
    for (int row = 0; row < TILE_ROWS; row++, total += pitch) {
        store(total, load(total) + sum[row][0]);
        store(total + LANES, load(total + LANES) + sum[row][1]);
    }
}

/* All tiles: a is [rows / TILE_ROWS, depth, TILE_ROWS], b [columns / TILE_COLUMNS, depth, TILE_COLUMNS]. */
static void multiply(index_t rows, index_t columns, index_t depth, const REAL *a, const REAL *b, REAL *total) {
    for (index_t column = 0; column < columns; column += TILE_COLUMNS)
        for (index_t row = 0; row < rows; row += TILE_ROWS)
            multiply_tile(depth, a + row * depth, b + column * depth, total + row * columns + column, columns);
}

/* ---- columns: every (channel, tap)'s plane at its shift, and their products with the weights ---------------------- */

typedef struct {
    sizes_t sizes;
    index_t images, channels, outputs, groups, taps;
    const REAL *input;       /* [images, channels, height, width] */
    const REAL *weight;      /* [outputs, channels / groups, taps] */
    const double *positions; /* [channels, taps, 2] */
    const REAL *bias;        /* [outputs], or NULL */
    REAL *output;            /* [images, outputs, out_height, out_width] */
    const REAL *grad_output; /* as output */
    REAL *grad_input;        /* as input, or NULL */
    REAL *grad_weight;       /* as weight, or NULL */
    double *grad_shift;      /* [channels * taps, 2], or NULL */
    REAL *workspace;         /* what workspace_length says */
} columns_t;

/* Rows of columns that a product takes at once: a tile's worth of both factors stays in the nearest cache. */
enum { DEPTH = 192 };
/* Output pixels of a band, about: with DEPTH rows of columns it stays in the second cache. */
enum { BAND = 384 };

typedef struct {
    frame_t frame;
    index_t area, out_area;
    index_t group_channels, group_outputs;
    index_t step;       /* channels of a block */
    index_t band_rows;  /* output rows of a band */
    index_t bands;      /* of an image */
    index_t band;       /* output pixels of a band, rounded up to tiles */
    index_t tile_rows, tile_columns; /* outputs of a group, rounded up to rows and to columns of tiles */
    REAL *frames;       /* [images, channels, frame_length] */
    tap_t *taps;        /* [channels, taps] */
    REAL *packed;       /* forward: weights; backward: weights transposed */
    REAL *grads;        /* [images, bands, groups, band / TILE_COLUMNS, group_outputs, TILE_COLUMNS] */
    REAL *grads_across; /* [images, bands, groups, tile_columns / TILE_COLUMNS, band, TILE_COLUMNS] */
    REAL *end;
} layout_t;

static layout_t make_layout(const columns_t *task, int backward) {
    const sizes_t *sizes = &task->sizes;
    layout_t layout;
    layout.frame = make_frame(sizes->height, sizes->width, 1, 1, 1, 1, sizes->stride_col);
    layout.area = sizes->height * sizes->width;
    layout.out_area = sizes->out_height * sizes->out_width;
    layout.group_channels = task->channels / task->groups;
    layout.group_outputs = task->outputs / task->groups;
    layout.step = smallest(largest(DEPTH / task->taps, 1), layout.group_channels);
    layout.band_rows = smallest(largest((BAND + sizes->out_width - 1) / sizes->out_width, 1), sizes->out_height);
    layout.bands = (sizes->out_height + layout.band_rows - 1) / layout.band_rows;
    /* Bands of one height, so that the last is no leftover. */
    layout.band_rows = (sizes->out_height + layout.bands - 1) / layout.bands;
    layout.bands = (sizes->out_height + layout.band_rows - 1) / layout.band_rows;
    layout.band = round_up(layout.band_rows * sizes->out_width, TILE_COLUMNS);
    layout.tile_rows = round_up(layout.group_outputs, TILE_ROWS);
    layout.tile_columns = round_up(layout.group_outputs, TILE_COLUMNS);
    REAL *at = task->workspace;
    layout.taps = (tap_t *)at;
    at += round_up(task->channels * task->taps * sizeof(tap_t), BYTES) / sizeof(REAL);
    layout.frames = at;
    at += task->images * task->channels * frame_length(&layout.frame);
    layout.packed = at;
    /* A block's rows of columns are rounded up to tiles in the backward. */
    index_t blocks = task->groups * ((layout.group_channels + layout.step - 1) / layout.step);
    at += backward ? blocks * round_up(layout.step * task->taps, TILE_ROWS) * layout.group_outputs
                   : task->channels * task->taps * layout.tile_rows;
    layout.grads = layout.grads_across = NULL;
    if (backward) {
        index_t slices = task->images * layout.bands * task->groups;
        layout.grads = at;
        at += slices * layout.band * layout.group_outputs;
        layout.grads_across = at;
        at += task->grad_weight == NULL ? 0 : slices * layout.band * layout.tile_columns;
    }
    layout.end = at;
    return layout;
}

index_t workspace_length(const columns_t *task, int backward) {
    layout_t layout = make_layout(task, backward);
    return layout.end - task->workspace;
}

typedef struct {
    const columns_t *task;
    layout_t layout;
} call_t;

static void frames_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    (void)scratch;
    fill_frame(&layout->frame, layout->frames + unit * frame_length(&layout->frame),
               task->input + unit * layout->area, task->sizes.height, task->sizes.width);
    if (unit >= task->channels) return;
    for (index_t index = unit * task->taps; index < (unit + 1) * task->taps; index++)
        layout->taps[index] = make_tap(&layout->frame, &task->sizes, task->positions + 2 * index);
}

/* Rows [first, last) of one channel's plane as a tap sees it, without gaps; may write LANES elements past the end. */
static void make_column(const call_t *call, const REAL *plane, index_t index, index_t first, index_t last, REAL *out) {
    const columns_t *task = call->task;
    const tap_t *tap = &call->layout.taps[index];
    index_t width = task->sizes.out_width;
    REAL down = tap->down, right = tap->right;
    vector w00 = all((1 - down) * (1 - right)), w01 = all((1 - down) * right);
    vector w10 = all(down * (1 - right)), w11 = all(down * right);
    vector outside = all((down + right) * 0); /* NaN where a position is */
    for (index_t row = first; row < last; row++, out += width) {
        int live = row >= tap->row_first && row < tap->row_last;
        index_t col_first = live ? tap->col_first : width, col_last = live ? tap->col_last : width;
        /* Whole vectors in ascending order: what spills over is written again. */
        for (index_t col = 0; col < col_first; col += LANES) store(out + col, outside);
        const REAL *top_left = plane + tap->top_left + row * tap->row_step;
        const REAL *top_right = plane + tap->top_right + row * tap->row_step;
        for (index_t col = col_first; col < col_last; col += LANES, top_left += LANES, top_right += LANES)
            store(out + col, w00 * load(top_left) + w01 * load(top_right) + w10 * load(top_left + tap->below) +
                                 w11 * load(top_right + tap->below));
        for (index_t col = col_last; col < width; col += LANES) store(out + col, outside);
    }
}

/* Weights of one group and block of channels as [tile_rows / TILE_ROWS, depth, TILE_ROWS]. */
static void pack_weight_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    (void)scratch;
    index_t blocks = (layout->group_channels + layout->step - 1) / layout->step;
    index_t group = unit / blocks, first = unit % blocks * layout->step;
    index_t depth = smallest(layout->step, layout->group_channels - first) * task->taps;
    index_t all_depth = layout->group_channels * task->taps;
    REAL *to = layout->packed + (group * all_depth + first * task->taps) * layout->tile_rows;
    for (index_t tile = 0; tile < layout->tile_rows; tile += TILE_ROWS)
        for (index_t d = 0; d < depth; d++)
            for (index_t output = tile; output < tile + TILE_ROWS; output++)
                *to++ = output < layout->group_outputs
                            ? task->weight[(group * layout->group_outputs + output) * all_depth + first * task->taps + d]
                            : 0;
}

static void forward_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    index_t width = task->sizes.out_width;
    index_t group = unit % task->groups, band = unit / task->groups % layout->bands;
    index_t image = unit / task->groups / layout->bands;
    index_t first = band * layout->band_rows, last = smallest(first + layout->band_rows, task->sizes.out_height);
    index_t pixels = (last - first) * width, columns = round_up(pixels, TILE_COLUMNS);
    REAL *total = scratch, *column = total + layout->tile_rows * columns, *packed = column + columns + LANES;
    memset(total, 0, layout->tile_rows * columns * sizeof(REAL));
    memset(column, 0, (columns + LANES) * sizeof(REAL));
    for (index_t start = 0; start < layout->group_channels; start += layout->step) {
        index_t stop = smallest(start + layout->step, layout->group_channels), depth = (stop - start) * task->taps;
        for (index_t d = 0; d < depth; d++) {
            index_t channel = group * layout->group_channels + start + d / task->taps;
            const REAL *plane = layout->frames + (image * task->channels + channel) * frame_length(&layout->frame);
            make_column(call, plane, channel * task->taps + d % task->taps, first, last, column);
            for (index_t at = 0; at < columns; at += TILE_COLUMNS) {
                REAL *to = packed + at * depth + d * TILE_COLUMNS;
                store(to, load(column + at));
                store(to + LANES, load(column + at + LANES));
            }
        }
        const REAL *weight =
            layout->packed + (group * layout->group_channels + start) * task->taps * layout->tile_rows;
        multiply(layout->tile_rows, columns, depth, weight, packed, total);
    }
    for (index_t output = 0; output < layout->group_outputs; output++) {
        index_t channel = group * layout->group_outputs + output;
        REAL bias = task->bias == NULL ? 0 : task->bias[channel];
        REAL *to = task->output + (image * task->outputs + channel) * layout->out_area + first * width;
        for (index_t pixel = 0; pixel < pixels; pixel++) to[pixel] = total[output * columns + pixel] + bias;
    }
}

int columns_forward(parallel_t parallel, unsigned threads, const columns_t *task) {
    call_t call = {task, make_layout(task, 0)};
    const layout_t *layout = &call.layout;
    index_t blocks = task->groups * ((layout->group_channels + layout->step - 1) / layout->step);
    index_t length =
        layout->tile_rows * layout->band + layout->band + LANES + layout->step * task->taps * layout->band;
    return run_parallel(parallel, threads, &call, task->images * task->channels, 1, frames_work) ||
           run_parallel(parallel, threads, &call, blocks, 1, pack_weight_work) ||
           run_parallel(parallel, threads, &call, task->images * layout->bands * task->groups, length, forward_work);
}

/* The transposed weights of one group and block of channels as [rows / TILE_ROWS, group_outputs, TILE_ROWS]. */
static void pack_transposed_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    (void)scratch;
    index_t blocks = (layout->group_channels + layout->step - 1) / layout->step;
    index_t group = unit / blocks, first = unit % blocks * layout->step;
    index_t used = smallest(layout->step, layout->group_channels - first) * task->taps;
    index_t rows = round_up(layout->step * task->taps, TILE_ROWS), all_depth = layout->group_channels * task->taps;
    REAL *to = layout->packed + unit * rows * layout->group_outputs;
    for (index_t tile = 0; tile < rows; tile += TILE_ROWS)
        for (index_t output = 0; output < layout->group_outputs; output++)
            for (index_t row = tile; row < tile + TILE_ROWS; row++)
                *to++ = row < used ? task->weight[(group * layout->group_outputs + output) * all_depth +
                                                  first * task->taps + row]
                                   : 0;
}

/* One band of the output's gradient, along the pixels and across them. */
static void pack_grad_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    (void)scratch;
    index_t group = unit % task->groups, band = unit / task->groups % layout->bands;
    index_t image = unit / task->groups / layout->bands, outputs = layout->group_outputs;
    index_t first = band * layout->band_rows, last = smallest(first + layout->band_rows, task->sizes.out_height);
    index_t pixels = (last - first) * task->sizes.out_width;
    const REAL *from = task->grad_output + (image * task->outputs + group * outputs) * layout->out_area +
                       first * task->sizes.out_width;
    REAL *along = layout->grads + unit * layout->band * outputs;
    for (index_t at = 0; at < layout->band; at += TILE_COLUMNS)
        for (index_t output = 0; output < outputs; output++)
            for (index_t pixel = at; pixel < at + TILE_COLUMNS; pixel++)
                *along++ = pixel < pixels ? from[output * layout->out_area + pixel] : 0;
    if (task->grad_weight == NULL) return;
    REAL *across = layout->grads_across + unit * layout->band * layout->tile_columns;
    for (index_t at = 0; at < layout->tile_columns; at += TILE_COLUMNS)
        for (index_t pixel = 0; pixel < layout->band; pixel++)
            for (index_t output = at; output < at + TILE_COLUMNS; output++)
                *across++ = output < outputs && pixel < pixels ? from[output * layout->out_area + pixel] : 0;
}

/* The adjoint of make_column for rows [first, last): adds to the plane's gradient and to that of the shift. */
static void scatter_column(const call_t *call, const REAL *plane, index_t index, index_t first, index_t last,
                           const REAL *column, REAL *total, REAL *row_buffer, double *by_shift) {
    const columns_t *task = call->task;
    const tap_t *tap = &call->layout.taps[index];
    index_t width = task->sizes.out_width, count = tap->col_last - tap->col_first;
    REAL down = tap->down, right = tap->right;
    vector w00 = all((1 - down) * (1 - right)), w01 = all((1 - down) * right);
    vector w10 = all(down * (1 - right)), w11 = all(down * right);
    vector sum_down = all(0), sum_right = all(0);
    memset(row_buffer, 0, round_up(count, LANES) * sizeof(REAL));
    for (index_t row = largest(first, tap->row_first); row < smallest(last, tap->row_last); row++) {
        /* With zeros after it, whole vectors do no harm to what follows in the frame. */
        memcpy(row_buffer, column + (row - first) * width + tap->col_first, count * sizeof(REAL));
        index_t left_at = tap->top_left + row * tap->row_step, right_at = tap->top_right + row * tap->row_step;
        if (total != NULL) {
            /* Left and right one after the other: with stride 1 they overlap. */
            REAL *left = total + left_at, *other = total + right_at;
            for (index_t col = 0; col < count; col += LANES) {
                vector value = load(row_buffer + col);
                store(left + col, load(left + col) + w00 * value);
                store(left + tap->below + col, load(left + tap->below + col) + w10 * value);
            }
            for (index_t col = 0; col < count; col += LANES) {
                vector value = load(row_buffer + col);
                store(other + col, load(other + col) + w01 * value);
                store(other + tap->below + col, load(other + tap->below + col) + w11 * value);
            }
        }
        if (by_shift != NULL) {
            const REAL *left = plane + left_at, *other = plane + right_at;
            for (index_t col = 0; col < count; col += LANES) {
                vector v00 = load(left + col), v01 = load(other + col), value = load(row_buffer + col);
                vector v10 = load(left + tap->below + col), v11 = load(other + tap->below + col);
                vector left_step = v10 - v00, top_step = v01 - v00;
                sum_down += value * (left_step + all(right) * (v11 - v01 - left_step));
                sum_right += value * (top_step + all(down) * (v11 - v10 - top_step));
            }
        }
    }
    if (by_shift != NULL) {
        by_shift[0] += sum_lanes(sum_down);
        by_shift[1] += sum_lanes(sum_right);
    }
}

/* All gradients of one group's block of channels. */
static void backward_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    index_t taps = task->taps, length = frame_length(&layout->frame), outputs = layout->group_outputs;
    index_t blocks = (layout->group_channels + layout->step - 1) / layout->step;
    index_t group = unit / blocks, start = unit % blocks * layout->step;
    index_t channels = smallest(layout->step, layout->group_channels - start);
    index_t rows = round_up(layout->step * taps, TILE_ROWS), used = channels * taps;
    index_t channel_first = group * layout->group_channels + start;
    const REAL *transposed = layout->packed + unit * rows * outputs;
    int by_columns = task->grad_input != NULL || task->grad_shift != NULL;
    REAL *columns = scratch, *packed = columns + rows * layout->band, *row_buffer = packed + rows * layout->band;
    REAL *column = row_buffer + task->sizes.out_width + LANES, *totals = column + layout->band + LANES;
    REAL *by_weight = totals + channels * length;
    double *by_shift = task->grad_shift == NULL ? NULL : task->grad_shift + channel_first * taps * 2;
    if (by_shift != NULL) memset(by_shift, 0, used * 2 * sizeof(double));
    memset(by_weight, 0, rows * layout->tile_columns * sizeof(REAL));
    memset(packed, 0, rows * layout->band * sizeof(REAL));
    for (index_t image = 0; image < task->images; image++) {
        const REAL *planes = layout->frames + (image * task->channels + channel_first) * length;
        memset(totals, 0, channels * length * sizeof(REAL));
        for (index_t band = 0; band < layout->bands; band++) {
            index_t first = band * layout->band_rows;
            index_t last = smallest(first + layout->band_rows, task->sizes.out_height);
            index_t slice = (image * layout->bands + band) * task->groups + group;
            index_t pixels = (last - first) * task->sizes.out_width;
            if (by_columns) {
                memset(columns, 0, rows * layout->band * sizeof(REAL));
                multiply(rows, layout->band, outputs, transposed, layout->grads + slice * layout->band * outputs,
                         columns);
            }
            for (index_t row = 0; row < used; row++) {
                index_t index = channel_first * taps + row, channel = row / taps;
                const REAL *plane = planes + channel * length;
                if (by_columns)
                    scatter_column(call, plane, index, first, last, columns + row * layout->band,
                                   task->grad_input == NULL ? NULL : totals + channel * length, row_buffer,
                                   by_shift == NULL ? NULL : by_shift + 2 * row);
                if (task->grad_weight == NULL) continue;
                make_column(call, plane, index, first, last, column);
                REAL *to = packed + row / TILE_ROWS * TILE_ROWS * layout->band + row % TILE_ROWS;
                for (index_t pixel = 0; pixel < pixels; pixel++) to[pixel * TILE_ROWS] = column[pixel];
                for (index_t pixel = pixels; pixel < layout->band; pixel++) to[pixel * TILE_ROWS] = 0;
            }
            if (task->grad_weight != NULL)
                multiply(rows, layout->tile_columns, layout->band, packed,
                         layout->grads_across + slice * layout->band * layout->tile_columns, by_weight);
        }
        if (task->grad_input == NULL) continue;
        for (index_t channel = 0; channel < channels; channel++) {
            REAL unknown = 0;
            for (index_t index = (channel_first + channel) * taps; index < (channel_first + channel + 1) * taps; index++)
                unknown += (layout->taps[index].down + layout->taps[index].right) * 0;
            REAL *to = task->grad_input + (image * task->channels + channel_first + channel) * layout->area;
            read_frame(&layout->frame, totals + channel * length, to, task->sizes.height, task->sizes.width);
            spread_unknown(unknown, to, layout->area);
        }
    }
    if (task->grad_weight == NULL) return;
    for (index_t output = 0; output < outputs; output++) {
        index_t at = ((group * outputs + output) * layout->group_channels + start) * taps;
        for (index_t row = 0; row < used; row++)
            task->grad_weight[at + row] = by_weight[row * layout->tile_columns + output];
    }
}

int columns_backward(parallel_t parallel, unsigned threads, const columns_t *task) {
    call_t call = {task, make_layout(task, 1)};
    const layout_t *layout = &call.layout;
    index_t blocks = task->groups * ((layout->group_channels + layout->step - 1) / layout->step);
    index_t rows = round_up(layout->step * task->taps, TILE_ROWS);
    index_t length = 2 * rows * layout->band + task->sizes.out_width + layout->band + 2 * LANES +
                     layout->step * frame_length(&layout->frame) + rows * layout->tile_columns;
    index_t slices = task->images * layout->bands * task->groups;
    return run_parallel(parallel, threads, &call, task->images * task->channels, 1, frames_work) ||
           run_parallel(parallel, threads, &call, blocks, 1, pack_transposed_work) ||
           run_parallel(parallel, threads, &call, slices, 1, pack_grad_work) ||
           run_parallel(parallel, threads, &call, blocks, length, backward_work);
}

/* ---- stencils: the kernel of one (output, input) pair as a list of cells, without columns ------------------------ */

typedef struct {
    sizes_t sizes;
    index_t images, channels, outputs, groups, taps;
    int per_kernel;       /* whether shifts belong to (output, channel of the group), else to the channel */
    const REAL *input;    /* [images, channels, height, width] */
    const REAL *weight;   /* [outputs, channels / groups, taps] */
    const double *positions; /* [channels, taps, 2], or [outputs, channels / groups, taps, 2] */
    const REAL *bias;     /* [outputs], or NULL */
    REAL *output;         /* [images, outputs, out_height, out_width] */
    const REAL *grad_output;
    REAL *grad_input;    /* or NULL */
    REAL *grad_weight;   /* [outputs, channels / groups, taps], with grad_shift, or NULL */
    double *grad_shift;  /* [outputs, channels / groups, taps, 2] */
} stencil_t;

typedef struct {
    index_t count;
    REAL unknown;       /* 0, or NaN where a position is */
    index_t *row, *col; /* [4 * taps] */
    REAL *weight;       /* [4 * taps] */
    index_t *cell;      /* [4 * taps], the cell of each corner of each tap, -1 where it never meets the input */
    index_t *offset;    /* [4 * taps] */
    double *moment;     /* [4 * taps] */
    shift_t *shift;     /* [taps] */
} list_t;

enum { LIST_WORDS = 7 }; /* a shift takes at most four words */

/* Lists live in the front of the scratch; sizeof(REAL) is 4 or 8, the lists' words take 8 bytes. */
static index_t list_length(const stencil_t *task) { return 4 * task->taps * LIST_WORDS * 8 / sizeof(REAL); }

static list_t make_list(const stencil_t *task, REAL *scratch) {
    index_t *words = (index_t *)scratch, room = 4 * task->taps;
    list_t list = {0, 0, words, words + room, (REAL *)(words + 2 * room), words + 3 * room, words + 4 * room,
                   (double *)(words + 5 * room), (shift_t *)(words + 6 * room)};
    return list;
}

static index_t owner_of(const stencil_t *task, index_t output, index_t member) {
    index_t group_channels = task->channels / task->groups;
    if (task->per_kernel) return output * group_channels + member;
    return output / (task->outputs / task->groups) * group_channels + member;
}

/* Collects the cells of one kernel; neighbouring taps share cells, which are merged. */
static void fill_list(const stencil_t *task, index_t output, index_t member, list_t *list) {
    const sizes_t *sizes = &task->sizes;
    index_t owner = owner_of(task, output, member), taps = task->taps;
    shift_t *shift = list->shift;
    const REAL *weight = task->weight + (output * (task->channels / task->groups) + member) * taps;
    enum { MAP = 1024 };
    int16_t map[MAP];
    index_t row_first = INT64_MAX, row_last = INT64_MIN, col_first = INT64_MAX, col_last = INT64_MIN;
    for (index_t tap = 0; tap < taps; tap++) {
        shift[tap] = make_shift(sizes, task->positions + (owner * taps + tap) * 2);
        row_first = smallest(row_first, shift[tap].row);
        row_last = largest(row_last, shift[tap].row + 1);
        col_first = smallest(col_first, shift[tap].col);
        col_last = largest(col_last, shift[tap].col + 1);
    }
    index_t map_width = col_last - col_first + 1, map_size = (row_last - row_first + 1) * map_width;
    int merge = map_size <= MAP;
    if (merge) memset(map, -1, map_size * sizeof(int16_t));
    list->count = 0;
    list->unknown = 0;
    for (index_t tap = 0; tap < taps; tap++) {
        REAL down = shift[tap].down, right = shift[tap].right;
        list->unknown += (down + right) * 0;
        for (int corner = 0; corner < 4; corner++) {
            index_t row = shift[tap].row + corner / 2, col = shift[tap].col + corner % 2;
            REAL part = (corner / 2 ? down : 1 - down) * (corner % 2 ? right : 1 - right) * weight[tap];
            int live = row < sizes->height && row + (sizes->out_height - 1) * sizes->stride_row >= 0 &&
                       col < sizes->width && col + (sizes->out_width - 1) * sizes->stride_col >= 0;
            list->cell[4 * tap + corner] = -1;
            if (!live) continue;
            int16_t *known = merge ? &map[(row - row_first) * map_width + col - col_first] : NULL;
            if (known != NULL && *known >= 0) {
                list->weight[*known] += part;
                list->cell[4 * tap + corner] = *known;
                continue;
            }
            index_t cell = list->count++;
            if (known != NULL) *known = (int16_t)cell;
            list->row[cell] = row;
            list->col[cell] = col;
            list->weight[cell] = part;
            list->cell[4 * tap + corner] = cell;
        }
    }
}

/* rows x vectors outputs at once, kept in registers while the cells are walked. */
static inline __attribute__((always_inline)) void tile(const int rows, const int vectors, const REAL *from,
                                                       index_t row_step, const index_t *offset, const REAL *weight,
                                                       index_t cells, REAL *to, index_t pitch, index_t count) {
    vector total[4][4];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < vectors; part++) total[row][part] = all(0);
    for (index_t cell = 0; cell < cells; cell++) {
        const REAL *at = from + offset[cell];
        vector scale = all(weight[cell]);
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < vectors; part++)
                total[row][part] += scale * load(at + row * row_step + part * LANES);
    }
    for (int row = 0; row < rows; row++) {
        for (int part = 0; part < vectors; part++) {
            REAL *place = to + row * pitch + part * LANES;
            index_t left = count - part * LANES;
            if (left >= LANES) {
                store(place, load(place) + total[row][part]);
            } else {
                vector old = all(0);
                memcpy(&old, place, left * sizeof(REAL));
                store_part(place, old + total[row][part], left);
            }
        }
    }
}

/* to[r, c] += sum over cells of weight * from[r * row_step + c + offset], for rows x cols outputs. */
static void apply(const REAL *from, index_t row_step, const index_t *offset, const REAL *weight, index_t cells,
                  REAL *to, index_t rows, index_t cols) {
    for (index_t col = 0; col < cols;) {
        index_t count = smallest(cols - col, 4 * LANES), vectors = (count + LANES - 1) / LANES, row = 0;
        for (; row < rows;) {
            const REAL *at = from + row * row_step + col;
            REAL *place = to + row * cols + col;
            int pair = row + 2 <= rows, four = row + 4 <= rows && vectors <= 2;
#define TILE(R, V) tile(R, V, at, row_step, offset, weight, cells, place, cols, count)
            switch (vectors * 8 + (four ? 4 : pair ? 2 : 1)) {
            case 12: TILE(4, 1); break;
            case 10: TILE(2, 1); break;
            case 9: TILE(1, 1); break;
            case 20: TILE(4, 2); break;
            case 18: TILE(2, 2); break;
            case 17: TILE(1, 2); break;
            case 26: TILE(2, 3); break;
            case 25: TILE(1, 3); break;
            case 34: TILE(2, 4); break;
            default: TILE(1, 4); break;
            }
#undef TILE
            row += four ? 4 : pair ? 2 : 1;
        }
        col += count;
    }
}

typedef struct {
    const stencil_t *task;
    frame_t input, grad; /* zeros enough for every cell that meets the input at all */
} stencil_call_t;

static void margins(index_t low, index_t high, index_t size, index_t outputs, index_t stride, index_t *input_before,
                    index_t *input_after, index_t *grad_before, index_t *grad_after) {
    index_t reach = (outputs - 1) * stride;
    low = largest(low, -reach);
    high = smallest(high, size - 1);
    *input_before = largest(-low, 0);
    *input_after = largest(high + reach - (size - 1), 0);
    /* The adjoint reads at (pixel - cell) / stride. */
    *grad_before = largest(floor_div(high, stride) + 1, 0);
    *grad_after = largest(floor_div(size - 1 - low, stride) + 1 - (outputs - 1), 0);
}

static stencil_call_t make_stencil_call(const stencil_t *task) {
    const sizes_t *sizes = &task->sizes;
    index_t owners = task->per_kernel ? task->outputs * (task->channels / task->groups) : task->channels;
    index_t row_first = INT64_MAX, row_last = INT64_MIN, col_first = INT64_MAX, col_last = INT64_MIN;
    for (index_t index = 0; index < owners * task->taps; index++) {
        shift_t shift = make_shift(sizes, task->positions + 2 * index);
        row_first = smallest(row_first, shift.row);
        row_last = largest(row_last, shift.row + 1);
        col_first = smallest(col_first, shift.col);
        col_last = largest(col_last, shift.col + 1);
    }
    index_t rows[4], cols[4];
    margins(row_first, row_last, sizes->height, sizes->out_height, sizes->stride_row, rows, rows + 1, rows + 2,
            rows + 3);
    margins(col_first, col_last, sizes->width, sizes->out_width, sizes->stride_col, cols, cols + 1, cols + 2,
            cols + 3);
    stencil_call_t call = {
        task, make_frame(sizes->height, sizes->width, rows[0], rows[1], cols[0], cols[1], sizes->stride_col),
        make_frame(sizes->out_height, sizes->out_width, rows[2], rows[3], cols[2], cols[3], 1)};
    return call;
}

static void set_offsets(const frame_t *frame, list_t *list) {
    for (index_t cell = 0; cell < list->count; cell++)
        list->offset[cell] = frame_at(frame, list->row[cell], list->col[cell]);
}

/* One output channel of all images. */
static void stencil_work(const void *data, index_t output, REAL *scratch) {
    const stencil_call_t *call = data;
    const stencil_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    index_t group_channels = task->channels / task->groups, in_area = sizes->height * sizes->width;
    index_t out_area = sizes->out_height * sizes->out_width;
    list_t list = make_list(task, scratch);
    REAL *plane = scratch + list_length(task), *to = task->output + output * out_area;
    index_t image_step = task->outputs * out_area;
    REAL bias = task->bias == NULL ? 0 : task->bias[output];
    for (index_t image = 0; image < task->images; image++)
        for (index_t pixel = 0; pixel < out_area; pixel++) to[image * image_step + pixel] = bias;
    for (index_t member = 0; member < group_channels; member++) {
        index_t channel = output / (task->outputs / task->groups) * group_channels + member;
        fill_list(task, output, member, &list);
        set_offsets(&call->input, &list);
        for (index_t image = 0; image < task->images; image++) {
            fill_frame(&call->input, plane, task->input + (image * task->channels + channel) * in_area, sizes->height,
                       sizes->width);
            apply(plane, sizes->stride_row * call->input.pitch, list.offset, list.weight, list.count,
                  to + image * image_step, sizes->out_height, sizes->out_width);
            spread_unknown(list.unknown, to + image * image_step, out_area);
        }
    }
}

/* The gradient of one input channel of all images: each phase of the strides is a stencil over the output's. */
static void stencil_input_work(const void *data, index_t channel, REAL *scratch) {
    const stencil_call_t *call = data;
    const stencil_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    index_t group_channels = task->channels / task->groups, group_outputs = task->outputs / task->groups;
    index_t group = channel / group_channels, member = channel % group_channels;
    index_t in_area = sizes->height * sizes->width, out_area = sizes->out_height * sizes->out_width;
    int strided = sizes->stride_row > 1 || sizes->stride_col > 1;
    list_t list = make_list(task, scratch);
    REAL *plane = scratch + list_length(task), *phase = plane + frame_length(&call->grad);
    REAL *selected = phase + in_area;
    for (index_t image = 0; image < task->images; image++)
        memset(task->grad_input + (image * task->channels + channel) * in_area, 0, in_area * sizeof(REAL));
    for (index_t output = group * group_outputs; output < (group + 1) * group_outputs; output++) {
        fill_list(task, output, member, &list);
        for (index_t image = 0; image < task->images; image++) {
            REAL *to = task->grad_input + (image * task->channels + channel) * in_area;
            fill_frame(&call->grad, plane, task->grad_output + (image * task->outputs + output) * out_area,
                       sizes->out_height, sizes->out_width);
            spread_unknown(list.unknown, to, in_area);
            for (index_t down = 0; down < smallest(sizes->stride_row, sizes->height); down++) {
                for (index_t right = 0; right < smallest(sizes->stride_col, sizes->width); right++) {
                    index_t count = 0;
                    for (index_t cell = 0; cell < list.count; cell++) {
                        index_t row = down - list.row[cell], col = right - list.col[cell];
                        if (strided && (floor_mod(row, sizes->stride_row) || floor_mod(col, sizes->stride_col)))
                            continue;
                        list.offset[count] =
                            frame_at(&call->grad, floor_div(row, sizes->stride_row), floor_div(col, sizes->stride_col));
                        selected[count++] = list.weight[cell];
                    }
                    index_t rows = (sizes->height - down + sizes->stride_row - 1) / sizes->stride_row;
                    index_t cols = (sizes->width - right + sizes->stride_col - 1) / sizes->stride_col;
                    if (!strided) {
                        apply(plane, call->grad.pitch, list.offset, selected, count, to, rows, cols);
                        continue;
                    }
                    memset(phase, 0, rows * cols * sizeof(REAL));
                    apply(plane, call->grad.pitch, list.offset, selected, count, phase, rows, cols);
                    for (index_t row = 0; row < rows; row++)
                        for (index_t col = 0; col < cols; col++)
                            to[(row * sizes->stride_row + down) * sizes->width + col * sizes->stride_col + right] +=
                                phase[row * cols + col];
                }
            }
        }
    }
}

/* Products of the output's gradient with the input at each cell, then the gradients of a kernel's taps. */
static void stencil_weight_work(const void *data, index_t unit, REAL *scratch) {
    const stencil_call_t *call = data;
    const stencil_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    index_t group_channels = task->channels / task->groups, in_area = sizes->height * sizes->width;
    index_t output = unit / group_channels, member = unit % group_channels;
    index_t channel = output / (task->outputs / task->groups) * group_channels + member;
    index_t out_area = sizes->out_height * sizes->out_width, taps = task->taps;
    list_t list = make_list(task, scratch);
    frame_t frame = call->input;
    index_t padded = round_up(sizes->out_width, LANES);
    REAL *plane = scratch + list_length(task), *grad = plane + frame_length(&frame);
    fill_list(task, output, member, &list);
    set_offsets(&frame, &list);
    for (index_t cell = 0; cell < list.count; cell++) list.moment[cell] = 0;
    memset(grad, 0, sizes->out_height * padded * sizeof(REAL));
    for (index_t image = 0; image < task->images; image++) {
        fill_frame(&frame, plane, task->input + (image * task->channels + channel) * in_area, sizes->height,
                   sizes->width);
        const REAL *from = task->grad_output + (image * task->outputs + output) * out_area;
        for (index_t row = 0; row < sizes->out_height; row++)
            memcpy(grad + row * padded, from + row * sizes->out_width, sizes->out_width * sizeof(REAL));
        for (index_t cell = 0; cell < list.count; cell += 4) {
            index_t last = list.count - 1;
            const REAL *at[4];
            vector total[4] = {all(0), all(0), all(0), all(0)};
            for (int part = 0; part < 4; part++) at[part] = plane + list.offset[smallest(cell + part, last)];
            for (index_t row = 0; row < sizes->out_height; row++) {
                index_t step = row * sizes->stride_row * frame.pitch;
                for (index_t col = 0; col < padded; col += LANES) {
                    vector value = load(grad + row * padded + col);
                    for (int part = 0; part < 4; part++) total[part] += value * load(at[part] + step + col);
                }
            }
            for (int part = 0; part < 4 && cell + part <= last; part++)
                list.moment[cell + part] += sum_lanes(total[part]);
        }
    }
    const REAL *weight = task->weight + unit * taps;
    for (index_t tap = 0; tap < taps; tap++) {
        double down = list.shift[tap].down, right = list.shift[tap].right;
        double m[4];
        for (int corner = 0; corner < 4; corner++) {
            index_t cell = list.cell[4 * tap + corner];
            m[corner] = cell < 0 ? 0 : list.moment[cell];
        }
        task->grad_weight[unit * taps + tap] = (REAL)((1 - down) * ((1 - right) * m[0] + right * m[1]) +
                                                      down * ((1 - right) * m[2] + right * m[3]));
        double *by_shift = task->grad_shift + (unit * taps + tap) * 2;
        by_shift[0] = weight[tap] * ((1 - right) * (m[2] - m[0]) + right * (m[3] - m[1]));
        by_shift[1] = weight[tap] * ((1 - down) * (m[1] - m[0]) + down * (m[3] - m[2]));
    }
}

int stencil_forward(parallel_t parallel, unsigned threads, const stencil_t *task) {
    stencil_call_t call = make_stencil_call(task);
    index_t length = list_length(task) + frame_length(&call.input);
    return run_parallel(parallel, threads, &call, task->outputs, length, stencil_work);
}

int stencil_backward(parallel_t parallel, unsigned threads, const stencil_t *task) {
    const sizes_t *sizes = &task->sizes;
    stencil_call_t call = make_stencil_call(task);
    if (task->grad_input != NULL) {
        index_t length = list_length(task) + frame_length(&call.grad) + sizes->height * sizes->width + 4 * task->taps;
        if (run_parallel(parallel, threads, &call, task->channels, length, stencil_input_work)) return 1;
    }
    if (task->grad_weight == NULL) return 0;
    index_t length =
        list_length(task) + frame_length(&call.input) + sizes->out_height * round_up(sizes->out_width, LANES);
    index_t units = task->outputs * (task->channels / task->groups);
    return run_parallel(parallel, threads, &call, units, length, stencil_weight_work);
}
