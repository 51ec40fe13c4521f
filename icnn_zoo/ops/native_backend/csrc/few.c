/* The forward of layers of many small groups: columns that few outputs share never leave the registers.
 *
 * A tile is a few vectors of pixels of up to eight outputs. It walks the taps of all channels of its group, interpolates
 * each in registers and adds it to every output. The planes of a group are copied into frames with zeros enough for all
 * taps, a band of rows at a time.
 */

#include "columns.h"

enum {
    FEW = 8,                        /* outputs of a tile */
    STRIPS = BYTES == 64 ? 3 : 1,   /* vectors of a tile: with FEW outputs as many sums as registers can hold */
    LEAST_ROWS = 8,                 /* outputs' rows of a band, where there are so many */
    FRAMES = (1 << 19) / sizeof(REAL) /* numbers, about, that the frames of a band may take: a part of the second cache */
};

typedef struct {
    const columns_t *task;
    index_t low[2], high[2]; /* rows and columns that output (0, 0) reads, of all taps */
    index_t band_rows, bands;
    index_t parts; /* of all bands and images; units are those of each group */
    index_t frame; /* room for a frame */
} few_t;

typedef struct {
    index_t left, right; /* addresses of the upper neighbors in the frames of a group, for output (0, 0) of a band */
    REAL corner[4];
} few_tap_t;

/* The cell of a tap; beyond all that reads the input, where it is the nearest that reads zeros only. */
static inline shift_t few_shift(const columns_t *task, index_t index) {
    const sizes_t *sizes = &task->sizes;
    shift_t shift = make_shift(sizes, task->positions + 2 * index);
    shift.row = smallest(largest(shift.row, -(sizes->out_height - 1) * sizes->stride_row - 2), sizes->height);
    shift.col = smallest(largest(shift.col, -(sizes->out_width - 1) * sizes->stride_col - 2), sizes->width);
    return shift;
}

static frame_t few_frame(const few_t *call, index_t first, index_t last) {
    const sizes_t *sizes = &call->task->sizes;
    index_t top = first * sizes->stride_row + call->low[0], bottom = (last - 1) * sizes->stride_row + call->high[0];
    index_t right = (sizes->out_width - 1) * sizes->stride_col + call->high[1] - (sizes->width - 1);
    return make_frame(sizes->height, sizes->width, -top, bottom - (sizes->height - 1), largest(-call->low[1], 0),
                      largest(right, 0), sizes->stride_col);
}

/* Where the vectors of a tile read, from the address of a tap on, and write. */
typedef struct {
    index_t from[STRIPS], to[STRIPS];
} strips_t;

static inline __attribute__((always_inline)) void few_tile(const few_tap_t *taps, index_t count, const REAL *weight,
                                                           const REAL *start, const REAL *frames, index_t below,
                                                           const strips_t *places, REAL *to, index_t out_area,
                                                           index_t width, index_t live, const int outputs,
                                                           const int strips) {
    vector sum[FEW][STRIPS];
    const REAL *from[STRIPS];
    for (int strip = 0; strip < strips; strip++) from[strip] = frames + places->from[strip];
#pragma GCC unroll 8
    for (int output = 0; output < outputs; output++)
        for (int strip = 0; strip < strips; strip++) sum[output][strip] = all(start[output]);
    for (index_t index = 0; index < count; index++, weight += outputs) {
        const few_tap_t *tap = &taps[index];
        vector value[STRIPS];
        for (int strip = 0; strip < strips; strip++) {
            const REAL *left = from[strip] + tap->left, *right = from[strip] + tap->right;
            value[strip] = all(tap->corner[0]) * load(left) + all(tap->corner[1]) * load(right) +
                           all(tap->corner[2]) * load(left + below) + all(tap->corner[3]) * load(right + below);
        }
#pragma GCC unroll 8
        for (int output = 0; output < outputs; output++) {
            vector scale = all(weight[output]);
            for (int strip = 0; strip < strips; strip++) sum[output][strip] += scale * value[strip];
        }
    }
#pragma GCC unroll 8
    for (int output = 0; output < outputs; output++) {
        for (int strip = 0; strip < strips && output < live; strip++) {
            REAL *place = to + output * out_area + places->to[strip];
            if (width >= LANES) {
                store(place, sum[output][strip]);
            } else {
                store_part(place, sum[output][strip], width);
            }
        }
    }
}

/* Outputs of a tile: the least of 1, 2, 4 and FEW that holds those that are left. */
static inline index_t tile_outputs(index_t left) { return left > 4 ? FEW : left > 2 ? 4 : left; }

static void few_band(const few_t *call, const few_tap_t *taps, const REAL *weight, const REAL *start, const REAL *frames,
                     const frame_t *frame, index_t rows, REAL *to) {
    const columns_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    index_t width = sizes->out_width, out_area = sizes->out_height * width, vectors = (width + LANES - 1) / LANES;
    index_t group_outputs = task->outputs / task->groups, count = task->channels / task->groups * task->taps;
    for (index_t first = 0; first < group_outputs; first += FEW) {
        index_t live = smallest(group_outputs - first, FEW), outputs = tile_outputs(live);
        const REAL *own = weight + first * count;
        for (index_t strip = 0; strip < rows * vectors; strip += STRIPS) {
            index_t strips = smallest(rows * vectors - strip, STRIPS);
            strips_t places;
            for (index_t part = 0; part < strips; part++) {
                index_t row = (strip + part) / vectors, col = (strip + part) % vectors * LANES;
                if (width >= LANES) col = smallest(col, width - LANES); /* some outputs twice, with the same result */
                places.from[part] = row * sizes->stride_row * frame->pitch + col;
                places.to[part] = row * width + col;
            }
#define TILE(N, S)                                                                                                     \
    case N * 4 + S:                                                                                                    \
        few_tile(taps, count, own, start + first, frames, frame->pitch, &places, to + first * out_area, out_area, width, \
                 live, N, S);                                                                                          \
        break
            switch (outputs * 4 + strips) {
                TILE(1, 1);
                TILE(2, 1);
                TILE(4, 1);
                TILE(8, 1);
#if defined(__AVX512F__) /* three strips */
                TILE(1, 2);
                TILE(2, 2);
                TILE(4, 2);
                TILE(8, 2);
                TILE(1, 3);
                TILE(2, 3);
                TILE(4, 3);
                TILE(8, 3);
#endif
            }
#undef TILE
        }
    }
}

/* A part of the bands and images of one group. */
static void few_work(const void *data, index_t unit, REAL *scratch) {
    const few_t *call = data;
    const columns_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    index_t group = unit / call->parts, part = unit % call->parts, slices = task->images * call->bands;
    index_t members = task->channels / task->groups, outputs = task->outputs / task->groups;
    index_t count = members * task->taps, area = sizes->height * sizes->width;
    few_tap_t *taps = (few_tap_t *)scratch;
    REAL *frames = (REAL *)(taps + count), *weight = frames + members * call->frame;
    REAL *start = weight + round_up(outputs, FEW) * count;
    REAL unknown = 0;
    frame_t whole = few_frame(call, 0, call->band_rows);
    for (index_t index = 0; index < count; index++) {
        shift_t shift = few_shift(task, group * count + index);
        REAL down = shift.down, right = shift.right;
        index_t plane = index / task->taps * call->frame;
        taps[index] = (few_tap_t){plane + frame_at(&whole, shift.row, shift.col),
                                  plane + frame_at(&whole, shift.row, shift.col + 1),
                                  {(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right}};
        unknown += (down + right) * 0;
    }
    for (index_t first = 0; first < outputs; first += FEW) {
        index_t live = smallest(outputs - first, FEW), tile = tile_outputs(live);
        const REAL *from = task->weight + (group * outputs + first) * count;
        for (index_t output = 0; output < tile; output++) {
            REAL bias = output >= live || task->bias == NULL ? 0 : task->bias[group * outputs + first + output];
            start[first + output] = bias + unknown;
            for (index_t index = 0; index < count; index++)
                weight[first * count + index * tile + output] = output < live ? from[output * count + index] : 0;
        }
    }
    for (index_t slice = part * slices / call->parts; slice < (part + 1) * slices / call->parts; slice++) {
        index_t image = slice / call->bands, first = slice % call->bands * call->band_rows;
        index_t last = smallest(first + call->band_rows, sizes->out_height);
        frame_t frame = few_frame(call, first, last);
        index_t row_first = largest(-frame.top, 0), row_last = smallest(frame.rows - frame.top, sizes->height);
        for (index_t member = 0; member < members; member++)
            fill_rows(&frame, frames + member * call->frame,
                      task->input + (image * task->channels + group * members + member) * area, row_first, row_last,
                      sizes->width);
        few_band(call, taps, weight, start, frames, &frame, last - first,
                 task->output + (image * task->outputs + group * outputs) * sizes->out_height * sizes->out_width +
                     first * sizes->out_width);
    }
}

static void cut_few(few_t *call, unsigned threads) {
    const columns_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    for (int axis = 0; axis < 2; axis++) {
        call->low[axis] = INT64_MAX;
        call->high[axis] = INT64_MIN;
    }
    for (index_t index = 0; index < task->channels * task->taps; index++) {
        shift_t shift = few_shift(task, index);
        call->low[0] = smallest(call->low[0], shift.row);
        call->high[0] = largest(call->high[0], shift.row + 1);
        call->low[1] = smallest(call->low[1], shift.col);
        call->high[1] = largest(call->high[1], shift.col + 1);
    }
    frame_t line = few_frame(call, 0, 1);
    index_t members = task->channels / task->groups;
    index_t rows = (FRAMES / members / line.pitch - line.rows) / sizes->stride_row + 1;
    /* Every output has one sum whatever the bands and parts: there may be as many as the threads want. */
    index_t wanted = (4 * (index_t)threads + task->groups - 1) / task->groups;
    index_t bands = (wanted + task->images - 1) / task->images;
    rows = smallest(rows, (sizes->out_height + bands - 1) / bands);
    call->band_rows = smallest(largest(rows, LEAST_ROWS), sizes->out_height);
    call->bands = (sizes->out_height + call->band_rows - 1) / call->band_rows;
    call->parts = smallest(wanted, task->images * call->bands);
    frame_t frame = few_frame(call, 0, call->band_rows);
    call->frame = frame_length(&frame);
}

/* 2 where nothing was computed, as the frames of a group are too large for the cache: columns are better there. */
int few_forward(parallel_t parallel, unsigned threads, const columns_t *task) {
    few_t call = {.task = task};
    index_t members = task->channels / task->groups, outputs = round_up(task->outputs / task->groups, FEW);
    double products = (double)task->images * task->sizes.out_height * task->sizes.out_width * task->outputs * members;
    double wanted = products * task->taps / (1 << 19);
    if (wanted < threads) threads = (unsigned)wanted + 1;
    if (members * LEAST_ROWS * task->sizes.width > 2 * FRAMES) return 2;
    cut_few(&call, threads);
    if (members * call.frame > 2 * FRAMES) return 2;
    index_t length = members * call.frame + outputs * (members * task->taps + 1) +
                     members * task->taps * (index_t)(sizeof(few_tap_t) / sizeof(REAL));
    return run_parallel(parallel, threads, &call, task->groups * call.parts, length, few_work);
}
