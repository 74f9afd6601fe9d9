// What the CUDA kernels take from the hardware: shared memory, clusters of thread blocks, warp reductions, 16-byte loads.
// tests/cuda_on_cpu.cpp puts its own version in the place of this file, so that the kernels also run, step by step, on a
// CPU; it defines the include guard.
#ifndef SOFTMASK_DEVICE_CUH
#define SOFTMASK_DEVICE_CUH

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace softmask {

constexpr int WARP = 32;

// The dynamic shared memory of the block.
__device__ __forceinline__ float* shared_memory() {
    extern __shared__ float4 softmask_shared_memory[];
    return reinterpret_cast<float*>(softmask_shared_memory);
}

// The thread blocks that share one image. Before sm_90 there are no clusters, and a block is alone in its own.
struct Cluster {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    __device__ static int rank() { return cooperative_groups::cluster_group::block_rank(); }
    __device__ static int size() { return cooperative_groups::cluster_group::num_blocks(); }
    // What every thread wrote before it arrived, every thread may read after it waited.
    __device__ static void arrive() { cooperative_groups::cluster_group::barrier_arrive(); }
    __device__ static void wait() { cooperative_groups::cluster_group::barrier_wait(); }
    // The same place in the shared memory of another block, which must not have exited.
    __device__ static const float* of_block(float* place, int rank) {
        return cooperative_groups::cluster_group::map_shared_rank(place, rank);
    }
#else
    __device__ static int rank() { return 0; }
    __device__ static int size() { return 1; }
    __device__ static void arrive() {}
    __device__ static void wait() { __syncthreads(); }
    __device__ static const float* of_block(float* place, int) { return place; }
#endif
};

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
