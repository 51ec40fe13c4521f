// A kernel in CUDA C++ on a CPU: a thread for each of CUDA's, one block after the other. Compiled with the macros of the
// kernel, KERNELS (its file) and KERNEL (its name).
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define EMULATED
#define __device__ static
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

using std::floor;
using std::max;
using std::min;

struct alignas(16) int4 {
    int x, y, z, w;
};

static thread_local struct { unsigned x; } threadIdx, blockIdx;
alignas(16) int4 shared_memory[1 << 14];
static std::unique_ptr<std::barrier<>> block;
static std::vector<std::unique_ptr<std::barrier<>>> warps;
static float exchanged[1024];

static void __syncthreads() { block->arrive_and_wait(); }
static void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
static float __shfl_xor_sync(unsigned, float value, int mask) {
    exchanged[threadIdx.x] = value;
    __syncwarp();
    float result = exchanged[threadIdx.x ^ mask];
    __syncwarp();
    return result;
}

#if SCALAR == 0
static float as_float(float value) { return value; }
static float as_scalar(float value) { return value; }
#elif SCALAR == 1
static float as_float(unsigned short value) {
    _Float16 half;
    memcpy(&half, &value, 2);
    return half;
}
static unsigned short as_scalar(float value) {
    _Float16 half = value;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}
#else
static float as_float(unsigned short value) {
    unsigned bits = (unsigned)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
static unsigned short as_scalar(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#endif

template <class T> static void copy_vector(T *to, const T *from) { memcpy(to, from, 16); }
static void wait_for_copies() {}

#include KERNELS

extern "C" void emulate(int blocks, const Task *task) {
    block = std::make_unique<std::barrier<>>(THREADS);
    warps.clear();
    for (int i = 0; i < WARPS; i++)
        warps.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> threads;
    for (int thread = 0; thread < THREADS; thread++)
        threads.emplace_back([=] {
            threadIdx.x = thread;
            for (int i = 0; i < blocks; i++) {
                blockIdx.x = i;
                if (thread == 0)
                    memset(shared_memory, 0xff, sizeof shared_memory); // NaN in every dtype
                __syncthreads();
                KERNEL(*task);
                __syncthreads();
            }
        });
    for (auto &thread : threads)
        thread.join();
}
