// The CUDA kernels on a CPU, for tests: csrc/cuda/word_mask.cu as it stands, host code and all, over a device in software.
//
// Every thread of a block is a fiber, which runs until it waits for others (a warp exchange, a barrier of its block). The
// scheduler ranks the warps at random and runs a warp only when all before it wait: some run as far ahead of others as the
// barriers allow, and a missing barrier shows. The blocks of a launch run one after the other, in random order. Shared memory
// is NaN when a block starts, so reading what nobody wrote shows too. Waiting that never ends aborts.

#define SOFTMASK_DEVICE_CUH  // in the place of csrc/cuda/device.cuh

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace softmask {

constexpr int WARP = 32;

struct Barrier {
    int arrived = 0;
    long generation = 0;
};

struct Block {
    std::vector<float> shared;
    Barrier barrier;
    std::vector<Barrier> warps;
    std::vector<float> exchanged;  // one place per thread
    unsigned index;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int thread;
    bool done;
};

constexpr size_t STACK_BYTES = 64 * 1024;
Block block;
std::vector<Fiber> fibers;
Fiber* current = nullptr;
ucontext_t scheduler;
bool progress = false;
void (*kernel_call)() = nullptr;

void pause() { swapcontext(&current->context, &scheduler); }

long arrive_at(Barrier& barrier, size_t expected) {
    const long generation = barrier.generation;
    progress = true;
    if (++barrier.arrived == static_cast<int>(expected)) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    return generation;
}

void wait_for(const Barrier& barrier, long generation) {
    while (barrier.generation == generation) pause();
    progress = true;
}

// What csrc/cuda/device.cuh gives.
float* shared_memory() { return block.shared.data(); }

float exchange(float value, int other_lane_bits) {
    Barrier& warp = block.warps[current->thread / WARP];
    block.exchanged[current->thread] = value;
    wait_for(warp, arrive_at(warp, WARP));
    const float other = block.exchanged[current->thread ^ other_lane_bits];
    wait_for(warp, arrive_at(warp, WARP));
    return other;
}

float sum_over(float value, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) value += exchange(value, distance);
    return value;
}

float max_over_warp(float value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) value = std::fmax(value, exchange(value, distance));
    return value;
}

uint4 load_16_bytes(const void* place) {
    if (reinterpret_cast<uintptr_t>(place) % 16) std::fprintf(stderr, "16-byte load: not aligned\n"), std::abort();
    uint4 bytes;
    std::memcpy(&bytes, place, 16);
    return bytes;
}

void store_16_bytes(void* place, uint4 bytes) {
    if (reinterpret_cast<uintptr_t>(place) % 16) std::fprintf(stderr, "16-byte store: not aligned\n"), std::abort();
    std::memcpy(place, &bytes, 16);
}

// What the compiler of CUDA gives.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
struct Place {
    unsigned x;
};
Place threadIdx, blockIdx;

void __syncthreads() {
    wait_for(block.barrier, arrive_at(block.barrier, fibers.size()));
}

using std::max;
using std::min;

void run_fiber() {
    kernel_call();
    current->done = true;
    progress = true;
    pause();
}

bool is_done(int warp) {
    return std::all_of(&fibers[warp * WARP], &fibers[warp * WARP] + WARP, [](const Fiber& x) { return x.done; });
}

// Runs the threads of one warp until all of them wait for other warps or are done; says whether any got further.
bool run_warp(int warp) {
    bool moved = false;
    do {
        progress = false;
        for (int i = warp * WARP; i < (warp + 1) * WARP; ++i) {
            current = &fibers[i];
            threadIdx.x = current->thread;
            blockIdx.x = block.index;
            if (!current->done) swapcontext(&scheduler, &current->context);
        }
        moved = moved || progress;
    } while (progress);
    return moved;
}

void run_block(unsigned index, int threads, size_t shared_bytes, std::mt19937& random) {
    block.shared.assign(shared_bytes / sizeof(float), NAN);
    block.barrier = {};
    block.warps.assign(threads / WARP, {});
    block.exchanged.assign(threads, NAN);
    block.index = index;
    fibers.resize(threads);
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[STACK_BYTES]);
        fiber.thread = i;
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    std::vector<int> warps(fibers.size() / WARP);
    std::iota(warps.begin(), warps.end(), 0);
    std::shuffle(warps.begin(), warps.end(), random);
    while (!warps.empty()) {
        if (random() % 256 == 0) std::shuffle(warps.begin(), warps.end(), random);
        const bool moved = std::any_of(warps.begin(), warps.end(), run_warp);
        if (!moved) std::fprintf(stderr, "threads wait for each other for ever\n"), std::abort();
        warps.erase(std::remove_if(warps.begin(), warps.end(), is_done), warps.end());
    }
}

}  // namespace softmask

// The kernel finds its registration in the test's own namespace, and tensors of the CPU.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(namespace_, key, m) static void implementations(torch::stable::detail::StableLibrary& m)
#define SOFTMASK_SCRATCH 512
#include "../../csrc/cuda/word_mask.cu"

STABLE_TORCH_LIBRARY(softmask_fast_cuda_on_cpu, m) {
    m.def(
        "word_gradcam(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor? word_index, "
        "Tensor? key_mask, Tensor? log_sum_exp, float? soft_cap, float scale, Tensor(a!) cam) -> ()");
    m.def(
        "word_soft_mask(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor word_index, "
        "Tensor? features, int prefix_tokens, Tensor? key_mask, float scale, float constant_spread, "
        "Tensor(a!)? masked, Tensor(b!) keep) -> ()");
}
_STABLE_TORCH_LIBRARY_IMPL(softmask_fast_cuda_on_cpu, CPU, m, 0) { implementations(m); }

// The parts of the CUDA runtime and of PyTorch that the launch calls. CUDA_ON_CPU_SEED in the environment seeds the order in
// which threads and blocks run.
static softmask::Problem problem;
static softmask::Kernel kernel;

extern "C" {

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    const char* seed = std::getenv("CUDA_ON_CPU_SEED");
    std::mt19937 random(seed ? std::atoi(seed) : 0);
    problem = *static_cast<const softmask::Problem*>(arguments[0]);
    kernel = reinterpret_cast<softmask::Kernel>(const_cast<void*>(function));
    softmask::kernel_call = [] { kernel(problem); };
    std::vector<unsigned> blocks(config->gridDim.x);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), random);
    for (unsigned index : blocks)
        softmask::run_block(index, config->blockDim.x, config->dynamicSmemBytes, random);
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the device in software refused"; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) { return *guard = nullptr, 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
}
