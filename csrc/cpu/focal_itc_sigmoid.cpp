// loss="sigmoid" on the CPU: a tile of products becomes losses, or the gradient of the products. Each pair stands
// alone, so one tile serves both directions of a batch that is its own keys: row sums are the losses of one, column
// sums those of the other.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "focal_itc.h"

namespace softmask {
namespace {

// Rows whose losses are added up for the columns, in float32: a number of its own, so that the results are the same for
// any number of threads.
constexpr int64_t GROUP = 32;

struct Loss {
    double bias, gamma;
    int order;
};

struct Term {
    float loss, gradient;  // f(p) and df / ds
};

// NaN where the product is not finite: a pair without a number has no loss.
SOFTMASK_INLINE float logit(float product, float inverse, float bias) {
    return product * inverse + bias + product * 0.0f;
}

// Of a negative with the logit s: p = sigmoid(-s). From e = exp(-|s|), without cancellation.
template <int ORDER>
SOFTMASK_INLINE Term negative(float s, float gamma) {
    const bool likely = s < 0.0f;
    const float e = exp_negative(likely ? s : -s);
    const float one_minus_p = (likely ? e : 1.0f) / (1.0f + e);
    const float log1p_e = log1p_unit(e), minus_log_p = (likely ? 0.0f : s) + log1p_e;
    if (ORDER == 0) return {minus_log_p, one_minus_p};
    const float power = ORDER > 0 ? focal_power(one_minus_p, gamma, ORDER)
                                  : exp_negative(gamma * ((likely ? s : 0.0f) - log1p_e));
    // -p log p / (1 - p); where e is 0, so is 1 - p
    const float ratio = likely ? log1p_e / (e + 1e-30f) : e * minus_log_p;
    return {power * minus_log_p, one_minus_p * power * (1.0f + gamma * ratio)};
}

// Of a positive with that product: f(p), and df / ds of p = sigmoid(s).
Focal positive(double product, const Tile& tile, const Loss& loss) {
    const double s = product * tile.inverse + loss.bias + product * 0, e = std::exp(-std::abs(s));
    const double one_minus_p = (s < 0 ? 1 : e) / (1 + e);
    const Focal term = focal(std::min(s, 0.0) - std::log1p(e), one_minus_p, loss.gamma);
    return {term.loss, -one_minus_p * term.weight};
}

// use(gamma where it is 0, 1, 2 or 3, else -1), as a constant.
template <class Use>
SOFTMASK_INLINE void for_order(int order, const Use& use) {
    switch (order) {
        case 0: return use(std::integral_constant<int, 0>());
        case 1: return use(std::integral_constant<int, 1>());
        case 2: return use(std::integral_constant<int, 2>());
        case 3: return use(std::integral_constant<int, 3>());
        default: return use(std::integral_constant<int, -1>());
    }
}

// Adds to the losses (rows), and to those of the columns (keys) where they are wanted. Overwrites products.
SOFTMASK_CLONES void losses_of_rows(
    const Tile& tile, const Loss& loss, int64_t begin, int64_t end, double* losses, float* column_losses) {
    const float inverse = tile.inverse, bias = static_cast<float>(loss.bias), gamma = static_cast<float>(loss.gamma);
    for (int64_t i = begin; i < end; ++i) {
        float* products = tile.products + i * tile.keys;
        tile.for_positives(i, [&](int64_t, int64_t j) {
            const double term = positive(products[j], tile, loss).loss;
            losses[i] += term;
            if (column_losses) column_losses[j] += static_cast<float>(term);
            products[j] = BLANK;
        });
        for_order(loss.order, [&](auto order) __attribute__((always_inline)) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < tile.keys; ++j) {
                const float term = negative<order>(logit(products[j], inverse, bias), gamma).loss;
                sum += term;
                products[j] = term;
            }
            losses[i] += sum;
        });
        if (!column_losses) continue;
        for (int64_t j = 0; j < tile.keys; ++j) column_losses[j] += products[j];
    }
}

// Gradients of the losses (rows) and, where the tile is that of both directions, of the columns (keys).
struct Gradient {
    const float *rows, *columns;
    double *with_products, *alone;  // (rows): sums of the gradient of the logits times products, and of it alone
};

SOFTMASK_CLONES void gradients_of_rows(
    const Tile& tile, const Loss& loss, const Gradient& gradient, int64_t begin, int64_t end) {
    const float inverse = tile.inverse, bias = static_cast<float>(loss.bias), gamma = static_cast<float>(loss.gamma);
    std::vector<std::pair<int64_t, double>> positives;  // keys, and the gradient of their logits
    std::vector<float> weights(tile.keys);
    for (int64_t i = begin; i < end; ++i) {
        float* products = tile.products + i * tile.keys;
        for (int64_t j = 0; j < tile.keys; ++j)
            weights[j] = gradient.rows[i] + (gradient.columns ? gradient.columns[j] : 0.0f);
        positives.clear();
        tile.for_positives(i, [&](int64_t, int64_t j) {
            const double of_logit = positive(products[j], tile, loss).weight * weights[j];
            positives.emplace_back(j, of_logit);
            gradient.with_products[i] += of_logit * products[j];
            gradient.alone[i] += of_logit;
            products[j] = BLANK;
        });
        for_order(loss.order, [&](auto order) __attribute__((always_inline)) {
            const float* weight = weights.data();
            float with_products = 0, alone = 0;
#pragma omp simd reduction(+ : with_products, alone)
            for (int64_t j = 0; j < tile.keys; ++j) {
                const float of_logit = negative<order>(logit(products[j], inverse, bias), gamma).gradient * weight[j];
                with_products += of_logit * products[j];
                alone += of_logit;
                products[j] = of_logit * inverse;
            }
            gradient.with_products[i] += with_products;
            gradient.alone[i] += alone;
        });
        for (const auto& key : positives) products[key.first] = static_cast<float>(key.second * inverse);
    }
}

void check_rows(const Tensor& tensor, const char* name, int64_t directions, int64_t rows, ScalarType dtype) {
    check_sizes(tensor, name, {directions, rows});
    check_dtype(tensor, name, dtype);
    check_contiguous(tensor, name);
}

void check_keys(int64_t first_key, int64_t keys, int64_t batch) {
    STD_TORCH_CHECK(
        first_key >= 0 && first_key + keys <= batch, "first_key: expected keys from 0 to ", batch, ", got ", first_key,
        " to ", first_key + keys);
}

// Adds a tile of products, which it overwrites, to the losses (directions, batch). With two directions the batch is its
// own keys, and the tile is that of both.
void focal_itc_sigmoid(
    const Tensor& products, double inverse_temperature, double bias, int64_t first_row, int64_t first_key,
    int64_t key_offset, const std::optional<Tensor>& columns, const std::optional<Tensor>& first,
    const std::optional<Tensor>& count, int64_t row_offset, double gamma, int64_t order, const Tensor& losses) {
    const int64_t directions = losses.size(0), batch = losses.size(1), rows = products.size(0), keys = products.size(1);
    check_rows(losses, "losses", directions, batch, ScalarType::Double);
    const Tiles tiles(batch, columns, first, count, row_offset, inverse_temperature);
    const Loss loss{bias, gamma, static_cast<int>(order)};
    double* sums = losses.mutable_data_ptr<double>();
    const Tile tile = tiles.tile(
        products_of(products, "products", rows, keys), nullptr, rows, keys, first_row, key_offset + first_key);
    const int64_t groups = (rows + GROUP - 1) / GROUP;
    std::vector<float> parts(directions > 1 ? groups * keys : 0);
    torch::stable::parallel_for(0, groups, std::max<int64_t>(1, grain(keys) / GROUP), [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group)
            losses_of_rows(
                tile, loss, group * GROUP, std::min((group + 1) * GROUP, rows), sums + first_row,
                directions > 1 ? parts.data() + group * keys : nullptr);
    });
    if (directions == 1) return;
    check_keys(first_key, keys, batch);
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t j = 0; j < keys; ++j) sums[batch + first_key + j] += parts[group * keys + j];
}

// Replaces a tile of products by the gradient of the products, by temperature. grad_loss (directions, batch); totals
// (2, batch) adds up the gradient of the logits times products, and alone.
void focal_itc_sigmoid_gradient(
    const Tensor& products, double inverse_temperature, double bias, int64_t first_row, int64_t first_key,
    int64_t key_offset, const std::optional<Tensor>& columns, const std::optional<Tensor>& first,
    const std::optional<Tensor>& count, int64_t row_offset, double gamma, int64_t order, const Tensor& grad_loss,
    const Tensor& totals) {
    const int64_t directions = grad_loss.size(0), batch = grad_loss.size(1);
    const int64_t rows = products.size(0), keys = products.size(1);
    check_rows(grad_loss, "grad_loss", directions, batch, ScalarType::Float);
    check_rows(totals, "totals", 2, batch, ScalarType::Double);
    if (directions > 1) check_keys(first_key, keys, batch);
    const Tiles tiles(batch, columns, first, count, row_offset, inverse_temperature);
    const Loss loss{bias, gamma, static_cast<int>(order)};
    const float* grads = grad_loss.const_data_ptr<float>();
    double* sums = totals.mutable_data_ptr<double>();
    const Tile tile = tiles.tile(
        products_of(products, "products", rows, keys), nullptr, rows, keys, first_row, key_offset + first_key);
    const Gradient gradient{
        grads + first_row, directions > 1 ? grads + batch + first_key : nullptr, sums + first_row,
        sums + batch + first_row};
    torch::stable::parallel_for(0, rows, grain(keys), [&](int64_t begin, int64_t end) {
        gradients_of_rows(tile, loss, gradient, begin, end);
    });
}

}  // namespace
}  // namespace softmask

STABLE_TORCH_LIBRARY_IMPL(softmask_fast_cpp, CPU, m) {
    m.impl("focal_itc_sigmoid", TORCH_BOX(&softmask::focal_itc_sigmoid));
    m.impl("focal_itc_sigmoid_gradient", TORCH_BOX(&softmask::focal_itc_sigmoid_gradient));
}
