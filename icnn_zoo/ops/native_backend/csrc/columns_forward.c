/* The forward of layers with a shape per input channel: see columns.h. */

#include "columns.h"

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
    index_t planes = call->task->images * call->task->channels, tiles = call->layout.tile_rows / TILE_ROWS;
    (void)scratch;
    if (unit < planes) {
        make_frame_and_taps(call, unit);
    } else {
        pack_weight(call, (unit - planes) / tiles, (unit - planes) % tiles);
    }
}

/* As make_column for a window of pixels: filtered along the columns into lines, then along the rows. */
static void make_wide_column(const call_t *call, const REAL *plane, index_t index, index_t first, index_t last, REAL *lines,
                             REAL *out) {
    const columns_t *task = call->task;
    const frame_t *frame = &call->layout.frame;
    index_t width = task->sizes.out_width, pitch = round_up(width, LANES), top = task->first_row[index] + first;
    for (index_t row = 0; row < last - first + task->reads_row - 1; row++) {
        REAL *line = lines + row * pitch;
        if (top + row < 0 || top + row >= task->sizes.height) {
            memset(line, 0, pitch * sizeof(REAL));
        } else {
            filter(task->cols + index * task->reads_col, 1, task->reads_col,
                   plane + frame_at(frame, top + row, task->first_col[index]), 1, line, width, 0);
        }
    }
    /* In ascending order: what whole vectors spill over is written again. */
    for (index_t row = 0; row < last - first; row++)
        filter(task->rows + index * task->reads_row, 1, task->reads_row, lines + row * pitch, pitch, out + row * width,
               width, 0);
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
    REAL *total = scratch, *column = total + layout->tile_rows * columns, *packed = column + 2 * (columns + LANES);
    REAL *lines = packed + layout->step * task->taps * columns;
    memset(total, 0, layout->tile_rows * columns * sizeof(REAL));
    memset(column, 0, 2 * (columns + LANES) * sizeof(REAL));
    for (index_t start = 0; start < layout->group_channels; start += layout->step) {
        index_t stop = smallest(start + layout->step, layout->group_channels), depth = (stop - start) * task->taps;
        for (index_t d = 0; d <= depth; d++) {
            if (d < depth) {
                index_t channel = group * layout->group_channels + start + d / task->taps;
                const REAL *plane = layout->frames + (image * task->channels + channel) * frame_length(&layout->frame);
                index_t index = channel * task->taps + d % task->taps;
                REAL *to = column + d % 2 * (columns + LANES);
                if (task->reads_row > 0) {
                    make_wide_column(call, plane, index, first, last, lines, to);
                } else {
                    make_column(call, plane, index, first, last, to);
                }
            }
            if (d == 0) continue;
            /* The one before: what was stored just now, by parts, would be waited for. */
            const REAL *from = column + (d - 1) % 2 * (columns + LANES);
            for (index_t at = 0; at < columns; at += TILE_COLUMNS) {
                REAL *to = packed + at * depth + (d - 1) * TILE_COLUMNS;
                store(to, load(from + at));
                store(to + LANES, load(from + at + LANES));
            }
        }
        const REAL *weight =
            layout->packed + (group * layout->group_channels + start) * task->taps * layout->tile_rows;
        multiply(layout->group_outputs, columns, depth, weight, packed, total);
    }
    for (index_t output = 0; output < layout->group_outputs; output++) {
        index_t channel = group * layout->group_outputs + output;
        REAL bias = task->bias == NULL ? 0 : task->bias[channel];
        REAL *to = task->output + (image * task->outputs + channel) * layout->out_area + first * width;
        for (index_t pixel = 0; pixel < pixels; pixel++) to[pixel] = total[output * columns + pixel] + bias;
    }
}

int columns_forward(parallel_t parallel, unsigned threads, const columns_t *task) {
    call_t call = {task, make_layout(task, 0, threads)};
    const layout_t *layout = &call.layout;
    threads = worthwhile(&call, threads);
    index_t starts = task->images * task->channels + layout->blocks * (layout->tile_rows / TILE_ROWS);
    index_t lines = task->reads_row > 0 ? layout->band_rows + task->reads_row : 0;
    index_t length = layout->tile_rows * layout->band + 2 * (layout->band + LANES) +
                     layout->step * task->taps * layout->band + lines * round_up(task->sizes.out_width, LANES);
    return run_parallel(parallel, threads, &call, starts, 1, forward_start_work) ||
           run_parallel(parallel, threads, &call, layout->slices, length, forward_work);
}

index_t workspace_length(const columns_t *task, int backward) {
    layout_t layout = make_layout(task, backward, 1);
    return layout.end - task->workspace;
}
