/* Depthwise layers and the full version, whose outputs share no columns: a kernel as a list of cells.
 *
 * Bilinear interpolation makes of a tap at most four cells with weights; cells that taps share are merged. The gradient
 * by the input is the same with the cells mirrored.
 *
 * Units are (channel or kernel, part of the images). What images add up to is kept apart for each part and summed in the
 * order of the parts, and how many there are follows from the sizes of the call alone, never from the threads.
 */

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

/* Collects the cells of one kernel; neighbouring taps share cells, which are merged. False if others computed all that read anything. */
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

typedef struct {
    const stencil_t *task;
    frame_t input, grad; /* zeros enough for every cell that meets the input at all */
    index_t parts;       /* of the images */
} stencil_call_t;

enum { KERNEL_UNITS = 256 }; /* that the gradients of kernels are cut into at least, where there are as many images */

static index_t count_kernels(const stencil_t *task) { return task->outputs * (task->channels / task->groups); }

static index_t cut_images(const stencil_t *task, index_t others, index_t wanted) {
    return smallest((wanted + others - 1) / others, task->images);
}

static index_t part_start(const stencil_call_t *call, index_t part) { return part * call->task->images / call->parts; }

/* Numbers of the workspace: the moments of every kernel and part, where there are several. */
index_t moments_length(const stencil_t *task) {
    index_t kernels = count_kernels(task), parts = cut_images(task, kernels, KERNEL_UNITS);
    return parts == 1 ? 0 : kernels * parts * 4 * task->taps;
}

/* Threads that a call is worth: below about this many multiply-adds for each, starting them takes longer. */
static unsigned worthwhile(const stencil_t *task, unsigned threads) {
    double pixels = (double)task->images * task->sizes.out_height * task->sizes.out_width;
    double wanted = pixels * count_kernels(task) * task->taps / (1 << 18);
    return wanted < threads ? (unsigned)wanted + 1 : threads;
}

static void margins(index_t low, index_t high, index_t size, index_t outputs, index_t stride, index_t *input_before,
                    index_t *input_after, index_t *grad_before, index_t *grad_after) {
    index_t reach = (outputs - 1) * stride;
    low = largest(low, -reach);
    high = smallest(high, size - 1);
    *input_before = largest(-low, 0);
    *input_after = largest(high + reach - (size - 1), 0);
    /* The adjoint reads at (pixel - cell) / stride. */
    *grad_before = largest(floor_div(high, stride) + 1, 0);
    *grad_after = largest(floor_div(size - 1 - low, stride) + 1 - (outputs - 1), 0);
}

static stencil_call_t make_stencil_call(const stencil_t *task) {
    const sizes_t *sizes = &task->sizes;
    index_t owners = task->per_kernel ? task->outputs * (task->channels / task->groups) : task->channels;
    index_t row_first = INT64_MAX, row_last = INT64_MIN, col_first = INT64_MAX, col_last = INT64_MIN;
    for (index_t index = 0; index < owners * task->taps; index++) {
        shift_t shift = make_shift(sizes, task->positions + 2 * index);
        row_first = smallest(row_first, shift.row);
        row_last = largest(row_last, shift.row + 1);
        col_first = smallest(col_first, shift.col);
        col_last = largest(col_last, shift.col + 1);
    }
    index_t rows[4], cols[4];
    margins(row_first, row_last, sizes->height, sizes->out_height, sizes->stride_row, rows, rows + 1, rows + 2,
            rows + 3);
    margins(col_first, col_last, sizes->width, sizes->out_width, sizes->stride_col, cols, cols + 1, cols + 2,
            cols + 3);
    stencil_call_t call = {
        task, make_frame(sizes->height, sizes->width, rows[0], rows[1], cols[0], cols[1], sizes->stride_col),
        make_frame(sizes->out_height, sizes->out_width, rows[2], rows[3], cols[2], cols[3], 1), 1};
    return call;
}

static void set_offsets(const frame_t *frame, list_t *list) {
    for (index_t cell = 0; cell < list->count; cell++)
        list->offset[cell] = frame_at(frame, list->row[cell], list->col[cell]);
}

/* One output channel of a part of the images. */
static void stencil_work(const void *data, index_t unit, REAL *scratch) {
    const stencil_call_t *call = data;
    const stencil_t *task = call->task;
    index_t output = unit / call->parts, part = unit % call->parts;
    index_t image_first = part_start(call, part), image_last = part_start(call, part + 1);
    const sizes_t *sizes = &task->sizes;
    index_t group_channels = task->channels / task->groups, in_area = sizes->height * sizes->width;
    index_t out_area = sizes->out_height * sizes->out_width;
    list_t list = make_list(task, scratch);
    REAL *plane = scratch + list_length(task), *to = task->output + output * out_area;
    index_t image_step = task->outputs * out_area;
    REAL bias = task->bias == NULL ? 0 : task->bias[output];
    for (index_t member = 0; member < group_channels; member++) {
        index_t channel = output / (task->outputs / task->groups) * group_channels + member;
        if (!fill_list(task, output, member, &list)) continue;
        set_offsets(&call->input, &list);
        for (index_t image = image_first; image < image_last; image++) {
            fill_frame(&call->input, plane, task->input + (image * task->channels + channel) * in_area, sizes->height,
                       sizes->width);
            apply(&(apply_t){plane, sizes->stride_row * call->input.pitch, list.offset, list.weight, list.count,
                             to + image * image_step, sizes->out_height, sizes->out_width, member == 0 ? bias : 0,
                             member > 0 || task->drawn != NULL});
            spread_unknown(list.unknown, to + image * image_step, out_area);
        }
    }
}

/* The gradient of one input channel of a part of the images: each phase of the strides is a stencil over the output's. */
static void stencil_input_work(const void *data, index_t unit, REAL *scratch) {
    const stencil_call_t *call = data;
    const stencil_t *task = call->task;
    index_t channel = unit / call->parts, part = unit % call->parts;
    index_t image_first = part_start(call, part), image_last = part_start(call, part + 1);
    const sizes_t *sizes = &task->sizes;
    index_t group_channels = task->channels / task->groups, group_outputs = task->outputs / task->groups;
    index_t group = channel / group_channels, member = channel % group_channels;
    index_t in_area = sizes->height * sizes->width, out_area = sizes->out_height * sizes->out_width;
    int strided = sizes->stride_row > 1 || sizes->stride_col > 1;
    list_t list = make_list(task, scratch);
    REAL *plane = scratch + list_length(task), *phase = plane + frame_length(&call->grad);
    REAL *selected = phase + in_area;
    int several = group_outputs > 1 || task->drawn != NULL;
    for (index_t image = image_first; image < image_last && (strided || several) && task->drawn == NULL; image++)
        memset(task->grad_input + (image * task->channels + channel) * in_area, 0, in_area * sizeof(REAL));
    for (index_t output = group * group_outputs; output < (group + 1) * group_outputs; output++) {
        if (!fill_list(task, output, member, &list)) continue;
        for (index_t image = image_first; image < image_last; image++) {
            REAL *to = task->grad_input + (image * task->channels + channel) * in_area;
            fill_frame(&call->grad, plane, task->grad_output + (image * task->outputs + output) * out_area,
                       sizes->out_height, sizes->out_width);
            for (index_t down = 0; down < smallest(sizes->stride_row, sizes->height); down++) {
                for (index_t right = 0; right < smallest(sizes->stride_col, sizes->width); right++) {
                    index_t count = 0;
                    for (index_t cell = 0; cell < list.count; cell++) {
                        index_t row = down - list.row[cell], col = right - list.col[cell];
                        if (strided && (floor_mod(row, sizes->stride_row) || floor_mod(col, sizes->stride_col)))
                            continue;
                        list.offset[count] =
                            frame_at(&call->grad, floor_div(row, sizes->stride_row), floor_div(col, sizes->stride_col));
                        selected[count++] = list.weight[cell];
                    }
                    index_t rows = (sizes->height - down + sizes->stride_row - 1) / sizes->stride_row;
                    index_t cols = (sizes->width - right + sizes->stride_col - 1) / sizes->stride_col;
                    if (!strided) {
                        apply(&(apply_t){plane, call->grad.pitch, list.offset, selected, count, to, rows, cols, 0,
                                         several});
                        continue;
                    }
                    apply(&(apply_t){plane, call->grad.pitch, list.offset, selected, count, phase, rows, cols, 0, 0});
                    for (index_t row = 0; row < rows; row++)
                        for (index_t col = 0; col < cols; col++)
                            to[(row * sizes->stride_row + down) * sizes->width + col * sizes->stride_col + right] +=
                                phase[row * cols + col];
                }
            }
            spread_unknown(list.unknown, to, in_area);
        }
    }
}

/* The gradients of a kernel's taps from its moments. */
static void finish_kernel(const stencil_t *task, index_t kernel, const list_t *list) {
    const REAL *weight = task->weight + kernel * task->taps;
    for (index_t tap = 0; tap < task->taps; tap++) {
        if (task->drawn != NULL && task->drawn[kernel * task->taps + tap]) continue;
        double down = list->shift[tap].down, right = list->shift[tap].right;
        double m[4];
        for (int corner = 0; corner < 4; corner++) {
            index_t cell = list->cell[4 * tap + corner];
            m[corner] = cell < 0 ? 0 : list->moment[cell];
        }
        task->grad_weight[kernel * task->taps + tap] = (REAL)((1 - down) * ((1 - right) * m[0] + right * m[1]) +
                                                              down * ((1 - right) * m[2] + right * m[3]));
        double *by_shift = task->grad_shift + (kernel * task->taps + tap) * 2;
        by_shift[0] = weight[tap] * ((1 - right) * (m[2] - m[0]) + right * (m[3] - m[1]));
        by_shift[1] = weight[tap] * ((1 - down) * (m[1] - m[0]) + down * (m[3] - m[2]));
    }
}

/* The moments of a kernel in a part of the images: products of the output's gradient with the input at each cell. */
static void stencil_weight_work(const void *data, index_t unit, REAL *scratch) {
    const stencil_call_t *call = data;
    const stencil_t *task = call->task;
    index_t kernel = unit / call->parts, part = unit % call->parts;
    const sizes_t *sizes = &task->sizes;
    index_t group_channels = task->channels / task->groups, in_area = sizes->height * sizes->width;
    index_t output = kernel / group_channels, member = kernel % group_channels;
    index_t channel = output / (task->outputs / task->groups) * group_channels + member;
    index_t out_area = sizes->out_height * sizes->out_width;
    list_t list = make_list(task, scratch);
    frame_t frame = call->input;
    index_t padded = round_up(sizes->out_width, LANES);
    REAL *plane = scratch + list_length(task), *grad = plane + frame_length(&frame);
    if (!fill_list(task, output, member, &list)) return;
    set_offsets(&frame, &list);
    for (index_t cell = 0; cell < list.count; cell++) list.moment[cell] = 0;
    memset(grad, 0, sizes->out_height * padded * sizeof(REAL));
    for (index_t image = part_start(call, part); image < part_start(call, part + 1); image++) {
        fill_frame(&frame, plane, task->input + (image * task->channels + channel) * in_area, sizes->height,
                   sizes->width);
        const REAL *from = task->grad_output + (image * task->outputs + output) * out_area;
        for (index_t row = 0; row < sizes->out_height; row++)
            copy_row(grad + row * padded, from + row * sizes->out_width, sizes->out_width);
        for (index_t cell = 0; cell < list.count; cell += 4) {
            index_t last = list.count - 1;
            const REAL *at[4];
            vector total[4] = {all(0), all(0), all(0), all(0)};
            for (int part = 0; part < 4; part++) at[part] = plane + list.offset[smallest(cell + part, last)];
            for (index_t row = 0; row < sizes->out_height; row++) {
                index_t step = row * sizes->stride_row * frame.pitch;
                for (index_t col = 0; col < padded; col += LANES) {
                    vector value = load(grad + row * padded + col);
                    for (int part = 0; part < 4; part++) total[part] += value * load(at[part] + step + col);
                }
            }
            for (int part = 0; part < 4 && cell + part <= last; part++)
                list.moment[cell + part] += sum_lanes(total[part]);
        }
    }
    if (call->parts == 1) {
        finish_kernel(task, kernel, &list);
    } else {
        memcpy(task->workspace + unit * 4 * task->taps, list.moment, list.count * sizeof(double));
    }
}

/* Adds the parts of a kernel's moments. */
static void stencil_sum_work(const void *data, index_t kernel, REAL *scratch) {
    const stencil_call_t *call = data;
    const stencil_t *task = call->task;
    index_t group_channels = task->channels / task->groups, length = 4 * task->taps;
    list_t list = make_list(task, scratch);
    if (!fill_list(task, kernel / group_channels, kernel % group_channels, &list)) return;
    for (index_t cell = 0; cell < list.count; cell++) {
        list.moment[cell] = 0;
        for (index_t part = 0; part < call->parts; part++)
            list.moment[cell] += task->workspace[(kernel * call->parts + part) * length + cell];
    }
    finish_kernel(task, kernel, &list);
}

int stencil_forward(parallel_t parallel, unsigned threads, const stencil_t *task) {
    stencil_call_t call = make_stencil_call(task);
    index_t length = list_length(task) + frame_length(&call.input);
    threads = worthwhile(task, threads);
    /* No sum goes over images: there may be as many parts as the threads want. */
    call.parts = cut_images(task, task->outputs, 4 * (index_t)threads);
    return run_parallel(parallel, threads, &call, task->outputs * call.parts, length, stencil_work);
}

int stencil_backward(parallel_t parallel, unsigned threads, const stencil_t *task) {
    const sizes_t *sizes = &task->sizes;
    stencil_call_t call = make_stencil_call(task);
    threads = worthwhile(task, threads);
    if (task->grad_input != NULL) {
        index_t length = list_length(task) + frame_length(&call.grad) + sizes->height * sizes->width + 4 * task->taps;
        call.parts = cut_images(task, task->channels, 4 * (index_t)threads);
        if (run_parallel(parallel, threads, &call, task->channels * call.parts, length, stencil_input_work)) return 1;
    }
    if (task->grad_weight == NULL) return 0;
    index_t length =
        list_length(task) + frame_length(&call.input) + sizes->out_height * round_up(sizes->out_width, LANES);
    index_t kernels = count_kernels(task);
    call.parts = cut_images(task, kernels, KERNEL_UNITS);
    return run_parallel(parallel, threads, &call, kernels * call.parts, length, stencil_weight_work) ||
           (call.parts > 1 && run_parallel(parallel, threads, &call, kernels, list_length(task), stencil_sum_work));
}
