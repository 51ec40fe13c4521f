/* Kernels drawn into one box of whole pixels by bilinear interpolation, and the gradients of what was drawn.
 *
 * Where outputs share no columns, most taps lie close together, and a box around them is a small dense kernel
 * (dense_planes.c and dense_cells.c). Taps outside of it are marked, and left to the stencils.
 */

#include "plane.h"

typedef struct {
    index_t kernels, taps;
    index_t members, sharing;    /* kernels of an output; outputs of a group where they share positions, else 1 */
    index_t wide;                /* whether positions are doubles, else floats */
    index_t least[2], most[2];   /* cells (row, col) outside of these never meet the input */
    index_t first[2], size[2];   /* of the box, in pixels from position 0: what drawing_choose says */
    index_t outside;             /* taps that are not drawn: about, by drawing_choose; what drawing_draw left out */
    double cell_cost, outlier_cost; /* of a cell of the box, and of such a tap, for a kernel and a pixel */
    index_t skips;               /* whether rows and columns of the box that no tap reads cost nothing */
    double cost;                 /* of what was chosen */
    const REAL *weight;          /* [kernels, taps] */
    const void *positions;       /* [kernels / sharing, taps, 2] */
    uint8_t *drawn;              /* [kernels, taps], whether a tap is in the box */
    REAL *cells;                 /* [kernels, size[0], size[1]] */
    const REAL *grad_cells;
    REAL *grad_weight;           /* [kernels, taps] */
    double *grad_shift;          /* [kernels, taps, 2] */
} drawing_t;

/* Pixels from position 0 beyond which nothing is drawn; kernels of a unit; kernels, about, that the box is chosen by. */
enum { REACH = 128, CHUNK = 64, SAMPLE = 256 };

/* Where the positions of a kernel start. */
static inline index_t positions_of(const drawing_t *task, index_t kernel) {
    return (kernel / task->members / task->sharing * task->members + kernel % task->members) * task->taps * 2;
}

/* The cell of a tap, relative to the box; false where one of its corners, or a position that is no number, is outside. */
static inline int find_cell(const drawing_t *task, index_t position, index_t *cell, double *fraction) {
    for (int axis = 0; axis < 2; axis++) {
        double whole = coordinate(task->positions, task->wide, position + axis), low = __builtin_floor(whole), place = low - task->first[axis];
        if (!(place >= 0 && place <= task->size[axis] - 2)) return 0;
        cell[axis] = (index_t)place;
        fraction[axis] = whole - low;
    }
    return 1;
}

/* Starting from all that can be drawn, the side whose removal frees most cells for a lost tap is moved inwards, down to
 * one cell; the cheapest box on the way is taken. */
void drawing_choose(drawing_t *task) {
    index_t counts[2][2 * REACH] = {{0}}, first[2] = {0, 0}, last[2] = {2 * REACH - 1, 2 * REACH - 1};
    index_t step = largest(task->kernels / SAMPLE, 1), sampled = 0, count = 0, lost = 0, lost_best = 0;
    index_t read[2][2 * REACH + 2] = {{0}}; /* rows, or columns, before each that are read */
    double least[2], most[2];
    for (int axis = 0; axis < 2; axis++) {
        least[axis] = largest(task->least[axis], -REACH);
        most[axis] = smallest(task->most[axis], REACH - 1);
    }
    for (index_t kernel = 0; kernel < task->kernels; kernel += step, sampled++) {
        index_t position = positions_of(task, kernel);
        for (index_t tap = 0; tap < task->taps; tap++, position += 2) {
            double row = __builtin_floor(coordinate(task->positions, task->wide, position));
            double col = __builtin_floor(coordinate(task->positions, task->wide, position + 1));
            if (!(row >= least[0] && row <= most[0] && col >= least[1] && col <= most[1])) continue;
            counts[0][(index_t)row + REACH]++;
            counts[1][(index_t)col + REACH]++;
            count++;
        }
    }
    for (int axis = 0; axis < 2; axis++) {
        for (index_t at = 0; at <= 2 * REACH; at++) {
            int own = (at < 2 * REACH && counts[axis][at]) || (at > 0 && counts[axis][at - 1]);
            read[axis][at + 1] = read[axis][at] + (own || !task->skips);
        }
    }
    task->cost = -1;
    for (;;) {
        index_t size[2] = {last[0] - first[0] + 2, last[1] - first[1] + 2};
        double rows = read[0][last[0] + 2] - read[0][first[0]], cols = read[1][last[1] + 2] - read[1][first[1]];
        double cost = task->cell_cost * rows * cols + task->outlier_cost * lost / sampled, freed_best = -1;
        if (task->cost < 0 || cost <= task->cost) { /* what nobody reads goes */
            task->cost = cost;
            lost_best = lost;
            for (int axis = 0; axis < 2; axis++) {
                task->first[axis] = first[axis] - REACH;
                task->size[axis] = size[axis];
            }
        }
        int axis_best = -1, end_best = 0;
        for (int axis = 0; axis < 2; axis++) {
            for (int end = 0; end < 2 && first[axis] < last[axis]; end++) {
                double freed = size[1 - axis] / (counts[axis][end ? last[axis] : first[axis]] + 1e-9);
                if (freed <= freed_best) continue;
                freed_best = freed;
                axis_best = axis;
                end_best = end;
            }
        }
        if (axis_best < 0) break;
        index_t *side = end_best ? &last[axis_best] : &first[axis_best];
        lost += counts[axis_best][*side];
        *side += end_best ? -1 : 1;
    }
    task->outside = (sampled * task->taps - count + lost_best) * task->kernels / sampled;
}

/* What the taps of an output, wherever they are, give to four cells of their boxes: [4, taps] and the first of the cells.
 * In the type of the numbers where positions are floats: what is left of one beyond its cell is then the same. */
#define WEIGH_TAPS(name, stored, number)                                                                                \
    static void name(const drawing_t *task, index_t position, const REAL *restrict weight, index_t count,              \
                     uint8_t *restrict drawn, int32_t *restrict cell, REAL *restrict parts) {                          \
        const stored *positions = (const stored *)task->positions + position;                                         \
        number row_first = task->first[0], col_first = task->first[1], width = task->size[1];                         \
        number row_last = task->size[0] - 2, col_last = task->size[1] - 2;                                            \
        for (index_t tap = 0; tap < count; tap++) {                                                                   \
            number row = positions[2 * tap], col = positions[2 * tap + 1], low = FLOOR(row), left = FLOOR(col);        \
            number top = low - row_first, side = left - col_first;                                                    \
            REAL down = (REAL)(row - low), right = (REAL)(col - left);                                                 \
            REAL lower = down * weight[tap], upper = (1 - down) * weight[tap];                                         \
            int inside = (top >= 0) & (top <= row_last) & (side >= 0) & (side <= col_last);                           \
            cell[tap] = (int32_t)(inside ? top * width + side : -1);                                                  \
            parts[tap] = upper * (1 - right);                                                                         \
            parts[count + tap] = upper * right;                                                                       \
            parts[2 * count + tap] = lower * (1 - right);                                                             \
            parts[3 * count + tap] = lower * right;                                                                   \
        }                                                                                                             \
        for (index_t tap = 0; tap < count; tap++) drawn[tap] = cell[tap] >= 0;                                        \
    }
#define FLOOR(number) (sizeof(number) == 4 ? __builtin_floorf((float)(number)) : __builtin_floor(number))
WEIGH_TAPS(weigh_doubles, double, double)
WEIGH_TAPS(weigh_floats, float, REAL)
#undef FLOOR
#undef WEIGH_TAPS

/* The kernels of one output. */
static void draw_work(const void *data, index_t output, REAL *scratch) {
    const drawing_t *task = data;
    index_t width = task->size[1], area = task->size[0] * width, taps = task->taps, count = task->members * taps;
    const REAL *weight = task->weight + output * count;
    REAL *parts = scratch, *cells = task->cells + output * task->members * area;
    int32_t *cell = (int32_t *)(parts + 4 * count);
    index_t position = positions_of(task, output * task->members);
    (task->wide ? weigh_doubles : weigh_floats)(task, position, weight, count, task->drawn + output * count, cell, parts);
    memset(cells, 0, task->members * area * sizeof(REAL));
    for (index_t first = 0; first < count; first += taps, cells += area) {
        for (index_t tap = first; tap < first + taps; tap++) {
            if (cell[tap] < 0) continue;
            REAL *at = cells + cell[tap];
            at[0] += parts[tap];
            at[1] += parts[count + tap];
            at[width] += parts[2 * count + tap];
            at[width + 1] += parts[3 * count + tap];
        }
    }
}

static void gradients_work(const void *data, index_t unit, REAL *scratch) {
    const drawing_t *task = data;
    index_t width = task->size[1], area = task->size[0] * width;
    (void)scratch;
    for (index_t kernel = unit * CHUNK; kernel < smallest((unit + 1) * CHUNK, task->kernels); kernel++) {
        index_t position = positions_of(task, kernel);
        for (index_t tap = kernel * task->taps; tap < (kernel + 1) * task->taps; tap++, position += 2) {
            index_t cell[2];
            double fraction[2], *by_shift = task->grad_shift + 2 * tap;
            task->grad_weight[tap] = 0;
            by_shift[0] = by_shift[1] = 0;
            if (!find_cell(task, position, cell, fraction)) continue;
            const REAL *at = task->grad_cells + kernel * area + cell[0] * width + cell[1];
            double products[4] = {at[0], at[1], at[width], at[width + 1]};
            finish_tap(products, fraction[0], fraction[1], task->weight[tap], task->grad_weight + tap, by_shift);
        }
    }
}

int drawing_draw(parallel_t parallel, unsigned threads, drawing_t *task) {
    index_t length = 5 * task->members * task->taps;
    if (run_parallel(parallel, threads, task, task->kernels / task->members, length, draw_work)) return 1;
    task->outside = 0;
    for (index_t tap = 0; tap < task->kernels * task->taps; tap++) task->outside += !task->drawn[tap];
    return 0;
}

static void mark_work(const void *data, index_t unit, REAL *scratch) {
    const drawing_t *task = data;
    (void)scratch;
    for (index_t kernel = unit * CHUNK; kernel < smallest((unit + 1) * CHUNK, task->kernels); kernel++) {
        index_t position = positions_of(task, kernel), cell[2];
        double fraction[2];
        for (index_t tap = kernel * task->taps; tap < (kernel + 1) * task->taps; tap++, position += 2)
            task->drawn[tap] = find_cell(task, position, cell, fraction);
    }
}

/* Marks the taps in the box, and counts the others. */
int drawing_mark(parallel_t parallel, unsigned threads, drawing_t *task) {
    index_t units = (task->kernels + CHUNK - 1) / CHUNK;
    if (run_parallel(parallel, threads, task, units, 1, mark_work)) return 1;
    task->outside = 0;
    for (index_t tap = 0; tap < task->kernels * task->taps; tap++) task->outside += !task->drawn[tap];
    return 0;
}

int drawing_gradients(parallel_t parallel, unsigned threads, const drawing_t *task) {
    return run_parallel(parallel, threads, task, (task->kernels + CHUNK - 1) / CHUNK, 1, gradients_work);
}
