/* Layers with a shape per input channel: columns (every (channel, tap)'s plane at its shift) and their products.
 *
 * A thread makes the columns of a band of output pixels, a few channels at a time, and multiplies them before they leave
 * the cache. The backward does the same with the transposed weights and spreads what comes out over the input's gradient.
 */

#include "plane.h"

/* ---- matrix products --------------------------------------------------------------------------------------------- */

/* Numbers that a later product reads, fetched meanwhile: from a far cache they would come too late. */
typedef struct {
    const REAL *from;
    index_t length;
} ahead_t;

/* The left factor of a product, of which d is the row and the row that of the product: at[row * across + d * along]. In
 * tiles it is [rows / TILE_ROWS, depth, TILE_ROWS], and across and along are of one of them. */
typedef struct {
    const REAL *at;
    index_t across, along;
} left_t;

/* total += sum over depth of a[d, row] * b[d, column] for the first rows of a tile, and for one or both of its vectors;
 * the rows of b are `step` apart. With every d `pace` bytes are fetched from `ahead`. */
static inline __attribute__((always_inline)) void multiply_rows(index_t depth, left_t a, const REAL *b, index_t step,
                                                                REAL *total, index_t pitch, const char *ahead,
                                                                index_t pace, const int rows, const int vectors) {
    vector sum[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) sum[row][0] = sum[row][1] = all(0);
    for (index_t d = 0; d < depth; d++, a.at += a.along, b += step, ahead += pace) {
        vector left = load(b), right = vectors > 1 ? load(b + LANES) : left;
        __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            vector scale = all(a.at[row * a.across]);
            sum[row][0] += scale * left;
            if (vectors > 1) sum[row][1] += scale * right;
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++, total += pitch) {
        store(total, load(total) + sum[row][0]);
        if (vectors > 1) store(total + LANES, load(total + LANES) + sum[row][1]);
    }
}

static inline __attribute__((always_inline)) void multiply_tile(index_t depth, left_t a, const REAL *b, index_t step,
                                                                REAL *total, index_t pitch, const char *ahead,
                                                                index_t pace, index_t rows, index_t columns) {
#define ROWS(N, VECTORS) multiply_rows(depth, a, b, step, total, pitch, ahead, pace, N, VECTORS)
    if (columns <= LANES) {
        if (3 * rows <= TILE_ROWS) ROWS(TILE_ROWS / 3, 1);
        else if (3 * rows <= 2 * TILE_ROWS) ROWS(TILE_ROWS / 3 * 2, 1);
        else ROWS(TILE_ROWS, 1);
    } else {
        if (3 * rows <= TILE_ROWS) ROWS(TILE_ROWS / 3, 2);
        else if (3 * rows <= 2 * TILE_ROWS) ROWS(TILE_ROWS / 3 * 2, 2);
        else ROWS(TILE_ROWS, 2);
    }
#undef ROWS
}

static void multiply_packed(index_t depth, const REAL *a, const REAL *b, index_t step, REAL *total, index_t pitch,
                            const char *ahead, index_t pace, index_t rows, index_t columns) {
    multiply_tile(depth, (left_t){a, 1, TILE_ROWS}, b, step, total, pitch, ahead, pace, rows, columns);
}

static void multiply_flat(index_t depth, const REAL *a, index_t across, const REAL *b, index_t step, REAL *total,
                          index_t pitch, const char *ahead, index_t pace, index_t rows, index_t columns) {
    multiply_tile(depth, (left_t){a, across, 1}, b, step, total, pitch, ahead, pace, rows, columns);
}

/* All tiles: a is [rows / TILE_ROWS, depth, TILE_ROWS], or [rows, across] where that is not 0, and a tile of b is `tile`
 * after the one before. Of the last tile of a no more than the rows that are wanted need be right, of the last one of b no
 * more than the columns. */
static inline void multiply(index_t rows, index_t columns, index_t depth, const REAL *a, index_t across, const REAL *b,
                            index_t step, index_t tile, REAL *total, index_t pitch, ahead_t ahead) {
    index_t tiles = round_up(rows, TILE_ROWS) / TILE_ROWS * (round_up(columns, TILE_COLUMNS) / TILE_COLUMNS);
    index_t pace = ahead.length * sizeof(REAL) / (tiles * depth) + 1;
    const char *from = (const char *)ahead.from;
    for (index_t column = 0; column < columns; column += TILE_COLUMNS, b += tile)
        for (index_t row = 0; row < rows; row += TILE_ROWS, from += pace * depth) {
            REAL *to = total + row * pitch + column;
            index_t used = smallest(rows - row, TILE_ROWS);
            if (across == 0) {
                multiply_packed(depth, a + row * depth, b, step, to, pitch, from, pace, used, columns - column);
            } else {
                multiply_flat(depth, a + row * across, across, b, step, to, pitch, from, pace, used, columns - column);
            }
        }
}

/* ---- columns ----------------------------------------------------------------------------------------------------- */

/* Outputs [first, last) whose two neighbors lie within one row or column of zeros around the input. */
static inline void live_range(index_t shift, index_t stride, index_t size, index_t outputs, index_t *first, index_t *last) {
    *first = smallest(largest(floor_div(-1 - shift + stride - 1, stride), 0), outputs);
    *last = largest(smallest(floor_div(size - 1 - shift, stride) + 1, outputs), *first);
}

typedef struct {
    index_t row;                                      /* that output row 0 reads, and the next one */
    index_t row_first, row_last, col_first, col_last; /* live outputs */
    index_t top_left, top_right;                      /* addresses in the frame for output (row 0, col_first) */
    index_t row_step;                                 /* from one output row to the next in the frame */
    index_t below;                                    /* from a row of the frame to the next */
    REAL down, right;                                 /* fractions */
} tap_t;

static inline tap_t make_tap(const frame_t *frame, const sizes_t *sizes, const double *position) {
    shift_t shift = make_shift(sizes, position);
    index_t row = shift.row, col = shift.col;
    tap_t tap;
    tap.row = row;
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
    double *grad_shift;      /* [channels * taps, 2], with windows [channels * taps, reads_row + reads_col]; or NULL */
    REAL *workspace;         /* what workspace_length says */
    /* Windows of triangle and gaussian taps; positions are not read then. Else 0 and NULL. */
    index_t reads_row, reads_col;         /* pixels of a window */
    const index_t *first_row, *first_col; /* [channels, taps], of the window of output (0, 0) */
    const REAL *rows, *cols;              /* [channels, taps, reads], weights */
} columns_t;

typedef struct {
    frame_t frame;
    index_t area, out_area;
    index_t group_channels, group_outputs;
    index_t step;       /* channels of a block */
    index_t blocks;     /* of all groups */
    index_t rows;       /* rows of columns of a block, rounded up to tiles */
    index_t band_rows;  /* output rows of a band */
    index_t bands;      /* of an image */
    index_t lot;        /* whole images of a band, where they are small; else 1 */
    index_t lots;       /* bands of all images */
    index_t band;       /* output pixels of a band, rounded up to tiles */
    index_t slices;     /* bands of all images and groups */
    index_t cuts;       /* backward: parts of an image */
    index_t parts;      /* backward: of all images; several lots where cuts is 1 */
    index_t tile_rows, tile_columns; /* outputs of a group, rounded up to rows and to columns of tiles */
    tap_t *taps;        /* [channels, taps] */
    REAL *packed;       /* forward: weights; backward: weights transposed */
    REAL *frames;       /* backward: [images, channels, frame_length] */
    REAL *grads;        /* [lots, groups, band / TILE_COLUMNS, group_outputs, TILE_COLUMNS] */
    REAL *grads_across; /* [lots, groups, tile_columns / TILE_COLUMNS, band, TILE_COLUMNS] */
    double *by_shift;   /* [parts, channels * taps, shift_length] */
    REAL *by_weight;    /* [parts, blocks, rows, tile_columns] */
    REAL *by_input;     /* [cuts, images, channels, area]; the gradient itself where cuts is 1 */
    REAL *end;
} layout_t;

enum {
    UNITS = 384,         /* that a backward is cut into, about: enough for many threads */
    LEAST_BAND = 128,    /* output pixels below which products are slow */
    WEIGHTS = 1 << 16,   /* forward: weights that a product takes at once, about, but for */
    LEAST_DEPTH = 64     /* so many rows of columns at least: these, others and sums share the second cache */
};

static inline REAL *take(REAL **at, index_t length) {
    REAL *start = *at;
    *at += length;
    return start;
}

/* Channels of a block: between a third of the depth and the depth, so that least of the tiles is empty. */
static inline index_t block_step(const columns_t *task, index_t channels) {
    index_t most = smallest(largest(task->depth / task->taps, 1), channels), best = most;
    index_t used = most * task->taps, padded = round_up(used, TILE_ROWS);
    for (index_t step = most - 1; step >= 1 && step * task->taps * 3 >= task->depth; step--) {
        index_t rows = step * task->taps, whole = round_up(rows, TILE_ROWS);
        if (whole * used <= padded * rows) best = step, used = rows, padded = whole;
    }
    index_t blocks = (channels + best - 1) / best;
    return (channels + blocks - 1) / blocks;
}

/* Pixels of all bands as vectors have them, where one has so many of so many. */
static inline index_t padded(index_t all, index_t most, index_t pixels) {
    index_t whole = all / most;
    return whole * round_up(most * pixels, LANES) + round_up((all - whole * most) * pixels, LANES);
}

/* Bands of one height, of which as few pixels as can be are added to make whole tiles; the last may be lower. */
static inline void cut_bands(layout_t *layout, const columns_t *task, index_t pixels) {
    index_t width = task->sizes.out_width, height = task->sizes.out_height;
    index_t most = smallest(largest((pixels + width / 2) / width, 1), height);
    if (3 * height * width <= 4 * pixels) most = height; /* a second band would have few */
    layout->band_rows = most;
    for (index_t rows = most; rows >= 1 && 2 * rows >= most; rows--)
        if (padded(height, rows, width) < padded(height, layout->band_rows, width)) layout->band_rows = rows;
    layout->bands = (height + layout->band_rows - 1) / layout->band_rows;
}

/* Several small images in a band. With threads, the forward's: as few pixels as can be for the one that has most. */
static inline void join_images(layout_t *layout, const columns_t *task, unsigned threads) {
    index_t area = layout->band_rows * task->sizes.out_width, least = INT64_MAX;
    index_t most = layout->bands > 1 ? 1 : largest(smallest(task->band / area, task->images), 1);
    for (index_t lot = most; lot >= 1; lot--) {
        index_t cost = padded(task->images, lot, area), units = (task->images + lot - 1) / lot * task->groups;
        if (threads > 0) cost = (units + threads - 1) / threads * round_up(lot * area, LANES);
        if (cost > least || (cost == least && threads == 0)) continue;
        least = cost;
        layout->lot = lot;
    }
    layout->lots = (task->images + layout->lot - 1) / layout->lot * layout->bands;
    layout->band = round_up(layout->lot * area, TILE_COLUMNS);
    layout->slices = layout->lots * task->groups;
}

/* Every output has one sum whatever the bands: the forward may have as many of them as the threads want. */
static inline index_t forward_band(const columns_t *task, index_t area, unsigned threads) {
    index_t others = task->images * task->groups, wanted = (3 * (index_t)threads + others - 1) / others;
    return smallest(task->band, largest(area / wanted, LEAST_BAND));
}

static inline void cut_parts(layout_t *layout, const columns_t *task) {
    index_t sums = layout->blocks * layout->rows * layout->tile_columns;
    index_t data = task->images * (task->channels * layout->area + task->outputs * layout->out_area);
    index_t wanted = UNITS / layout->blocks;
    /* More numbers than input and output have would cost more than other threads gain: new memory has its price. */
    if (task->grad_weight != NULL) wanted = smallest(wanted, data / sums);
    wanted = largest(wanted, 1);
    /* About three bands of an image, as parts have their price. */
    layout->cuts = smallest((wanted + task->images - 1) / task->images, largest((layout->bands + 1) / 3, 1));
    layout->parts = layout->cuts > 1 ? layout->cuts * task->images : smallest(wanted, layout->lots / layout->bands);
}

/* Zeros beside a plane for every window, rows of whole vectors: they are asked whether they are in the plane. */
static inline frame_t wide_frame(const columns_t *task) {
    index_t left = 0, right = 0, span = (task->sizes.out_width - 1) * task->sizes.stride_col;
    for (index_t index = 0; index < task->channels * task->taps; index++) {
        left = largest(left, -task->first_col[index]);
        right = largest(right, task->first_col[index] + span + task->reads_col - task->sizes.width);
    }
    frame_t frame = make_frame(task->sizes.height, task->sizes.width, 0, 0, left, right, task->sizes.stride_col);
    frame.pitch = round_up(frame.pitch, LANES);
    return frame;
}

/* Numbers of a tap's gradient: of its two shifts, or of the weights of its window's rows and columns. */
static inline index_t shift_length(const columns_t *task) {
    return task->reads_row > 0 ? task->reads_row + task->reads_col : 2;
}

static inline layout_t make_layout(const columns_t *task, int backward, unsigned threads) {
    const sizes_t *sizes = &task->sizes;
    layout_t layout = {0};
    layout.frame = task->reads_row > 0 ? wide_frame(task)
                                       : make_frame(sizes->height, sizes->width, 1, 1, 1, 1, sizes->stride_col);
    layout.area = sizes->height * sizes->width;
    layout.out_area = sizes->out_height * sizes->out_width;
    layout.group_channels = task->channels / task->groups;
    layout.group_outputs = task->outputs / task->groups;
    index_t depth = smallest(task->depth, largest(WEIGHTS / layout.group_outputs, LEAST_DEPTH));
    layout.step = backward ? block_step(task, layout.group_channels)
                           : smallest(largest(depth / task->taps, 1), layout.group_channels);
    layout.blocks = task->groups * ((layout.group_channels + layout.step - 1) / layout.step);
    layout.rows = round_up(layout.step * task->taps, TILE_ROWS);
    cut_bands(&layout, task, backward ? task->band : forward_band(task, layout.out_area, threads));
    join_images(&layout, task, backward ? 0 : threads);
    layout.tile_rows = round_up(layout.group_outputs, TILE_ROWS);
    layout.tile_columns = round_up(layout.group_outputs, TILE_COLUMNS);
    REAL *at = task->workspace;
    layout.taps = (tap_t *)take(&at, round_up(task->channels * task->taps * sizeof(tap_t), BYTES) / sizeof(REAL));
    if (!backward) {
        layout.packed = take(&at, task->channels * task->taps * layout.tile_rows);
        layout.end = at;
        return layout;
    }
    cut_parts(&layout, task);
    layout.frames = take(&at, task->images * task->channels * frame_length(&layout.frame));
    int by_columns = task->grad_input != NULL || task->grad_shift != NULL;
    layout.packed = take(&at, by_columns ? layout.blocks * layout.rows * layout.group_outputs : 0);
    layout.grads = take(&at, by_columns ? layout.slices * layout.band * layout.group_outputs : 0);
    if (task->grad_weight != NULL) {
        layout.grads_across = take(&at, layout.slices * layout.band * layout.tile_columns);
        layout.by_weight = take(&at, layout.parts * layout.blocks * layout.rows * layout.tile_columns);
    }
    layout.by_input = layout.cuts == 1 || task->grad_input == NULL
                          ? task->grad_input
                          : take(&at, layout.cuts * task->images * task->channels * layout.area);
    at = task->workspace + round_up(at - task->workspace, BYTES / sizeof(REAL));
    index_t shifts = task->grad_shift == NULL ? 0 : layout.parts * task->channels * task->taps * shift_length(task);
    layout.by_shift = (double *)take(&at, shifts * sizeof(double) / sizeof(REAL));
    layout.end = at;
    return layout;
}

typedef struct {
    const columns_t *task;
    layout_t layout;
} call_t;

typedef struct {
    index_t group, image, images;
    index_t first, last; /* rows of the output */
    index_t pixels, all; /* of an image, and of all */
} band_t;

static inline band_t find_band(const call_t *call, index_t slice) {
    const columns_t *task = call->task;
    const layout_t *layout = &call->layout;
    index_t image = slice / task->groups / layout->bands * layout->lot;
    index_t first = slice / task->groups % layout->bands * layout->band_rows;
    band_t band = {slice % task->groups, image, smallest(layout->lot, task->images - image), first, 0, 0, 0};
    band.last = smallest(first + layout->band_rows, task->sizes.out_height);
    band.pixels = (band.last - first) * task->sizes.out_width;
    band.all = band.images * band.pixels;
    return band;
}

/* Threads that a call is worth: below about this many multiply-adds for each, starting them takes longer. */
static inline unsigned worthwhile(const call_t *call, unsigned threads) {
    const columns_t *task = call->task;
    double products = (double)task->images * call->layout.out_area * task->outputs * call->layout.group_channels;
    double wanted = products * task->taps / (1 << 19);
    return wanted < threads ? (unsigned)wanted + 1 : threads;
}

static inline void make_taps(const call_t *call, index_t channel) {
    const columns_t *task = call->task;
    for (index_t index = channel * task->taps; index < (channel + 1) * task->taps; index++)
        call->layout.taps[index] = make_tap(&call->layout.frame, &task->sizes, task->positions + 2 * index);
}

/* From a column to the next: room for what spills over, and an odd number of vectors, as lines of the cache that are a
 * power of two apart displace each other. */
static inline index_t column_pitch(index_t pixels) {
    return ((round_up(pixels, LANES) / LANES + 1) | 1) * LANES;
}

/* The weighted mean of what two neighbors read. */
static inline vector blend(const REAL *left, const REAL *right, vector near, vector far) {
    return near * load(left) + far * load(right);
}

/* Rows [first, last) of one channel's plane as a tap sees it, without gaps; may write LANES elements past the end. */
static inline void make_column(const call_t *call, const REAL *plane, index_t index, index_t first, index_t last, REAL *out) {
    const columns_t *task = call->task;
    const tap_t *tap = &call->layout.taps[index];
    index_t width = task->sizes.out_width, live = tap->col_last - tap->col_first;
    index_t row_first = smallest(largest(first, tap->row_first), last);
    index_t row_last = largest(smallest(last, tap->row_last), row_first), rows = row_last - row_first;
    int next = tap->row_step == tap->below; /* a row's lower neighbors are the next one's upper */
    vector down = all(tap->down), up = all(1 - tap->down), right = all(tap->right), left = all(1 - tap->right);
    REAL unknown = (tap->down + tap->right) * 0; /* NaN where a position is, else 0 */
    REAL *start = out + (row_first - first) * width;
    fill(out, all(unknown), (live < width ? last - first : row_first - first) * width);
    /* Vector by vector, each down all rows. The last one ends where the row does, unless there is not even one. */
    for (index_t at = 0; at < live && rows > 0; at += LANES) {
        index_t col = smallest(at, largest(live - LANES, 0));
        const REAL *top_left = plane + tap->top_left + row_first * tap->row_step + col;
        const REAL *top_right = top_left + (tap->top_right - tap->top_left);
        REAL *to = start + tap->col_first + col;
        vector above = blend(top_left, top_right, left, right);
        for (index_t row = 0; row < rows; row++, to += width) {
            if (!next) above = blend(top_left, top_right, left, right);
            vector below = blend(top_left + tap->below, top_right + tap->below, left, right);
            vector value = up * above + down * below;
            if (live < LANES && live < width) {
                store_part(to, value, live);
            } else {
                store(to, value); /* what it spills over is written again */
            }
            above = below;
            top_left += tap->row_step;
            top_right += tap->row_step;
        }
    }
    fill(start + rows * width, all(unknown), (last - row_last) * width);
}
