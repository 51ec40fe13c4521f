/* Columns of triangle and gaussian interpolation with stride 1, and what their gradients say of input and weights.
 *
 * A tap reads a window of pixels whose weights are products of one of the row and one of the column: its plane is
 * filtered along the columns, then along the rows. The adjoint does the same with the weights turned around.
 */

#define NARROW
#include "plane.h"

#include "filter.h"

typedef struct {
    sizes_t sizes;
    index_t images, channels, taps;
    index_t reads_row, reads_col;      /* pixels of a window */
    index_t image_step, channel_step;  /* from one input plane to the next */
    const REAL *input;
    const index_t *first_row, *first_col; /* [channels, taps], of the window of output (0, 0) */
    const REAL *rows, *cols;              /* [channels, taps, reads] */
    REAL *columns;                        /* [channels, taps, images, out_height, out_width], or NULL */
    const REAL *grad;                     /* as columns, or NULL */
    REAL *grad_input;                     /* [channels, images, height, width], or NULL */
    double *by_rows, *by_cols;            /* as rows and cols, with grad, or NULL */
} wide_t;

static double dot(const REAL *a, const REAL *b, index_t length) {
    vector total = all(0);
    for (index_t at = 0; at < length; at += LANES) total += load(a + at) * load(b + at);
    return (double)sum_lanes(total);
}

typedef struct {
    index_t margin, frame_pitch; /* zeros beside a plane, enough for any window that meets it */
    index_t pitch;               /* of filtered rows, with a window's zeros on both sides */
    index_t window_rows;         /* rows that a tap reads */
    index_t frame, filtered, grad;
} plan_t;

static plan_t make_plan(const wide_t *task) {
    const sizes_t *sizes = &task->sizes;
    plan_t plan;
    plan.margin = sizes->out_width + task->reads_col + LANES;
    plan.frame_pitch = sizes->width + 2 * plan.margin;
    plan.pitch = round_up(sizes->out_width, LANES) + 2 * (task->reads_col - 1) + LANES;
    plan.window_rows = sizes->out_height + task->reads_row - 1;
    plan.frame = sizes->height * plan.frame_pitch + 2 * LANES;
    plan.filtered = plan.window_rows * plan.pitch + 2 * LANES;
    plan.grad = (plan.window_rows + task->reads_row - 1) * plan.pitch + 2 * LANES;
    return plan;
}

static index_t scratch_length(const wide_t *task) {
    plan_t plan = make_plan(task);
    return 2 * plan.frame + 2 * plan.filtered + plan.grad;
}

/* One channel: all its taps and images. */
static void wide_work(const void *data, index_t channel, REAL *scratch) {
    const wide_t *task = data;
    const sizes_t *sizes = &task->sizes;
    plan_t plan = make_plan(task);
    index_t width = sizes->out_width, height = sizes->out_height, length = round_up(width, LANES);
    index_t side = task->reads_col - 1, above = task->reads_row - 1, area = height * width;
    REAL *frame = scratch, *total = frame + plan.frame, *filtered = total + plan.frame;
    REAL *spread = filtered + plan.filtered, *grad = spread + plan.filtered;
    memset(scratch, 0, scratch_length(task) * sizeof(REAL));
    for (index_t image = 0; image < task->images; image++) {
        const REAL *plane = task->input + image * task->image_step + channel * task->channel_step;
        for (index_t row = 0; row < sizes->height; row++)
            copy_row(frame + row * plan.frame_pitch + plan.margin, plane + row * sizes->width, sizes->width);
        if (task->grad_input != NULL) memset(total, 0, plan.frame * sizeof(REAL));
        for (index_t tap = channel * task->taps; tap < (channel + 1) * task->taps; tap++) {
            index_t first = task->first_row[tap], start = plan.margin + task->first_col[tap];
            const REAL *rows = task->rows + tap * task->reads_row, *cols = task->cols + tap * task->reads_col;
            index_t low = largest(-first, 0), high = smallest(sizes->height - first, plan.window_rows);
            if (task->columns != NULL || task->by_rows != NULL) {
                for (index_t at = 0; at < plan.window_rows; at++) {
                    REAL *to = filtered + at * plan.pitch;
                    if (at < low || at >= high) {
                        memset(to, 0, length * sizeof(REAL));
                    } else {
                        filter(cols, 1, task->reads_col, frame + (first + at) * plan.frame_pitch + start, 1, to, length, 0);
                    }
                }
            }
            if (task->columns != NULL) {
                REAL *to = task->columns + (tap * task->images + image) * area;
                for (index_t row = 0; row < height; row++, to += width) {
                    /* The line that `spread` is filled with later, as room for one. */
                    filter(rows, 1, task->reads_row, filtered + row * plan.pitch, plan.pitch, spread, length, 0);
                    copy_row(to, spread, width);
                }
                memset(spread, 0, (length + LANES) * sizeof(REAL));
            }
            if (task->grad == NULL) continue;
            const REAL *from = task->grad + (tap * task->images + image) * area;
            for (index_t row = 0; row < height; row++, from += width)
                copy_row(grad + (above + row) * plan.pitch, from, width);
            if (task->by_rows != NULL)
                for (index_t read = 0; read < task->reads_row; read++)
                    for (index_t row = 0; row < height; row++)
                        task->by_rows[tap * task->reads_row + read] +=
                            dot(grad + (above + row) * plan.pitch, filtered + (row + read) * plan.pitch, length);
            for (index_t at = low; at < high; at++) {
                REAL *line = spread + at * plan.pitch + side;
                filter(rows + above, -1, task->reads_row, grad + at * plan.pitch, plan.pitch, line, length, 0);
                index_t place = (first + at) * plan.frame_pitch + start;
                if (task->by_cols != NULL)
                    for (index_t read = 0; read < task->reads_col; read++)
                        task->by_cols[tap * task->reads_col + read] += dot(line, frame + place + read, length);
                if (task->grad_input != NULL)
                    filter(cols + side, -1, task->reads_col, line - side, 1, total + place, width + side, 1);
            }
        }
        if (task->grad_input == NULL) continue;
        REAL *to = task->grad_input + (channel * task->images + image) * sizes->height * sizes->width;
        for (index_t row = 0; row < sizes->height; row++)
            copy_row(to + row * sizes->width, total + row * plan.frame_pitch + plan.margin, sizes->width);
    }
}

int wide_columns(parallel_t parallel, unsigned threads, const wide_t *task) {
    return run_parallel(parallel, threads, task, task->channels, scratch_length(task), wide_work);
}
