// soft_masked_attention on the CPU, forward and backward. One task is one head of one image: K and V are packed once
// and serve all sequences of the image, whose rows pass through in blocks that stay in the cache. dK and dV of the head
// have this one owner, so sums run in one fixed order, and no map of size (L, N) leaves the block.
//
// The formulas stand in softmask_fast/ops/soft_masked_attention/reference.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "../check.h"
#include "simd.h"

namespace softmask {
namespace {

constexpr int64_t BLOCK = 32;  // rows of queries that pass together

// Which sequences attend to which image: those of image i are order[start[i]] ... order[start[i + 1] - 1], ascending.
struct Grouping {
    std::vector<int64_t> start, order;

    Grouping(const std::optional<Tensor>& image_index, int64_t sequences, int64_t images)
        : start(images + 1, 0), order(sequences) {
        if (!image_index) {
            std::iota(start.begin(), start.end(), 0);
            std::iota(order.begin(), order.end(), 0);
            return;
        }
        const int64_t* index = image_index->const_data_ptr<int64_t>();
        for (int64_t s = 0; s < sequences; ++s) {
            check_index(index[s], images, "image_index");
            ++start[index[s] + 1];
        }
        std::partial_sum(start.begin(), start.end(), start.begin());
        std::vector<int64_t> next(start.begin(), start.end() - 1);
        for (int64_t s = 0; s < sequences; ++s) order[next[index[s]]++] = s;
    }
};

// The rows of one sequence: row l is (outer, head, first + l) of the query. Packed, all sequences are rows of one.
struct Sequence {
    int64_t outer, first, length;
};

struct Problem {
    Rows query, key, value;
    std::optional<Rows> keep;
    const bool* key_mask;
    int64_t mask_image, mask_token;
    int64_t sequences, images, heads, length, tokens, width;
    const int32_t* boundaries;  // (sequences + 1,) of packed rows, or null
    float scale;
    Grouping groups;

    Sequence sequence(int64_t s) const {
        if (!boundaries) return {s, 0, length};
        return {0, boundaries[s], boundaries[s + 1] - boundaries[s]};
    }
    int64_t row_of(const Sequence& sequence, int64_t head, int64_t row) const {
        return (sequence.outer * heads + head) * length + row;
    }
    int64_t padded_width() const { return padded(width); }
    int64_t padded_tokens() const { return padded(tokens); }
};

Problem describe(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& keep,
    const std::optional<Tensor>& image_index, const std::optional<Tensor>& boundaries,
    const std::optional<Tensor>& key_mask, double scale) {
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "query, key: expected 4 dimensions");
    const int64_t sequences = boundaries ? boundaries->numel() - 1 : query.size(0);
    const int64_t heads = query.size(1), length = query.size(2), width = query.size(3);
    const int64_t images = key.size(0), tokens = key.size(2);
    check_sizes(key, "key", {images, heads, tokens, width});
    check_sizes(value, "value", {images, heads, tokens, width});
    if (image_index) {
        check_sizes(*image_index, "image_index", {sequences});
        check_dtype(*image_index, "image_index", ScalarType::Long);
        check_contiguous(*image_index, "image_index");
    } else {
        check_sizes(query, "query", {images, heads, length, width});
    }
    const int32_t* first = nullptr;
    if (boundaries) {
        STD_TORCH_CHECK(query.size(0) == 1 && image_index, "boundaries: expected packed rows and an image_index");
        check_dtype(*boundaries, "boundaries", ScalarType::Int);
        check_contiguous(*boundaries, "boundaries");
        first = boundaries->const_data_ptr<int32_t>();
        for (int64_t s = 0; s < sequences; ++s)
            STD_TORCH_CHECK(
                0 <= first[s] && first[s] <= first[s + 1] && first[s + 1] <= length,
                "boundaries: expected ascending values from 0 to ", length);
    }
    Problem p{
        Rows(query, "query"), Rows(key, "key"), Rows(value, "value"), std::nullopt, nullptr, 0, 0, sequences, images,
        heads, length, tokens, width, first, static_cast<float>(scale), Grouping(image_index, sequences, images)};
    if (keep) {
        check_sizes(*keep, "keep", {sequences, tokens});
        p.keep.emplace(*keep, "keep");
    }
    if (key_mask) {
        check_sizes(*key_mask, "key_mask", {images, tokens});
        check_dtype(*key_mask, "key_mask", ScalarType::Bool);
        p.key_mask = key_mask->const_data_ptr<bool>();
        p.mask_image = key_mask->stride(0);
        p.mask_token = key_mask->stride(1);
    }
    return p;
}

// What one thread works in, zeroed once: padding columns and padding tokens stay zero, because every task takes the
// same pieces in the same order and writes only what is inside of the sizes.
struct Scratch {
    float* next;

    float* take(int64_t floats) {
        float* taken = next;
        next += floats;
        return taken;
    }
};

// (N, D) rows of one head as they are, (N, wide)
SOFTMASK_CLONES void pack(const Rows& rows, int64_t image, int64_t head, int64_t tokens, int64_t width, float* packed) {
    for (int64_t n = 0; n < tokens; ++n) load(rows.at(image, head, n), width, 1.0f, packed + n * padded(width));
}

// (wide, long) transpose of packed rows (N, wide)
SOFTMASK_CLONES void transpose(const float* packed, int64_t tokens, int64_t width, float* transposed) {
    const int64_t wide = padded(width), length = padded(tokens);
    for (int64_t n = 0; n < tokens; ++n)
        for (int64_t d = 0; d < width; ++d) transposed[d * length + n] = packed[n * wide + d];
}

// One row per token: what multiplies logits and values of a sequence (1 without keep), and the bias of the logits: 0,
// or -inf for padding and for tokens outside of key_mask.
SOFTMASK_CLONES void token_factors(const Problem& p, int64_t image, int64_t sequence, float* keep, float* bias) {
    const int64_t length = padded(p.tokens);
    if (p.keep) {
        load(p.keep->at(sequence), p.tokens, 1.0f, keep);
    } else {
        for (int64_t n = 0; n < p.tokens; ++n) keep[n] = 1.0f;
    }
    const float lowest = -std::numeric_limits<float>::infinity();
    for (int64_t n = 0; n < length; ++n) bias[n] = n < p.tokens ? 0.0f : lowest;
    if (p.key_mask) {
        const bool* mask = p.key_mask + image * p.mask_image;
        for (int64_t n = 0; n < p.tokens; ++n) bias[n] = mask[n * p.mask_token] ? 0.0f : lowest;
    }
}

// Chosen, not added, so that NaN in the keys of a token that is not attended has no effect.
SOFTMASK_INLINE float biased(float logit, float bias) { return bias == 0.0f ? logit : bias; }

// One row of logits s -> keep * softmax(keep * s + bias), in place. Writes the maximum and the inverse sum.
SOFTMASK_INLINE void softmax_row(float* row, const float* keep, const float* bias, int64_t length, float* statistics) {
    float maximum = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : maximum)
    for (int64_t n = 0; n < length; ++n) {
        row[n] = biased(row[n] * keep[n], bias[n]);
        maximum = row[n] > maximum ? row[n] : maximum;
    }
    if (maximum == -std::numeric_limits<float>::infinity()) maximum = 0.0f;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < length; ++n) {
        row[n] = exp_negative(row[n] - maximum);
        sum += row[n];
    }
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int64_t n = 0; n < length; ++n) row[n] *= inverse * keep[n];
    statistics[0] = maximum;
    statistics[1] = inverse;
}

// Buffers of a forward task, in this order: keys transposed, values, queries, logits, output rows, keep and bias.
int64_t forward_floats(const Problem& p) {
    const int64_t wide = p.padded_width(), length = p.padded_tokens();
    return wide * length + p.tokens * wide + 2 * BLOCK * wide + BLOCK * length + 2 * length;
}

SOFTMASK_CLONES void forward_task(
    const Problem& p, int64_t image, int64_t head, const float* value_bias, const Rows& output, float* statistics,
    Scratch scratch) {
    const int64_t wide = p.padded_width(), length = p.padded_tokens();
    float* keys = scratch.take(wide * length);
    float* values = scratch.take(p.tokens * wide);
    float* queries = scratch.take(BLOCK * wide);
    float* rows = scratch.take(BLOCK * wide);
    float* logits = scratch.take(BLOCK * length);
    float* keep = scratch.take(length);
    float* bias = scratch.take(length);
    pack(p.key, image, head, p.tokens, p.width, values);
    transpose(values, p.tokens, p.width, keys);
    pack(p.value, image, head, p.tokens, p.width, values);
    for (int64_t g = p.groups.start[image]; g < p.groups.start[image + 1]; ++g) {
        const int64_t index = p.groups.order[g];
        const Sequence sequence = p.sequence(index);
        token_factors(p, image, index, keep, bias);
        for (int64_t begin = 0; begin < sequence.length; begin += BLOCK) {
            const int64_t count = std::min(BLOCK, sequence.length - begin), first = sequence.first + begin;
            for (int64_t l = 0; l < count; ++l)
                load(p.query.at(sequence.outer, head, first + l), p.width, p.scale, queries + l * wide);
            multiply(queries, wide, 1, keys, length, logits, length, count, length, p.width, false);
            for (int64_t l = 0; l < count; ++l) {
                float* place = statistics + p.row_of(sequence, head, first + l) * 2;
                softmax_row(logits + l * length, keep, bias, length, place);
            }
            multiply(logits, length, 1, values, wide, rows, wide, count, wide, p.tokens, false);
            for (int64_t l = 0; l < count; ++l) {
                float* row = rows + l * wide;
                if (value_bias)
                    for (int64_t d = 0; d < p.width; ++d) row[d] += value_bias[head * p.width + d];
                store(row, p.width, 1.0f, output.at(sequence.outer, head, first + l));
            }
        }
    }
}

struct Gradients {
    Rows grad_output;
    const float* statistics;
    std::optional<Rows> query, key, value;
    float* keep_by_head;  // (S, H, N), or null
};

// Buffers of a backward task: K, dK, dV, K^T, V^T, three row blocks of width D and two of width N, keep, bias, dkeep.
int64_t backward_floats(const Problem& p) {
    const int64_t wide = p.padded_width(), length = p.padded_tokens();
    return 3 * p.tokens * wide + 2 * wide * length + 3 * BLOCK * wide + 2 * BLOCK * length + 3 * length;
}

// One row: logits s and P = <dO, V> -> dz keep in `logits` and A keep in `grads`; adds to dkeep where it is wanted.
SOFTMASK_INLINE void softmax_row_backward(
    float* logits, float* grads, const float* keep, const float* bias, int64_t length, const float* statistics,
    float* d_keep) {
    const float maximum = statistics[0], inverse = statistics[1];
    float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
    for (int64_t n = 0; n < length; ++n) {
        const float weight = exp_negative(biased(logits[n] * keep[n], bias[n]) - maximum) * inverse;
        delta += weight * keep[n] * grads[n];
    }
    for (int64_t n = 0; n < length; ++n) {
        const float weight = exp_negative(biased(logits[n] * keep[n], bias[n]) - maximum) * inverse;
        const float logit_gradient = weight * (keep[n] * grads[n] - delta);
        if (d_keep) d_keep[n] += logit_gradient * logits[n] + weight * grads[n];
        logits[n] = logit_gradient * keep[n];
        grads[n] = weight * keep[n];
    }
}

SOFTMASK_CLONES void backward_task(
    const Problem& p, int64_t image, int64_t head, const Gradients& gradients, Scratch scratch) {
    const int64_t wide = p.padded_width(), length = p.padded_tokens();
    float* keys = scratch.take(p.tokens * wide);
    float* keys_transposed = scratch.take(wide * length);
    float* values_transposed = scratch.take(wide * length);
    float* d_keys = scratch.take(p.tokens * wide);
    float* d_values = scratch.take(p.tokens * wide);
    float* queries = scratch.take(BLOCK * wide);
    float* grad_rows = scratch.take(BLOCK * wide);
    float* d_queries = scratch.take(BLOCK * wide);
    float* logits = scratch.take(BLOCK * length);
    float* grads = scratch.take(BLOCK * length);
    float* keep = scratch.take(length);
    float* bias = scratch.take(length);
    float* d_keep = scratch.take(length);
    pack(p.value, image, head, p.tokens, p.width, keys);
    transpose(keys, p.tokens, p.width, values_transposed);
    pack(p.key, image, head, p.tokens, p.width, keys);
    transpose(keys, p.tokens, p.width, keys_transposed);
    std::fill(d_keys, d_keys + p.tokens * wide, 0.0f);
    std::fill(d_values, d_values + p.tokens * wide, 0.0f);
    for (int64_t g = p.groups.start[image]; g < p.groups.start[image + 1]; ++g) {
        const int64_t index = p.groups.order[g];
        const Sequence sequence = p.sequence(index);
        token_factors(p, image, index, keep, bias);
        std::fill(d_keep, d_keep + length, 0.0f);
        for (int64_t begin = 0; begin < sequence.length; begin += BLOCK) {
            const int64_t count = std::min(BLOCK, sequence.length - begin), first = sequence.first + begin;
            for (int64_t l = 0; l < count; ++l) {
                load(p.query.at(sequence.outer, head, first + l), p.width, p.scale, queries + l * wide);
                load(gradients.grad_output.at(sequence.outer, head, first + l), p.width, 1.0f, grad_rows + l * wide);
            }
            multiply(queries, wide, 1, keys_transposed, length, logits, length, count, length, p.width, false);
            multiply(grad_rows, wide, 1, values_transposed, length, grads, length, count, length, p.width, false);
            for (int64_t l = 0; l < count; ++l) {
                const float* row = gradients.statistics + p.row_of(sequence, head, first + l) * 2;
                softmax_row_backward(
                    logits + l * length, grads + l * length, keep, bias, length, row,
                    gradients.keep_by_head ? d_keep : nullptr);
            }
            if (gradients.query) {
                multiply(logits, length, 1, keys, wide, d_queries, wide, count, wide, p.tokens, false);
                for (int64_t l = 0; l < count; ++l)
                    store(d_queries + l * wide, p.width, p.scale, gradients.query->at(sequence.outer, head, first + l));
            }
            if (gradients.key) multiply(logits, 1, length, queries, wide, d_keys, wide, p.tokens, wide, count, true);
            if (gradients.value)
                multiply(grads, 1, length, grad_rows, wide, d_values, wide, p.tokens, wide, count, true);
        }
        if (gradients.keep_by_head)
            std::copy(d_keep, d_keep + p.tokens, gradients.keep_by_head + (index * p.heads + head) * p.tokens);
    }
    for (int64_t n = 0; n < p.tokens; ++n) {
        if (gradients.key) store(d_keys + n * wide, p.width, 1.0f, gradients.key->at(image, head, n));
        if (gradients.value) store(d_values + n * wide, p.width, 1.0f, gradients.value->at(image, head, n));
    }
}

// Runs task(image, head, scratch) for all heads of all images.
template <class Task>
void for_every_head(const Problem& p, int64_t floats, const Task& task) {
    const int64_t rows = p.boundaries ? p.length : p.sequences * p.length;
    const int64_t operations = 2 * rows * p.tokens * p.width / std::max<int64_t>(1, p.images);
    torch::stable::parallel_for(0, p.images * p.heads, tasks_per_thread(operations), [&](int64_t begin, int64_t end) {
        std::vector<float> memory(floats, 0.0f);
        for (int64_t i = begin; i < end; ++i) task(i / p.heads, i % p.heads, Scratch{memory.data()});
    });
}

void soft_masked_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& keep,
    const std::optional<Tensor>& image_index, const std::optional<Tensor>& boundaries,
    const std::optional<Tensor>& value_bias, const std::optional<Tensor>& key_mask, double scale, const Tensor& output,
    const Tensor& statistics) {
    const Problem p = describe(query, key, value, keep, image_index, boundaries, key_mask, scale);
    check_sizes(output, "output", {query.size(0), p.heads, p.length, p.width});
    check_sizes(statistics, "statistics", {query.size(0), p.heads, p.length, 2});
    check_dtype(statistics, "statistics", ScalarType::Float);
    check_contiguous(statistics, "statistics");
    std::vector<float> bias;
    if (value_bias) {
        check_sizes(*value_bias, "value_bias", {p.heads, p.width});
        const Rows rows(*value_bias, "value_bias");
        bias.resize(p.heads * p.width);
        for (int64_t head = 0; head < p.heads; ++head) load(rows.at(head), p.width, 1.0f, bias.data() + head * p.width);
    }
    const Rows target(output, "output");
    float* saved = statistics.mutable_data_ptr<float>();
    for_every_head(p, forward_floats(p), [&](int64_t image, int64_t head, Scratch scratch) {
        forward_task(p, image, head, value_bias ? bias.data() : nullptr, target, saved, scratch);
    });
}

void soft_masked_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& keep, const std::optional<Tensor>& image_index,
    const std::optional<Tensor>& boundaries, const std::optional<Tensor>& key_mask, const Tensor& statistics,
    double scale, const std::optional<Tensor>& d_query, const std::optional<Tensor>& d_key,
    const std::optional<Tensor>& d_value, const std::optional<Tensor>& d_keep_by_head) {
    const Problem p = describe(query, key, value, keep, image_index, boundaries, key_mask, scale);
    check_sizes(grad_output, "grad_output", {query.size(0), p.heads, p.length, p.width});
    check_sizes(statistics, "statistics", {query.size(0), p.heads, p.length, 2});
    check_dtype(statistics, "statistics", ScalarType::Float);
    check_contiguous(statistics, "statistics");
    Gradients gradients{
        Rows(grad_output, "grad_output"), statistics.const_data_ptr<float>(), std::nullopt, std::nullopt, std::nullopt,
        nullptr};
    if (d_query) {
        check_sizes(*d_query, "d_query", {query.size(0), p.heads, p.length, p.width});
        gradients.query.emplace(*d_query, "d_query");
    }
    if (d_key) {
        check_sizes(*d_key, "d_key", {p.images, p.heads, p.tokens, p.width});
        gradients.key.emplace(*d_key, "d_key");
    }
    if (d_value) {
        check_sizes(*d_value, "d_value", {p.images, p.heads, p.tokens, p.width});
        gradients.value.emplace(*d_value, "d_value");
    }
    if (d_keep_by_head) {
        check_sizes(*d_keep_by_head, "d_keep_by_head", {p.sequences, p.heads, p.tokens});
        check_dtype(*d_keep_by_head, "d_keep_by_head", ScalarType::Float);
        check_contiguous(*d_keep_by_head, "d_keep_by_head");
        gradients.keep_by_head = d_keep_by_head->mutable_data_ptr<float>();
    }
    for_every_head(p, backward_floats(p), [&](int64_t image, int64_t head, Scratch scratch) {
        backward_task(p, image, head, gradients, scratch);
    });
}

}  // namespace
}  // namespace softmask

STABLE_TORCH_LIBRARY_IMPL(softmask_fast_cpp, CPU, m) {
    m.impl("soft_masked_attention", TORCH_BOX(&softmask::soft_masked_attention));
    m.impl("soft_masked_attention_backward", TORCH_BOX(&softmask::soft_masked_attention_backward));
}
