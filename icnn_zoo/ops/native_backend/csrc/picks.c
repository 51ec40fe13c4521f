/* The full version by picking: a pixel of every cell that any kernel reads is copied into columns once for many kernels,
 * and each kernel picks the four columns of each of its taps.
 *
 * Four multiply-adds a tap, wherever in the box it lies, where a dense convolution over the box has one for every cell of
 * it: cheaper where the box is large, as with dilated layers. Vectors lie along pixels, rows and images one after the
 * other, so that none is wasted on small maps. Forward and input's gradient are one function with the planes' parts
 * changed; strides are 1. Taps outside of the box are left to the stencils.
 */

#include "plane.h"

typedef struct {
    sizes_t sizes; /* origin: where position 0 of output 0 reads */
    index_t images, channels, outputs, groups, taps;
    index_t wide;              /* whether positions are doubles, else floats */
    index_t first[2], size[2]; /* of the box, in pixels from position 0 */
    const REAL *input;         /* [images, channels, height, width] */
    const REAL *weight;        /* [outputs, channels / groups, taps] */
    const void *positions;     /* [outputs, channels / groups, taps, 2] */
    const REAL *bias;          /* [outputs], or NULL */
    REAL *output;              /* [images, outputs, out_height, out_width] */
    const REAL *grad_output;   /* as output */
    REAL *grad_input;          /* as input */
    REAL *grad_weight;         /* as weight, zero for other taps */
    double *grad_shift;        /* as positions, zero for other taps */
    REAL *workspace;           /* what picks_workspace_length says */
} picks_t;

/* Vectors of a column, so many that sums stay in registers and columns in the nearest cache; columns' worth of pixels of
 * a range, whose sums stay in the second; results of a block, which share columns. */
enum { VECTORS = 6, BAND = VECTORS * LANES, RANGE = 16 * BAND, BLOCK = 128 };
/* Bands whose products are added in REAL before they are in double. */
enum { FLUSH = 64 };

/* A tap of a kernel: where its upper and lower pair of columns start, and what its four cells weigh. */
typedef struct {
    int32_t upper, lower, tap;
    REAL parts[4];
} pick_t;

/* A part of a row of pixels: where the first cell of the box reads, and where in the column it is. */
typedef struct {
    index_t from, to;
} segment_t;

typedef struct {
    const picks_t *task;
    int backward;                 /* whether the input's gradient is computed from the output's, else the output */
    index_t height, width;        /* of the planes that are computed */
    index_t read_height, read_width;
    index_t low[2];               /* the first row and column of cells, for pixel (0, 0) */
    index_t members, results;     /* planes of a group that are read, that are computed */
    index_t blocks, block;        /* of results, and how many are in one */
    index_t rows, ranges;         /* of all images one after the other: in a range, and how many ranges */
    index_t pitch, frame_length;  /* of the rows that a range reads, of all of its images */
    index_t room;                 /* columns at most */
} call_t;

/* What a thread works in. */
typedef struct {
    REAL *sums;         /* of what is computed */
    REAL *columns;      /* [room, BAND] */
    REAL *frame;        /* rows that a range reads, with zeros around */
    pick_t *picks;      /* [block, taps] */
    int32_t *counts;    /* [block] */
    int32_t *places;    /* [cells of the box]: the number of its column, or -1 */
    index_t *offsets;   /* [room]: of a column, in the frame */
    index_t *starts;    /* [rows]: of a row of pixels, in the frame */
    segment_t *segments; /* [BAND + 1] */
} room_t;

/* Ranges are cut smaller where fewer than so many units would come of them. */
static call_t make_call(const picks_t *task, int backward, index_t units) {
    const sizes_t *sizes = &task->sizes;
    index_t origin[2] = {sizes->origin_row, sizes->origin_col};
    index_t group_outputs = task->outputs / task->groups, group_channels = task->channels / task->groups;
    call_t call = {.task = task, .backward = backward};
    call.height = backward ? sizes->height : sizes->out_height;
    call.width = backward ? sizes->width : sizes->out_width;
    call.read_height = backward ? sizes->out_height : sizes->height;
    call.read_width = backward ? sizes->out_width : sizes->width;
    for (int axis = 0; axis < 2; axis++) {
        index_t first = origin[axis] + task->first[axis];
        call.low[axis] = backward ? -first - task->size[axis] + 1 : first;
    }
    call.members = backward ? group_outputs : group_channels;
    call.results = backward ? group_channels : group_outputs;
    call.blocks = (call.results + BLOCK - 1) / BLOCK;
    call.block = (call.results + call.blocks - 1) / call.blocks;
    index_t rows = task->images * call.height, ranges = (units - 1) / (task->groups * call.blocks) + 1;
    index_t least = largest(BAND / call.width, 1), most = largest(RANGE / call.width, 1);
    call.rows = smallest(smallest(largest((rows + ranges - 1) / ranges, least), most), rows);
    call.ranges = (rows + call.rows - 1) / call.rows;
    call.pitch = call.width + task->size[1] - 1;
    index_t touched = smallest((call.rows - 2 + call.height) / call.height + 1, task->images);
    call.frame_length = (call.rows + touched * (task->size[0] - 1)) * call.pitch + BAND;
    call.room = smallest(task->size[0] * task->size[1], 4 * call.block * task->taps);
    return call;
}

/* Numbers of a part of the scratch, each at a line of the cache. */
static index_t part_length(index_t bytes) { return round_up(bytes, 64) / sizeof(REAL); }

/* The parts of the scratch, and its length; `sums` numbers are wanted of them. */
static index_t make_room(const call_t *call, index_t sums, REAL *scratch, room_t *room) {
    const picks_t *task = call->task;
    index_t at = 0, taps = call->block * task->taps;
#define PART(name, count)                                                                                              \
    room->name = scratch == NULL ? NULL : (void *)(scratch + at);                                                      \
    at += part_length((count) * sizeof(*room->name))
    PART(sums, sums);
    PART(columns, (call->room + 1) * BAND);
    PART(frame, call->frame_length);
    PART(picks, taps);
    PART(counts, call->block);
    PART(places, task->size[0] * task->size[1]);
    PART(offsets, call->room);
    PART(starts, call->rows);
    PART(segments, BAND + 1);
#undef PART
    return at;
}

/* The weights' index of the kernel between a result and a member of a group. */
static index_t kernel_of(const call_t *call, index_t group, index_t result, index_t member) {
    return call->backward ? (group * call->members + member) * call->results + result
                          : (group * call->results + result) * call->members + member;
}

/* The taps of the kernels of a block that lie in the box, and the columns that they read: how many. */
static index_t collect(const call_t *call, index_t group, index_t first, index_t count, index_t member, room_t *room) {
    const picks_t *task = call->task;
    index_t taps = task->taps, height = task->size[0], width = task->size[1], columns = 0;
    memset(room->places, -1, height * width * sizeof(int32_t));
    for (index_t result = 0; result < count; result++) {
        index_t kernel = kernel_of(call, group, first + result, member);
        pick_t *pick = room->picks + result * taps;
        for (index_t tap = kernel * taps; tap < (kernel + 1) * taps; tap++) {
            double row = coordinate(task->positions, task->wide, 2 * tap) - task->first[0], col = coordinate(task->positions, task->wide, 2 * tap + 1) - task->first[1];
            double upper = __builtin_floor(row), left = __builtin_floor(col);
            if (!(upper >= 0 && upper <= height - 2 && left >= 0 && left <= width - 2)) continue;
            REAL down = (REAL)(row - upper), right = (REAL)(col - left), weight = task->weight[tap];
            int32_t cell = (int32_t)(upper * width + left), *place = room->places + cell;
            *pick++ = (pick_t){cell, 0, (int32_t)(tap - kernel * taps),
                               {(1 - down) * (1 - right) * weight, (1 - down) * right * weight,
                                down * (1 - right) * weight, down * right * weight}};
            place[0] = place[1] = place[width] = place[width + 1] = 0;
        }
        room->counts[result] = (int32_t)(pick - room->picks - result * taps);
    }
    for (index_t row = 0; row < height; row++) {
        index_t down = (call->backward ? height - 1 - row : row) * call->pitch;
        for (index_t col = 0; col < width; col++) {
            int32_t *place = room->places + row * width + col;
            if (*place < 0) continue;
            *place = (int32_t)columns;
            room->offsets[columns++] = down + (call->backward ? width - 1 - col : col);
        }
    }
    /* The columns of neighbors in a row of the box are neighbors. */
    for (index_t result = 0; result < count; result++) {
        for (pick_t *pick = room->picks + result * taps; pick < room->picks + result * taps + room->counts[result]; pick++) {
            int32_t cell = pick->upper;
            pick->upper = room->places[cell] * BAND;
            pick->lower = room->places[cell + width] * BAND;
        }
    }
    return columns;
}

/* Copies what the rows [first, last) of pixels read of a plane of each image; `step` from an image to the next. */
static void fill_range(const call_t *call, const REAL *plane, index_t step, index_t first, index_t last, room_t *room) {
    index_t above = call->task->size[0] - 1, length = call->frame_length, width = call->read_width, at = 0;
    index_t col_first = largest(call->low[1], 0), col_last = smallest(call->low[1] + call->pitch, width);
    memset(room->frame, 0, length * sizeof(REAL));
    for (index_t row = first; row < last;) {
        index_t image = row / call->height, top = row % call->height;
        index_t bottom = smallest(top + last - row, call->height);
        index_t read_first = largest(top + call->low[0], 0);
        index_t read_last = smallest(bottom + above + call->low[0], call->read_height);
        for (index_t read = read_first; read < read_last && col_first < col_last; read++)
            copy_row(room->frame + at + (read - top - call->low[0]) * call->pitch + col_first - call->low[1],
                     plane + image * step + read * width + col_first, col_last - col_first);
        for (; top < bottom; top++, row++, at += call->pitch) room->starts[row - first] = at;
        at += above * call->pitch;
    }
}

/* In whole vectors: what is past the end of a segment is written over by the next one. */
static inline __attribute__((always_inline)) void copy_segments(REAL *to, const REAL *from, const segment_t *segments,
                                                                index_t count, const index_t vectors) {
    for (const segment_t *segment = segments; segment < segments + count; segment++)
        for (index_t part = 0; part < vectors; part++)
            store(to + segment->to + part * LANES, load(from + segment->from + part * LANES));
}

/* The columns of `count` pixels of a range from `first` on: zeros after them. */
static void make_columns(const call_t *call, index_t first, index_t count, index_t columns, room_t *room) {
    index_t parts = 0, width = call->width, vectors = (smallest(width, count) + LANES - 1) / LANES;
    for (index_t at = 0; at < count; parts++) {
        index_t row = (first + at) / width, col = (first + at) % width;
        room->segments[parts] = (segment_t){room->starts[row] + col, at};
        at += width - col;
    }
    for (index_t column = 0; column < columns; column++) {
        const REAL *from = room->frame + room->offsets[column];
        REAL *to = room->columns + column * BAND;
        switch (vectors) { /* the most that a segment has */
        case 1: copy_segments(to, from, room->segments, parts, 1); break;
        case 2: copy_segments(to, from, room->segments, parts, 2); break;
        case 3: copy_segments(to, from, room->segments, parts, 3); break;
        default: copy_segments(to, from, room->segments, parts, vectors);
        }
        if (count < BAND) memset(to + count, 0, (BAND - count) * sizeof(REAL));
    }
}

/* sums += what the taps of a kernel pick. */
static __attribute__((noinline)) void add_picks(const pick_t *picks, index_t count, const REAL *columns, REAL *sums) {
    vector upper[VECTORS], lower[VECTORS];
#pragma GCC unroll 6
    for (int part = 0; part < VECTORS; part++) {
        upper[part] = load(sums + part * LANES);
        lower[part] = all(0);
    }
    for (const pick_t *pick = picks; pick < picks + count; pick++) {
        const REAL *above = columns + pick->upper, *below = columns + pick->lower;
        vector scale[4] = {all(pick->parts[0]), all(pick->parts[1]), all(pick->parts[2]), all(pick->parts[3])};
#pragma GCC unroll 6
        for (int part = 0; part < VECTORS; part++) {
            upper[part] += scale[0] * load(above + part * LANES);
            lower[part] += scale[2] * load(below + part * LANES);
        }
#pragma GCC unroll 6
        for (int part = 0; part < VECTORS; part++) {
            upper[part] += scale[1] * load(above + BAND + part * LANES);
            lower[part] += scale[3] * load(below + BAND + part * LANES);
        }
    }
#pragma GCC unroll 6
    for (int part = 0; part < VECTORS; part++) store(sums + part * LANES, upper[part] + lower[part]);
}

/* sums[tap, corner] += products of a band of the output's gradient with the columns that a kernel's taps pick. */
static __attribute__((noinline)) void add_moments(const pick_t *picks, index_t count, const REAL *columns,
                                                  const REAL *grads, REAL *sums) {
    vector grad[VECTORS];
#pragma GCC unroll 6
    for (int part = 0; part < VECTORS; part++) grad[part] = load(grads + part * LANES);
    for (const pick_t *pick = picks; pick < picks + count; pick++) {
        const REAL *above = columns + pick->upper, *below = columns + pick->lower;
        REAL *to = sums + pick->tap * 4 * LANES;
        vector total[4] = {load(to), load(to + LANES), load(to + 2 * LANES), load(to + 3 * LANES)};
#pragma GCC unroll 6
        for (int part = 0; part < VECTORS; part++) {
            total[0] += grad[part] * load(above + part * LANES);
            total[1] += grad[part] * load(above + BAND + part * LANES);
            total[2] += grad[part] * load(below + part * LANES);
            total[3] += grad[part] * load(below + BAND + part * LANES);
        }
        for (int corner = 0; corner < 4; corner++) store(to + corner * LANES, total[corner]);
    }
}

static index_t bands_of(index_t pixels) { return (pixels + BAND - 1) / BAND; }

/* A range of the pixels of a block of results. */
static void planes_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    const picks_t *task = call->task;
    index_t range = unit % call->ranges, block = unit / call->ranges % call->blocks;
    index_t group = unit / call->ranges / call->blocks, rows = task->images * call->height;
    index_t first = block * call->block, results = smallest(call->block, call->results - first);
    index_t top = range * call->rows, bottom = smallest(top + call->rows, rows), pixels = (bottom - top) * call->width;
    index_t bands = bands_of(pixels), area = call->height * call->width, read_area = call->read_height * call->read_width;
    index_t read_step = task->groups * call->members * read_area;
    room_t room;
    make_room(call, bands_of(call->rows * call->width) * call->block * BAND, scratch, &room);
    memset(room.sums, 0, bands * results * BAND * sizeof(REAL));
    for (index_t member = 0; member < call->members; member++) {
        const REAL *planes = call->backward ? task->grad_output : task->input;
        index_t columns = collect(call, group, first, results, member, &room);
        if (columns == 0) continue;
        fill_range(call, planes + (group * call->members + member) * read_area, read_step, top, bottom, &room);
        for (index_t band = 0; band < bands; band++) {
            make_columns(call, band * BAND, smallest(BAND, pixels - band * BAND), columns, &room);
            for (index_t result = 0; result < results; result++)
                add_picks(room.picks + result * task->taps, room.counts[result], room.columns,
                          room.sums + (band * results + result) * BAND);
        }
    }
    for (index_t result = 0; result < results; result++) {
        index_t plane = group * call->results + first + result;
        REAL bias = call->backward || task->bias == NULL ? 0 : task->bias[plane];
        REAL *planes = (call->backward ? task->grad_input : task->output) + plane * area;
        for (index_t pixel = 0, length; pixel < pixels; pixel += length) {
            index_t place = top * call->width + pixel, image = place / area, left = BAND - pixel % BAND;
            const REAL *from = room.sums + (pixel / BAND * results + result) * BAND + pixel % BAND;
            REAL *to = planes + image * task->groups * call->results * area + place % area;
            length = smallest(smallest(left, pixels - pixel), area - place % area);
            for (index_t at = 0; at < length; at++) to[at] = from[at] + bias;
        }
    }
}

/* Pixels of all images in the workspace, and what is read past them. */
static index_t packed_length(const picks_t *task) {
    return task->images * task->sizes.out_height * task->sizes.out_width + BAND;
}

index_t picks_workspace_length(const picks_t *task) { return task->outputs * packed_length(task); }

/* The output's gradient of one output, image after image. */
static void pack_work(const void *data, index_t output, REAL *scratch) {
    const call_t *call = data;
    const picks_t *task = call->task;
    index_t area = task->sizes.out_height * task->sizes.out_width;
    REAL *to = task->workspace + output * packed_length(task);
    (void)scratch;
    for (index_t image = 0; image < task->images; image++, to += area)
        memcpy(to, task->grad_output + (image * task->outputs + output) * area, area * sizeof(REAL));
    memset(to, 0, BAND * sizeof(REAL));
}

/* Adds sums of vectors to those in double, and clears them. */
static void flush(REAL *sums, double *moments, index_t count) {
    for (index_t at = 0; at < count; at++) moments[at] += sum_lanes(load(sums + at * LANES));
    memset(sums, 0, count * LANES * sizeof(REAL));
}

/* The gradients of the kernels of a block of outputs for one channel. */
static void kernels_work(const void *data, index_t unit, REAL *scratch) {
    const call_t *call = data;
    const picks_t *task = call->task;
    index_t block = unit % call->blocks, member = unit / call->blocks % call->members;
    index_t group = unit / call->blocks / call->members, taps = task->taps;
    index_t first = block * call->block, results = smallest(call->block, call->results - first);
    index_t area = call->read_height * call->read_width, rows = task->images * call->height, waiting = 0;
    index_t sums = call->block * taps * 4, numbers = results * taps * 4;
    room_t room;
    index_t length = make_room(call, sums * LANES, scratch, &room);
    double *moments = (double *)(scratch + length);
    memset(room.sums, 0, numbers * LANES * sizeof(REAL));
    memset(moments, 0, numbers * sizeof(double));
    index_t columns = collect(call, group, first, results, member, &room);
    for (index_t top = 0; top < rows && columns > 0; top += call->rows) {
        index_t bottom = smallest(top + call->rows, rows), pixels = (bottom - top) * call->width;
        fill_range(call, task->input + (group * call->members + member) * area, task->channels * area, top, bottom, &room);
        for (index_t band = 0; band < bands_of(pixels); band++) {
            make_columns(call, band * BAND, smallest(BAND, pixels - band * BAND), columns, &room);
            const REAL *grads = task->workspace + top * call->width + band * BAND;
            for (index_t result = 0; result < results; result++) {
                index_t output = group * call->results + first + result;
                add_moments(room.picks + result * taps, room.counts[result], room.columns,
                            grads + output * packed_length(task), room.sums + result * taps * 4 * LANES);
            }
            if (++waiting % FLUSH == 0) flush(room.sums, moments, numbers);
        }
    }
    flush(room.sums, moments, numbers);
    for (index_t result = 0; result < results; result++) {
        index_t start = kernel_of(call, group, first + result, member) * taps;
        memset(task->grad_weight + start, 0, taps * sizeof(REAL));
        memset(task->grad_shift + 2 * start, 0, 2 * taps * sizeof(double));
        for (index_t index = 0; index < room.counts[result]; index++) {
            index_t own = room.picks[result * taps + index].tap, tap = start + own;
            double row = coordinate(task->positions, task->wide, 2 * tap), col = coordinate(task->positions, task->wide, 2 * tap + 1), weight = task->weight[tap];
            finish_tap(moments + (result * taps + own) * 4, row - __builtin_floor(row), col - __builtin_floor(col), weight,
                       task->grad_weight + tap, task->grad_shift + 2 * tap);
        }
    }
}

/* Threads that a call is worth: below about this many multiply-adds for each, starting them takes longer. */
static unsigned worthwhile(const picks_t *task, unsigned threads) {
    double pixels = (double)task->images * task->sizes.out_height * task->sizes.out_width;
    double wanted = pixels * task->outputs * (task->channels / task->groups) * task->taps / (1 << 17);
    return wanted < threads ? (unsigned)wanted + 1 : threads;
}

int picks_planes(parallel_t parallel, unsigned threads, const picks_t *task, int backward) {
    threads = worthwhile(task, threads);
    /* No sum goes over pixels: there may be as many ranges as the threads want. */
    call_t call = make_call(task, backward, threads > 1 ? 4 * (index_t)threads : 1);
    room_t room;
    index_t sums = bands_of(call.rows * call.width) * call.block * BAND;
    index_t length = make_room(&call, sums, NULL, &room);
    return run_parallel(parallel, threads, &call, task->groups * call.blocks * call.ranges, length, planes_work);
}

int picks_kernels(parallel_t parallel, unsigned threads, const picks_t *task) {
    call_t call = make_call(task, 0, 1);
    room_t room;
    index_t sums = call.block * task->taps * 4;
    index_t length = make_room(&call, sums * LANES, NULL, &room) + sums * sizeof(double) / sizeof(REAL);
    threads = worthwhile(task, threads);
    return run_parallel(parallel, threads, &call, task->outputs, 1, pack_work) ||
           run_parallel(parallel, threads, &call, task->groups * call.members * call.blocks, length, kernels_work);
}
