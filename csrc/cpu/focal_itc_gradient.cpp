// Backward of the focal contrastive loss on the CPU: a tile of products becomes a tile of the gradient of the logits.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "focal_itc.h"

namespace softmask {
namespace {

struct RowState {
    float maximum, log_sum, teacher_maximum, teacher_log_sum, weight, hard, positive_max, positive_log_sum;
    float dominant_gradient;
};

template <int ORDER, bool TEACHER>
SOFTMASK_INLINE float gradient_of_row(
    float* products, const float* teacher, int64_t keys, float inverse, float gamma, float alpha, const RowState& state,
    float factor) {
    float temperature = 0;
    const float teacher_factor = alpha * factor, weight = state.weight * factor;
#pragma omp simd reduction(+ : temperature)
    for (int64_t j = 0; j < keys; ++j) {
        const float x = (products[j] - state.maximum) * inverse;
        const float log_p = x - state.log_sum;
        const float p = exp_negative(log_p);
        float gradient = p * weight;
        if (TEACHER) {
            const float target = exp_negative((teacher[j] - state.teacher_maximum) * inverse - state.teacher_log_sum);
            const float q = 1.0f - p;
            const float power = ORDER == 0 ? 1.0f : focal_power(q, gamma - 1.0f, ORDER < 0 ? -1 : ORDER - 1);
            const float focal_weight = ORDER == 0 ? 1.0f : power * (q - gamma * p * log_p);
            gradient -= teacher_factor * target * focal_weight;
        }
        temperature += gradient * x;
        products[j] = gradient;
    }
    return temperature;
}

template <bool TEACHER>
SOFTMASK_INLINE float gradient_of_row(
    int order, float* products, const float* teacher, int64_t keys, float inverse, float gamma, float alpha,
    const RowState& state, float factor) {
    switch (order) {
        case 0: return gradient_of_row<0, TEACHER>(products, teacher, keys, inverse, gamma, alpha, state, factor);
        case 1: return gradient_of_row<1, TEACHER>(products, teacher, keys, inverse, gamma, alpha, state, factor);
        case 2: return gradient_of_row<2, TEACHER>(products, teacher, keys, inverse, gamma, alpha, state, factor);
        case 3: return gradient_of_row<3, TEACHER>(products, teacher, keys, inverse, gamma, alpha, state, factor);
        default: return gradient_of_row<-1, TEACHER>(products, teacher, keys, inverse, gamma, alpha, state, factor);
    }
}

struct Gradient {
    int order;
    double gamma, alpha;
    bool any_positive;
    const float *grad_loss, *row_state;  // (rows), (ROW_STATES, batch) from the first row of the tile on
    int64_t batch;
    const int64_t* dominant;
    double* temperature;  // (rows)
};

SOFTMASK_CLONES void gradients_of_rows(const Tile& tile, const Gradient& g, int64_t begin, int64_t end) {
    std::vector<std::pair<int64_t, float>> exact;  // keys whose gradient is replaced, and it
    for (int64_t i = begin; i < end; ++i) {
        float* products = tile.products + i * tile.keys;
        const float* teacher = tile.teacher ? tile.teacher + i * tile.keys : nullptr;
        auto saved = [&](int64_t row) { return g.row_state[row * g.batch + i]; };
        const RowState state{
            saved(ROW_MAX), saved(ROW_LOG_SUM), saved(ROW_TEACHER_MAX), saved(ROW_TEACHER_LOG_SUM), saved(ROW_WEIGHT),
            saved(ROW_HARD), saved(ROW_POSITIVE_MAX), saved(ROW_POSITIVE_LOG_SUM), saved(ROW_DOMINANT_GRADIENT)};
        const float factor = g.grad_loss[i] * tile.inverse;
        const int64_t dominant = g.dominant[i] - tile.first_key;

        exact.clear();
        double exact_temperature = 0;
        auto add_positive = [&](int64_t j) {
            const double product = products[j];
            const double x = (product - state.maximum) * tile.inverse;
            const double log_p = std::min(x - state.log_sum, 0.0);
            const double weight = focal(log_p, g.gamma).weight;
            double gradient = std::exp(log_p) * state.weight;
            if (teacher) {
                const double u = (double(teacher[j]) - state.teacher_maximum) * tile.inverse;
                gradient -= g.alpha * weight * std::exp(u - state.teacher_log_sum);
            }
            const double log_share = (product - state.positive_max) * tile.inverse - state.positive_log_sum;
            gradient -= state.hard * (g.any_positive ? std::exp(log_share) : weight);
            exact.emplace_back(j, static_cast<float>(gradient * factor));
            exact_temperature += gradient * factor * x;
        };
        tile.for_positives(i, [&](int64_t, int64_t j) {
            if (j != dominant) add_positive(j);
        });
        if (dominant >= 0 && dominant < tile.keys) exact.emplace_back(dominant, state.dominant_gradient * factor);
        // The loop over the tile must not count them in the sum for the temperature: at x = 0 they add nothing.
        for (const auto& key : exact) products[key.first] = state.maximum;
        const float gamma = static_cast<float>(g.gamma), alpha = static_cast<float>(g.alpha);
        exact_temperature +=
            teacher ? gradient_of_row<true>(
                          g.order, products, teacher, tile.keys, tile.inverse, gamma, alpha, state, factor)
                    : gradient_of_row<false>(
                          0, products, teacher, tile.keys, tile.inverse, gamma, alpha, state, factor);
        for (const auto& key : exact) products[key.first] = key.second;
        g.temperature[i] += exact_temperature;
    }
}

}  // namespace

// Replaces a tile of products by the gradient of the products, by temperature. grad_loss, dominant and of_inverse
// (directions, batch), row_state (directions, ROW_STATES, batch); of_inverse adds up the gradient of 1 / temperature.
// With `transposed` the gradient is the sum of both directions', see for_directions.
void focal_itc_gradient(
    const Tensor& products, const std::optional<Tensor>& teacher, const std::optional<Tensor>& transposed,
    double inverse_temperature, int64_t first_row, int64_t first_key, int64_t key_offset,
    const std::optional<Tensor>& columns, const std::optional<Tensor>& first, const std::optional<Tensor>& count,
    int64_t row_offset, double gamma, int64_t order, double alpha, bool any_positive, const Tensor& grad_loss,
    const Tensor& row_state, const Tensor& dominant, const Tensor& of_inverse) {
    const int64_t directions = transposed ? 2 : 1, batch = of_inverse.size(1);
    for (const Tensor* tensor : {&grad_loss, &dominant, &of_inverse}) {
        check_sizes(*tensor, "grad_loss, dominant, of_inverse", {directions, batch});
        check_contiguous(*tensor, "grad_loss, dominant, of_inverse");
    }
    check_dtype(grad_loss, "grad_loss", ScalarType::Float);
    check_sizes(row_state, "row_state", {directions, ROW_STATES, batch});
    check_dtype(row_state, "row_state", ScalarType::Float);
    check_contiguous(row_state, "row_state");
    check_dtype(dominant, "dominant", ScalarType::Long);
    check_dtype(of_inverse, "of_inverse", ScalarType::Double);
    const Tiles tiles(batch, columns, first, count, row_offset, inverse_temperature);
    auto run = [&](const Tile& tile, int64_t direction, int64_t place) {
        const Gradient gradient{
            static_cast<int>(order), gamma, alpha, any_positive, grad_loss.const_data_ptr<float>() + place,
            row_state.const_data_ptr<float>() + direction * (ROW_STATES - 1) * batch + place, batch,
            dominant.const_data_ptr<int64_t>() + place, of_inverse.mutable_data_ptr<double>() + place};
        torch::stable::parallel_for(0, tile.rows, grain(tile.keys), [&](int64_t begin, int64_t end) {
            gradients_of_rows(tile, gradient, begin, end);
        });
    };
    for_directions(tiles, products, teacher, transposed, first_row, first_key, key_offset, run);
    if (!transposed) return;
    transpose<true>(
        transposed->const_data_ptr<float>(), products.size(1), products.size(0), products.mutable_data_ptr<float>());
}

}  // namespace softmask

STABLE_TORCH_LIBRARY_IMPL(softmask_fast_cpp, CPU, m) {
    m.impl("focal_itc_gradient", TORCH_BOX(&softmask::focal_itc_gradient));
}
