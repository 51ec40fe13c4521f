/* The gradient of a dense convolution by its weights, to the same bits with any number of threads.
 *
 * A weight's gradient is the sum over all pixels of the output's gradient times what the weight's cell reads there. Vectors
 * lie along the outputs of a group: a tile of cells, whichever they are, times one or two vectors of outputs stays in
 * registers while it walks the pixels.
 */

#include "plane.h"

typedef struct {
    sizes_t sizes; /* origin: where the first cell of output 0 reads */
    index_t images, channels, outputs, groups;
    index_t rows, cols; /* cells of a kernel */
    const REAL *input;       /* [images, channels, height, width] */
    const REAL *grad_output; /* [images, outputs, out_height, out_width] */
    REAL *grad_cells;        /* [outputs, channels / groups, rows, cols] */
    REAL *workspace;         /* what dense_workspace_length says */
} dense_t;

/* Tiles of cells of a unit; numbers of the output's gradient that it walks at once: a part of the second cache; numbers of
 * the workspace, about, where one image does not take more. */
enum { UNIT_TILES = 4, WALKED = (1 << 18) / sizeof(REAL), WORKSPACE = (1 << 22) / sizeof(REAL) };

typedef struct {
    const dense_t *task;
    frame_t frame;
    index_t cells;          /* of a group's channels */
    index_t columns, lanes; /* outputs of a tile, and the length of the vectors that hold them */
    index_t tiles, units;   /* of a group: tiles of outputs, units for each of them */
    index_t rows;           /* of the output, walked at once */
    index_t first, images;  /* that are in the workspace */
    index_t grads_length;   /* of an image */
    REAL *frames;           /* [images, channels, frame_length] */
    REAL *grads;            /* [images, groups, tiles, out_height * out_width, columns] */
} dense_call_t;

static dense_call_t make_call(const dense_t *task) {
    const sizes_t *sizes = &task->sizes;
    index_t below = sizes->origin_row + (sizes->out_height - 1) * sizes->stride_row + task->rows - sizes->height;
    index_t right = sizes->origin_col + (sizes->out_width - 1) * sizes->stride_col + task->cols - sizes->width;
    index_t group_outputs = task->outputs / task->groups;
    dense_call_t call = {.task = task, .cells = task->channels / task->groups * task->rows * task->cols};
    call.frame = make_frame(sizes->height, sizes->width, largest(-sizes->origin_row, 0), largest(below, 0),
                            largest(-sizes->origin_col, 0), largest(right, 0), 1);
    call.columns = group_outputs > LANES ? TILE_COLUMNS : group_outputs;
    call.lanes = group_outputs > LANES ? TILE_COLUMNS : LANES;
    call.tiles = (group_outputs + call.columns - 1) / call.columns;
    call.units = (call.cells + UNIT_TILES * TILE_ROWS - 1) / (UNIT_TILES * TILE_ROWS);
    call.rows = smallest(largest(WALKED / (sizes->out_width * call.columns), 1), sizes->out_height);
    call.grads_length = task->groups * call.tiles * sizes->out_height * sizes->out_width * call.columns;
    index_t length = call.grads_length + task->channels * frame_length(&call.frame);
    call.images = smallest(largest(WORKSPACE / length, 1), task->images);
    call.grads = task->workspace;
    /* Vectors of few outputs read past the end. */
    call.frames = call.grads + call.images * call.grads_length + LANES;
    return call;
}

index_t dense_workspace_length(const dense_t *task) {
    dense_call_t call = make_call(task);
    return call.frames - call.grads + call.images * task->channels * frame_length(&call.frame);
}

/* Copies a plane of the input, or a row of the gradient of a tile of outputs, across its pixels. */
static void start_work(const void *data, index_t unit, REAL *scratch) {
    const dense_call_t *call = data;
    const dense_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    index_t planes = call->images * task->channels, group_outputs = task->outputs / task->groups;
    (void)scratch;
    if (unit < planes) {
        const REAL *plane = task->input + (call->first * task->channels + unit) * sizes->height * sizes->width;
        fill_frame(&call->frame, call->frames + unit * frame_length(&call->frame), plane, sizes->height, sizes->width);
        return;
    }
    unit -= planes;
    index_t width = sizes->out_width, area = sizes->out_height * width, row = unit % sizes->out_height;
    index_t tile = unit / sizes->out_height % call->tiles, part = unit / sizes->out_height / call->tiles;
    index_t first = tile * call->columns, count = smallest(group_outputs - first, call->columns);
    const REAL *from =
        task->grad_output + ((call->first * task->groups + part) * group_outputs + first) * area + row * width;
    REAL *to = call->grads + unit * width * call->columns;
    for (index_t pixel = 0; pixel < width; pixel++)
        for (index_t output = 0; output < call->columns; output++)
            *to++ = output < count ? from[output * area + pixel] : 0;
}

/* sums[cell, output] += over rows of the output, what a cell reads times the output's gradient. */
static inline __attribute__((always_inline)) void add_products(const dense_call_t *call, const REAL *const *cells,
                                                               const REAL *grads, index_t rows, REAL *sums,
                                                               const int vectors) {
    const sizes_t *sizes = &call->task->sizes;
    index_t next = vectors > 1 ? TILE_COLUMNS : call->columns;
    index_t step = sizes->stride_col, width = sizes->out_width * step, row_step = sizes->stride_row * call->frame.pitch;
    const REAL *from[TILE_ROWS];
    vector sum[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int cell = 0; cell < TILE_ROWS; cell++) {
        from[cell] = cells[cell] + width; /* counted from behind the row, which takes a register less */
        for (int part = 0; part < vectors; part++) sum[cell][part] = load(sums + (cell * vectors + part) * LANES);
    }
    for (index_t row = 0; row < rows; row++) {
        for (index_t at = -width; at < 0; at += step, grads += next) {
            vector left = load(grads), right = load(grads + (vectors - 1) * LANES);
#pragma GCC unroll 12
            for (int cell = 0; cell < TILE_ROWS; cell++) {
                vector scale = all(from[cell][at]);
                sum[cell][0] += scale * left;
                if (vectors > 1) sum[cell][1] += scale * right;
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
static void dense_work(const void *data, index_t unit, REAL *scratch) {
    const dense_call_t *call = data;
    const dense_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    index_t group_outputs = task->outputs / task->groups, group_channels = task->channels / task->groups;
    index_t tile = unit / call->units % call->tiles, group = unit / call->units / call->tiles;
    index_t first = unit % call->units * UNIT_TILES * TILE_ROWS, area = task->rows * task->cols;
    index_t last = smallest(first + UNIT_TILES * TILE_ROWS, call->cells);
    memset(scratch, 0, UNIT_TILES * TILE_ROWS * call->lanes * sizeof(REAL));
    for (index_t image = 0; image < call->images; image++) {
        const REAL *frames = call->frames + (image * task->channels + group * group_channels) * frame_length(&call->frame);
        for (index_t row = 0; row < sizes->out_height; row += call->rows) {
            index_t rows = smallest(call->rows, sizes->out_height - row), part = (image * task->groups + group) * call->tiles + tile;
            const REAL *grads = call->grads + (part * sizes->out_height + row) * sizes->out_width * call->columns;
            for (index_t start = first; start < last; start += TILE_ROWS) {
                const REAL *cells[TILE_ROWS];
                for (index_t index = 0; index < TILE_ROWS; index++) {
                    index_t cell = smallest(start + index, last - 1), place = cell % area;
                    cells[index] = frames + cell / area * frame_length(&call->frame) +
                                   frame_at(&call->frame, sizes->origin_row + row * sizes->stride_row + place / task->cols,
                                            sizes->origin_col + place % task->cols);
                }
                REAL *sums = scratch + (start - first) * call->lanes;
                if (call->lanes > LANES) {
                    add_products(call, cells, grads, rows, sums, 2);
                } else {
                    add_products(call, cells, grads, rows, sums, 1);
                }
            }
        }
    }
    index_t output_first = tile * call->columns, outputs = smallest(group_outputs - output_first, call->columns);
    for (index_t output = 0; output < outputs; output++) {
        REAL *to = task->grad_cells + (group * group_outputs + output_first + output) * call->cells;
        for (index_t cell = first; cell < last; cell++) {
            REAL sum = scratch[(cell - first) * call->lanes + output];
            to[cell] = call->first > 0 ? to[cell] + sum : sum;
        }
    }
}

/* Threads that a call is worth: below about this many multiply-adds for each, starting them takes longer. */
static unsigned worthwhile(const dense_t *task, index_t cells, unsigned threads) {
    double pixels = (double)task->images * task->sizes.out_height * task->sizes.out_width;
    double wanted = pixels * task->outputs * cells / (1 << 19);
    return wanted < threads ? (unsigned)wanted + 1 : threads;
}

int dense_gradient(parallel_t parallel, unsigned threads, const dense_t *task) {
    dense_call_t call = make_call(task);
    index_t at_once = call.images, length = UNIT_TILES * TILE_ROWS * call.lanes;
    threads = worthwhile(task, call.cells, threads);
    for (; call.first < task->images; call.first += at_once) {
        call.images = smallest(at_once, task->images - call.first);
        index_t starts = call.images * (task->channels + task->groups * call.tiles * task->sizes.out_height);
        if (run_parallel(parallel, threads, &call, starts, 1, start_work)) return 1;
        if (run_parallel(parallel, threads, &call, task->groups * call.tiles * call.units, length, dense_work)) return 1;
    }
    return 0;
}
