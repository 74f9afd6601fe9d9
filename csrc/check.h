// Argument checks of the compiled operators. The public Python functions have checked everything for the user; these
// keep a direct call of an operator from reading outside of its tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <sstream>

namespace softmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_sizes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
    bool equal = tensor.dim() == static_cast<int64_t>(expected.size());
    int64_t dimension = 0;
    for (int64_t size : expected) equal = equal && tensor.size(dimension++) == size;
    if (equal) return;
    std::ostringstream message;
    message << name << ": expected size (";
    for (auto size = expected.begin(); size != expected.end(); ++size)
        message << (size == expected.begin() ? "" : ", ") << *size;
    message << "), got (";
    for (int64_t i = 0; i < tensor.dim(); ++i) message << (i ? ", " : "") << tensor.size(i);
    message << ")";
    STD_TORCH_CHECK(false, message.str());
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType expected) {
    STD_TORCH_CHECK(tensor.scalar_type() == expected, name, ": unexpected dtype");
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_index(int64_t index, int64_t size, const char* name) {
    STD_TORCH_CHECK(index >= 0 && index < size, name, ": expected values from 0 to ", size - 1, ", got ", index);
}

}  // namespace softmask
