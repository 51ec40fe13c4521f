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
    memset(total, 0, layout->tile_rows * columns * sizeof(REAL));
    memset(column, 0, 2 * (columns + LANES) * sizeof(REAL));
    for (index_t start = 0; start < layout->group_channels; start += layout->step) {
        index_t stop = smallest(start + layout->step, layout->group_channels), depth = (stop - start) * task->taps;
        for (index_t d = 0; d <= depth; d++) {
            if (d < depth) {
                index_t channel = group * layout->group_channels + start + d / task->taps;
                const REAL *plane = layout->frames + (image * task->channels + channel) * frame_length(&layout->frame);
                make_column(call, plane, channel * task->taps + d % task->taps, first, last,
                            column + d % 2 * (columns + LANES));
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
    index_t length =
        layout->tile_rows * layout->band + 2 * (layout->band + LANES) + layout->step * task->taps * layout->band;
    return run_parallel(parallel, threads, &call, starts, 1, forward_start_work) ||
           run_parallel(parallel, threads, &call, layout->slices, length, forward_work);
}

index_t workspace_length(const columns_t *task, int backward) {
    layout_t layout = make_layout(task, backward, 1);
    return layout.end - task->workspace;
}
