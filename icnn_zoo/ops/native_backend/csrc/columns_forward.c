/* The forward of layers with a shape per input channel: see columns.h. */

#include "columns.h"

#include "wide.h"

/* One tile's rows of the weights of a block of channels, which are [tile_rows / TILE_ROWS, depth, TILE_ROWS]. */
static void pack_weight(const call_t *call, index_t block, index_t tile) {
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    index_t blocks = layout->blocks / task->groups, group = block / blocks, first = block % blocks * layout->step;
    index_t depth = smallest(layout->step, layout->group_channels - first) * task->taps;
    index_t all_depth = layout->group_channels * task->taps;
    REAL *to = layout->packed + (group * all_depth + first * task->taps) * layout->tile_rows + tile * depth * TILE_ROWS;
    for (index_t d = 0; d < depth; d++)
        for (index_t output = tile * TILE_ROWS; output < (tile + 1) * TILE_ROWS; output++)
            *to++ = output < layout->group_outputs
                        ? task->weight[(group * layout->group_outputs + output) * all_depth + first * task->taps + d]
                        : 0;
}

static void forward_start_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    index_t channels = call->task->reads_row > 0 ? 0 : call->task->channels, tiles = call->layout.tile_rows / TILE_ROWS;
    (void)scratch;
    if (unit < channels) {
        make_taps(call, unit);
    } else {
        pack_weight(call, (unit - channels) / tiles, (unit - channels) % tiles);
    }
}

/* Fills those rows of a frame that a channel's taps read for outputs [first, last). Returns the same rows of the channel
 * that comes after. */
static ahead_t fill_band(const call_t *call, const REAL *plane, index_t channel, index_t first, index_t last, REAL *buffer) {
    const columns_t *task = call->task;
    const frame_t *frame = &call->layout.frame;
    index_t low = INT64_MAX, high = INT64_MIN, reads = task->reads_row > 0 ? task->reads_row : 2;
    for (index_t index = channel * task->taps; index < (channel + 1) * task->taps; index++) {
        index_t row = task->reads_row > 0 ? task->first_row[index] : call->layout.taps[index].row;
        low = smallest(low, row);
        high = largest(high, row);
    }
    low = largest(low + first * task->sizes.stride_row, -frame->top);
    high = smallest(high + (last - 1) * task->sizes.stride_row + reads, frame->rows - frame->top);
    if (low >= high) return (ahead_t){NULL, 0};
    index_t row_first = largest(low, 0), row_last = smallest(high, task->sizes.height);
    memset(buffer + (low + frame->top) * frame->pitch, 0, ((high - low) * frame->pitch + 2 * LANES) * sizeof(REAL));
    for (index_t row = row_first; row < row_last; row++)
        copy_to_frame(frame, buffer, plane, row, task->sizes.width);
    return (ahead_t){plane + call->layout.area + row_first * task->sizes.width,
                     largest(row_last - row_first, 0) * task->sizes.width};
}

static void forward_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    band_t band = find_band(call, unit);
    index_t columns = round_up(band.all, LANES), pitch = column_pitch(band.all);
    REAL *total = scratch, *made = total + layout->tile_rows * columns, *plane = made + layout->step * task->taps * pitch;
    REAL *lines = plane + frame_length(&layout->frame);
    memset(total, 0, layout->tile_rows * columns * sizeof(REAL));
    if (task->reads_row > 0) memset(lines, 0, lines_length(call) * sizeof(REAL));
    for (index_t d = 0; d < layout->step * task->taps; d++)
        memset(made + d * pitch + band.all, 0, (pitch - band.all) * sizeof(REAL));
    for (index_t start = 0; start < layout->group_channels; start += layout->step) {
        index_t stop = smallest(start + layout->step, layout->group_channels), depth = (stop - start) * task->taps;
        for (index_t at = 0; at < (stop - start) * band.images; at++) {
            index_t image = at % band.images, number = at / band.images;
            index_t channel = band.group * layout->group_channels + start + number;
            const REAL *from = task->input + ((band.image + image) * task->channels + channel) * layout->area;
            ahead_t next = fill_band(call, from, channel, band.first, band.last, plane);
            for (index_t tap = 0; tap < task->taps; tap++) {
                index_t index = channel * task->taps + tap;
                REAL *to = made + (number * task->taps + tap) * pitch + image * band.pixels;
                /* A part for each tap: the memory answers only so many requests at once. */
                index_t part = tap * next.length / task->taps, end = (tap + 1) * next.length / task->taps;
                for (; part < end; part += 64 / sizeof(REAL)) __builtin_prefetch(next.from + part);
                if (task->reads_row > 0) {
                    join_rows(call, plane, index, band.first, band.last, lines);
                    filter_lines(call, index, band.last - band.first, lines, to);
                } else {
                    make_column(call, plane, index, band.first, band.last, to);
                }
            }
        }
        const REAL *weights = layout->packed + band.group * layout->group_channels * task->taps * layout->tile_rows;
        const REAL *weight = weights + start * task->taps * layout->tile_rows;
        index_t length = depth * layout->tile_rows;
        ahead_t ahead = {stop < layout->group_channels ? weight + length : weights, length};
        multiply(layout->group_outputs, columns, depth, weight, 0, made, pitch, TILE_COLUMNS, total, columns, ahead);
    }
    for (index_t at = 0; at < band.images * layout->group_outputs; at++) {
        index_t image = at / layout->group_outputs, output = at % layout->group_outputs;
        index_t channel = band.group * layout->group_outputs + output;
        REAL bias = task->bias == NULL ? 0 : task->bias[channel];
        REAL *to = task->output + ((band.image + image) * task->outputs + channel) * layout->out_area +
                   band.first * task->sizes.out_width;
        const REAL *from = total + output * columns + image * band.pixels;
        for (index_t pixel = 0; pixel < band.pixels; pixel++) to[pixel] = from[pixel] + bias;
    }
}

int columns_forward(parallel_t parallel, unsigned threads, const columns_t *task) {
    call_t call = {task, make_layout(task, 0, threads)};
    const layout_t *layout = &call.layout;
    threads = worthwhile(&call, threads);
    index_t starts = (task->reads_row > 0 ? 0 : task->channels) + layout->blocks * (layout->tile_rows / TILE_ROWS);
    index_t lines = task->reads_row > 0 ? lines_length(&call) : 0;
    index_t length = layout->tile_rows * layout->band + layout->step * task->taps * column_pitch(layout->band) +
                     frame_length(&layout->frame) + lines;
    return run_parallel(parallel, threads, &call, starts, 1, forward_start_work) ||
           run_parallel(parallel, threads, &call, layout->slices, length, forward_work);
}

index_t workspace_length(const columns_t *task, int backward) {
    layout_t layout = make_layout(task, backward, 1);
    return layout.end - task->workspace;
}
