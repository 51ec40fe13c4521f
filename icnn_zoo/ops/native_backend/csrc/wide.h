/* Columns of triangle and gaussian taps, and their adjoint. Comes after columns.h.
 *
 * A tap reads a window of pixels whose weights are products of one of the row and one of the column: its plane is
 * filtered along the columns into lines, one for each row that is read, then along the rows. The adjoint does the same
 * backwards.
 */

/* Rows of numbers, so far apart from each other. */
typedef struct {
    const REAL *at;
    index_t pitch;
} rows_t;

/* For so many rows, to[i] (+)= sum over k of weight[k * order] * from[k * step + i], i in whole vectors. */
static inline __attribute__((always_inline)) void filter_some(const REAL *weight, index_t order, const int reads, rows_t from,
                                                              index_t step, REAL *to, index_t pitch, index_t rows,
                                                              index_t length, int add) {
    vector weights[reads];
    for (int k = 0; k < reads; k++) weights[k] = all(weight[k * order]);
    for (index_t row = 0; row < rows; row++, from.at += from.pitch, to += pitch) {
        for (index_t at = 0; at < length; at += LANES) {
            vector total = add ? load(to + at) : all(0);
            for (int k = 0; k < reads; k++) total += weights[k] * load(from.at + k * step + at);
            store(to + at, total);
        }
    }
}

static inline void filter(const REAL *weight, index_t order, index_t reads, rows_t from, index_t step, REAL *to,
                          index_t pitch, index_t rows, index_t length, int add) {
#define READS(N) case N: filter_some(weight, order, N, from, step, to, pitch, rows, length, add); break
    switch (reads) {
        READS(1);
        READS(2);
        READS(3);
        READS(4);
        READS(5);
        READS(6);
        READS(7);
        READS(8);
        READS(9);
        READS(10);
    default:
        /* Row by row: what a row spills over is made anew with the next one. */
        for (index_t row = 0; row < rows; row++, from.at += from.pitch, to += pitch)
            for (index_t k = 0; k < reads; k++)
                filter_some(weight + k * order, 0, 1, (rows_t){from.at + k * step, 0}, 0, to, 0, 1, length, add || k > 0);
    }
#undef READS
}

/* Rows that outputs of so many rows read through a window. */
static inline index_t count_lines(const columns_t *task, index_t rows) {
    return (rows - 1) * task->sizes.stride_row + task->reads_row;
}

static inline index_t line_pitch(const columns_t *task) { return round_up(task->sizes.out_width, LANES); }

/* Numbers of the lines of a band. */
static inline index_t lines_length(const call_t *call) {
    return count_lines(call->task, call->layout.band_rows) * line_pitch(call->task);
}

/* Where the read with this number of a tap's window lies in a row of the frame, for output column 0. */
static inline index_t read_at(const call_t *call, index_t index, index_t row, index_t read) {
    return frame_at(&call->layout.frame, row, call->task->first_col[index] + read);
}

/* A plane's rows that a tap reads for outputs [first, last), filtered along the columns: lines [rows, line_pitch]. */
static inline void filter_lines(const call_t *call, const REAL *plane, index_t index, index_t first, index_t last,
                                REAL *lines) {
    const columns_t *task = call->task;
    const REAL *cols = task->cols + index * task->reads_col;
    index_t width = task->sizes.out_width, pitch = line_pitch(task), count = count_lines(task, last - first);
    index_t row = task->first_row[index] + first * task->sizes.stride_row, frame_pitch = call->layout.frame.pitch;
    index_t low = smallest(largest(-row, 0), count), high = largest(smallest(task->sizes.height - row, count), low);
    REAL *to = lines + low * pitch;
    memset(lines, 0, low * pitch * sizeof(REAL));
    memset(lines + high * pitch, 0, (count - high) * pitch * sizeof(REAL));
    if (low == high) return;
    if (task->sizes.stride_col == 1) {
        rows_t from = {plane + read_at(call, index, row + low, 0), frame_pitch};
        filter(cols, 1, task->reads_col, from, 1, to, pitch, high - low, width, 0);
        return;
    }
    for (index_t read = 0; read < task->reads_col; read++) { /* neighbouring reads are in other phases */
        rows_t from = {plane + read_at(call, index, row + low, read), frame_pitch};
        filter(cols + read, 1, 1, from, 1, to, pitch, high - low, width, read > 0);
    }
}

/* The rows of a column, of lines; may write LANES elements past the end. */
static inline void join_lines(const call_t *call, index_t index, index_t rows, const REAL *lines, REAL *out) {
    const columns_t *task = call->task;
    index_t width = task->sizes.out_width, pitch = line_pitch(task);
    /* In ascending order: what whole vectors spill over is written again. */
    filter(task->rows + index * task->reads_row, 1, task->reads_row, (rows_t){lines, task->sizes.stride_row * pitch}, pitch,
           out, width, rows, width, 0);
}

static inline vector add_products(vector total, const REAL *a, const REAL *b, index_t length) {
    for (index_t at = 0; at < length; at += LANES) total += load(a + at) * load(b + at);
    return total;
}

/* From a line of the adjoint to the next, with zeros for reads before and after it. */
static inline index_t spread_pitch(const columns_t *task) { return line_pitch(task) + 2 * task->reads_col + LANES; }

/* Numbers that scatter_lines works in. */
static inline index_t spread_length(const call_t *call) {
    const columns_t *task = call->task;
    index_t rows = call->layout.band_rows;
    return rows * line_pitch(task) + count_lines(task, rows) * spread_pitch(task);
}

/* The adjoint of both for outputs [first, last): adds to the plane's gradient, and to that of the window's weights, which
 * lines are wanted for. */
static inline void scatter_lines(const call_t *call, const REAL *plane, index_t index, index_t first, index_t last,
                                 const REAL *column, const REAL *lines, REAL *total, REAL *buffer, double *by_weights) {
    const columns_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    const REAL *rows = task->rows + index * task->reads_row, *cols = task->cols + index * task->reads_col;
    index_t width = sizes->out_width, pitch = line_pitch(task), count = last - first, side = task->reads_col - 1;
    index_t row = task->first_row[index] + first * sizes->stride_row, step = spread_pitch(task);
    index_t low = largest(-row, 0), high = smallest(sizes->height - row, count_lines(task, count)); /* in the plane */
    REAL *padded = buffer, *spread = padded + call->layout.band_rows * pitch + side;
    memset(buffer, 0, spread_length(call) * sizeof(REAL));
    for (index_t at = 0; at < count; at++) copy_row(padded + at * pitch, column + at * width, width);
    for (index_t at = low; at < high; at++) {
        /* The outputs that read this row: the first of them by the window's row `read`. */
        index_t lowest = largest(floor_div(at - task->reads_row + sizes->stride_row, sizes->stride_row), 0);
        index_t highest = smallest(at / sizes->stride_row, count - 1), read = at - lowest * sizes->stride_row;
        if (lowest > highest) continue; /* between strides */
        filter(rows + read, -sizes->stride_row, highest - lowest + 1, (rows_t){padded + lowest * pitch, 0}, pitch,
               spread + at * step, 0, 1, width, 0);
    }
    rows_t from = {spread + low * step, step};
    index_t frame_pitch = call->layout.frame.pitch;
    if (low < high && total != NULL && sizes->stride_col == 1) {
        REAL *to = total + read_at(call, index, row + low, 0);
        filter(cols + side, -1, task->reads_col, (rows_t){from.at - side, step}, 1, to, frame_pitch, high - low, width + side,
               1);
    } else if (low < high && total != NULL) {
        for (index_t read = 0; read < task->reads_col; read++)
            filter(cols + read, 1, 1, from, 1, total + read_at(call, index, row + low, read), frame_pitch, high - low, width,
                   1);
    }
    for (index_t read = 0; read < task->reads_row && by_weights != NULL; read++) {
        vector sum = all(0);
        for (index_t at = 0; at < count; at++)
            sum = add_products(sum, padded + at * pitch, lines + (at * sizes->stride_row + read) * pitch, width);
        *by_weights++ += (double)sum_lanes(sum);
    }
    for (index_t read = 0; read < task->reads_col && by_weights != NULL; read++) {
        vector sum = all(0);
        for (index_t at = low; at < high; at++)
            sum = add_products(sum, spread + at * step, plane + read_at(call, index, row + at, read), width);
        *by_weights++ += (double)sum_lanes(sum);
    }
}
