// What the forward and the backward of the focal contrastive loss share on the CPU: everything that happens to one tile
// of products <x_i, y_j> while it is in the cache. The products themselves are matrix products of the framework;
// softmask_fast/ops/focal_itc/cpp.py drives the tiles.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "../check.h"
#include "simd.h"

namespace softmask {

// Rows per task: at least as many as it is worth waking another thread for.
inline int64_t grain(int64_t keys) { return std::max<int64_t>(16, 32768 / std::max<int64_t>(keys, 1)); }

// Rows of the row state, see softmask_fast/ops/focal_itc/state.py.
enum StateRow {
    ROW_MAX,
    ROW_LOG_SUM,
    ROW_TEACHER_MAX,
    ROW_TEACHER_LOG_SUM,
    ROW_WEIGHT,
    ROW_HARD,
    ROW_POSITIVE_MAX,
    ROW_POSITIVE_LOG_SUM,
    ROW_DOMINANT_GRADIENT,
    ROW_STATES
};

constexpr int64_t SUMS = 25, PLACES = 3;  // numbers of a row on the way to its loss, see focal_itc.cpp

struct Tile {
    float* products;  // (rows, keys)
    float* teacher;   // (rows, keys), or null
    int64_t rows, keys, first_key;
    const int64_t *columns, *first, *count;  // the positives of each row, see positives.py; or null, and
    int64_t diagonal;                        // row i has the column diagonal + i
    float inverse;                           // 1 / temperature

    // Calls use(number of the key, its place in the tile) for the positives of a row in this tile.
    template <class Use>
    void for_positives(int64_t row, const Use& use) const {
        if (!columns) {
            const int64_t column = diagonal + row;
            if (column >= first_key && column < first_key + keys) use(column, column - first_key);
            return;
        }
        const int64_t *begin = columns + first[row], *end = begin + count[row];
        begin = std::lower_bound(begin, end, first_key);
        for (; begin < end && *begin < first_key + keys; ++begin) use(*begin, *begin - first_key);
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

constexpr float BLANK = -1e30f;  // product of a key that is kept out of the loop over the tile

// log((1 + m) 2^exponent), to about 2 units in the last place, for 1 + m in [1/sqrt 2, sqrt 2): a polynomial with the
// coefficients of Cephes' logf.
SOFTMASK_INLINE float log_near_one(float m, float exponent) {
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

// Natural logarithm of a positive normal number.
SOFTMASK_INLINE float log_positive(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    const int32_t shifted = bits - 0x3f3504f3;
    bits = (shifted & 0x007fffff) + 0x3f3504f3;
    float mantissa;
    std::memcpy(&mantissa, &bits, 4);
    return log_near_one(mantissa - 1.0f, static_cast<float>(shifted >> 23));
}

// log(1 + x) for x from 0 to 1.
SOFTMASK_INLINE float log1p_unit(float x) {
    const bool large = x > 0.41421356f;
    return log_near_one(large ? 0.5f * (x - 1.0f) : x, large ? 1.0f : 0.0f);
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

// What the tiles of one loss have in common: the positives of all its rows, and 1 / temperature.
struct Tiles {
    const int64_t *columns = nullptr, *first = nullptr, *count = nullptr;
    int64_t batch;       // all rows
    int64_t row_offset;  // the positive of row 0, without lists
    float inverse;

    Tiles(
        int64_t batch_, const std::optional<Tensor>& columns_, const std::optional<Tensor>& first_,
        const std::optional<Tensor>& count_, int64_t row_offset_, double inverse_)
        : batch(batch_), row_offset(row_offset_), inverse(static_cast<float>(inverse_)) {
        if (!columns_) return;
        for (const auto* tensor : {&columns_, &first_, &count_}) {
            STD_TORCH_CHECK(tensor->has_value(), "columns, first, count: expected all of them or none");
            if (tensor != &columns_) check_sizes(**tensor, "first, count", {batch});
            check_dtype(**tensor, "columns, first, count", ScalarType::Long);
            check_contiguous(**tensor, "columns, first, count");
        }
        columns = columns_->const_data_ptr<int64_t>();
        first = first_->const_data_ptr<int64_t>();
        count = count_->const_data_ptr<int64_t>();
        for (int64_t i = 0; i < batch; ++i) {
            check_index(first[i], columns_->size(0) + 1, "first");
            check_index(count[i], columns_->size(0) + 1 - first[i], "count");
        }
    }

    // The tile of the rows from first_row on and the keys from first_key on.
    Tile tile(float* products, float* teacher, int64_t rows, int64_t keys, int64_t first_row, int64_t first_key) const {
        STD_TORCH_CHECK(
            first_row >= 0 && first_row + rows <= batch, "first_row: expected rows from 0 to ", batch, ", got ",
            first_row, " to ", first_row + rows);
        return {
            products, teacher, rows, keys, first_key, columns, columns ? first + first_row : nullptr,
            columns ? count + first_row : nullptr, row_offset + first_row, inverse};
    }
};

// The data of a tile of products (rows, keys).
inline float* products_of(const Tensor& tensor, const char* name, int64_t rows, int64_t keys) {
    check_sizes(tensor, name, {rows, keys});
    check_dtype(tensor, name, ScalarType::Float);
    check_contiguous(tensor, name);
    return tensor.mutable_data_ptr<float>();
}

// A tensor of `size` elements to write to.
template <class T>
T* results_of(const Tensor& tensor, const char* name, int64_t size, ScalarType dtype) {
    STD_TORCH_CHECK(tensor.numel() == size, name, ": expected ", size, " elements, got ", tensor.numel());
    check_dtype(tensor, name, dtype);
    check_contiguous(tensor, name);
    return tensor.mutable_data_ptr<T>();
}

// to (columns, rows) = transpose of from (rows, columns), or += it with ADD. Blocks of a cache line by as many rows go
// through a small array, so that each line is touched once: rows of 4 KiB share the same lines of the first cache.
template <bool ADD>
void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
    constexpr int64_t BLOCK = 16;
    torch::stable::parallel_for(0, (columns + BLOCK - 1) / BLOCK, grain(rows), [&](int64_t begin, int64_t end) {
        float block[BLOCK][BLOCK];
        for (int64_t c = begin * BLOCK; c < std::min(end * BLOCK, columns); c += BLOCK) {
            const int64_t width = std::min(BLOCK, columns - c);
            for (int64_t r = 0; r < rows; r += BLOCK) {
                const int64_t height = std::min(BLOCK, rows - r);
                for (int64_t i = 0; i < height; ++i)
                    for (int64_t j = 0; j < width; ++j) block[j][i] = from[(r + i) * columns + c + j];
                for (int64_t j = 0; j < width; ++j) {
                    float* line = to + (c + j) * rows + r;
                    for (int64_t i = 0; i < height; ++i) line[i] = ADD ? line[i] + block[j][i] : block[j][i];
                }
            }
        }
    });
}

// use(tile, direction, place) of a tile of products: its rows are those from `place` on of tensors (directions, batch).
// With `transposed`, room for as many, the products are those of the keys with the rows as well, which are rows of the
// second direction then.
template <class Use>
void for_directions(
    const Tiles& tiles, const Tensor& products, const std::optional<Tensor>& teacher,
    const std::optional<Tensor>& transposed, int64_t first_row, int64_t first_key, int64_t key_offset, const Use& use) {
    const int64_t rows = products.size(0), keys = products.size(1);
    float* data = products_of(products, "products", rows, keys);
    float* other = transposed ? products_of(*transposed, "transposed", keys, rows) : nullptr;
    if (other) transpose<false>(data, rows, keys, other);
    float* teacher_data = teacher ? products_of(*teacher, "teacher", rows, keys) : nullptr;
    use(tiles.tile(data, teacher_data, rows, keys, first_row, key_offset + first_key), 0, first_row);
    if (other) use(tiles.tile(other, nullptr, keys, rows, first_key, first_row), 1, tiles.batch + first_key);
}

// The operators that focal_itc_tile.cpp calls one after another; what they do stands where they are defined.
using OptionalTensor = std::optional<Tensor>;
void focal_itc_sums(
    const Tensor& products, const OptionalTensor& teacher, const OptionalTensor& transposed, double inverse_temperature,
    int64_t first_row, int64_t first_key, int64_t key_offset, const OptionalTensor& columns,
    const OptionalTensor& first, const OptionalTensor& count, int64_t row_offset, bool start, int64_t order,
    bool sample, int64_t first_negative, int64_t last_negative, int64_t seed, int64_t direction, const Tensor& sums,
    const Tensor& places);
void focal_itc_terms(
    const Tensor& products, const OptionalTensor& teacher, const OptionalTensor& transposed, double inverse_temperature,
    int64_t first_row, int64_t first_key, int64_t key_offset, const OptionalTensor& columns,
    const OptionalTensor& first, const OptionalTensor& count, int64_t row_offset, double gamma, const Tensor& sums,
    const Tensor& places);
void focal_itc_finish(
    const Tensor& sums, const Tensor& places, const OptionalTensor& count, double inverse_temperature, double gamma,
    int64_t order, double alpha, bool any_positive, bool stats, const Tensor& loss_of_rows, const Tensor& row_state,
    const Tensor& dominant_key, const Tensor& statistics, const Tensor& hard_negative);
void focal_itc_gradient(
    const Tensor& products, const OptionalTensor& teacher, const OptionalTensor& transposed, double inverse_temperature,
    int64_t first_row, int64_t first_key, int64_t key_offset, const OptionalTensor& columns,
    const OptionalTensor& first, const OptionalTensor& count, int64_t row_offset, double gamma, int64_t order,
    double alpha, bool any_positive, const Tensor& grad_loss, const Tensor& row_state, const Tensor& dominant,
    const Tensor& of_inverse);

}  // namespace softmask
