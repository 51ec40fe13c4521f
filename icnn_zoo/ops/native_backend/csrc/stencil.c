/* Depthwise layers and the full version, whose outputs share no columns: a kernel as a list of cells.
 *
 * Bilinear interpolation makes of a tap at most four cells with weights; cells that taps share are merged. The gradient
 * by the input is the same with the cells mirrored.
 *
 * Units are (channel or kernel, part of the images). What images add up to is kept apart for each part and summed in the
 * order of the parts, and how many there are follows from the sizes of the call alone, never from the threads.
 */

#include "stencil.h"

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
        index_t own = kernel * task->taps + tap;
        finish_tap(m, down, right, weight[tap], task->grad_weight + own, task->grad_shift + 2 * own);
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
