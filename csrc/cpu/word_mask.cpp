// word_gradcam and word_soft_mask on the CPU. One task is one word of one image: it reads that image's K and V once,
// head by head, and for the soft mask goes on to normalise the map and to scale the features while everything is in the
// cache.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <vector>

#include "../word_mask_checks.h"
#include "simd.h"

namespace softmask {
namespace {

struct Attention {
    Rows query, key, value, grad_output;
    const int64_t* word_index;  // (B,), or null: all words
    const bool* key_mask;       // (B, N) by strides, or null
    int64_t mask_image, mask_token;
    const float* log_sum_exp;  // (B, H, L) by strides, or null: the softmax is over these keys alone
    int64_t sum_image, sum_head, sum_word;
    int64_t images, heads, group, length, tokens, width;  // group: query heads that share a head of K and V
    float scale, soft_cap;                                // soft_cap: 0 for none
};

constexpr int64_t STREAMED = 1 << 20;  // elements of the masked features from which they are larger than the caches
constexpr int BLOCK = 2;  // rows of K, and of V, whose products are summed side by side

// products[n] = <vector, row n> for the rows of K or V of one head
struct Products {
    const float* vector;
    Row first;
    int64_t step;  // bytes from one row to the next
    float* products;
    float* buffer;  // BLOCK * width floats
};

template <bool DENSE, int COUNT>
SOFTMASK_INLINE void multiply_rows(const Products& x, int64_t n, int64_t width) {
    char* data = x.first.data + n * x.step;
    touch_ahead(data);
    const float* rows[COUNT];
    for (int i = 0; i < COUNT; ++i) {
        rows[i] = reinterpret_cast<const float*>(data + i * x.step);
        if (!DENSE) {
            load({data + i * x.step, x.first.dtype, x.first.stride}, width, 1.0f, x.buffer + i * width);
            rows[i] = x.buffer + i * width;
        }
    }
    dot<COUNT>(x.vector, rows, width, x.products + n);
}

// K and V in turns: two streams from memory are faster than one.
template <bool DENSE>
SOFTMASK_INLINE void multiply_head(const Products& keys, const Products& values, int64_t tokens, int64_t width) {
    int64_t n = 0;
    for (; n + BLOCK <= tokens; n += BLOCK) {
        multiply_rows<DENSE, BLOCK>(keys, n, width);
        multiply_rows<DENSE, BLOCK>(values, n, width);
    }
    for (; n < tokens; ++n) {
        multiply_rows<DENSE, 1>(keys, n, width);
        multiply_rows<DENSE, 1>(values, n, width);
    }
}

// soft_cap tanh(logit / soft_cap), to about 1 unit in the last place: a polynomial near 0 (Cephes), where
// 1 - 2 / (e^2x + 1) would cancel.
SOFTMASK_INLINE float capped(float logit, float soft_cap) {
    const float x = logit / soft_cap, z = x * x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const float size = x < 0.0f ? -x : x, decay = exp_negative(-2.0f * size);
    const float large = (1.0f - decay) / (1.0f + decay);
    return soft_cap * (size < 0.625f ? p * z * x + x : x < 0.0f ? -large : large);
}

// In place: e^(logit - maximum) over the attended tokens. Returns what makes attention / heads of it.
SOFTMASK_INLINE float softmax_row(float* logits, int64_t tokens, int64_t heads) {
    const float lowest = -std::numeric_limits<float>::infinity();
    float maximum = lowest;
    for (int64_t n = 0; n < tokens; ++n) maximum = logits[n] > maximum ? logits[n] : maximum;
    if (maximum == lowest) maximum = 0.0f;  // no attended token: all exponentials are 0, and so is the map
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < tokens; ++n) {
        logits[n] = exp_negative(logits[n] - maximum);
        sum += logits[n];
    }
    return sum == 0.0f ? 0.0f : 1.0f / (sum * static_cast<float>(heads));  // NaN stays
}

// The same where the log of the row's sum over all keys of the model is known.
SOFTMASK_INLINE float given_softmax_row(float* logits, int64_t tokens, int64_t heads, float log_sum_exp) {
    const float infinity = std::numeric_limits<float>::infinity();
    const float shift = log_sum_exp == -infinity ? infinity : log_sum_exp;  // no key at all: a map of zeros
    for (int64_t n = 0; n < tokens; ++n) {
        const float x = logits[n] - shift;
        logits[n] = x > 88.0f ? infinity : exp_negative(x);  // positive by rounding, or by a wrong log_sum_exp
    }
    return 1.0f / static_cast<float>(heads);
}

// cam[n] = mean over heads of a_n relu(<dO, V_n>), a = softmax(scale <q, K_n>) over the attended tokens.
// buffer: 2 * tokens + (2 + BLOCK) * width floats
SOFTMASK_CLONES void word_map(const Attention& x, int64_t image, int64_t word, float* cam, float* buffer) {
    float* logits = buffer;
    float* gradients = logits + x.tokens;
    float* query = gradients + x.tokens;
    float* grad_output = query + x.width;
    float* row = grad_output + x.width;
    const bool* mask = x.key_mask ? x.key_mask + image * x.mask_image : nullptr;
    const float lowest = -std::numeric_limits<float>::infinity();
    for (int64_t n = 0; n < x.tokens; ++n) cam[n] = 0.0f;
    for (int64_t head = 0; head < x.heads; ++head) {
        load(x.query.at(image, head, word), x.width, x.scale, query);
        load(x.grad_output.at(image, head, word), x.width, 1.0f, grad_output);
        const Products keys{query, x.key.at(image, head / x.group), x.key.step(), logits, row};
        const Products values{grad_output, x.value.at(image, head / x.group), x.value.step(), gradients, row};
        if (is_dense(keys.first) && is_dense(values.first)) {
            multiply_head<true>(keys, values, x.tokens, x.width);
        } else {
            multiply_head<false>(keys, values, x.tokens, x.width);
        }
        if (x.soft_cap > 0.0f)
            for (int64_t n = 0; n < x.tokens; ++n) logits[n] = capped(logits[n], x.soft_cap);
        if (mask)
            for (int64_t n = 0; n < x.tokens; ++n) logits[n] = mask[n * x.mask_token] ? logits[n] : lowest;
        const float* sums = x.log_sum_exp + image * x.sum_image + head * x.sum_head + word * x.sum_word;
        const float factor = x.log_sum_exp ? given_softmax_row(logits, x.tokens, x.heads, *sums)
                                           : softmax_row(logits, x.tokens, x.heads);
        for (int64_t n = 0; n < x.tokens; ++n) {
            const float positive = gradients[n] < 0.0f ? 0.0f : gradients[n];
            cam[n] += logits[n] * factor * positive;
        }
    }
    if (mask)
        for (int64_t n = 0; n < x.tokens; ++n) cam[n] = mask[n * x.mask_token] ? cam[n] : 0.0f;
}

// keep[n] = 1 - (cam[n] - min) / (max - min) over the attended patches, 1 elsewhere and for constant maps, NaN where
// the map is NaN, which counts for neither min nor max. In place.
SOFTMASK_CLONES void normalise(const Attention& x, int64_t image, int64_t prefix, float constant_spread, float* keep) {
    const bool* mask = x.key_mask ? x.key_mask + image * x.mask_image : nullptr;
    float low = std::numeric_limits<float>::infinity(), high = 0.0f;
    for (int64_t n = prefix; n < x.tokens; ++n) {
        if (mask && !mask[n * x.mask_token]) continue;
        low = keep[n] < low ? keep[n] : low;
        high = keep[n] > high ? keep[n] : high;
    }
    const float spread = high - low;
    const bool varies = spread > constant_spread * high;
    for (int64_t n = 0; n < x.tokens; ++n) {
        const bool patch = n >= prefix && (!mask || mask[n * x.mask_token]);
        const float value = patch && varies ? 1.0f - (keep[n] - low) / spread : 1.0f;
        keep[n] = keep[n] == keep[n] ? value : keep[n];
    }
}

// Asks for large pages under a result. Memory that the allocator has just mapped, always from 32 MiB on under glibc, is
// given page by page as it is written, and 4 KiB pages take as long as all the rest. Elsewhere this changes nothing.
void prefer_large_pages(const Tensor& result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 << 20;
    if (!result.is_contiguous()) return;
    const uintptr_t data = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
    const uintptr_t begin = (data + page - 1) / page * page;
    const uintptr_t end = (data + result.numel() * result.element_size()) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: may be refused
#endif
}

// streamed: the result is larger than the caches, so it goes past them
SOFTMASK_CLONES void scale_features(
    const Rows& features, const Rows& masked, const float* keep, int64_t image, int64_t tokens, int64_t channels,
    bool streamed, float* buffer) {
    for (int64_t n = 0; n < tokens; ++n) {
        touch_ahead(features.at(image, n).data);
        touch_ahead(masked.at(image, n).data);
        const float* source = dense(features.at(image, n), channels, buffer);
        const Row target = masked.at(image, n);
        if (streamed && can_stream(target, channels)) {
            stream(source, channels, keep[n], reinterpret_cast<float*>(target.data));
        } else {
            store(source, channels, keep[n], target);
        }
    }
}

Attention describe(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad_output,
    const std::optional<Tensor>& word_index, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& log_sum_exp, std::optional<double> soft_cap, double scale) {
    check_word_map(query, key, value, grad_output, word_index, key_mask, log_sum_exp);
    const int64_t images = query.size(0), heads = query.size(1), length = query.size(2), width = query.size(3);
    const int64_t tokens = key.size(2);
    Attention x{
        Rows(query, "query"), Rows(key, "key"), Rows(value, "value"), Rows(grad_output, "grad_output"),
        nullptr, nullptr, 0, 0, nullptr, 0, 0, 0, images, heads, heads / std::max<int64_t>(1, key.size(1)), length,
        tokens, width, static_cast<float>(scale), static_cast<float>(soft_cap.value_or(0.0))};
    if (word_index) {
        x.word_index = word_index->const_data_ptr<int64_t>();
        for (int64_t image = 0; image < images; ++image) check_index(x.word_index[image], length, "word_index");
    }
    if (key_mask) {
        x.key_mask = key_mask->const_data_ptr<bool>();
        x.mask_image = key_mask->stride(0);
        x.mask_token = key_mask->stride(1);
    }
    if (log_sum_exp) {
        x.log_sum_exp = log_sum_exp->const_data_ptr<float>();
        x.sum_image = log_sum_exp->stride(0);
        x.sum_head = log_sum_exp->stride(1);
        x.sum_word = log_sum_exp->stride(2);
    }
    return x;
}

void word_gradcam(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad_output,
    const std::optional<Tensor>& word_index, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& log_sum_exp, std::optional<double> soft_cap, double scale, const Tensor& cam) {
    const Attention x = describe(query, key, value, grad_output, word_index, key_mask, log_sum_exp, soft_cap, scale);
    const int64_t words = word_index ? 1 : x.length;
    check_map(cam, "cam", x.images * words * x.tokens);
    float* maps = cam.mutable_data_ptr<float>();
    const int64_t grain = tasks_per_thread(2 * x.heads * x.tokens * x.width);
    torch::stable::parallel_for(0, x.images * words, grain, [&](int64_t begin, int64_t end) {
        std::vector<float> buffer(2 * x.tokens + (2 + BLOCK) * x.width);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t image = task / words;
            const int64_t word = x.word_index ? x.word_index[image] : task % words;
            word_map(x, image, word, maps + task * x.tokens, buffer.data());
        }
    });
}

void word_soft_mask(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad_output, const Tensor& word_index,
    const std::optional<Tensor>& features, int64_t prefix_tokens, const std::optional<Tensor>& key_mask, double scale,
    double constant_spread, const std::optional<Tensor>& masked, const Tensor& keep) {
    const Attention x =
        describe(query, key, value, grad_output, word_index, key_mask, std::nullopt, std::nullopt, scale);
    check_map(keep, "keep", x.images * x.tokens);
    const int64_t channels = check_features(features, masked, x.images, x.tokens);
    std::optional<Rows> source, target;
    if (features) {
        source.emplace(*features, "features");
        target.emplace(*masked, "masked");
        prefer_large_pages(*masked);
    }
    float* kept = keep.mutable_data_ptr<float>();
    const int64_t grain = tasks_per_thread(x.tokens * (2 * x.heads * x.width + channels));
    torch::stable::parallel_for(0, x.images, grain, [&](int64_t begin, int64_t end) {
        std::vector<float> buffer(std::max(2 * x.tokens + (2 + BLOCK) * x.width, channels));
        const bool streamed = x.images * x.tokens * channels >= STREAMED;
        for (int64_t image = begin; image < end; ++image) {
            float* row = kept + image * x.tokens;
            word_map(x, image, x.word_index[image], row, buffer.data());
            normalise(x, image, prefix_tokens, static_cast<float>(constant_spread), row);
            if (source) scale_features(*source, *target, row, image, x.tokens, channels, streamed, buffer.data());
        }
        if (streamed) finish_stream();
    });
}

}  // namespace
}  // namespace softmask

STABLE_TORCH_LIBRARY_IMPL(softmask_fast_cpp, CPU, m) {
    m.impl("word_gradcam", TORCH_BOX(&softmask::word_gradcam));
    m.impl("word_soft_mask", TORCH_BOX(&softmask::word_soft_mask));
}
