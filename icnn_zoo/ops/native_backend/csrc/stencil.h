/* A kernel as a list of cells, and the sum over the cells of one plane: what forward and backward of stencil.c share. */

#define NARROW
#include "plane.h"

typedef struct {
    sizes_t sizes;
    index_t images, channels, outputs, groups, taps;
    int per_kernel;       /* whether shifts belong to (output, channel of the group), else to the channel */
    const REAL *input;    /* [images, channels, height, width] */
    const REAL *weight;   /* [outputs, channels / groups, taps] */
    const double *positions; /* [channels, taps, 2], or [outputs, channels / groups, taps, 2] */
    const REAL *bias;     /* [outputs], or NULL */
    REAL *output;         /* [images, outputs, out_height, out_width] */
    const REAL *grad_output;
    REAL *grad_input;    /* or NULL */
    REAL *grad_weight;   /* [outputs, channels / groups, taps], with grad_shift, or NULL */
    double *grad_shift;  /* [outputs, channels / groups, taps, 2] */
    double *workspace;   /* of the backward: what moments_length says */
    /* [outputs, channels / groups, taps], taps that others computed: what is left is added to their output and input's
     * gradient. Or NULL. */
    const uint8_t *drawn;
} stencil_t;

typedef struct {
    index_t count;
    REAL unknown;       /* 0, or NaN where a position is */
    index_t *row, *col; /* [4 * taps] */
    REAL *weight;       /* [4 * taps] */
    index_t *cell;      /* [4 * taps], the cell of each corner of each tap, -1 where it never meets the input */
    index_t *offset;    /* [4 * taps] */
    double *moment;     /* [4 * taps] */
    shift_t *shift;     /* [taps] */
} list_t;

enum { LIST_WORDS = 7 }; /* a shift takes at most four words */

/* Lists live in the front of the scratch; sizeof(REAL) is 4 or 8, the lists' words take 8 bytes. */
static index_t list_length(const stencil_t *task) { return 4 * task->taps * LIST_WORDS * 8 / sizeof(REAL); }

static list_t make_list(const stencil_t *task, REAL *scratch) {
    index_t *words = (index_t *)scratch, room = 4 * task->taps;
    list_t list = {0, 0, words, words + room, (REAL *)(words + 2 * room), words + 3 * room, words + 4 * room,
                   (double *)(words + 5 * room), (shift_t *)(words + 6 * room)};
    return list;
}

static index_t owner_of(const stencil_t *task, index_t output, index_t member) {
    index_t group_channels = task->channels / task->groups;
    if (task->per_kernel) return output * group_channels + member;
    return output / (task->outputs / task->groups) * group_channels + member;
}

/* Collects the cells of one kernel; neighboring taps share cells, which are merged. False if others computed all that read anything. */
static int fill_list(const stencil_t *task, index_t output, index_t member, list_t *list) {
    const sizes_t *sizes = &task->sizes;
    index_t owner = owner_of(task, output, member), taps = task->taps;
    shift_t *shift = list->shift;
    index_t kernel = output * (task->channels / task->groups) + member;
    const REAL *weight = task->weight + kernel * taps;
    const uint8_t *drawn = task->drawn == NULL ? NULL : task->drawn + kernel * taps;
    enum { MAP = 1024 };
    int16_t map[MAP];
    index_t row_first = INT64_MAX, row_last = INT64_MIN, col_first = INT64_MAX, col_last = INT64_MIN;
    list->count = 0;
    list->unknown = 0;
    for (index_t tap = 0; tap < taps; tap++) {
        if (drawn != NULL && drawn[tap]) continue;
        shift[tap] = make_shift(sizes, task->positions + (owner * taps + tap) * 2);
        row_first = smallest(row_first, shift[tap].row);
        row_last = largest(row_last, shift[tap].row + 1);
        col_first = smallest(col_first, shift[tap].col);
        col_last = largest(col_last, shift[tap].col + 1);
    }
    if (row_first > row_last) return 0;
    index_t map_width = col_last - col_first + 1, map_size = (row_last - row_first + 1) * map_width;
    int merge = map_size <= MAP;
    if (merge) memset(map, -1, map_size * sizeof(int16_t));
    for (index_t tap = 0; tap < taps; tap++) {
        if (drawn != NULL && drawn[tap]) continue;
        REAL down = shift[tap].down, right = shift[tap].right;
        list->unknown += (down + right) * 0;
        for (int corner = 0; corner < 4; corner++) {
            index_t row = shift[tap].row + corner / 2, col = shift[tap].col + corner % 2;
            REAL part = (corner / 2 ? down : 1 - down) * (corner % 2 ? right : 1 - right) * weight[tap];
            int live = row < sizes->height && row + (sizes->out_height - 1) * sizes->stride_row >= 0 &&
                       col < sizes->width && col + (sizes->out_width - 1) * sizes->stride_col >= 0;
            list->cell[4 * tap + corner] = -1;
            if (!live) continue;
            int16_t *known = merge ? &map[(row - row_first) * map_width + col - col_first] : NULL;
            if (known != NULL && *known >= 0) {
                list->weight[*known] += part;
                list->cell[4 * tap + corner] = *known;
                continue;
            }
            index_t cell = list->count++;
            if (known != NULL) *known = (int16_t)cell;
            list->row[cell] = row;
            list->col[cell] = col;
            list->weight[cell] = part;
            list->cell[4 * tap + corner] = cell;
        }
    }
    return drawn == NULL || list->count > 0 || list->unknown != 0;
}

/* What a stencil reads and writes: to[r, c] (+)= start + sum over cells of weight * from[r * step + c + offset]. */
typedef struct {
    const REAL *from;
    index_t step;
    const index_t *offset;
    const REAL *weight;
    index_t cells;
    REAL *to;
    index_t rows, cols;
    REAL start;
    int add; /* to what is there */
} apply_t;

/* rows x vectors outputs at once, kept in registers while the cells are walked; the last `count` lanes are valid. */
static inline __attribute__((always_inline)) void tile(const apply_t *task, const int rows, const int vectors,
                                                       index_t row_first, index_t col_first, index_t count) {
    const REAL *from = task->from + row_first * task->step + col_first;
    REAL *to = task->to + row_first * task->cols + col_first;
    vector total[4][4];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < vectors; part++) total[row][part] = all(task->start);
    for (index_t cell = 0; cell < task->cells; cell++) {
        const REAL *at = from + task->offset[cell];
        vector scale = all(task->weight[cell]);
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < vectors; part++)
                total[row][part] += scale * load(at + row * task->step + part * LANES);
    }
    for (int row = 0; row < rows; row++) {
        for (int part = 0; part < vectors; part++) {
            REAL *place = to + row * task->cols + part * LANES;
            if (count >= LANES) {
                if (task->add) total[row][part] += load(place);
                store(place, total[row][part]);
            } else {
                vector old = all(0);
                if (task->add) memcpy(&old, place, count * sizeof(REAL));
                store_part(place, old + total[row][part], count);
            }
        }
    }
}

static void apply(const apply_t *task) {
    for (index_t col = 0; col < task->cols;) {
        index_t left = task->cols - col, vectors = largest(smallest(left / LANES, 4), 1);
        if (left < LANES && !task->add && task->cols >= LANES) { /* some outputs twice is faster than a part of a vector */
            col = task->cols - LANES;
            left = LANES;
        }
        for (index_t row = 0; row < task->rows;) {
            index_t rows = task->rows - row >= 4 ? 4 : task->rows - row >= 2 ? 2 : 1;
#define TILE(R, V) case V * 8 + R: tile(task, R, V, row, col, left); break
            switch (vectors * 8 + rows) {
            TILE(4, 1);
            TILE(2, 1);
            TILE(1, 1);
            TILE(4, 2);
            TILE(2, 2);
            TILE(1, 2);
            TILE(4, 3);
            TILE(2, 3);
            TILE(1, 3);
            TILE(4, 4);
            TILE(2, 4);
            TILE(1, 4);
            }
#undef TILE
            row += rows;
        }
        col += smallest(left, vectors * LANES);
    }
}
