/* Columns of triangle and gaussian taps, and their adjoint. Comes after columns.h.
 *
 * A tap reads a window of pixels whose weights are products of one of the row and one of the column: the rows of its
 * windows are joined into a line for each row of outputs, lines then filtered along the row. The adjoint does the same
 * backwards. So nothing is made for rows that only other bands' outputs read.
 */

/* Rows of numbers, so far apart from each other. */
typedef struct {
    const REAL *at;
    index_t pitch;
} rows_t;

/* More than so many of a window's numbers are taken in several turns: a processor has only so many registers. */
enum { MOST_READS = 10 };

#define FOR_READS(CASE)                                                                                                \
    CASE(1);                                                                                                           \
    CASE(2);                                                                                                           \
    CASE(3);                                                                                                           \
    CASE(4);                                                                                                           \
    CASE(5);                                                                                                           \
    CASE(6);                                                                                                           \
    CASE(7);                                                                                                           \
    CASE(8);                                                                                                           \
    CASE(9);                                                                                                           \
    CASE(10)

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
    /* Row by row, in ascending order: what a row spills over is made anew with the next one. */
    for (; reads > MOST_READS && rows > 1; rows--, from.at += from.pitch, to += pitch)
        filter(weight, order, reads, from, step, to, pitch, 1, length, add);
    for (; reads > MOST_READS; reads -= MOST_READS, weight += MOST_READS * order, from.at += MOST_READS * step, add = 1)
        filter_some(weight, order, MOST_READS, from, step, to, pitch, rows, length, add);
#define CASE(N) case N: filter_some(weight, order, N, from, step, to, pitch, rows, length, add); break
    switch (reads) { FOR_READS(CASE); }
#undef CASE
}

/* sums[k] += sum over rows and i of a[i] * b[k * step + i], i in whole vectors. */
static inline __attribute__((always_inline)) void correlate_some(rows_t a, rows_t b, index_t step, const int reads,
                                                                 index_t rows, index_t length, double *sums) {
    vector totals[reads];
    for (int k = 0; k < reads; k++) totals[k] = all(0);
    for (index_t row = 0; row < rows; row++, a.at += a.pitch, b.at += b.pitch) {
        for (index_t at = 0; at < length; at += LANES) {
            vector value = load(a.at + at);
            for (int k = 0; k < reads; k++) totals[k] += value * load(b.at + k * step + at);
        }
    }
    for (int k = 0; k < reads; k++) sums[k] += (double)sum_lanes(totals[k]);
}

static inline void correlate(rows_t a, rows_t b, index_t step, index_t reads, index_t rows, index_t length, double *sums) {
    for (; reads > MOST_READS; reads -= MOST_READS, b.at += MOST_READS * step, sums += MOST_READS)
        correlate_some(a, b, step, MOST_READS, rows, length, sums);
#define CASE(N) case N: correlate_some(a, b, step, N, rows, length, sums); break
    switch (reads) { FOR_READS(CASE); }
#undef CASE
}

/* Where a tap's lines begin in a row of the frame: at a whole vector. With strides rows are sorted by phases, and taken
 * whole. */
static inline index_t line_start(const call_t *call, index_t index) {
    if (call->task->sizes.stride_col > 1) return 0;
    return frame_at(&call->layout.frame, 0, call->task->first_col[index]) / LANES * LANES;
}

/* Where in a line output column 0 reads by a column of the window. */
static inline index_t read_at(const call_t *call, index_t index, index_t read) {
    return frame_at(&call->layout.frame, 0, call->task->first_col[index] + read) - line_start(call, index);
}

/* Numbers of a line. */
static inline index_t line_length(const call_t *call, index_t index) {
    const columns_t *task = call->task;
    if (task->sizes.stride_col > 1) return call->layout.frame.pitch;
    return read_at(call, index, task->reads_col - 1) + task->sizes.out_width;
}

/* From a line to the next: room for what whole vectors read past the end. */
static inline index_t line_pitch(const call_t *call) {
    const columns_t *task = call->task;
    if (task->sizes.stride_col > 1) return call->layout.frame.pitch + LANES;
    return round_up(task->sizes.out_width + task->reads_col, LANES) + 2 * LANES;
}

/* Numbers of the lines of a band, which have to be zeros at first. */
static inline index_t lines_length(const call_t *call) { return call->layout.band_rows * line_pitch(call); }

/* Output rows of which the same rows [low, high) of their windows are in the plane. */
typedef struct {
    index_t count;
    index_t row; /* of the plane, or before it, where the first one's window begins */
    index_t low, high;
} stretch_t;

/* Those from output row `first` on. */
static inline stretch_t find_stretch(const columns_t *task, index_t index, index_t first, index_t last) {
    index_t reads = task->reads_row, stride = task->sizes.stride_row, height = task->sizes.height;
    stretch_t stretch = {1, task->first_row[index] + first * stride, 0, 0};
    stretch.low = smallest(largest(-stretch.row, 0), reads);
    stretch.high = largest(smallest(height - stretch.row, reads), stretch.low);
    if (stretch.high - stretch.low == reads)
        stretch.count = smallest(last - first, (height - reads - stretch.row) / stride + 1);
    return stretch;
}

/* The rows that a tap reads for outputs [first, last), joined into lines. */
static inline void join_rows(const call_t *call, const REAL *plane, index_t index, index_t first, index_t last, REAL *lines) {
    const columns_t *task = call->task;
    const REAL *rows = task->rows + index * task->reads_row;
    index_t frame_pitch = call->layout.frame.pitch, pitch = line_pitch(call);
    index_t length = line_length(call, index);
    for (index_t at = first; at < last;) {
        stretch_t stretch = find_stretch(task, index, at, last);
        REAL *to = lines + (at - first) * pitch;
        at += stretch.count;
        if (stretch.low == stretch.high) {
            REAL outside = 0; /* NaN where a row's weight is */
            for (index_t read = 0; read < task->reads_row; read++) outside += rows[read] * 0;
            fill(to, all(outside), length);
            continue;
        }
        const REAL *from = plane + line_start(call, index) + (stretch.row + stretch.low) * frame_pitch;
        filter(rows + stretch.low, 1, stretch.high - stretch.low, (rows_t){from, task->sizes.stride_row * frame_pitch},
               frame_pitch, to, pitch, stretch.count, length, 0);
    }
    /* What whole vectors read past the end may not be what a longer line left there: zero times that may be no number. */
    for (index_t row = 0; row < last - first; row++) store(lines + row * pitch + round_up(length, LANES), all(0));
}

/* The rows of a column, of lines; may write LANES elements past the end. */
static inline void filter_lines(const call_t *call, index_t index, index_t rows, const REAL *lines, REAL *out) {
    const columns_t *task = call->task;
    const REAL *cols = task->cols + index * task->reads_col;
    index_t width = task->sizes.out_width, pitch = line_pitch(call);
    /* In ascending order: what whole vectors spill over is written again. */
    if (task->sizes.stride_col == 1) {
        filter(cols, 1, task->reads_col, (rows_t){lines + read_at(call, index, 0), pitch}, 1, out, width, rows, width, 0);
        return;
    }
    for (index_t row = 0; row < rows; row++, lines += pitch, out += width)
        for (index_t read = 0; read < task->reads_col; read++) /* neighboring reads are in other phases */
            filter(cols + read, 1, 1, (rows_t){lines + read_at(call, index, read), 0}, 0, out, 0, 1, width, read > 0);
}

/* From a row of a column to the next, with zeros around it for the reads before and after. */
static inline index_t spaced_pitch(const call_t *call) {
    return line_pitch(call) + LANES + round_up(call->task->reads_col, LANES);
}

/* Numbers that scatter_lines works in, which have to be zeros at first. */
static inline index_t spread_length(const call_t *call) {
    return call->layout.band_rows * (spaced_pitch(call) + line_pitch(call));
}

/* The adjoint of both for outputs [first, last): adds to the plane's gradient, and to that of the window's weights, which
 * lines are wanted for. */
static inline void scatter_lines(const call_t *call, const REAL *plane, index_t index, index_t first, index_t last,
                                 const REAL *column, const REAL *lines, REAL *total, REAL *buffer, double *by_weights) {
    const columns_t *task = call->task;
    const sizes_t *sizes = &task->sizes;
    const REAL *rows = task->rows + index * task->reads_row, *cols = task->cols + index * task->reads_col;
    index_t width = sizes->out_width, count = last - first, side = task->reads_col - 1, stride = sizes->stride_row;
    index_t frame_pitch = call->layout.frame.pitch, start = line_start(call, index), pitch = line_pitch(call);
    index_t length = line_length(call, index), spaced = spaced_pitch(call);
    index_t begin = read_at(call, index, 0);
    REAL *values = buffer + LANES + round_up(side, LANES);
    REAL *spread = buffer + call->layout.band_rows * spaced; /* the values spread along the rows, as lines */
    for (index_t row = 0; row < count; row++) copy_row(values + row * spaced, column + row * width, width);
    if (sizes->stride_col == 1) {
        filter(cols + side, -1, task->reads_col, (rows_t){values - side - begin, spaced}, 1, spread, pitch, count, length, 0);
    } else {
        memset(spread, 0, count * pitch * sizeof(REAL));
        for (index_t read = 0; read < task->reads_col; read++)
            filter(cols + read, 1, 1, (rows_t){values, spaced}, 0, spread + read_at(call, index, read), pitch, count, width,
                   1);
    }
    index_t row = task->first_row[index] + first * stride; /* where the first window begins */
    index_t low = largest(-row, 0), high = smallest(sizes->height - row, (count - 1) * stride + task->reads_row);
    for (index_t at = low; at < high && total != NULL; at++) {
        /* The outputs that read this row: the first of them by the window's row `read`. */
        index_t lowest = largest(floor_div(at - task->reads_row + stride, stride), 0);
        index_t highest = smallest(at / stride, count - 1), read = at - lowest * stride;
        if (lowest > highest) continue; /* between strides */
        filter(rows + read, -stride, highest - lowest + 1, (rows_t){spread + lowest * pitch, 0}, pitch,
               total + (row + at) * frame_pitch + start, 0, 1, length, 1);
    }
    if (by_weights == NULL) return;
    for (index_t at = first; at < last;) {
        stretch_t stretch = find_stretch(task, index, at, last);
        rows_t given = {spread + (at - first) * pitch, pitch};
        at += stretch.count;
        if (stretch.low == stretch.high) continue;
        const REAL *from = plane + start + (stretch.row + stretch.low) * frame_pitch;
        correlate(given, (rows_t){from, stride * frame_pitch}, frame_pitch, stretch.high - stretch.low, stretch.count, length,
                  by_weights + stretch.low);
    }
    by_weights += task->reads_row;
    if (sizes->stride_col == 1) {
        correlate((rows_t){values, spaced}, (rows_t){lines + begin, pitch}, 1, task->reads_col, count, width, by_weights);
        return;
    }
    for (index_t read = 0; read < task->reads_col; read++)
        correlate((rows_t){values, spaced}, (rows_t){lines + read_at(call, index, read), pitch}, 0, 1, count, width,
                  by_weights + read);
}
