/* The backward of layers with a shape per input channel: see columns.h.
 *
 * Units are (part of the images and bands, block of channels). A part's sums are kept apart and added in the order of the
 * parts, and how many there are follows from the sizes of the call alone, never from the threads.
 */

#include "columns.h"

#include "wide.h"

/* The transposed weights of a block of channels, which are [rows / TILE_ROWS, group_outputs, TILE_ROWS]. */
static void pack_transposed(const call_t *call, index_t block) {
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    index_t blocks = layout->blocks / task->groups, group = block / blocks, first = block % blocks * layout->step;
    index_t used = smallest(layout->step, layout->group_channels - first) * task->taps;
    index_t all_depth = layout->group_channels * task->taps, outputs = layout->group_outputs;
    for (index_t output = 0; output < outputs; output++) {
        const REAL *from = task->weight + (group * outputs + output) * all_depth + first * task->taps;
        REAL *to = layout->packed + block * layout->rows * outputs + output * TILE_ROWS;
        for (index_t tile = 0; tile < layout->rows; tile += TILE_ROWS, from += TILE_ROWS, to += outputs * TILE_ROWS)
            for (index_t row = 0; row < TILE_ROWS; row++) to[row] = tile + row < used ? from[row] : 0;
    }
}

/* Where the output's gradient has the pixels [first, first + count) of a band, for the first output of its group; -1 where
 * it has none. */
static void find_pixels(const call_t *call, const band_t *band, index_t first, index_t count, index_t *places) {
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    index_t start = (band->image * task->outputs + band->group * layout->group_outputs) * layout->out_area;
    for (index_t pixel = first; pixel < first + count; pixel++) {
        index_t image = pixel / band->pixels, place = band->first * task->sizes.out_width + pixel % band->pixels;
        *places++ = pixel < band->all ? start + image * task->outputs * layout->out_area + place : -1;
    }
}

/* One tile of a band of the output's gradient, along the pixels. */
static void pack_along(const call_t *call, index_t slice, index_t tile) {
    const layout_t *layout = &call->layout;
    band_t band = find_band(call, slice);
    REAL *to = layout->grads + (slice * layout->band + tile * TILE_COLUMNS) * layout->group_outputs;
    index_t places[TILE_COLUMNS];
    find_pixels(call, &band, tile * TILE_COLUMNS, TILE_COLUMNS, places);
    for (const REAL *from = call->task->grad_output, *end = from + layout->group_outputs * layout->out_area; from < end;
         from += layout->out_area)
        for (index_t pixel = 0; pixel < TILE_COLUMNS; pixel++) *to++ = places[pixel] >= 0 ? from[places[pixel]] : 0;
}

/* The same across the pixels. */
static void pack_across(const call_t *call, index_t slice, index_t tile) {
    const layout_t *layout = &call->layout;
    band_t band = find_band(call, slice);
    REAL *to = layout->grads_across + (slice * layout->tile_columns + tile * TILE_COLUMNS) * layout->band;
    for (index_t pixel = 0; pixel < layout->band; pixel++) {
        index_t place;
        find_pixels(call, &band, pixel, 1, &place);
        for (index_t output = tile * TILE_COLUMNS; output < (tile + 1) * TILE_COLUMNS; output++)
            *to++ = output < layout->group_outputs && place >= 0
                        ? call->task->grad_output[place + output * layout->out_area]
                        : 0;
    }
}

/* How many units of each kind start a backward. */
typedef struct {
    index_t planes, transposed, along, across;
} starts_t;

static starts_t count_starts(const call_t *call) {
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    int by_columns = task->grad_input != NULL || task->grad_shift != NULL;
    return (starts_t){task->images * task->channels,
                      by_columns ? layout->blocks : 0,
                      by_columns ? layout->slices * (layout->band / TILE_COLUMNS) : 0,
                      task->grad_weight == NULL ? 0 : layout->slices * (layout->tile_columns / TILE_COLUMNS)};
}

static void backward_start_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    const layout_t *layout = &call->layout;
    starts_t starts = count_starts(call);
    index_t pixel_tiles = layout->band / TILE_COLUMNS;
    index_t output_tiles = layout->tile_columns / TILE_COLUMNS;
    (void)scratch;
    if (unit < starts.planes) {
        fill_frame(&layout->frame, layout->frames + unit * frame_length(&layout->frame),
                   call->task->input + unit * layout->area, call->task->sizes.height, call->task->sizes.width);
        if (unit < call->task->channels && call->task->reads_row == 0) make_taps(call, unit);
    } else if ((unit -= starts.planes) < starts.transposed) {
        pack_transposed(call, unit);
    } else if ((unit -= starts.transposed) < starts.along) {
        pack_along(call, unit / pixel_tiles, unit % pixel_tiles);
    } else {
        unit -= starts.along;
        pack_across(call, unit / output_tiles, unit % output_tiles);
    }
}

/* Rows of a column with a vector of zeros before and after each. */
static inline index_t padded_pitch(index_t width) { return LANES + round_up(width + 1, LANES); }

/* Adds what a column gives to a plane's gradient: `rows` rows of live values, padded, from output row `first` on. */
static inline void spread_column(const call_t *call, const tap_t *tap, index_t first, index_t rows, const REAL *padded,
                                 REAL *total) {
    const sizes_t *sizes = &call->task->sizes;
    index_t count = tap->col_last - tap->col_first, pitch = padded_pitch(count);
    vector down = all(tap->down), up = all(1 - tap->down), right = all(tap->right), left = all(1 - tap->right);
    REAL *to = total + tap->top_left + first * tap->row_step, *other = to + (tap->top_right - tap->top_left);
    if (sizes->stride_row == 1 && sizes->stride_col == 1) {
        /* The four neighbors are next to each other: what a pixel gets is added at once, the last row to that below it. */
        for (index_t col = 0; col <= count; col += LANES) {
            const REAL *here = padded + LANES + col;
            REAL *pixel = to + col;
            vector above = all(0);
            for (index_t row = 0; row < rows; row++, here += pitch, pixel += tap->below) {
                vector values = blend(here, here - 1, left, right);
                store(pixel, load(pixel) + up * values + down * above);
                above = values;
            }
            store(pixel, load(pixel) + down * above);
        }
        return;
    }
    /* Left and right one after the other: they may overlap. With zeros after the values, whole vectors do no harm to what
     * follows in the frame. */
    for (index_t row = 0; row < rows; row++, to += tap->row_step, other += tap->row_step) {
        const REAL *values = padded + row * pitch + LANES;
        for (index_t col = 0; col < count; col += LANES) {
            vector value = left * load(values + col);
            store(to + col, load(to + col) + up * value);
            store(to + tap->below + col, load(to + tap->below + col) + down * value);
        }
        for (index_t col = 0; col < count; col += LANES) {
            vector value = right * load(values + col);
            store(other + col, load(other + col) + up * value);
            store(other + tap->below + col, load(other + tap->below + col) + down * value);
        }
    }
}

/* The adjoint of make_column for rows [first, last): adds to the plane's gradient and to that of the shift. */
static void scatter_column(const call_t *call, const REAL *plane, index_t index, index_t first, index_t last,
                           const REAL *column, REAL *total, REAL *padded, double *by_shift) {
    const tap_t *tap = &call->layout.taps[index];
    index_t width = call->task->sizes.out_width, count = tap->col_last - tap->col_first, pitch = padded_pitch(count);
    index_t row_first = largest(first, tap->row_first), rows = smallest(last, tap->row_last) - row_first;
    if (rows <= 0) return;
    for (index_t row = 0; row < rows; row++) {
        REAL *values = padded + row * pitch + LANES;
        store(values - LANES, all(0));
        copy_row(values, column + (row_first + row - first) * width + tap->col_first, count);
        store(values + count, all(0));
    }
    if (total != NULL) spread_column(call, tap, row_first, rows, padded, total);
    if (by_shift == NULL) return;
    vector down = all(tap->down), right = all(tap->right), sum_down = all(0), sum_right = all(0);
    int next = tap->row_step == tap->below; /* a row's lower neighbors are the next one's upper */
    for (index_t col = 0; col < count; col += LANES) {
        const REAL *left = plane + tap->top_left + row_first * tap->row_step + col, *values = padded + LANES + col;
        const REAL *other = left + (tap->top_right - tap->top_left);
        vector v00 = load(left), v01 = load(other);
        for (index_t row = 0; row < rows; row++, left += tap->row_step, other += tap->row_step, values += pitch) {
            if (!next) v00 = load(left), v01 = load(other);
            vector v10 = load(left + tap->below), v11 = load(other + tap->below), value = load(values);
            vector left_step = v10 - v00, top_step = v01 - v00;
            sum_down += value * (left_step + right * (v11 - v01 - left_step));
            sum_right += value * (top_step + down * (v11 - v10 - top_step));
            v00 = v10;
            v01 = v11;
        }
    }
    by_shift[0] += sum_lanes(sum_down);
    by_shift[1] += sum_lanes(sum_right);
}

/* No number where a tap of a channel is at none, else zero. */
static REAL find_unknown(const call_t *call, index_t channel) {
    const columns_t *task = call->task;
    index_t first = channel * task->taps, last = first + task->taps, rows = task->reads_row, cols = task->reads_col;
    REAL unknown = 0;
    for (index_t index = first; index < last && rows == 0; index++)
        unknown += (call->layout.taps[index].down + call->layout.taps[index].right) * 0;
    for (index_t at = first * rows; at < last * rows; at++) unknown += task->rows[at] * 0;
    for (index_t at = first * cols; at < last * cols; at++) unknown += task->cols[at] * 0;
    return unknown;
}

/* Numbers that a tap's adjoint works in: rows of its column with zeros around, or lines of its window and the adjoint's. */
static inline index_t adjoint_length(const call_t *call) {
    if (call->task->reads_row > 0) return lines_length(call) + spread_length(call);
    return call->layout.band_rows * padded_pitch(call->task->sizes.out_width) + 2 * LANES;
}

/* What a tap's columns give to all gradients, in a band; makes its column where it is wanted.
 *
 * grads, totals, by_tap, column: NULL where they are not wanted. */
static void visit_tap(const call_t *call, const band_t *band, index_t index, const REAL *grads, REAL *totals, double *by_tap,
                      REAL *adjoint, REAL *column) {
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    index_t channel = index / task->taps, length = frame_length(&layout->frame);
    REAL *lines = adjoint + (task->reads_row > 0 ? spread_length(call) : 0);
    for (index_t image = 0; image < band->images; image++) {
        const REAL *plane = layout->frames + ((band->image + image) * task->channels + channel) * length;
        const REAL *grad = grads == NULL ? NULL : grads + image * band->pixels;
        REAL *total = totals == NULL ? NULL : totals + image * layout->step * length;
        if (task->reads_row > 0 && (by_tap != NULL || column != NULL))
            join_rows(call, plane, index, band->first, band->last, lines);
        if (grads != NULL && task->reads_row > 0) {
            scatter_lines(call, plane, index, band->first, band->last, grad, lines, total, adjoint, by_tap);
        } else if (grads != NULL) {
            scatter_column(call, plane, index, band->first, band->last, grad, total, adjoint, by_tap);
        }
        if (column == NULL) continue;
        if (task->reads_row > 0) {
            filter_lines(call, index, band->last - band->first, lines, column + image * band->pixels);
        } else {
            make_column(call, plane, index, band->first, band->last, column + image * band->pixels);
        }
    }
}

/* What one part of the images gives to all gradients of a block of channels. */
static void backward_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    index_t taps = task->taps, length = frame_length(&layout->frame), outputs = layout->group_outputs;
    index_t shifts = shift_length(task);
    index_t blocks = layout->blocks / task->groups, block = unit % layout->blocks, part = unit / layout->blocks;
    index_t group = block / blocks, start = block % blocks * layout->step;
    index_t channels = smallest(layout->step, layout->group_channels - start);
    index_t used = channels * taps, rows = round_up(used, TILE_ROWS);
    index_t channel_first = group * layout->group_channels + start, planes = task->images * task->channels;
    index_t cut = part % layout->cuts, parts = layout->parts / layout->cuts, lots_part = part / layout->cuts;
    index_t lots = layout->lots / layout->bands; /* of whole images */
    index_t lot_first = lots_part * lots / parts, lot_last = (lots_part + 1) * lots / parts;
    index_t band_first = cut * layout->bands / layout->cuts, band_last = (cut + 1) * layout->bands / layout->cuts;
    const REAL *transposed = layout->packed + block * layout->rows * outputs;
    int by_columns = task->grad_input != NULL || task->grad_shift != NULL;
    REAL *columns = scratch, *made = columns + rows * layout->band, *adjoint = made + rows * column_pitch(layout->band);
    REAL *totals = adjoint + adjoint_length(call);
    REAL *by_weight = layout->by_weight + unit * layout->rows * layout->tile_columns;
    double *by_shift =
        task->grad_shift == NULL ? NULL : layout->by_shift + (part * task->channels + channel_first) * taps * shifts;
    if (by_shift != NULL) memset(by_shift, 0, used * shifts * sizeof(double));
    if (task->grad_weight != NULL) memset(by_weight, 0, rows * layout->tile_columns * sizeof(REAL));
    memset(made, 0, rows * column_pitch(layout->band) * sizeof(REAL));
    if (task->reads_row > 0) memset(adjoint, 0, adjoint_length(call) * sizeof(REAL));
    for (index_t lot = lot_first; lot < lot_last; lot++) {
        index_t images = smallest(layout->lot, task->images - lot * layout->lot);
        memset(totals, 0, images * layout->step * length * sizeof(REAL));
        for (index_t number = band_first; number < band_last; number++) {
            index_t slice = (lot * layout->bands + number) * task->groups + group;
            band_t band = find_band(call, slice);
            index_t pitch = round_up(band.all, LANES), across_made = column_pitch(band.all);
            const REAL *along = layout->grads + slice * layout->band * outputs;
            const REAL *across = layout->grads_across + slice * layout->band * layout->tile_columns;
            ahead_t same = {across, layout->band * layout->tile_columns};
            ahead_t next = {along + task->groups * layout->band * outputs, layout->band * outputs};
            if (by_columns) {
                memset(columns, 0, rows * pitch * sizeof(REAL));
                multiply(used, pitch, outputs, transposed, 0, along, TILE_COLUMNS, outputs * TILE_COLUMNS, columns, pitch,
                         task->grad_weight == NULL ? next : same);
            }
            for (index_t row = 0; row < used; row++)
                visit_tap(call, &band, channel_first * taps + row, by_columns ? columns + row * pitch : NULL,
                          task->grad_input == NULL ? NULL : totals + row / taps * length,
                          by_shift == NULL ? NULL : by_shift + shifts * row, adjoint,
                          task->grad_weight == NULL ? NULL : made + row * across_made);
            if (task->grad_weight != NULL)
                multiply(used, outputs, band.all, made, across_made, across, TILE_COLUMNS, layout->band * TILE_COLUMNS,
                         by_weight, layout->tile_columns, by_columns ? next : same);
        }
        for (index_t at = 0; at < images * channels && task->grad_input != NULL; at++) {
            index_t image = at / channels, channel = at % channels;
            index_t plane = cut * planes + (lot * layout->lot + image) * task->channels + channel_first + channel;
            REAL *to = layout->by_input + plane * layout->area;
            read_frame(&layout->frame, totals + (image * layout->step + channel) * length, to, task->sizes.height,
                       task->sizes.width);
            spread_unknown(find_unknown(call, channel_first + channel), to, layout->area);
        }
    }
}

/* Adds the parts of what a block of channels gives to a tile of outputs; sums are as many rows of such tiles. */
static void sum_weight(const call_t *call, index_t block, index_t tile, REAL *sums) {
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    index_t blocks = layout->blocks / task->groups, group = block / blocks, start = block % blocks * layout->step;
    index_t used = smallest(layout->step, layout->group_channels - start) * task->taps;
    index_t length = layout->rows * layout->tile_columns, first = tile * TILE_COLUMNS;
    index_t count = smallest(TILE_COLUMNS, layout->group_outputs - first);
    for (index_t row = 0; row < used; row++) {
        vector left = all(0), right = all(0);
        const REAL *from = layout->by_weight + block * length + row * layout->tile_columns + first;
        for (index_t part = 0; part < layout->parts; part++, from += layout->blocks * length) {
            left += load(from);
            right += load(from + LANES);
        }
        store(sums + row * TILE_COLUMNS, left);
        store(sums + row * TILE_COLUMNS + LANES, right);
    }
    for (index_t output = 0; output < count; output++) {
        REAL *to = task->grad_weight +
                   ((group * layout->group_outputs + first + output) * layout->group_channels + start) * task->taps;
        for (index_t row = 0; row < used; row++) to[row] = sums[row * TILE_COLUMNS + output];
    }
}

static void sum_shift(const call_t *call, index_t channel) {
    index_t count = call->task->taps * shift_length(call->task), all_count = call->task->channels * count;
    for (index_t index = channel * count; index < (channel + 1) * count; index++) {
        double sum = 0;
        for (index_t part = 0; part < call->layout.parts; part++) sum += call->layout.by_shift[part * all_count + index];
        call->task->grad_shift[index] = sum;
    }
}

static void sum_input(const call_t *call, index_t plane) {
    const layout_t *layout = &call->layout;
    index_t step = call->task->images * call->task->channels * layout->area;
    REAL *to = call->task->grad_input + plane * layout->area;
    copy_row(to, layout->by_input + plane * layout->area, layout->area);
    for (index_t cut = 1; cut < layout->cuts; cut++) {
        const REAL *from = layout->by_input + cut * step + plane * layout->area;
        for (index_t pixel = 0; pixel < layout->area; pixel++) to[pixel] += from[pixel];
    }
}

typedef struct {
    index_t weights, shifts, planes;
} ends_t;

static ends_t count_ends(const call_t *call) {
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    return (ends_t){task->grad_weight == NULL ? 0 : layout->blocks * (layout->tile_columns / TILE_COLUMNS),
                    task->grad_shift == NULL ? 0 : task->channels,
                    task->grad_input == NULL || layout->cuts == 1 ? 0 : task->images * task->channels};
}

static void backward_end_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    ends_t ends = count_ends(call);
    index_t tiles = call->layout.tile_columns / TILE_COLUMNS;
    if (unit < ends.weights) {
        sum_weight(call, unit / tiles, unit % tiles, scratch);
    } else if ((unit -= ends.weights) < ends.shifts) {
        sum_shift(call, unit);
    } else {
        sum_input(call, unit - ends.shifts);
    }
}

int columns_backward(parallel_t parallel, unsigned threads, const columns_t *task) {
    call_t call = {task, make_layout(task, 1, threads)};
    const layout_t *layout = &call.layout;
    threads = worthwhile(&call, threads);
    starts_t starts = count_starts(&call);
    ends_t ends = count_ends(&call);
    index_t length = layout->rows * (layout->band + column_pitch(layout->band)) + adjoint_length(&call) +
                     layout->lot * layout->step * frame_length(&layout->frame);
    return run_parallel(parallel, threads, &call, starts.planes + starts.transposed + starts.along + starts.across, 1,
                        backward_start_work) ||
           run_parallel(parallel, threads, &call, layout->parts * layout->blocks, length, backward_work) ||
           run_parallel(parallel, threads, &call, ends.weights + ends.shifts + ends.planes, layout->rows * TILE_COLUMNS,
                        backward_end_work);
}
