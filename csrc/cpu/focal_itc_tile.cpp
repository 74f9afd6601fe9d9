// The focal contrastive loss of a batch that is its own keys and fits one tile, with its gradient: one call in place of
// a handful, since what surrounds each call costs more than such a tile takes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <numeric>

#include "focal_itc.h"

namespace softmask {
namespace {

// loss (): `scale` times the sum of the losses of both directions. With grad_temperature (), `products` (batch, batch)
// becomes the gradient of that loss, and grad_temperature is its gradient. For the rest see focal_itc.cpp.
void focal_itc_tile(
    const Tensor& products, double inverse_temperature, const std::optional<Tensor>& columns,
    const std::optional<Tensor>& first, const std::optional<Tensor>& count, int64_t row_offset, double gamma,
    int64_t order, bool any_positive, bool sample, int64_t first_negative, int64_t last_negative, int64_t seed,
    double scale, const Tensor& loss, const std::optional<Tensor>& grad_temperature, const Tensor& statistics,
    const Tensor& hard_negative) {
    STD_TORCH_CHECK(products.dim() == 2, "products: expected 2 dimensions, got ", products.dim());
    const int64_t batch = products.size(0), size = batch * batch;
    const float* source = products_of(products, "products", batch, batch);
    float* result = results_of<float>(loss, "loss", 1, ScalarType::Float);
    float* of_temperature =
        grad_temperature ? results_of<float>(*grad_temperature, "grad_temperature", 1, ScalarType::Float) : nullptr;
    auto room = [&](torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
        return torch::stable::new_empty(products, sizes, dtype);
    };
    const Tensor tile = room({batch, batch}, ScalarType::Float), transposed = room({batch, batch}, ScalarType::Float);
    const Tensor sums = room({2, batch, SUMS}, ScalarType::Double), places = room({2, batch, PLACES}, ScalarType::Long);
    const Tensor losses = room({2, batch}, ScalarType::Float), dominant = room({2, batch}, ScalarType::Long);
    const Tensor row_state = room({2, ROW_STATES, batch}, ScalarType::Float);
    auto copy = [&] { std::copy_n(source, size, tile.mutable_data_ptr<float>()); };  // each pass writes to its tile

    copy();
    focal_itc_sums(
        tile, std::nullopt, transposed, inverse_temperature, 0, 0, 0, columns, first, count, row_offset, true,
        std::max<int64_t>(order, 0), sample, first_negative, last_negative, seed, 0, sums, places);
    if (order < 0) {
        copy();
        focal_itc_terms(
            tile, std::nullopt, transposed, inverse_temperature, 0, 0, 0, columns, first, count, row_offset, gamma,
            sums, places);
    }
    focal_itc_finish(
        sums, places, count, inverse_temperature, gamma, order, 0, any_positive, sample, losses, row_state, dominant,
        statistics, hard_negative);
    const float* of_rows = losses.const_data_ptr<float>();
    *result = static_cast<float>(scale * std::accumulate(of_rows, of_rows + 2 * batch, 0.0));
    if (!of_temperature) return;

    float* grad_loss = losses.mutable_data_ptr<float>();
    std::fill_n(grad_loss, 2 * batch, static_cast<float>(scale));
    const Tensor of_inverse = room({2, batch}, ScalarType::Double);
    double* totals = of_inverse.mutable_data_ptr<double>();
    std::fill_n(totals, 2 * batch, 0.0);
    focal_itc_gradient(
        products, std::nullopt, transposed, inverse_temperature, 0, 0, 0, columns, first, count, row_offset, gamma,
        order, 0, any_positive, losses, row_state, dominant, of_inverse);
    *of_temperature = static_cast<float>(-std::accumulate(totals, totals + 2 * batch, 0.0));
}

}  // namespace
}  // namespace softmask

STABLE_TORCH_LIBRARY_IMPL(softmask_fast_cpp, CPU, m) {
    m.impl("focal_itc_tile", TORCH_BOX(&softmask::focal_itc_tile));
}
