// Argument checks of word_gradcam and word_soft_mask, the same on the CPU and on a GPU.
#pragma once

#include "check.h"

namespace softmask {

inline void check_word_map(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad_output,
    const std::optional<Tensor>& word_index, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& log_sum_exp) {
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "query, key: expected 4 dimensions");
    const int64_t images = query.size(0), heads = query.size(1), length = query.size(2), width = query.size(3);
    const int64_t key_heads = key.size(1), tokens = key.size(2);
    STD_TORCH_CHECK(
        key_heads > 0 ? heads % key_heads == 0 : heads == 0, "key: expected a divisor of ", heads, " heads, got ",
        key_heads);
    check_sizes(key, "key", {images, key_heads, tokens, width});
    check_sizes(value, "value", {images, key_heads, tokens, width});
    check_sizes(grad_output, "grad_output", {images, heads, length, width});
    if (word_index) {
        check_sizes(*word_index, "word_index", {images});
        check_dtype(*word_index, "word_index", ScalarType::Long);
        check_contiguous(*word_index, "word_index");
    }
    if (key_mask) {
        check_sizes(*key_mask, "key_mask", {images, tokens});
        check_dtype(*key_mask, "key_mask", ScalarType::Bool);
    }
    if (log_sum_exp) {
        check_sizes(*log_sum_exp, "log_sum_exp", {images, heads, length});
        check_dtype(*log_sum_exp, "log_sum_exp", ScalarType::Float);
    }
}

inline void check_map(const Tensor& map, const char* name, int64_t size) {
    STD_TORCH_CHECK(map.numel() == size, name, ": unexpected size");
    check_dtype(map, name, ScalarType::Float);
    check_contiguous(map, name);
}

// Returns the number of channels, 0 without features.
inline int64_t check_features(
    const std::optional<Tensor>& features, const std::optional<Tensor>& masked, int64_t images, int64_t tokens) {
    STD_TORCH_CHECK(features.has_value() == masked.has_value(), "masked: expected exactly where features are given");
    if (!features) return 0;
    STD_TORCH_CHECK(features->dim() == 3, "features: expected 3 dimensions");
    const int64_t channels = features->size(2);
    check_sizes(*features, "features", {images, tokens, channels});
    check_sizes(*masked, "masked", {images, tokens, channels});
    return channels;
}

}  // namespace softmask
