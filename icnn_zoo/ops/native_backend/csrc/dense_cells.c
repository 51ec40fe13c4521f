/* The gradient of a dense convolution by its weights, to the same bits with any number of threads.
 *
 * A weight's gradient is the sum over all pixels of the output's gradient times what the weight's cell reads there.
 * Vectors lie along the outputs of a group: a tile of cells, whichever they are, times one or two vectors of outputs
 * stays in registers while it walks the pixels.
 */

#include "dense.h"

/* Tiles of cells of a unit; numbers of the output's gradient that it walks at once: a part of the second cache. */
enum { UNIT_TILES = 4, WALKED = (1 << 18) / sizeof(REAL) };

typedef struct {
    const dense_t *task;
    frame_t frame;
    index_t cells;          /* of a group's channels */
    index_t sharing, teams; /* groups that share vectors, of all groups */
    index_t columns, lanes; /* outputs of a tile, and the length of the vectors that hold them */
    index_t tiles, units;   /* of a team: tiles of outputs, units for each of them */
    index_t rows;           /* of the output, walked at once */
    index_t first, images;  /* that are in the workspace */
    index_t grads_length, frames_length; /* of an image */
    REAL *frames;           /* [images, teams, group's channels, sharing * frame_length] */
    REAL *grads;            /* [images, teams, tiles, out_height * out_width, columns] */
} cells_call_t;

static cells_call_t make_call(const dense_t *task) {
    const sizes_t *sizes = &task->sizes;
    index_t below = sizes->origin_row + (sizes->out_height - 1) * sizes->stride_row + task->rows - sizes->height;
    index_t right = sizes->origin_col + (sizes->out_width - 1) * sizes->stride_col + task->cols - sizes->width;
    index_t group_outputs = task->outputs / task->groups;
    cells_call_t call = {.task = task, .cells = task->channels / task->groups * task->rows * task->cols};
    call.frame = make_frame(sizes->height, sizes->width, largest(-sizes->origin_row, 0), largest(below, 0),
                            largest(-sizes->origin_col, 0), largest(right, 0), 1);
    call.sharing = groups_of_vector(task->groups, group_outputs);
    call.teams = (task->groups + call.sharing - 1) / call.sharing;
    call.columns = group_outputs > LANES ? TILE_COLUMNS : call.sharing * group_outputs;
    call.lanes = group_outputs > LANES ? TILE_COLUMNS : LANES;
    call.tiles = (call.sharing * group_outputs + call.columns - 1) / call.columns;
    call.units = (call.cells + UNIT_TILES * TILE_ROWS - 1) / (UNIT_TILES * TILE_ROWS);
    call.rows = smallest(largest(WALKED / (sizes->out_width * call.columns), 1), sizes->out_height);
    call.grads_length = call.teams * call.tiles * sizes->out_height * sizes->out_width * call.columns;
    call.frames_length = call.teams * (task->channels / task->groups) * call.sharing * frame_length(&call.frame);
    index_t length = call.grads_length + call.frames_length;
    call.images = smallest(largest(WORKSPACE / length, 1), task->images);
    call.grads = task->workspace;
    /* Vectors of few outputs read past the end. */
    call.frames = call.grads + call.images * call.grads_length + LANES;
    return call;
}

index_t cells_workspace_length(const dense_t *task) {
    cells_call_t call = make_call(task);
    return call.frames - call.grads + call.images * call.frames_length;
}

/* Copies a plane of the input, or a row of the gradient of a tile of outputs, across its pixels. */
static void start_work(const void *data, index_t unit, REAL *scratch) {
    const cells_call_t *call = data;
    const dense_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    index_t group_outputs = task->outputs / task->groups, group_channels = task->channels / task->groups;
    index_t frames = call->images * call->teams * group_channels, sharing = call->sharing;
    (void)scratch;
    if (unit < frames) {
        index_t image = call->first + unit / group_channels / call->teams, area = sizes->height * sizes->width;
        index_t group = unit / group_channels % call->teams * sharing;
        index_t channel = group * group_channels + unit % group_channels;
        fill_shared(&call->frame, call->frames + unit * sharing * frame_length(&call->frame),
                    task->input + (image * task->channels + channel) * area, group_channels * area, sizes->height,
                    sizes->width, smallest(sharing, task->groups - group), sharing);
        return;
    }
    unit -= frames;
    index_t width = sizes->out_width, area = sizes->out_height * width, row = unit % sizes->out_height;
    index_t tile = unit / sizes->out_height % call->tiles, part = unit / sizes->out_height / call->tiles;
    index_t image = call->first + part / call->teams, group = part % call->teams * sharing;
    REAL *to = call->grads + unit * width * call->columns;
    const REAL *from[TILE_COLUMNS];
    for (index_t column = 0; column < call->columns; column++) {
        index_t own = group + column % sharing, output = (tile * call->columns + column) / sharing;
        int live = own < task->groups && output < group_outputs;
        index_t plane = (image * task->groups + own) * group_outputs + output;
        from[column] = live ? task->grad_output + plane * area + row * width : NULL;
    }
    for (index_t pixel = 0; pixel < width; pixel++)
        for (index_t column = 0; column < call->columns; column++)
            *to++ = from[column] == NULL ? 0 : from[column][pixel];
}

/* sums[cell, output] += over rows of the output, what a cell reads times the output's gradient. */
static inline __attribute__((always_inline)) void add_products(const cells_call_t *call, const REAL *const *cells,
                                                               const REAL *grads, index_t rows, REAL *sums,
                                                               const int vectors, const int sharing) {
    const sizes_t *sizes = &call->task->sizes;
    index_t next = vectors > 1 ? TILE_COLUMNS : call->columns;
    index_t step = sizes->stride_col * sharing, width = sizes->out_width * step;
    index_t row_step = sizes->stride_row * call->frame.pitch * sharing;
    const REAL *from[TILE_ROWS];
    vector sum[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int cell = 0; cell < TILE_ROWS; cell++) {
        from[cell] = cells[cell] + width; /* counted from behind the row, which takes a register less */
        sum[cell][0] = load(sums + cell * vectors * LANES);
        sum[cell][1] = vectors > 1 ? load(sums + (cell * vectors + 1) * LANES) : all(0);
    }
    for (index_t row = 0; row < rows; row++) {
        for (index_t at = -width; at < 0; at += step, grads += next) {
            vector left = load(grads), right = load(grads + (vectors - 1) * LANES);
#pragma GCC unroll 12
            for (int cell = 0; cell < TILE_ROWS; cell++) {
                vector scale = repeat(from[cell] + at, sharing);
                sum[cell][0] += scale * left;
                if (vectors > 1) sum[cell][1] += scale * right;
                KEEP_ORDER(sum[cell]);
            }
        }
#pragma GCC unroll 12
        for (int cell = 0; cell < TILE_ROWS; cell++) from[cell] += row_step;
    }
#pragma GCC unroll 12
    for (int cell = 0; cell < TILE_ROWS; cell++)
        for (int part = 0; part < vectors; part++) store(sums + (cell * vectors + part) * LANES, sum[cell][part]);
}

/* A few tiles of cells times a tile of outputs. */
static void cells_work(const void *data, index_t unit, REAL *scratch) {
    const cells_call_t *call = data;
    const dense_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    index_t group_outputs = task->outputs / task->groups, group_channels = task->channels / task->groups;
    index_t tile = unit / call->units % call->tiles, team = unit / call->units / call->tiles;
    index_t first = unit % call->units * UNIT_TILES * TILE_ROWS, area = task->rows * task->cols;
    index_t last = smallest(first + UNIT_TILES * TILE_ROWS, call->cells);
    index_t length = call->sharing * frame_length(&call->frame);
    memset(scratch, 0, UNIT_TILES * TILE_ROWS * call->lanes * sizeof(REAL));
    for (index_t image = 0; image < call->images; image++) {
        const REAL *frames = call->frames + (image * call->teams + team) * group_channels * length;
        for (index_t row = 0; row < sizes->out_height; row += call->rows) {
            index_t rows = smallest(call->rows, sizes->out_height - row);
            index_t part = (image * call->teams + team) * call->tiles + tile;
            const REAL *grads = call->grads + (part * sizes->out_height + row) * sizes->out_width * call->columns;
            for (index_t start = first; start < last; start += TILE_ROWS) {
                const REAL *cells[TILE_ROWS];
                for (index_t index = 0; index < TILE_ROWS; index++) {
                    index_t cell = smallest(start + index, last - 1), place = cell % area;
                    index_t from = sizes->origin_row + row * sizes->stride_row + place / task->cols;
                    index_t at = frame_at(&call->frame, from, sizes->origin_col + place % task->cols);
                    cells[index] = frames + cell / area * length + at * call->sharing;
                }
                REAL *sums = scratch + (start - first) * call->lanes;
                if (call->lanes > LANES) {
                    add_products(call, cells, grads, rows, sums, 2, 1);
                } else if (call->sharing > 1) {
                    add_products(call, cells, grads, rows, sums, 1, 2);
                } else {
                    add_products(call, cells, grads, rows, sums, 1, 1);
                }
            }
        }
    }
    for (index_t column = 0; column < call->columns; column++) {
        index_t group = team * call->sharing + column % call->sharing;
        index_t output = (tile * call->columns + column) / call->sharing;
        if (group >= task->groups || output >= group_outputs) continue;
        REAL *to = task->grad_cells + (group * group_outputs + output) * call->cells;
        for (index_t cell = first; cell < last; cell++) {
            REAL sum = scratch[(cell - first) * call->lanes + column];
            to[cell] = call->first > 0 ? to[cell] + sum : sum;
        }
    }
}

int dense_cells(parallel_t parallel, unsigned threads, const dense_t *task) {
    cells_call_t call = make_call(task);
    index_t at_once = call.images, length = UNIT_TILES * TILE_ROWS * call.lanes;
    threads = worthwhile(task, threads);
    for (; call.first < task->images; call.first += at_once) {
        call.images = smallest(at_once, task->images - call.first);
        index_t planes = task->channels / task->groups, rows = call.tiles * task->sizes.out_height;
        if (run_parallel(parallel, threads, &call, call.images * call.teams * (planes + rows), 1, start_work) ||
            run_parallel(parallel, threads, &call, call.teams * call.tiles * call.units, length, cells_work))
            return 1;
    }
    return 0;
}
