// Columns of dense layers and their adjoint, from planes that lie in shared memory: neither a copy of the input with
// zeros around it nor one in another layout is made.
//
// Compiled at run time, without headers, for
//   SCALAR     0 float32, 1 float16, 2 bfloat16
//   POSITION   float or double
//   CHANNELS   channels of a block, a power of two
//   ROWS       rows of a band, which a thread walks down
//   THREADS    threads of a block, a multiple of 32
//   GRADIENT   for `gather_gradient` in place of `make_columns`, with the sizes WIDTH, OUT_WIDTH and OUT_PIXELS
//
// A block has CHANNELS channels of one image. Wherever taps lie, all that is read lies in shared memory: ZERO rows of
// zeros above and below serve bands that start outside, and no row is tested. Sums have a fixed order.

#ifdef EMULATED
#if SCALAR == 0
typedef float scalar;
#else
typedef unsigned short scalar;
#endif
#elif SCALAR == 0
typedef float scalar;
__device__ float as_float(scalar value) { return value; }
__device__ scalar as_scalar(float value) { return value; }
#elif SCALAR == 1
typedef unsigned short scalar;
__device__ float as_float(scalar value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
    return result;
}
__device__ scalar as_scalar(float value) {
    scalar result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
}
#else
typedef unsigned short scalar;
__device__ float as_float(scalar value) { return __uint_as_float((unsigned)value << 16); }
__device__ scalar as_scalar(float value) {
    unsigned result; // compute capability 8.0 converts in pairs
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(0.0f), "f"(value));
    return (scalar)result;
}
#endif

#ifndef EMULATED
__device__ void copy_vector(scalar *to, const scalar *from) {
    unsigned place = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from));
}
__device__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

enum {
    VECTOR = 16 / sizeof(scalar), // elements of what is copied at once
    ZERO = ROWS + 1,
    WARPS = THREADS / 32,
};

// Images [B, C, H, W] of any strides, counted in elements.
struct Images {
    scalar *first;
    long long image, channel, row, col;
    long long vectors; // whether a block's channels of a pixel lie side by side, aligned as a whole
};

// What a launch is told; in Python `staged.Task`.
struct Task {
    Images input;            // read by `make_columns`; by `gather_gradient` where there are partials
    Images grad_input;       // written by `gather_gradient`, if there is one
    const POSITION *positions; // [C, T, 2]
    scalar *columns;         // [C * T, column_pitch], each image's output pixels one after the other; or their gradient
    float *partials;         // positions' gradient of each image [B, C, T, 2], or null
    long long column_pitch;  // a multiple of 16
    int channels, taps, blocks; // blocks of CHANNELS channels for each image
    int height, width, out_height, out_width;
    int origin_row, origin_col, bound_row, bound_col; // past the bounds every read is outside
};

// Where a tap reads: whole shifts, the origin included, and fractions.
struct Tap {
    int row, col;
    float row_fraction, col_fraction;
};

__device__ int clamp(int value, int least, int most) { return min(max(value, least), most); }

__device__ int round_up(int value, int step) { return (value + step - 1) / step * step; }

// A coordinate that is no number, or infinite, makes both fractions NaN, and the shift a place that can be read.
__device__ Tap split_position(const POSITION *position, const Task &task) {
    POSITION row = position[0], col = position[1], row_floor = floor(row), col_floor = floor(col);
    Tap tap;
    tap.row_fraction = (float)(row - row_floor);
    tap.col_fraction = (float)(col - col_floor);
    float either = tap.row_fraction * tap.col_fraction;
    if (either != either)
        tap.row_fraction = tap.col_fraction = either;
    row_floor = row_floor == row_floor ? row_floor : 0;
    col_floor = col_floor == col_floor ? col_floor : 0;
    POSITION bound_row = task.bound_row, bound_col = task.bound_col;
    tap.row = (int)(row_floor > bound_row ? bound_row : row_floor < -bound_row ? -bound_row : row_floor);
    tap.col = (int)(col_floor > bound_col ? bound_col : col_floor < -bound_col ? -bound_col : col_floor);
    tap.row += task.origin_row;
    tap.col += task.origin_col;
    return tap;
}

__device__ void fill_with_zeros(scalar *memory, int elements) {
    int4 zero = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < elements / VECTOR; i += THREADS)
        ((int4 *)memory)[i] = zero;
}

// Planes in shared memory: where the pixel (0, 0) of the first is, and the elements from one to the next of each.
struct Planes {
    scalar *first;
    int channel, row;
};

// The channels of a block at a pixel.
struct alignas(CHANNELS * sizeof(scalar)) Vector {
    scalar values[CHANNELS];
};

__device__ scalar *first_pixel(const Images &images, int image, int channel) {
    return images.first + image * images.image + channel * images.channel;
}

__device__ void load_planes(Planes planes, const Images &images, int image, int channel, int channels,
                            const Task &task) {
    const scalar *first = first_pixel(images, image, channel);
    for (int i = threadIdx.x; i < task.height * task.width; i += THREADS) {
        int row = i / task.width, col = i - row * task.width;
        const scalar *from = first + row * images.row + col * images.col;
        scalar *to = planes.first + row * planes.row + col;
        if (images.vectors) {
            Vector vector = *(const Vector *)from;
#pragma unroll
            for (int j = 0; j < CHANNELS; j++)
                to[j * planes.channel] = vector.values[j];
        } else {
            for (int j = 0; j < channels; j++)
                to[j * planes.channel] = from[j * images.channel];
        }
    }
}

extern __shared__ int4 shared_memory[];

#ifndef GRADIENT

// Reads three elements that lie side by side. Of two bytes each, they are in two words whose address is even.
#if SCALAR == 0
__device__ void read_three(const scalar *from, bool, float *values) {
    for (int i = 0; i < 3; i++)
        values[i] = from[i];
}
#else
__device__ void read_three(const scalar *from, bool odd, float *values) {
    const unsigned *words = (const unsigned *)(from - odd);
    unsigned first = words[0], second = words[1];
    values[0] = as_float(odd ? first >> 16 : first);
    values[1] = as_float(odd ? second : first >> 16);
    values[2] = as_float(odd ? second >> 16 : second);
}
#endif

// A band of two columns of samples, into memory whose rows are out_width elements apart.
__device__ void make_band(scalar *to, const scalar *from, int pitch, bool odd, bool both, const Tap &tap,
                          const Task &task) {
    float left[ROWS + 1], right[ROWS + 1];
    // All is read before anything is written: a store would hold back the loads that follow it.
#pragma unroll
    for (int i = 0; i <= ROWS; i++) {
        float values[3];
        read_three(from, odd, values);
        left[i] = values[0] * (1 - tap.col_fraction) + values[1] * tap.col_fraction;
        right[i] = values[1] * (1 - tap.col_fraction) + values[2] * tap.col_fraction;
        from += pitch;
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        // Products with both weights, not lerp: an infinite pixel must not meet its own negative.
        to[0] = as_scalar(left[i] * (1 - tap.row_fraction) + left[i + 1] * tap.row_fraction);
        if (both)
            to[1] = as_scalar(right[i] * (1 - tap.row_fraction) + right[i + 1] * tap.row_fraction);
        to += task.out_width;
    }
}

// Makes columns. A warp has a channel and a tap at a time, a lane two columns of a band, whose rows serve two samples
// each. Samples are gathered in shared memory, so that whole vectors are written.
extern "C" __global__ void __launch_bounds__(THREADS) make_columns(const __grid_constant__ Task task) {
    int image = blockIdx.x / task.blocks, first_channel = blockIdx.x % task.blocks * CHANNELS;
    int channels = min(CHANNELS, task.channels - first_channel);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int pixels = task.out_height * task.out_width, bands = (task.out_height + ROWS - 1) / ROWS;
    int pairs = (task.out_width + 1) / 2;
    // Four columns of zeros before each row serve as those behind the row before it.
    int pitch = round_up(task.width + 4, 2), plane_rows = task.height + ZERO;
    int plane_elements = round_up((CHANNELS * plane_rows + ZERO) * pitch + 4, VECTOR);
    int gathered_elements = round_up(VECTOR + bands * ROWS * task.out_width, VECTOR);
    scalar *memory = (scalar *)shared_memory, *gathered = memory + plane_elements + warp * gathered_elements;
    Planes planes = {memory + ZERO * pitch + 4, plane_rows * pitch, pitch};

    fill_with_zeros(memory, plane_elements);
    __syncthreads();
    load_planes(planes, task.input, image, first_channel, channels, task);
    __syncthreads();
    int first_band = lane / pairs, first_pair = lane - first_band * pairs;
    for (int k = warp; k < channels * task.taps; k += WARPS) {
        long long owner = (long long)first_channel * task.taps + k;
        Tap tap = split_position(task.positions + 2 * owner, task);
        long long place = owner * task.column_pitch + (long long)image * pixels;
        int shift = (int)(place % VECTOR), end = shift + pixels;
        const scalar *plane = planes.first + k / task.taps * planes.channel;
        bool odd = tap.col & 1;
        for (int band = first_band, pair = first_pair; band < bands;) {
            int row = clamp(band * ROWS + tap.row, -ZERO, task.height);
            // Odd stays odd; what is read lies from 4 columns before a row to 3 behind it.
            int col = 2 * clamp(pair + (tap.col - odd) / 2, -2, (task.width + 1) / 2) + odd;
            const scalar *from = plane + row * pitch + col;
            scalar *to = gathered + shift + band * ROWS * task.out_width + 2 * pair;
            bool both = 2 * pair + 1 < task.out_width;
            if (odd)
                make_band(to, from, pitch, true, both, tap, task);
            else
                make_band(to, from, pitch, false, both, tap, task);
            for (pair += 32; pair >= pairs; pair -= pairs)
                band++;
        }
        __syncwarp();
        scalar *target = task.columns + (place - shift);
        for (int i = lane * VECTOR; i < end; i += 32 * VECTOR) {
            if (i >= shift && i + VECTOR <= end) {
                *(int4 *)(target + i) = *(const int4 *)(gathered + i);
            } else {
                for (int j = max(i, shift); j < min(i + VECTOR, end); j++)
                    target[j] = gathered[j];
            }
        }
        __syncwarp();
    }
}

#else

__device__ void store_planes(Planes planes, const Images &images, int image, int channel, int channels,
                             const Task &task) {
    scalar *first = first_pixel(images, image, channel);
    for (int i = threadIdx.x; i < task.height * task.width; i += THREADS) {
        int row = i / task.width, col = i - row * task.width;
        scalar *to = first + row * images.row + col * images.col;
        const scalar *from = planes.first + row * planes.row + col;
        if (images.vectors) {
            Vector vector;
#pragma unroll
            for (int j = 0; j < CHANNELS; j++)
                vector.values[j] = from[j * planes.channel];
            *(Vector *)to = vector;
        } else {
            for (int j = 0; j < channels; j++)
                to[j * images.channel] = from[j * planes.channel];
        }
    }
}

// Copies the gradient of a column to shared memory, with what surrounds it in its vectors.
__device__ void load_column(scalar *to, const scalar *column, int shift) {
#pragma unroll
    for (int i = 0; i < (OUT_PIXELS + 2 * VECTOR - 2) / VECTOR; i += THREADS) {
        int place = (i + threadIdx.x) * VECTOR;
        if (place < shift + OUT_PIXELS)
            copy_vector(to + place, column + place);
    }
}

// Replaces what surrounds it by zeros, each thread in the vectors that it has copied.
__device__ void clear_surroundings(scalar *to, int shift) {
    int last = (shift + OUT_PIXELS - 1) / VECTOR; // the last vector
    if (threadIdx.x == 0)
        for (int i = 0; i < shift; i++)
            to[i] = 0;
    if (threadIdx.x == last % THREADS)
        for (int i = shift + OUT_PIXELS; i < (last + 1) * VECTOR; i++)
            to[i] = 0;
}

// Gathers the input's gradient from the columns', with strides of 1, and sums the positions' gradient: a pixel times
// the derivative of what it gives.
//
// A thread has ROWS pixels below one another, for all taps of a channel; each row of samples serves two of them.
extern "C" __global__ void __launch_bounds__(THREADS) gather_gradient(const __grid_constant__ Task task) {
    int image = blockIdx.x / task.blocks, first_channel = blockIdx.x % task.blocks * CHANNELS;
    int channels = min(CHANNELS, task.channels - first_channel);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int bands = (task.height + ROWS - 1) / ROWS;
    int plane_elements = round_up(CHANNELS * bands * ROWS * WIDTH, VECTOR);
    int zeros = round_up(ZERO * OUT_WIDTH, VECTOR), copied = round_up(VECTOR + OUT_PIXELS, VECTOR);
    int column_elements = zeros + copied + zeros, owners = channels * task.taps;
    scalar *memory = (scalar *)shared_memory, *samples = memory + plane_elements;
    Planes planes = {memory, bands * ROWS * WIDTH, WIDTH};
    Tap *table = (Tap *)(samples + 2 * column_elements);
    float *sums = (float *)(table + CHANNELS * task.taps); // [owners, WARPS, 2]

    fill_with_zeros(memory, plane_elements + 2 * column_elements);
    long long first_owner = (long long)first_channel * task.taps;
    for (int k = threadIdx.x; k < owners; k += THREADS)
        table[k] = split_position(task.positions + 2 * (first_owner + k), task);
    __syncthreads();
    if (task.partials)
        load_planes(planes, task.input, image, first_channel, channels, task);
    long long first_place = first_owner * task.column_pitch + (long long)image * OUT_PIXELS;
    int shift = (int)(first_place % VECTOR); // the same for all owners, as the pitch is a multiple of VECTOR
    const scalar *column = task.columns + (first_place - shift);
    load_column(samples + zeros, column, shift);
    wait_for_copies();
    clear_surroundings(samples + zeros, shift);
    __syncthreads();

    int item = threadIdx.x, band = item / WIDTH, col = item - band * WIDTH;
    float totals[ROWS], values[ROWS], steps[ROWS + 1]; // values[i] - values[i - 1]
    for (int k = 0, tap_number = 0, channel = 0; k < owners; k++) {
        scalar *next = samples + (k + 1) % 2 * column_elements + zeros;
        column += task.column_pitch;
        if (k + 1 < owners)
            load_column(next, column, shift);
        scalar *plane = planes.first + channel * planes.channel + band * (ROWS - 1) * WIDTH + item;
        if (tap_number == 0) {
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                totals[i] = 0;
                values[i] = band < bands ? as_float(plane[i * WIDTH]) : 0;
                steps[i] = i == 0 ? values[0] : values[i] - values[i - 1];
            }
            steps[ROWS] = -values[ROWS - 1];
        }
        Tap tap = table[k];
        // The sample at a pixel minus the shift has the pixel as its left top corner; that to the left of it, as its
        // right one. Where there is no sample, zeros are read.
        const scalar *nothing = samples + k % 2 * column_elements, *origin = nothing + zeros + shift;
        int row = clamp(band * ROWS - 1 - tap.row, -ZERO, task.out_height), at = col - tap.col;
        const scalar *left = at >= 0 && at < OUT_WIDTH ? origin + row * OUT_WIDTH + at : nothing;
        const scalar *right = at > 0 && at <= OUT_WIDTH ? origin + row * OUT_WIDTH + at - 1 : nothing;
        float by_row = 0, by_col = 0;
#pragma unroll
        for (int i = 0; i <= ROWS; i++) {
            float left_sample = as_float(left[i * OUT_WIDTH]), right_sample = as_float(right[i * OUT_WIDTH]);
            float blend = left_sample * (1 - tap.col_fraction) + right_sample * tap.col_fraction;
            // It lies between two pixels: that above it gets the weight 1 - fraction, that below it the fraction.
            if (i > 0)
                totals[i - 1] += blend * (1 - tap.row_fraction);
            if (i < ROWS)
                totals[i] += blend * tap.row_fraction;
            by_row += steps[i] * blend;
            float value = (i > 0 ? values[i - 1] : 0) + tap.row_fraction * steps[i];
            by_col += value * (right_sample - left_sample);
        }
        if (task.partials) {
            // Half of the lanes go on with one sum, half with the other.
            bool upper = lane & 16;
            float sum = (upper ? by_col : by_row) + __shfl_xor_sync(~0u, upper ? by_row : by_col, 16);
            for (int step = 8; step > 0; step /= 2)
                sum += __shfl_xor_sync(~0u, sum, step);
            if (lane % 16 == 0)
                sums[(k * WARPS + warp) * 2 + lane / 16] = sum;
        }
        if (++tap_number == task.taps) {
            tap_number = 0;
            channel++;
            if (band < bands)
#pragma unroll
                for (int i = 0; i < ROWS; i++)
                    plane[i * WIDTH] = as_scalar(totals[i]);
        }
        wait_for_copies();
        if (k + 1 < owners)
            clear_surroundings(next, shift);
        __syncthreads();
    }
    if (task.grad_input.first)
        store_planes(planes, task.grad_input, image, first_channel, channels, task);
    if (task.partials)
        for (int i = threadIdx.x; i < 2 * owners; i += THREADS) {
            float sum = 0;
            for (int other = 0; other < WARPS; other++)
                sum += sums[(i / 2 * WARPS + other) * 2 + i % 2];
            task.partials[((long long)image * task.channels * task.taps + first_owner) * 2 + i] = sum;
        }
}

#endif
