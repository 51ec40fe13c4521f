/* Layers with a shape per input channel: columns (every (channel, tap)'s plane at its shift) and their products.
 *
 * A thread makes the columns of a band of output pixels, a few channels at a time, in the order in which the matrix
 * product reads them, and multiplies them before they leave the cache. The backward does the same with the transposed
 * weights and spreads what comes out over the input's gradient.
 */

#include "plane.h"

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

/* ---- columns ----------------------------------------------------------------------------------------------------- */

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

typedef struct {
    sizes_t sizes;
    index_t images, channels, outputs, groups, taps;
    index_t depth; /* rows of columns that a product takes at once */
    index_t band;  /* output pixels of a band, about */
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
    layout.step = smallest(largest(task->depth / task->taps, 1), layout.group_channels);
    layout.band_rows = smallest(largest((task->band + sizes->out_width - 1) / sizes->out_width, 1), sizes->out_height);
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
        copy_row(row_buffer, column + (row - first) * width + tap->col_first, count);
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
