// word_gradcam and word_soft_mask on NVIDIA GPUs as one launch: extract, normalise, mask. A cluster of 1, 2, 4 or 8 thread
// blocks makes the map of one image. Each block owns a run of its tokens, reads their K, V and features once, and
// exchanges with the others, through distributed shared memory, only the softmax statistics of every head and the minimum
// and maximum of the map. Every sum has one order and nothing is added atomically, so results are bitwise reproducible.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "../word_mask.h"
#include "device.cuh"

namespace softmask {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int BATCH = 4;        // loads of K, of V and of features that a thread has in flight
constexpr int SLICE = 64;       // tokens of one head that a warp takes at a time, at most
constexpr int MOST_BLOCKS = 8;  // the largest cluster that every GPU with clusters runs
constexpr int BLOCK_TOKENS = 96;
constexpr size_t SHARED_BYTES = 48 * 1024;  // what a block may take anywhere without asking

struct View {
    const char* data;
    ScalarType dtype;
    int64_t strides[4];
    bool in_16_bytes;  // rows along the last dimension are dense, aligned to 16 bytes and a multiple of them long
};

struct Problem {
    View query, key, value, grad_output;  // (B, H, L or N, D)
    View features, masked;                // (B, N, C), data is null without features
    const int64_t* word_index;            // (B,), or null: all words
    const bool* key_mask;                 // (B, N) by strides, or null
    int64_t mask_image, mask_token;
    float* map;  // (B, words, N): the map, or keep where it is normalised
    int64_t words, length;
    int heads, tokens, width, channels, prefix;
    int lanes;         // a power of two: lanes of a warp that share one row of K
    int block_tokens;  // tokens of one block of the cluster
    int head_chunk;    // heads whose logits are in shared memory at a time
    float scale, constant_spread;
    bool normalise;
};

// Where everything is in shared memory, in floats. The layout is the same in every block of a cluster.
struct Layout {
    int logits, gradients, cam, factors, statistics, range, scratch, size;

    __host__ __device__ explicit Layout(const Problem& p) {
        logits = 0;                                             // (head_chunk, block_tokens)
        gradients = logits + p.head_chunk * p.block_tokens;     // (head_chunk, block_tokens)
        cam = gradients + p.head_chunk * p.block_tokens;        // (block_tokens,)
        factors = cam + p.block_tokens;                         // (head_chunk,)
        statistics = factors + p.head_chunk;                    // (2, head_chunk, 2): maximum and sum, two chunks in turn
        range = statistics + 4 * p.head_chunk;                  // (2,): minimum and maximum of the map
        scratch = range + 2;                                    // (2, WARPS)
        size = scratch + 2 * WARPS;
    }
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void assign(float& target, float value) { target = value; }
__device__ __forceinline__ void assign(__half& target, float value) { target = __float2half_rn(value); }
__device__ __forceinline__ void assign(__nv_bfloat16& target, float value) { target = __float2bfloat16_rn(value); }

template <typename T>
constexpr int VECTOR = 16 / sizeof(T);

// VECTOR consecutive elements.
template <typename T>
struct Chunk {
    T values[VECTOR<T>];

    // Of `size` elements, `stride` apart, those from `first` on; zeros behind the end.
    template <bool IN_16_BYTES>
    __device__ __forceinline__ void load(const T* row, int64_t stride, int first, int size) {
        uint4 bytes = make_uint4(0, 0, 0, 0);
        if (IN_16_BYTES && first < size) bytes = load_16_bytes(row + first);
        memcpy(values, &bytes, 16);
        if (!IN_16_BYTES)
            for (int i = 0; i < VECTOR<T>; ++i)
                if (first + i < size) values[i] = row[(first + i) * stride];
    }

    __device__ __forceinline__ float dot(const float* other) const {
        float sum = 0.0f;
        for (int i = 0; i < VECTOR<T>; ++i) sum += to_float(values[i]) * other[i];
        return sum;
    }
};

template <typename T>
__device__ __forceinline__ const T* row_of(const View& x, int64_t i, int64_t j, int64_t k) {
    return reinterpret_cast<const T*>(x.data) + i * x.strides[0] + j * x.strides[1] + k * x.strides[2];
}

__device__ __forceinline__ bool attended(const Problem& p, int64_t image, int64_t token) {
    return !p.key_mask || p.key_mask[image * p.mask_image + token * p.mask_token];
}

// logits[t] = scale <q, K_n> (-inf at padding) and gradients[t] = <dO, V_n> of `count` tokens n = first + t, by one warp.
template <typename T, bool IN_16_BYTES>
__device__ __forceinline__ void products(
    const Problem& p, int64_t image, int head, int64_t word, int first, int count, float* logits, float* gradients) {
    const int lane = threadIdx.x % WARP, rows = WARP / p.lanes;
    const int d = lane % p.lanes * VECTOR<T>, row = lane / p.lanes;
    constexpr int STEPS = IN_16_BYTES ? BATCH : BATCH / 2;  // strided addresses take registers
    Chunk<T> chunk;
    float query[VECTOR<T>], gradient[VECTOR<T>];
    const T* source = row_of<T>(p.query, image, head, word);
    chunk.template load<IN_16_BYTES>(source, p.query.strides[3], d, p.width);
    for (int i = 0; i < VECTOR<T>; ++i) query[i] = to_float(chunk.values[i]) * p.scale;
    source = row_of<T>(p.grad_output, image, head, word);
    chunk.template load<IN_16_BYTES>(source, p.grad_output.strides[3], d, p.width);
    for (int i = 0; i < VECTOR<T>; ++i) gradient[i] = to_float(chunk.values[i]);
    for (int start = 0; start < count; start += STEPS * rows) {
        Chunk<T> keys[STEPS], values[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const int t = start + i * rows + row, size = t < count ? p.width : 0;
            keys[i].template load<IN_16_BYTES>(row_of<T>(p.key, image, head, first + t), p.key.strides[3], d, size);
            values[i].template load<IN_16_BYTES>(
                row_of<T>(p.value, image, head, first + t), p.value.strides[3], d, size);
        }
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const int t = start + i * rows + row;
            const float logit = sum_over(keys[i].dot(query), p.lanes);
            const float along = sum_over(values[i].dot(gradient), p.lanes);
            if (d == 0 && t < count) {
                logits[t] = attended(p, image, first + t) ? logit : -INFINITY;
                gradients[t] = along;
            }
        }
    }
}

// statistics[0], [1]: maximum of the logits and sum of e^(logit - maximum), by one warp, which leaves the exponentials in
// the place of the logits.
__device__ __forceinline__ void softmax_statistics(float* logits, int count, float* statistics) {
    const int lane = threadIdx.x % WARP;
    float maximum = -INFINITY, sum = 0.0f;
    for (int t = lane; t < count; t += WARP) maximum = fmaxf(maximum, logits[t]);
    maximum = max_over_warp(maximum);
    const float reference = maximum == -INFINITY ? 0.0f : maximum;
    for (int t = lane; t < count; t += WARP) {
        logits[t] = expf(logits[t] - reference);
        sum += logits[t];
    }
    sum = sum_over(sum, WARP);
    if (lane == 0) statistics[0] = maximum, statistics[1] = sum;
}

// What turns the exponentials of this block into attention / heads, from the statistics of all blocks.
__device__ __forceinline__ float softmax_factor(float* statistics, int heads) {
    float maximum = -INFINITY, sum = 0.0f;
    for (int block = 0; block < Cluster::size(); ++block)
        maximum = fmaxf(maximum, Cluster::of_block(statistics, block)[0]);
    if (maximum == -INFINITY) maximum = 0.0f;  // no attended token: all sums are 0
    for (int block = 0; block < Cluster::size(); ++block) {
        const float* other = Cluster::of_block(statistics, block);
        sum += other[1] * expf(other[0] - maximum);
    }
    const float own = statistics[0] == -INFINITY ? 0.0f : expf(statistics[0] - maximum);
    return sum == 0.0f ? 0.0f : own / (sum * heads);  // NaN stays
}

// masked = features * keep for the `count` tokens from `first` on.
template <typename T, bool IN_16_BYTES>
__device__ __forceinline__ void scale_features(const Problem& p, int64_t image, int first, int count, const float* keep) {
    const int lane = threadIdx.x % WARP;
    for (int t = threadIdx.x / WARP; t < count; t += WARPS) {
        const T* source = row_of<T>(p.features, image, first + t, 0);
        T* target = const_cast<T*>(row_of<T>(p.masked, image, first + t, 0));
        const int64_t step = p.features.strides[2], target_step = p.masked.strides[2];
        if (IN_16_BYTES) {
            for (int start = lane * VECTOR<T>; start < p.channels; start += BATCH * WARP * VECTOR<T>) {
                Chunk<T> chunks[BATCH];
#pragma unroll
                for (int i = 0; i < BATCH; ++i)
                    chunks[i].template load<true>(source, 1, start + i * WARP * VECTOR<T>, p.channels);
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    const int c = start + i * WARP * VECTOR<T>;
                    for (int j = 0; j < VECTOR<T>; ++j)
                        assign(chunks[i].values[j], to_float(chunks[i].values[j]) * keep[t]);
                    uint4 bytes;
                    memcpy(&bytes, chunks[i].values, 16);
                    if (c < p.channels) store_16_bytes(target + c, bytes);
                }
            }
        } else {
            for (int c = lane; c < p.channels; c += WARP) assign(target[c * target_step], to_float(source[c * step]) * keep[t]);
        }
    }
}

template <typename T>
__device__ __forceinline__ void scale_features(const Problem& p, int64_t image, int first, int count, const float* keep) {
    if (p.features.in_16_bytes && p.masked.in_16_bytes) scale_features<T, true>(p, image, first, count, keep);
    else scale_features<T, false>(p, image, first, count, keep);
}

// Grid: the blocks of one cluster for every word map, one after the other. T is the dtype of query, key, value, grad_output.
template <typename T, bool IN_16_BYTES>
__global__ void __launch_bounds__(THREADS, 2) word_map(const __grid_constant__ Problem p) {
    const Layout layout(p);
    float* shared = shared_memory();
    float *logits = shared + layout.logits, *gradients = shared + layout.gradients, *cam = shared + layout.cam;
    float *factors = shared + layout.factors, *range = shared + layout.range, *scratch = shared + layout.scratch;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t task = blockIdx.x / Cluster::size(), image = task / p.words;
    const int64_t asked = p.word_index ? p.word_index[image] : task % p.words;
    const bool exists = asked >= 0 && asked < p.length;  // if not, the map is NaN: nobody looks at the index on the host
    const int first = Cluster::rank() * p.block_tokens;
    const int count = max(0, min(p.block_tokens, p.tokens - first));
    const int slices = max(1, (count + SLICE - 1) / SLICE), slice = (count + slices - 1) / slices;

    for (int t = threadIdx.x; t < count; t += THREADS) cam[t] = 0.0f;
    for (int head = 0, turn = 0; head < p.heads; head += p.head_chunk, turn ^= 1) {
        const int chunk = min(p.head_chunk, p.heads - head);
        float* statistics = shared + layout.statistics + turn * 2 * p.head_chunk;
        for (int job = warp; job < chunk * slices; job += WARPS) {
            const int h = job / slices, start = job % slices * slice, place = h * p.block_tokens + start;
            products<T, IN_16_BYTES>(
                p, image, head + h, exists ? asked : 0, first + start, min(slice, count - start), logits + place,
                gradients + place);
        }
        __syncthreads();
        for (int h = warp; h < chunk; h += WARPS)
            softmax_statistics(logits + h * p.block_tokens, count, statistics + 2 * h);
        // Two sets of statistics in turn: whoever writes one of them has passed this barrier since the others read it.
        Cluster::arrive();
        Cluster::wait();
        for (int h = threadIdx.x; h < chunk; h += THREADS) factors[h] = softmax_factor(statistics + 2 * h, p.heads);
        __syncthreads();
        for (int t = threadIdx.x; t < count; t += THREADS) {
            float sum = cam[t];
            for (int h = 0; h < chunk; ++h) {
                const float along = gradients[h * p.block_tokens + t];
                // the comparison is false for NaN, so that a NaN stays: fmaxf would drop it
                sum += logits[h * p.block_tokens + t] * factors[h] * (along < 0.0f ? 0.0f : along);
            }
            cam[t] = sum;
        }
        __syncthreads();
    }

    float low = INFINITY, high = 0.0f;  // a map is never negative
    for (int t = threadIdx.x; t < count; t += THREADS) {
        const bool counts = attended(p, image, first + t);
        cam[t] = !exists ? NAN : counts ? cam[t] : 0.0f;
        if (counts && first + t >= p.prefix) low = fminf(low, cam[t]), high = fmaxf(high, cam[t]);
    }
    if (p.normalise) {
        low = -max_over_warp(-low);
        high = max_over_warp(high);
        if (lane == 0) scratch[2 * warp] = low, scratch[2 * warp + 1] = high;
        __syncthreads();
        for (int w = 0; w < WARPS; ++w) low = fminf(low, scratch[2 * w]), high = fmaxf(high, scratch[2 * w + 1]);
        if (threadIdx.x == 0) range[0] = low, range[1] = high;
        Cluster::arrive();
        Cluster::wait();
        for (int block = 0; block < Cluster::size(); ++block) {
            const float* other = Cluster::of_block(range, block);
            low = fminf(low, other[0]), high = fmaxf(high, other[1]);
        }
    }
    Cluster::arrive();  // this thread reads no other block's memory any more
    float* map = p.map + task * p.tokens + first;
    const float spread = high - low;
    const bool varies = spread > p.constant_spread * high;
    for (int t = threadIdx.x; t < count; t += THREADS) {
        const bool patch = first + t >= p.prefix && attended(p, image, first + t);
        if (p.normalise && cam[t] == cam[t]) cam[t] = patch && varies ? 1.0f - (cam[t] - low) / spread : 1.0f;
        map[t] = cam[t];
    }
    if (p.features.data) {
        __syncthreads();
        if (p.features.dtype == ScalarType::Float) scale_features<float>(p, image, first, count, cam);
        else if (p.features.dtype == ScalarType::Half) scale_features<__half>(p, image, first, count, cam);
        else scale_features<__nv_bfloat16>(p, image, first, count, cam);
    }
    Cluster::wait();  // a block must not exit while another reads its memory
}

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "word_mask on CUDA: ", cudaGetErrorString(error)); }

View view(const Tensor& tensor, const char* name, const Tensor& query) {
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, name,
        ": expected dtype float32, float16 or bfloat16");
    STD_TORCH_CHECK(tensor.get_device_index() == query.get_device_index(), name, ": expected the device of query");
    View x{static_cast<const char*>(tensor.data_ptr()), dtype, {0, 0, 0, 0}, true};
    const int64_t dims = tensor.dim(), element = dtype == ScalarType::Float ? 4 : 2;
    for (int64_t i = 0; i < dims; ++i) {
        x.strides[i] = tensor.stride(i);
        const bool last = i == dims - 1;
        const bool fits = last ? x.strides[i] == 1 && tensor.size(i) * element % 16 == 0 : x.strides[i] * element % 16 == 0;
        x.in_16_bytes = x.in_16_bytes && (fits || (!last && tensor.size(i) == 1));
    }
    x.in_16_bytes = x.in_16_bytes && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
    return x;
}

Problem describe(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad_output,
    const std::optional<Tensor>& word_index, const std::optional<Tensor>& key_mask, double scale, const Tensor& map) {
    check_word_map(query, key, value, grad_output, word_index, key_mask);
    for (const Tensor* other : {&key, &value, &grad_output})
        STD_TORCH_CHECK(other->scalar_type() == query.scalar_type(), "key, value, grad_output: expected the dtype of query");
    for (const Tensor* other : {word_index ? &*word_index : &query, key_mask ? &*key_mask : &query, &map})
        STD_TORCH_CHECK(
            other->get_device_index() == query.get_device_index(), "word_index, key_mask, map: expected the device of query");
    const int64_t tokens = key.size(2), width = query.size(3);
    STD_TORCH_CHECK(width <= 128, "query: expected heads of up to 128 elements, got ", width);
    STD_TORCH_CHECK(tokens <= 1 << 24, "key: expected up to 2^24 tokens, got ", tokens);
    Problem p{};
    p.query = view(query, "query", query);
    p.key = view(key, "key", query);
    p.value = view(value, "value", query);
    p.grad_output = view(grad_output, "grad_output", query);
    if (word_index) p.word_index = word_index->const_data_ptr<int64_t>();
    if (key_mask) {
        p.key_mask = key_mask->const_data_ptr<bool>();
        p.mask_image = key_mask->stride(0);
        p.mask_token = key_mask->stride(1);
    }
    p.words = word_index ? 1 : query.size(2);
    check_map(map, "map", query.size(0) * p.words * tokens);
    p.map = map.mutable_data_ptr<float>();
    p.length = query.size(2);
    p.heads = static_cast<int>(query.size(1));
    p.tokens = static_cast<int>(tokens);
    p.width = static_cast<int>(width);
    p.scale = static_cast<float>(scale);
    const int vector = query.scalar_type() == ScalarType::Float ? VECTOR<float> : VECTOR<__half>;
    for (p.lanes = 1; p.lanes * vector < width; p.lanes *= 2) {}
    return p;
}

template <typename T>
auto kernel_for(const Problem& p) {
    const bool in_16_bytes =
        p.query.in_16_bytes && p.key.in_16_bytes && p.value.in_16_bytes && p.grad_output.in_16_bytes;
    return in_16_bytes ? word_map<T, true> : word_map<T, false>;
}

void launch(Problem& p, int64_t maps, int device) {
    if (maps * p.tokens == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(device);
    check(cudaSetDevice(device));  // this library has its own copy of the CUDA runtime
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    int generation = 0, most_shared = 0;
    check(cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device));
    check(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));

    int blocks = 1;
    while (generation >= 9 && blocks < MOST_BLOCKS && blocks * BLOCK_TOKENS < p.tokens) blocks *= 2;
    p.block_tokens = (p.tokens + blocks - 1) / blocks;
    // As many heads at a time as fit, and about the same number each time.
    int chunks = 0;
    size_t shared = 0;
    do {
        p.head_chunk = (p.heads + chunks) / (chunks + 1);
        ++chunks;
        shared = sizeof(float) * Layout(p).size;
    } while (shared > SHARED_BYTES && p.head_chunk > 1);
    STD_TORCH_CHECK(
        shared <= static_cast<size_t>(most_shared), "key: ", p.tokens, " tokens need ", shared,
        " bytes of shared memory in each block, this GPU has ", most_shared);
    STD_TORCH_CHECK(maps * blocks <= std::numeric_limits<int>::max(), "query: too many word maps for one launch: ", maps);

    auto kernel = kernel_for<float>(p);
    if (p.query.dtype == ScalarType::Half) kernel = kernel_for<__half>(p);
    if (p.query.dtype == ScalarType::BFloat16) kernel = kernel_for<__nv_bfloat16>(p);
    if (shared > SHARED_BYTES)
        check(cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(shared)));
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = blocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(maps * blocks));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = blocks > 1 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, p));
}

void word_gradcam(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad_output,
    const std::optional<Tensor>& word_index, const std::optional<Tensor>& key_mask, double scale, const Tensor& cam) {
    Problem p = describe(query, key, value, grad_output, word_index, key_mask, scale, cam);
    launch(p, query.size(0) * p.words, query.get_device_index());
}

void word_soft_mask(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad_output, const Tensor& word_index,
    const std::optional<Tensor>& features, int64_t prefix_tokens, const std::optional<Tensor>& key_mask, double scale,
    double constant_spread, const std::optional<Tensor>& masked, const Tensor& keep) {
    Problem p = describe(query, key, value, grad_output, word_index, key_mask, scale, keep);
    p.channels = static_cast<int>(check_features(features, masked, query.size(0), p.tokens));
    if (features) {
        STD_TORCH_CHECK(masked->scalar_type() == features->scalar_type(), "masked: expected the dtype of features");
        p.features = view(*features, "features", query);
        p.masked = view(*masked, "masked", query);
    }
    p.prefix = static_cast<int>(std::clamp<int64_t>(prefix_tokens, 0, p.tokens));
    p.constant_spread = static_cast<float>(constant_spread);
    p.normalise = true;
    launch(p, query.size(0), query.get_device_index());
}

}  // namespace
}  // namespace softmask

STABLE_TORCH_LIBRARY_IMPL(softmask_fast_cpp, CUDA, m) {
    m.impl("word_gradcam", TORCH_BOX(&softmask::word_gradcam));
    m.impl("word_soft_mask", TORCH_BOX(&softmask::word_soft_mask));
}
