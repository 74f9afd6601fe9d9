// What the CUDA kernels take from the hardware: shared memory, warp reductions, 16-byte loads.
// tests/helpers/cuda_on_cpu.cpp puts its own version in the place of this file, so that the kernels also run, step by
// step, on a CPU; it defines the include guard.
#ifndef SOFTMASK_DEVICE_CUH
#define SOFTMASK_DEVICE_CUH

#include <cuda_runtime.h>

namespace softmask {

constexpr int WARP = 32;

// The dynamic shared memory of the block.
__device__ __forceinline__ float* shared_memory() {
    extern __shared__ float4 softmask_shared_memory[];
    return reinterpret_cast<float*>(softmask_shared_memory);
}

// Sum over groups of `lanes` neighbouring lanes (a power of two), in every lane and always in the same order.
__device__ __forceinline__ float sum_over(float value, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

__device__ __forceinline__ float max_over_warp(float value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(~0u, value, distance));
    return value;
}

// 16 aligned bytes that are used once: the caches drop them first.
__device__ __forceinline__ uint4 load_16_bytes(const void* place) { return __ldcs(static_cast<const uint4*>(place)); }
__device__ __forceinline__ void store_16_bytes(void* place, uint4 bytes) { __stcs(static_cast<uint4*>(place), bytes); }

}  // namespace softmask

#endif
