// What the forward and the backward of the focal contrastive loss share on the CPU: everything that happens to one tile
// of products <x_i, y_j> while it is in the cache. The products themselves are matrix products of the framework;
// softmask_fast/ops/focal_itc/cpp.py drives the tiles.
#pragma once

#include <algorithm>
#include <cmath>

#include "../check.h"
#include "simd.h"

namespace softmask {

constexpr int64_t GRAIN = 16;  // rows per task

struct Tile {
    float* products;  // (rows, keys)
    float* teacher;   // (rows, keys), or null
    int64_t rows, keys, first_key;
    const int64_t *columns, *first, *count;  // the positives of each row, see positives.py
    float inverse;                           // 1 / temperature

    // Calls use(number of the key, its place in the tile) for the positives of a row in this tile.
    template <class Use>
    void for_positives(int64_t row, const Use& use) const {
        const int64_t *begin = columns + first[row], *end = begin + count[row];
        for (auto column = std::lower_bound(begin, end, first_key); column < end && *column < first_key + keys; ++column)
            use(*column, *column - first_key);
    }
};

struct Focal {
    double loss, weight;  // f(p) and w(p), see reference.py
};

inline Focal focal(double log_p, double one_minus_p, double gamma) {
    const double power = gamma == 0 ? 1.0 : std::pow(one_minus_p, gamma);
    const double ratio = one_minus_p > 0 ? -std::exp(log_p) * log_p / one_minus_p : 1.0;
    return {-power * log_p, power * (1 + gamma * ratio)};
}

inline Focal focal(double log_p, double gamma) { return focal(log_p, -std::expm1(log_p), gamma); }

// Natural logarithm of a positive normal number, to about 2 units in the last place: a mantissa in [1/sqrt 2, sqrt 2)
// and a polynomial with the coefficients of Cephes' logf.
SOFTMASK_INLINE float log_positive(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    const int32_t shifted = bits - 0x3f3504f3;
    const float exponent = static_cast<float>(shifted >> 23);
    bits = (shifted & 0x007fffff) + 0x3f3504f3;
    float m;
    std::memcpy(&m, &bits, 4);
    m -= 1.0f;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const float square = m * m;
    return m + (square * m * p - 0.5f * square + exponent * -2.12194440e-4f) + exponent * 0.693359375f;
}

SOFTMASK_INLINE float focal_power(float one_minus_p, float gamma, int order) {
    switch (order) {
        case 0: return 1.0f;
        case 1: return one_minus_p;
        case 2: return one_minus_p * one_minus_p;
        case 3: return one_minus_p * one_minus_p * one_minus_p;
        // p <= 1/2 here; rounding may bring it a little higher, never near 1
        default: return exp_negative(gamma * log_positive(one_minus_p < 0x1p-20f ? 0x1p-20f : one_minus_p));
    }
}

inline Tile describe(
    const Tensor& products, const std::optional<Tensor>& teacher, double inverse, int64_t first_key,
    const Tensor& columns, const Tensor& first, const Tensor& count) {
    const int64_t rows = products.size(0), keys = products.size(1);
    check_dtype(products, "products", ScalarType::Float);
    check_contiguous(products, "products");
    if (teacher) {
        check_sizes(*teacher, "teacher", {rows, keys});
        check_dtype(*teacher, "teacher", ScalarType::Float);
        check_contiguous(*teacher, "teacher");
    }
    for (const Tensor* tensor : {&first, &count}) {
        check_sizes(*tensor, "first, count", {rows});
        check_dtype(*tensor, "first, count", ScalarType::Long);
        check_contiguous(*tensor, "first, count");
    }
    check_dtype(columns, "columns", ScalarType::Long);
    check_contiguous(columns, "columns");
    Tile tile{
        products.mutable_data_ptr<float>(), teacher ? teacher->mutable_data_ptr<float>() : nullptr, rows, keys,
        first_key, columns.const_data_ptr<int64_t>(), first.const_data_ptr<int64_t>(),
        count.const_data_ptr<int64_t>(), static_cast<float>(inverse)};
    for (int64_t i = 0; i < rows; ++i) {
        check_index(tile.first[i], columns.size(0) + 1, "first");
        check_index(tile.count[i], columns.size(0) + 1 - tile.first[i], "count");
    }
    return tile;
}

}  // namespace softmask
