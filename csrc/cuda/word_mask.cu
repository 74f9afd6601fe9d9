// word_gradcam and word_soft_mask on NVIDIA GPUs: three plain kernels behind one call. `word_products` streams K and V
// once and leaves two numbers per head and token; `word_map` makes the map or the mask of an image of them, one block
// each; `mask_features` streams the features once. Every sum has one order and nothing is added atomically.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "../built_with.h"
#include "../word_mask_checks.h"
#include "device.cuh"

namespace softmask {
namespace {

constexpr int THREADS = 128, WARPS = THREADS / WARP;
constexpr int BATCH = 4;            // loads of K, of V and of features that a thread has in flight
constexpr int FEATURE_TOKENS = 16;  // tokens whose features a block masks
#ifndef SOFTMASK_SCRATCH  // a test takes less
#define SOFTMASK_SCRATCH (1 << 24)
#endif
constexpr int64_t SCRATCH = SOFTMASK_SCRATCH;  // products kept at a time for maps of all words: 64 MiB each of the two

struct View {
    const char* data;
    ScalarType dtype;
    int64_t strides[4];
    bool in_16_bytes;  // rows along the last dimension are dense, aligned to 16 bytes and a multiple of them long
};

struct Problem {
    View query, key, value, grad_output;  // (B, H or Hk, L or N, D)
    View features, masked;                // (B, N, C), data is null without features
    const int64_t* word_index;            // (B,), or null: all words
    const bool* key_mask;                 // (B, N) by strides, or null
    int64_t mask_image, mask_token;
    const float* log_sum_exp;  // (B, H, L) by strides, or null: the softmax is over these keys alone
    int64_t sum_image, sum_head, sum_word;
    float *logits, *gradients;  // (B, words, H, N)
    float* map;                 // (B, all_words, N): the map, or keep where it is normalized
    int64_t images, all_words, first_word, words, length;  // words from first_word on are made at a time
    int heads, group, tokens, width, channels, prefix;     // group: query heads that share a head of K and V
    int lanes, tiles;                                      // lanes of a warp that share one row of K; blocks per head
    float scale, soft_cap, constant_spread;                // soft_cap: 0 for none
    bool normalize;
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

    // Of `size` elements, `stride` apart, those from `first` on; zeros after the end.
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

// The word of a map, -1 if it is out of range: then the map is NaN, as the host does not read the index.
__device__ __forceinline__ int64_t word_of(const Problem& p, int64_t map) {
    const int64_t word = p.word_index ? p.word_index[map / p.words] : p.first_word + map % p.words;
    return word >= 0 && word < p.length ? word : -1;
}

// Grid: the tiles of tokens of every head of every map, one after the other. logits: scale <q, K_n>, capped, less the
// log of the row's sum where it is given, -inf at padding; gradients: <dO, V_n>.
template <typename T, bool IN_16_BYTES>
__global__ void __launch_bounds__(THREADS) word_products(const __grid_constant__ Problem p) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, rows = WARP / p.lanes;
    const int d = lane % p.lanes * VECTOR<T>, row = lane / p.lanes;
    const int tile = blockIdx.x % p.tiles, head = blockIdx.x / p.tiles % p.heads;
    const int64_t map = blockIdx.x / p.tiles / p.heads, image = map / p.words;
    const int64_t word = max(word_of(p, map), int64_t(0));
    const int first = (tile * WARPS + warp) * BATCH * rows + row;
    Chunk<T> chunk, keys[BATCH], values[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        const int token = first + i * rows, size = token < p.tokens ? p.width : 0;
        keys[i].template load<IN_16_BYTES>(row_of<T>(p.key, image, head / p.group, token), p.key.strides[3], d, size);
        values[i].template load<IN_16_BYTES>(
            row_of<T>(p.value, image, head / p.group, token), p.value.strides[3], d, size);
    }
    float query[VECTOR<T>], gradient[VECTOR<T>];
    chunk.template load<IN_16_BYTES>(row_of<T>(p.query, image, head, word), p.query.strides[3], d, p.width);
    for (int i = 0; i < VECTOR<T>; ++i) query[i] = to_float(chunk.values[i]) * p.scale;
    chunk.template load<IN_16_BYTES>(row_of<T>(p.grad_output, image, head, word), p.grad_output.strides[3], d, p.width);
    for (int i = 0; i < VECTOR<T>; ++i) gradient[i] = to_float(chunk.values[i]);
    float shift = 0.0f;
    if (p.log_sum_exp) shift = p.log_sum_exp[image * p.sum_image + head * p.sum_head + word * p.sum_word];
    if (shift == -INFINITY) shift = INFINITY;  // no key at all: a map of zeros
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        const int token = first + i * rows;
        float logit = sum_over(keys[i].dot(query), p.lanes);
        const float along = sum_over(values[i].dot(gradient), p.lanes);
        if (d > 0 || token >= p.tokens) continue;
        if (p.soft_cap > 0.0f) logit = p.soft_cap * tanhf(logit / p.soft_cap);
        const int64_t place = (map * p.heads + head) * p.tokens + token;
        p.logits[place] = attended(p, image, token) ? logit - shift : -INFINITY;
        p.gradients[place] = along;
    }
}

// Grid: one block per map. Shared: maximum and factor of each head, then minimum and maximum of each warp.
__global__ void __launch_bounds__(THREADS) word_map(const __grid_constant__ Problem p) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t image = blockIdx.x / p.words;
    float *maxima = shared_memory(), *factors = maxima + p.heads, *range = factors + p.heads;
    const float* logits = p.logits + int64_t(blockIdx.x) * p.heads * p.tokens;
    const float* gradients = p.gradients + int64_t(blockIdx.x) * p.heads * p.tokens;
    float* map = p.map + (image * p.all_words + p.first_word + blockIdx.x % p.words) * p.tokens;
    for (int head = warp; head < p.heads; head += WARPS) {
        float maximum = -INFINITY, sum = 0.0f;
        if (!p.log_sum_exp) {
            const float* row = logits + int64_t(head) * p.tokens;
            for (int t = lane; t < p.tokens; t += WARP) maximum = fmaxf(maximum, row[t]);
            maximum = max_over_warp(maximum);
            if (maximum == -INFINITY) maximum = 0.0f;  // no attended token: the sum is 0
            for (int t = lane; t < p.tokens; t += WARP) sum += expf(row[t] - maximum);
            sum = sum_over(sum, WARP);
        }
        if (lane > 0) continue;
        maxima[head] = p.log_sum_exp ? 0.0f : maximum;
        factors[head] = p.log_sum_exp ? 1.0f / p.heads : sum == 0.0f ? 0.0f : 1.0f / (sum * p.heads);  // NaN stays
    }
    __syncthreads();
    const bool exists = word_of(p, blockIdx.x) >= 0;
    float low = INFINITY, high = 0.0f;  // a map is never negative
    for (int t = threadIdx.x; t < p.tokens; t += THREADS) {
        float cam = 0.0f;
        for (int head = 0; head < p.heads; ++head) {
            const float along = gradients[int64_t(head) * p.tokens + t];
            const float weight = expf(logits[int64_t(head) * p.tokens + t] - maxima[head]) * factors[head];
            cam += weight * (along < 0.0f ? 0.0f : along);  // false for NaN, so that a NaN stays: fmaxf would drop it
        }
        const bool counts = attended(p, image, t);
        map[t] = !exists ? NAN : counts ? cam : 0.0f;
        if (counts && t >= p.prefix) low = fminf(low, cam), high = fmaxf(high, cam);
    }
    if (!p.normalize) return;
    low = -max_over_warp(-low);
    high = max_over_warp(high);
    if (lane == 0) range[2 * warp] = low, range[2 * warp + 1] = high;
    __syncthreads();
    for (int w = 0; w < WARPS; ++w) low = fminf(low, range[2 * w]), high = fmaxf(high, range[2 * w + 1]);
    const float spread = high - low;
    const bool varies = spread > p.constant_spread * high;
    for (int t = threadIdx.x; t < p.tokens; t += THREADS) {  // what this thread wrote
        const bool patch = t >= p.prefix && attended(p, image, t);
        if (map[t] == map[t]) map[t] = patch && varies ? 1.0f - (map[t] - low) / spread : 1.0f;
    }
}

// Grid: the runs of FEATURE_TOKENS tokens of every image. A warp takes one token after the other.
template <typename T, bool IN_16_BYTES>
__global__ void __launch_bounds__(THREADS) mask_features(const __grid_constant__ Problem p) {
    const int lane = threadIdx.x % WARP, runs = (p.tokens + FEATURE_TOKENS - 1) / FEATURE_TOKENS;
    const int64_t image = blockIdx.x / runs;
    const int first = blockIdx.x % runs * FEATURE_TOKENS, last = min(first + FEATURE_TOKENS, p.tokens);
    for (int t = first + threadIdx.x / WARP; t < last; t += WARPS) {
        const T* source = row_of<T>(p.features, image, t, 0);
        T* target = const_cast<T*>(row_of<T>(p.masked, image, t, 0));
        const float keep = p.map[image * p.tokens + t];
        for (int start = lane * VECTOR<T>; start < p.channels; start += BATCH * WARP * VECTOR<T>) {
            Chunk<T> chunks[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i)
                chunks[i].template load<IN_16_BYTES>(
                    source, p.features.strides[2], start + i * WARP * VECTOR<T>, p.channels);
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int c = start + i * WARP * VECTOR<T>;
                for (int j = 0; j < VECTOR<T>; ++j) {
                    assign(chunks[i].values[j], to_float(chunks[i].values[j]) * keep);
                    if (!IN_16_BYTES && c + j < p.channels) target[(c + j) * p.masked.strides[2]] = chunks[i].values[j];
                }
                uint4 bytes;
                memcpy(&bytes, chunks[i].values, 16);
                if (IN_16_BYTES && c < p.channels) store_16_bytes(target + c, bytes);
            }
        }
    }
}

void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "word_mask on CUDA: ", cudaGetErrorString(error));
}

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
        const bool fits =
            last ? x.strides[i] == 1 && tensor.size(i) * element % 16 == 0 : x.strides[i] * element % 16 == 0;
        x.in_16_bytes = x.in_16_bytes && (fits || (!last && tensor.size(i) == 1));
    }
    x.in_16_bytes = x.in_16_bytes && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
    return x;
}

Problem describe(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad_output,
    const std::optional<Tensor>& word_index, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& log_sum_exp, std::optional<double> soft_cap, double scale, const Tensor& map) {
    check_word_map(query, key, value, grad_output, word_index, key_mask, log_sum_exp);
    for (const Tensor* other : {&key, &value, &grad_output})
        STD_TORCH_CHECK(
            other->scalar_type() == query.scalar_type(), "key, value, grad_output: expected the dtype of query");
    for (const auto& other : {word_index, key_mask, log_sum_exp, std::optional<Tensor>(map)})
        STD_TORCH_CHECK(
            !other || other->get_device_index() == query.get_device_index(),
            "word_index, key_mask, log_sum_exp, map: expected the device of query");
    STD_TORCH_CHECK(query.size(3) <= 128, "query: expected heads of up to 128 elements, got ", query.size(3));
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
    if (log_sum_exp) {
        p.log_sum_exp = log_sum_exp->const_data_ptr<float>();
        p.sum_image = log_sum_exp->stride(0);
        p.sum_head = log_sum_exp->stride(1);
        p.sum_word = log_sum_exp->stride(2);
    }
    p.images = query.size(0);
    p.length = query.size(2);
    p.all_words = word_index ? 1 : p.length;
    p.heads = static_cast<int>(query.size(1));
    p.group = p.heads / std::max<int>(1, key.size(1));
    p.tokens = static_cast<int>(key.size(2));
    p.width = static_cast<int>(query.size(3));
    check_map(map, "map", p.images * p.all_words * p.tokens);
    p.map = map.mutable_data_ptr<float>();
    p.scale = static_cast<float>(scale);
    p.soft_cap = static_cast<float>(soft_cap.value_or(0.0));
    const int vector = p.query.dtype == ScalarType::Float ? VECTOR<float> : VECTOR<__half>;
    for (p.lanes = 1; p.lanes * vector < p.width; p.lanes *= 2) {}
    const int tile = WARPS * BATCH * (WARP / p.lanes);
    p.tiles = (p.tokens + tile - 1) / tile;
    return p;
}

using Kernel = void (*)(Problem);

template <template <typename, bool> class Choice>
Kernel kernel_for(ScalarType dtype, bool in_16_bytes) {
    if (dtype == ScalarType::Half) return in_16_bytes ? Choice<__half, true>::kernel : Choice<__half, false>::kernel;
    if (dtype == ScalarType::Float) return in_16_bytes ? Choice<float, true>::kernel : Choice<float, false>::kernel;
    return in_16_bytes ? Choice<__nv_bfloat16, true>::kernel : Choice<__nv_bfloat16, false>::kernel;
}

template <typename T, bool IN_16_BYTES>
struct Products {
    static constexpr Kernel kernel = word_products<T, IN_16_BYTES>;
};

template <typename T, bool IN_16_BYTES>
struct Mask {
    static constexpr Kernel kernel = mask_features<T, IN_16_BYTES>;
};

void launch(Kernel kernel, int64_t blocks, size_t shared, void* stream, const Problem& p) {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "query: too large for one launch: ", blocks, " blocks");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, p));
}

void run(Problem& p, const Tensor& query) {
    if (p.images * p.all_words * p.tokens == 0) return;
    const int device = query.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check(cudaSetDevice(device));  // this library has its own copy of the CUDA runtime
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const int64_t per_word = std::max<int64_t>(1, p.images * p.heads * p.tokens);
    p.words = std::clamp<int64_t>(SCRATCH / per_word, 1, p.all_words);
    const Tensor scratch = torch::stable::new_empty(query, {2, p.words * per_word}, ScalarType::Float);
    p.logits = scratch.mutable_data_ptr<float>();
    p.gradients = p.logits + p.words * per_word;
    const bool in_16_bytes =
        p.query.in_16_bytes && p.key.in_16_bytes && p.value.in_16_bytes && p.grad_output.in_16_bytes;
    const size_t shared = sizeof(float) * (2 * p.heads + 2 * WARPS);
    for (; p.first_word < p.all_words; p.first_word += p.words) {
        p.words = std::min(p.words, p.all_words - p.first_word);
        const int64_t maps = p.images * p.words;
        launch(kernel_for<Products>(p.query.dtype, in_16_bytes), maps * p.heads * p.tiles, 0, stream, p);
        launch(word_map, maps, shared, stream, p);
    }
    if (p.channels == 0) return;
    const int64_t runs = (p.tokens + FEATURE_TOKENS - 1) / FEATURE_TOKENS;
    const bool aligned = p.features.in_16_bytes && p.masked.in_16_bytes;
    launch(kernel_for<Mask>(p.features.dtype, aligned), p.images * runs, 0, stream, p);
}

void word_gradcam(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad_output,
    const std::optional<Tensor>& word_index, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& log_sum_exp, std::optional<double> soft_cap, double scale, const Tensor& cam) {
    Problem p = describe(query, key, value, grad_output, word_index, key_mask, log_sum_exp, soft_cap, scale, cam);
    run(p, query);
}

void word_soft_mask(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad_output, const Tensor& word_index,
    const std::optional<Tensor>& features, int64_t prefix_tokens, const std::optional<Tensor>& key_mask, double scale,
    double constant_spread, const std::optional<Tensor>& masked, const Tensor& keep) {
    Problem p = describe(query, key, value, grad_output, word_index, key_mask, std::nullopt, std::nullopt, scale, keep);
    p.channels = static_cast<int>(check_features(features, masked, p.images, p.tokens));
    if (features) {
        STD_TORCH_CHECK(masked->scalar_type() == features->scalar_type(), "masked: expected the dtype of features");
        p.features = view(*features, "features", query);
        p.masked = view(*masked, "masked", query);
    }
    p.prefix = static_cast<int>(std::clamp<int64_t>(prefix_tokens, 0, p.tokens));
    p.constant_spread = static_cast<float>(constant_spread);
    p.normalize = true;
    run(p, query);
}

}  // namespace
}  // namespace softmask

STABLE_TORCH_LIBRARY_IMPL(softmask_fast_cpp, CUDA, m) {
    m.impl("word_gradcam", TORCH_BOX(&softmask::word_gradcam));
    m.impl("word_soft_mask", TORCH_BOX(&softmask::word_soft_mask));
}
