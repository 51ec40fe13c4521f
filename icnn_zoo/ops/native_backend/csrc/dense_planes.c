/* The forward of a dense convolution, and its gradient by the input.
 *
 * Both sum, for a pixel of a plane, what cells read of other planes. Vectors lie along the planes that are computed: a
 * tile of pixels, whichever they are, times one or two vectors of planes stays in registers while it walks the cells.
 * With strides, the pixels of the gradient are sorted by the remainders of their row and column ("phases"), as each has
 * cells of its own.
 */

#include "dense.h"

/* Tiles of pixels of a unit; numbers of the weights that it walks at once: a part of the second cache. */
enum { BAND = 8, WALKED = (1 << 18) / sizeof(REAL) };

typedef struct {
    const dense_t *task;
    int backward;
    frame_t frame;            /* of a plane that is read */
    index_t members, results; /* planes of a group that are read, that are computed */
    index_t sharing, teams;   /* groups that share vectors, of all groups */
    index_t lanes, tiles;     /* numbers of the vectors of a tile; tiles of a team */
    index_t depth;            /* cells of a group's kernel */
    index_t bands;            /* that the pixels are cut into */
    index_t first, images;    /* that are in the workspace */
    REAL *weights;            /* [teams, tiles, depth, lanes], the cells of a phase next to each other */
    index_t *reads;           /* [depth], from where a pixel lies in the first plane of its team to what a cell reads */
    REAL *frames;             /* [images, teams, members, sharing * frame_length] */
} planes_call_t;

/* Pixels of a phase along an axis, and the cells that they read by. */
typedef struct {
    index_t first, step, count;  /* pixels */
    index_t cells, before;       /* cells of the phase, of the phases before */
    index_t read, read_order;    /* what the first cell reads for the first pixel, the next ones from there on */
    index_t read_step;           /* the same for the next pixel */
} axis_t;

static axis_t find_axis(const planes_call_t *call, int axis, index_t phase) {
    const dense_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    index_t origin = axis ? sizes->origin_col : sizes->origin_row;
    index_t stride = axis ? sizes->stride_col : sizes->stride_row, cells = axis ? task->cols : task->rows;
    index_t size = axis ? sizes->width : sizes->height, out = axis ? sizes->out_width : sizes->out_height, before = 0;
    if (!call->backward) return (axis_t){0, 1, out, cells, 0, origin, 1, stride};
    index_t cell = floor_mod(phase - origin, stride); /* the first, of every stride-th */
    for (index_t other = 0; phase > 0 && other < cells; other++) before += floor_mod(other + origin, stride) < phase;
    index_t own = cell < cells ? (cells - 1 - cell) / stride + 1 : 0, read = floor_div(phase - origin - cell, stride);
    return (axis_t){phase, stride, (size - phase + stride - 1) / stride, own, before, read, -1, 1};
}

static index_t count_phases(const planes_call_t *call, int axis) {
    const sizes_t *sizes = &call->task->sizes;
    if (!call->backward) return 1;
    return axis ? smallest(sizes->stride_col, sizes->width) : smallest(sizes->stride_row, sizes->height);
}

/* Where the cells of a phase are among those of a group's kernel. */
static index_t start_of(const planes_call_t *call, const axis_t *rows, const axis_t *cols) {
    return call->members * (rows->before * call->task->cols + rows->cells * cols->before);
}

static planes_call_t make_call(const dense_t *task, int backward) {
    const sizes_t *sizes = &task->sizes;
    index_t low[2], high[2], origin[2] = {sizes->origin_row, sizes->origin_col}, cells[2] = {task->rows, task->cols};
    index_t stride[2] = {sizes->stride_row, sizes->stride_col}, in[2] = {sizes->height, sizes->width};
    index_t out[2] = {sizes->out_height, sizes->out_width};
    for (int axis = 0; axis < 2; axis++) {
        low[axis] = backward ? floor_div(-origin[axis] - cells[axis] + 1, stride[axis]) : origin[axis];
        high[axis] = backward ? floor_div(in[axis] - 1 - origin[axis], stride[axis]) - (out[axis] - 1)
                              : origin[axis] + (out[axis] - 1) * stride[axis] + cells[axis] - in[axis];
    }
    index_t group_outputs = task->outputs / task->groups, group_channels = task->channels / task->groups;
    planes_call_t call = {.task = task, .backward = backward};
    call.members = backward ? group_outputs : group_channels;
    call.results = backward ? group_channels : group_outputs;
    call.frame = make_frame(backward ? out[0] : in[0], backward ? out[1] : in[1], largest(-low[0], 0),
                            largest(high[0], 0), largest(-low[1], 0), largest(high[1], 0), 1);
    call.sharing = groups_of_vector(task->groups, call.results);
    call.teams = (task->groups + call.sharing - 1) / call.sharing;
    call.lanes = call.results > LANES ? TILE_COLUMNS : LANES;
    call.tiles = (call.results * call.sharing + call.lanes - 1) / call.lanes;
    call.depth = call.members * task->rows * task->cols;
    axis_t rows = find_axis(&call, 0, 0), cols = find_axis(&call, 1, 0);
    call.bands = (rows.count * cols.count + BAND * TILE_ROWS - 1) / (BAND * TILE_ROWS);
    call.images = WORKSPACE / (call.teams * call.members * call.sharing * frame_length(&call.frame));
    call.images = smallest(largest(call.images, 1), task->images);
    call.weights = task->workspace;
    call.reads = (index_t *)(call.weights + call.teams * call.tiles * call.depth * call.lanes);
    call.frames = (REAL *)(call.reads + call.depth);
    return call;
}

index_t planes_workspace_length(const dense_t *task, int backward) {
    planes_call_t call = make_call(task, backward);
    index_t frames = call.images * call.teams * call.members;
    return call.frames - task->workspace + frames * call.sharing * frame_length(&call.frame);
}

/* Copies a plane, or the cells of one that is read for a tile of those that are computed. */
static void start_work(const void *data, index_t unit, REAL *scratch) {
    const planes_call_t *call = data;
    const dense_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    index_t length = call->sharing * frame_length(&call->frame), taps = task->rows * task->cols;
    index_t frames = call->images * call->teams * call->members, member = unit % call->members;
    (void)scratch;
    if (unit < frames) {
        index_t height = call->backward ? sizes->out_height : sizes->height;
        index_t width = call->backward ? sizes->out_width : sizes->width;
        index_t image = call->first + unit / call->members / call->teams;
        index_t group = unit / call->members % call->teams * call->sharing, step = call->members * height * width;
        const REAL *from = (call->backward ? task->grad_output : task->input) +
                           ((image * task->groups + group) * call->members + member) * height * width;
        fill_shared(&call->frame, call->frames + unit * length, from, step, height, width,
                    smallest(call->sharing, task->groups - group), call->sharing);
        return;
    }
    unit -= frames;
    member = unit % call->members;
    index_t tile = unit / call->members % call->tiles, team = unit / call->members / call->tiles;
    REAL *weights = call->weights + (team * call->tiles + tile) * call->depth * call->lanes;
    for (index_t row = 0; row < task->rows; row++) {
        index_t row_phase = call->backward ? floor_mod(row + sizes->origin_row, sizes->stride_row) : 0;
        axis_t rows = find_axis(call, 0, row_phase);
        index_t row_number = call->backward ? row / sizes->stride_row : row;
        for (index_t col = 0; col < task->cols; col++) {
            index_t col_phase = call->backward ? floor_mod(col + sizes->origin_col, sizes->stride_col) : 0;
            axis_t cols = find_axis(call, 1, col_phase);
            index_t col_number = call->backward ? col / sizes->stride_col : col;
            index_t at = start_of(call, &rows, &cols) + (member * rows.cells + row_number) * cols.cells + col_number;
            if (team == 0 && tile == 0)
                call->reads[at] = member * length +
                                  call->sharing * ((rows.read + row_number * rows.read_order) * call->frame.pitch +
                                                   cols.read + col_number * cols.read_order);
            for (index_t part = 0; part < call->sharing; part++) {
                index_t group = team * call->sharing + part, first = tile * call->lanes, step = taps;
                const REAL *from = task->cells + row * task->cols + col;
                if (call->backward) {
                    from += ((group * call->members + member) * call->results + first) * taps;
                } else {
                    from += ((group * call->results + first) * call->members + member) * taps;
                    step *= call->members;
                }
                index_t most = smallest(call->results - first, call->lanes / call->sharing);
                index_t results = group < task->groups ? most : 0;
                REAL *to = weights + at * call->lanes + part;
                for (index_t result = 0; result < call->lanes / call->sharing; result++)
                    to[result * call->sharing] = result < results ? from[result * step] : 0;
            }
        }
    }
}

/* sums[pixel, result] += over cells, what a pixel reads by a cell times the cell's weights. */
static inline __attribute__((always_inline)) void add_products(const REAL *const *pixels, const index_t *reads,
                                                               const REAL *weights, index_t count, REAL *sums,
                                                               const int vectors, const int sharing) {
    const REAL *from[TILE_ROWS];
    vector sum[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int pixel = 0; pixel < TILE_ROWS; pixel++) {
        from[pixel] = pixels[pixel];
        sum[pixel][0] = load(sums + pixel * vectors * LANES);
        sum[pixel][1] = vectors > 1 ? load(sums + (pixel * vectors + 1) * LANES) : all(0);
    }
    for (index_t cell = 0; cell < count; cell++, weights += vectors * LANES) {
        index_t read = reads[cell];
        vector left = load(weights), right = load(weights + (vectors - 1) * LANES);
#pragma GCC unroll 12
        for (int pixel = 0; pixel < TILE_ROWS; pixel++) {
            vector scale = repeat(from[pixel] + read, sharing);
            sum[pixel][0] += scale * left;
            if (vectors > 1) sum[pixel][1] += scale * right;
            KEEP_ORDER(sum[pixel]);
        }
    }
#pragma GCC unroll 12
    for (int pixel = 0; pixel < TILE_ROWS; pixel++) {
        store(sums + pixel * vectors * LANES, sum[pixel][0]);
        if (vectors > 1) store(sums + (pixel * vectors + 1) * LANES, sum[pixel][1]);
    }
}

/* Not inlined, as all registers are needed. */
#define ADD(name, vectors, sharing)                                                                                    \
    static __attribute__((noinline)) void name(const REAL *const *pixels, const index_t *reads, const REAL *weights,   \
                                               index_t count, REAL *sums) {                                            \
        add_products(pixels, reads, weights, count, sums, vectors, sharing);                                           \
    }
ADD(add_two_vectors, 2, 1)
ADD(add_vector, 1, 1)
ADD(add_shared, 1, 2)
#undef ADD

/* Tiles [first, last) of the pixels of a phase. */
static void compute_tiles(const planes_call_t *call, const axis_t *rows, const axis_t *cols, index_t first,
                          index_t last, const REAL *weights, const REAL *frames, REAL *sums) {
    index_t start = start_of(call, rows, cols), depth = call->members * rows->cells * cols->cells;
    index_t lanes = call->lanes, step = WALKED / lanes, pixels = rows->count * cols->count;
    memset(sums, 0, (last - first) * TILE_ROWS * lanes * sizeof(REAL));
    for (index_t cell = 0; cell < depth; cell += step) {
        index_t count = smallest(step, depth - cell), at = start + cell;
        for (index_t tile = first; tile < last; tile++) {
            const REAL *from[TILE_ROWS];
            for (index_t part = 0; part < TILE_ROWS; part++) {
                index_t pixel = smallest(tile * TILE_ROWS + part, pixels - 1);
                from[part] = frames + call->sharing * frame_at(&call->frame, pixel / cols->count * rows->read_step,
                                                               pixel % cols->count * cols->read_step);
            }
            REAL *total = sums + (tile - first) * TILE_ROWS * lanes;
            (lanes > LANES ? add_two_vectors : call->sharing > 1 ? add_shared : add_vector)(
                from, call->reads + at, weights + at * lanes, count, total);
        }
    }
}

static void planes_work(const void *data, index_t unit, REAL *scratch) {
    const planes_call_t *call = data;
    const dense_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    index_t band = unit % call->bands, tile = unit / call->bands % call->tiles;
    index_t part = unit / call->bands / call->tiles, team = part % call->teams;
    index_t image = call->first + part / call->teams;
    index_t phases = count_phases(call, 1), all_phases = count_phases(call, 0) * phases;
    index_t width = call->backward ? sizes->width : sizes->out_width;
    index_t area = width * (call->backward ? sizes->height : sizes->out_height);
    const REAL *weights = call->weights + (team * call->tiles + tile) * call->depth * call->lanes;
    const REAL *frames = call->frames + part * call->members * call->sharing * frame_length(&call->frame);
    index_t first = tile * call->lanes / call->sharing, group = team * call->sharing;
    index_t results = smallest(call->results - first, call->lanes / call->sharing);
    for (index_t phase = 0; phase < all_phases; phase++) {
        axis_t rows = find_axis(call, 0, phase / phases), cols = find_axis(call, 1, phase % phases);
        index_t pixels = rows.count * cols.count, tiles = (pixels + TILE_ROWS - 1) / TILE_ROWS;
        index_t start = band * tiles / call->bands, last = (band + 1) * tiles / call->bands;
        compute_tiles(call, &rows, &cols, start, last, weights, frames, scratch);
        for (index_t member = 0; member < smallest(call->sharing, task->groups - group); member++) {
            index_t own = (group + member) * call->results + first;
            REAL *planes = (call->backward ? task->grad_input : task->output) +
                           (image * task->groups * call->results + own) * area;
            const REAL *bias = call->backward || task->bias == NULL ? NULL : task->bias + own, *sums = scratch + member;
            index_t pixel = start * TILE_ROWS, row = pixel / cols.count, col = pixel % cols.count;
            for (; pixel < smallest(last * TILE_ROWS, pixels); pixel++, sums += call->lanes) {
                REAL *to = planes + (rows.first + row * rows.step) * width + cols.first + col * cols.step;
                for (index_t result = 0; result < results; result++)
                    to[result * area] = sums[result * call->sharing] + (bias == NULL ? 0 : bias[result]);
                if (++col == cols.count) col = 0, row++;
            }
        }
    }
}

int dense_planes(parallel_t parallel, unsigned threads, const dense_t *task, int backward) {
    planes_call_t call = make_call(task, backward);
    index_t at_once = call.images, packs = call.teams * call.tiles * call.members;
    threads = worthwhile(task, threads);
    for (; call.first < task->images; call.first += at_once, packs = 0) {
        call.images = smallest(at_once, task->images - call.first);
        index_t units = call.images * call.teams * call.tiles * call.bands;
        if (run_parallel(parallel, threads, &call, call.images * call.teams * call.members + packs, 1, start_work) ||
            run_parallel(parallel, threads, &call, units, BAND * TILE_ROWS * call.lanes, planes_work))
            return 1;
    }
    return 0;
}
