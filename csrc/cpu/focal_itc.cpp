// Forward of the focal contrastive loss on the CPU: sums over the keys of each row, and the loss from them.
//
// The most probable key of a row, its "dominant" key, is kept out of the sums over a tile. Every other key has
// p <= 1/2, so powers of 1 - p expand without cancellation, and the dominant key's 1 - p is the sum of all others over
// the total. Its share is added at the end, in double precision. Positive keys are few and are added one by one too.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "focal_itc.h"

namespace softmask {
namespace {

constexpr int ORDERS = 4;           // gamma 0 ... 3 expand in powers of p
constexpr float LOWEST_X = -1e20f;  // keeps 0 * x finite for it
constexpr double NO_SCORE = -1e15;

// Sums of one row over the keys seen so far, relative to the maxima, with x_j = (product_j - maximum) / temperature and
// the teacher's u_j = (teacher product_j - teacher maximum) / temperature.
struct Sums {
    double maximum, teacher_maximum, teacher_dominant;  // products
    double negative, positive;  // sum e^x over the negatives and the positives, without the dominant key
    double positive_max, positive_sum;  // largest product of a positive, and sum e^((product - it) / temperature) over
                                        // the positives, the dominant key included
    double entropy;             // sum e^x x
    double best;                // best score of a hard negative, relative to the maximum
    double teacher[ORDERS][2];  // sum e^u e^(kx) x^j;  for other gamma [1] holds the loss and the weight
    double hard[ORDERS][2];     // sum e^(kx) x^j over the positives;  likewise
};
static_assert(sizeof(Sums) == SUMS * sizeof(double));

struct Places {
    int64_t dominant, dominant_is_positive, best;
};
static_assert(sizeof(Places) == PLACES * sizeof(int64_t));

struct Sampler {
    bool on;
    int64_t first_negative, last_negative, first_row;
    uint32_t low, high, stream;
};

SOFTMASK_INLINE uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

SOFTMASK_INLINE float largest(const float* values, int64_t size) {
    float maximum = values[0];
#pragma omp simd reduction(max : maximum)
    for (int64_t j = 0; j < size; ++j) maximum = values[j] > maximum ? values[j] : maximum;
    return maximum;
}

// 0, or NaN where a product is not finite: the loops below would leave out what is not a number or minus infinity.
SOFTMASK_INLINE float poison(const float* values, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < size; ++j) sum += values[j] * 0.0f;
    return sum;
}

// Adds one key, outside of the loop over the tile.
void add_key(Sums& sums, double x, double teacher_weight, int order, bool positive) {
    const double e = std::exp(x);
    (positive ? sums.positive : sums.negative) += e;
    sums.entropy += e * x;
    double power = 1.0;
    for (int k = 0; k <= order; ++k, power *= e) {
        sums.teacher[k][0] += teacher_weight * power;
        sums.teacher[k][1] += teacher_weight * power * x;
        if (positive) {
            sums.hard[k][0] += power;
            sums.hard[k][1] += power * x;
        }
    }
}

// Makes the sums relative to a maximum that is larger by `delta` logits.
void rescale(Sums& sums, double delta, int order) {
    const double e = std::exp(-delta);
    sums.entropy = e * (sums.entropy - delta * (sums.negative + sums.positive));
    sums.negative *= e;
    sums.positive *= e;
    sums.best -= delta;
    double power = 1.0;
    for (int k = 0; k <= order; ++k, power *= e)
        for (auto row : {sums.teacher[k], sums.hard[k]}) {
            row[1] = power * (row[1] - delta * row[0]);
            row[0] *= power;
        }
}

// The sums over a tile, without the keys that are blank.
template <int ORDER, bool TEACHER>
SOFTMASK_INLINE void add_tile(const float* products, const float* teacher, int64_t keys, float inverse, Sums& sums) {
    const float maximum = static_cast<float>(sums.maximum), teacher_maximum = static_cast<float>(sums.teacher_maximum);
    float z = 0, entropy = 0, a00 = 0, a01 = 0, a10 = 0, a11 = 0, a20 = 0, a21 = 0, a30 = 0, a31 = 0;
#pragma omp simd reduction(+ : z, entropy, a00, a01, a10, a11, a20, a21, a30, a31)
    for (int64_t j = 0; j < keys; ++j) {
        float x = (products[j] - maximum) * inverse;
        x = x < LOWEST_X ? LOWEST_X : x;
        const float e = exp_negative(x);
        z += e;
        entropy += e * x;
        if (TEACHER) {
            float weight = exp_negative((teacher[j] - teacher_maximum) * inverse);
            a00 += weight;
            a01 += weight * x;
            weight *= ORDER > 0 ? e : 0.0f;
            a10 += weight;
            a11 += weight * x;
            weight *= ORDER > 1 ? e : 0.0f;
            a20 += weight;
            a21 += weight * x;
            weight *= ORDER > 2 ? e : 0.0f;
            a30 += weight;
            a31 += weight * x;
        }
    }
    sums.negative += z;
    sums.entropy += entropy;
    const float added[ORDERS][2] = {{a00, a01}, {a10, a11}, {a20, a21}, {a30, a31}};
    for (int k = 0; k <= ORDER; ++k)
        for (int j = 0; j < 2; ++j) sums.teacher[k][j] += added[k][j];
}

template <bool TEACHER>
SOFTMASK_INLINE void add_tile(
    int order, const float* products, const float* teacher, int64_t keys, float inverse, Sums& sums) {
    switch (order) {
        case 0: return add_tile<0, TEACHER>(products, teacher, keys, inverse, sums);
        case 1: return add_tile<1, TEACHER>(products, teacher, keys, inverse, sums);
        case 2: return add_tile<2, TEACHER>(products, teacher, keys, inverse, sums);
        default: return add_tile<3, TEACHER>(products, teacher, keys, inverse, sums);
    }
}

// The Gumbel-max step: the best of x_j - log(E_j) over the candidates of this tile; sampling.py explains the noise.
SOFTMASK_INLINE void draw(
    const Sampler& sampler, const float* products, int64_t row, const Tile& tile, Sums& sums, Places& places,
    float* scores) {
    const int64_t from = std::max<int64_t>(sampler.first_negative - tile.first_key, 0);
    const int64_t to = std::min(sampler.last_negative - tile.first_key, tile.keys);
    if (from >= to) return;
    const uint32_t first = mix(static_cast<uint32_t>(sampler.first_row + row) + sampler.stream);
    const uint32_t second = mix(first ^ sampler.high ^ 0x85ebca6bu);
    const uint32_t first_column = static_cast<uint32_t>(tile.first_key);
    const float maximum = static_cast<float>(sums.maximum), inverse = tile.inverse;
    for (int64_t j = from; j < to; ++j) {
        const uint32_t bits = mix(mix((first_column + static_cast<uint32_t>(j)) ^ first) + second);
        float v = static_cast<float>(bits) * 0x1p-32f + 0x1p-33f;
        v = v > 0x1.fffffep-1f ? 0x1.fffffep-1f : v;
        // log1p(-v) = log(u) (-v) / (u - 1) with u = 1 - v as rounded: the rounding error cancels
        const float u = 1.0f - v;
        const float exponential = u == 1.0f ? v : log_positive(u) * v / (u - 1.0f);
        scores[j] = (products[j] - maximum) * inverse - log_positive(exponential);
    }
    const float best = largest(scores + from, to - from);
    if (!(best > sums.best)) return;  // also of NaN
    sums.best = best;
    places.best = tile.first_key + (std::find(scores + from, scores + to, best) - scores);
}

SOFTMASK_CLONES void sums_of_rows(
    const Tile& tile, const Sampler& sampler, bool start, int order, Sums* all_sums, Places* all_places, int64_t begin,
    int64_t end, float* scores) {
    const double inverse = tile.inverse;
    for (int64_t i = begin; i < end; ++i) {
        Sums& sums = all_sums[i];
        Places& places = all_places[i];
        float* products = tile.products + i * tile.keys;
        float* teacher = tile.teacher ? tile.teacher + i * tile.keys : nullptr;
        if (start) {
            sums = Sums{};
            sums.maximum = sums.positive_max = -std::numeric_limits<double>::infinity();
            sums.best = NO_SCORE;
            places = {0, 0, -1};
        }
        sums.negative += poison(products, tile.keys);
        if (teacher) sums.negative += poison(teacher, tile.keys);
        auto teacher_weight = [&](double product) {
            return teacher ? std::exp((product - sums.teacher_maximum) * inverse) : 0.0;
        };
        if (teacher) {
            const double maximum = largest(teacher, tile.keys);
            if (start || maximum > sums.teacher_maximum) {
                const double factor = start ? 1.0 : std::exp((sums.teacher_maximum - maximum) * inverse);
                for (auto& row : sums.teacher)
                    for (double& sum : row) sum *= factor;
                sums.teacher_maximum = maximum;
            }
        }
        const float maximum = largest(products, tile.keys);
        // Tiles may come in any order: of equal ones the key of the lowest number is the dominant one.
        if (maximum > sums.maximum || (maximum == sums.maximum && tile.first_key < places.dominant)) {
            if (!start) {
                add_key(sums, 0.0, teacher_weight(sums.teacher_dominant), order, places.dominant_is_positive);
                rescale(sums, (maximum - sums.maximum) * inverse, order);
            }
            const int64_t place = std::find(products, products + tile.keys, maximum) - products;
            sums.maximum = maximum;
            if (teacher) sums.teacher_dominant = teacher[place];
            places.dominant = tile.first_key + place;
            places.dominant_is_positive = 0;
        }
        tile.for_positives(i, [&](int64_t column, int64_t j) {
            const double positive_max = std::max<double>(sums.positive_max, products[j]);
            sums.positive_sum *= std::exp((sums.positive_max - positive_max) * inverse);
            sums.positive_sum += std::exp((products[j] - positive_max) * inverse);
            sums.positive_max = positive_max;
            if (column == places.dominant) {
                places.dominant_is_positive = 1;
            } else {
                const double x = (products[j] - sums.maximum) * inverse;
                add_key(sums, x, teacher ? teacher_weight(teacher[j]) : 0.0, order, true);
            }
            products[j] = BLANK;
            if (teacher) teacher[j] = BLANK;
        });
        if (sampler.on) draw(sampler, products, i, tile, sums, places, scores);
        const int64_t dominant = places.dominant - tile.first_key;
        if (dominant >= 0 && dominant < tile.keys) {
            products[dominant] = BLANK;
            if (teacher) teacher[dominant] = BLANK;
        }
        if (teacher) {
            add_tile<true>(order, products, teacher, tile.keys, tile.inverse, sums);
        } else {
            add_tile<false>(0, products, teacher, tile.keys, tile.inverse, sums);
        }
    }
}

// What follows from the sums of a row once all keys were seen.
struct Totals {
    double log_sum, total, teacher_total, teacher_dominant;

    Totals(const Sums& sums, double inverse, bool has_teacher)
        : log_sum(std::log1p(sums.negative + sums.positive)), total(1 + sums.negative + sums.positive),
          teacher_total(1), teacher_dominant(0) {
        if (!has_teacher) return;
        const double weight = std::exp((sums.teacher_dominant - sums.teacher_maximum) * inverse);
        teacher_total = sums.teacher[0][0] + weight;
        teacher_dominant = weight / teacher_total;
    }
};

// Loss and weight of the keys in `sums`: (1 - p)^order in powers of p. Divided by `weights`, the sum of the weights.
Focal expand(const double (&sums)[ORDERS][2], int order, const Totals& totals, double weights) {
    constexpr int BINOMIAL[ORDERS][ORDERS] = {{1, 0, 0, 0}, {1, 1, 0, 0}, {1, 2, 1, 0}, {1, 3, 3, 1}};
    Focal result{0, 0};
    double scale = 1 / weights;  // over total^k
    for (int k = 0; k <= order; ++k, scale /= totals.total) {
        const double plain = sums[k][0] * scale, with_log_p = (sums[k][1] - totals.log_sum * sums[k][0]) * scale;
        const double sign = k % 2 ? -1 : 1;
        result.loss -= sign * BINOMIAL[order][k] * with_log_p;
        result.weight += sign * BINOMIAL[order][k] * plain;
        if (k > 0) result.weight += sign * order * BINOMIAL[order - 1][k - 1] * with_log_p;
    }
    return result;
}

// Second pass for gammas that do not expand: sum t f(p) and sum t w(p) over a tile, and the same over the positives.
SOFTMASK_CLONES void terms_of_rows(
    const Tile& tile, double gamma, Sums* all_sums, const Places* all_places, int64_t begin, int64_t end) {
    const double inverse = tile.inverse;
    for (int64_t i = begin; i < end; ++i) {
        Sums& sums = all_sums[i];
        const Places& places = all_places[i];
        float* products = tile.products + i * tile.keys;
        float* teacher = tile.teacher ? tile.teacher + i * tile.keys : nullptr;
        const Totals totals(sums, inverse, teacher != nullptr);
        tile.for_positives(i, [&](int64_t column, int64_t j) {
            if (column == places.dominant) return;
            const double x = (products[j] - sums.maximum) * inverse;
            const Focal term = focal(std::min(x - totals.log_sum, 0.0), gamma);
            sums.hard[1][0] += term.loss;
            sums.hard[1][1] += term.weight;
        });
        if (!teacher) continue;
        const int64_t dominant = places.dominant - tile.first_key;
        if (dominant >= 0 && dominant < tile.keys) teacher[dominant] = BLANK;
        const float maximum = static_cast<float>(sums.maximum), log_sum = static_cast<float>(totals.log_sum);
        const float teacher_maximum = static_cast<float>(sums.teacher_maximum);
        const float exponent = static_cast<float>(gamma), scale = tile.inverse;
        float loss = 0, weight = 0;
#pragma omp simd reduction(+ : loss, weight)
        for (int64_t j = 0; j < tile.keys; ++j) {
            const float log_p = (products[j] - maximum) * scale - log_sum;
            const float p = exp_negative(log_p);
            const float one_minus_p = 1.0f - p;
            const float target = exp_negative((teacher[j] - teacher_maximum) * scale);
            const float power = target * focal_power(one_minus_p, exponent, -1);
            loss -= power * log_p;
            // the dominant key, which is blank, may have 1 - p = 0
            weight += power * (1.0f - exponent * p * log_p / (one_minus_p + 1e-30f));
        }
        sums.teacher[1][0] += loss;
        sums.teacher[1][1] += weight;
    }
}

// The sums and places (directions, batch, ...) of all rows.
struct State {
    Sums* sums;
    Places* places;
    int64_t batch;

    State(const Tensor& sums_, const Tensor& places_, int64_t directions) : batch(sums_.size(1)) {
        check_sizes(sums_, "sums", {directions, batch, SUMS});
        check_sizes(places_, "places", {directions, batch, PLACES});
        check_dtype(sums_, "sums", ScalarType::Double);
        check_dtype(places_, "places", ScalarType::Long);
        check_contiguous(sums_, "sums");
        check_contiguous(places_, "places");
        sums = reinterpret_cast<Sums*>(sums_.mutable_data_ptr<double>());
        places = reinterpret_cast<Places*>(places_.mutable_data_ptr<int64_t>());
    }
};

}  // namespace

// Adds a tile of products, which it overwrites, to the sums of the rows from first_row on; `start`: it is their first
// one.
void focal_itc_sums(
    const Tensor& products, const std::optional<Tensor>& teacher, const std::optional<Tensor>& transposed,
    double inverse_temperature, int64_t first_row, int64_t first_key, int64_t key_offset,
    const std::optional<Tensor>& columns, const std::optional<Tensor>& first, const std::optional<Tensor>& count,
    int64_t row_offset, bool start, int64_t order, bool sample, int64_t first_negative, int64_t last_negative,
    int64_t seed, int64_t direction, const Tensor& sums, const Tensor& places) {
    const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    const State state(sums, places, transposed ? 2 : 1);
    const Tiles tiles(state.batch, columns, first, count, row_offset, inverse_temperature);
    auto run = [&](const Tile& tile, int64_t second, int64_t place) {
        const uint32_t stream = mix(low ^ (second || direction ? 0x9e3779b9u : 0u));
        const int64_t row = place - second * state.batch;
        const Sampler sampler{sample, first_negative, last_negative, row_offset + row, low, high, stream};
        torch::stable::parallel_for(0, tile.rows, grain(tile.keys), [&](int64_t begin, int64_t end) {
            std::vector<float> scores(sample ? tile.keys : 0);
            sums_of_rows(
                tile, sampler, second ? first_row == 0 : start, static_cast<int>(order), state.sums + place,
                state.places + place, begin, end, scores.data());
        });
    };
    for_directions(tiles, products, teacher, transposed, first_row, first_key, key_offset, run);
}

void focal_itc_terms(
    const Tensor& products, const std::optional<Tensor>& teacher, const std::optional<Tensor>& transposed,
    double inverse_temperature, int64_t first_row, int64_t first_key, int64_t key_offset,
    const std::optional<Tensor>& columns, const std::optional<Tensor>& first, const std::optional<Tensor>& count,
    int64_t row_offset, double gamma, const Tensor& sums, const Tensor& places) {
    const State state(sums, places, transposed ? 2 : 1);
    const Tiles tiles(state.batch, columns, first, count, row_offset, inverse_temperature);
    auto run = [&](const Tile& tile, int64_t, int64_t place) {
        torch::stable::parallel_for(0, tile.rows, grain(tile.keys), [&](int64_t begin, int64_t end) {
            terms_of_rows(tile, gamma, state.sums + place, state.places + place, begin, end);
        });
    };
    for_directions(tiles, products, teacher, transposed, first_row, first_key, key_offset, run);
}

// Of one direction or of both, before all other dimensions: loss (rows), row_state (ROW_STATES, rows), dominant (rows),
// and with `stats` statistics (3, rows), hard_negative (rows). Without `count` every row has one positive.
void focal_itc_finish(
    const Tensor& sums, const Tensor& places, const std::optional<Tensor>& count, double inverse_temperature,
    double gamma, int64_t order, double alpha, bool any_positive, bool stats, const Tensor& loss_of_rows,
    const Tensor& row_state, const Tensor& dominant_key, const Tensor& statistics, const Tensor& hard_negative) {
    const int64_t directions = sums.size(0), rows = sums.size(1), all = directions * rows;
    const State state(sums, places, directions);
    if (count) {
        check_sizes(*count, "count", {rows});
        check_contiguous(*count, "count");
    }
    const int64_t* counts = count ? count->const_data_ptr<int64_t>() : nullptr;
    float* losses = results_of<float>(loss_of_rows, "loss", all, ScalarType::Float);
    float* states = results_of<float>(row_state, "row_state", ROW_STATES * all, ScalarType::Float);
    int64_t* dominants = results_of<int64_t>(dominant_key, "dominant", all, ScalarType::Long);
    float* figures = stats ? results_of<float>(statistics, "statistics", 3 * all, ScalarType::Float) : nullptr;
    int64_t* negatives =
        stats ? results_of<int64_t>(hard_negative, "hard_negative", all, ScalarType::Long) : nullptr;
    for (int64_t n = 0; n < all; ++n) {
        const int64_t direction = n / rows, i = n % rows;
        const Sums& s = state.sums[n];
        const Totals totals(s, inverse_temperature, alpha > 0);
        const bool positive = state.places[n].dominant_is_positive;
        const double others = s.negative + s.positive;
        const Focal dominant = focal(-totals.log_sum, others / totals.total, gamma);
        auto sum = [&](const double (&terms)[ORDERS][2], double weights) {
            if (order >= 0) return expand(terms, static_cast<int>(order), totals, weights);
            return Focal{terms[1][0] / weights, terms[1][1] / weights};
        };
        // Loss and weight of all other keys; what the target gives to the dominant one.
        Focal rest{0, 0};
        double target = 0, hard, mass_weight = 0, mass_gradient = 0;
        auto add = [&](double factor, const Focal& term) {
            rest.loss += factor * term.loss;
            rest.weight += factor * term.weight;
        };
        if (alpha > 0) {
            add(alpha, sum(s.teacher, totals.teacher_total));
            target += alpha * totals.teacher_dominant;
        }
        const double p = 1 / totals.total;
        if (any_positive) {
            // 1 - P is the sum over the negatives, which are all that is left out where P is near 1
            const double one_minus_mass = (s.negative + (positive ? 0 : 1)) / totals.total;
            const double log_mass = positive ? std::log1p(-one_minus_mass)
                                             : (s.positive_max - s.maximum) * inverse_temperature +
                                                   std::log(s.positive_sum) - totals.log_sum;
            const Focal mass = focal(std::min(log_mass, 0.0), one_minus_mass, gamma);
            rest.loss += (1 - alpha) * mass.loss;
            hard = mass_weight = (1 - alpha) * mass.weight;
            mass_gradient = hard * p * (positive ? -one_minus_mass / (1 - one_minus_mass) : 1);
        } else {
            hard = (1 - alpha) / (counts ? counts[i] : 1);
            add(hard, sum(s.hard, 1.0));
            if (positive) target += hard;
        }
        // p W - t w for the dominant key, without the difference of near equals that it is where p and t are near 1
        const double gradient = p * rest.weight - others / totals.total * target * dominant.weight + mass_gradient;
        const double lost = totals.total * 0;  // NaN where a product is not finite, whose row has no loss
        const double loss = rest.loss + target * dominant.loss + lost;
        // The backward has log_sum in float32, so all its p of a row are off by one factor: here W takes it back.
        const double weight = (rest.weight + target * dominant.weight + mass_weight + lost) *
                              std::exp(static_cast<float>(totals.log_sum) - totals.log_sum);
        losses[n] = static_cast<float>(loss);
        dominants[n] = state.places[n].dominant;
        auto save = [&](StateRow row, double value) {
            states[(direction * ROW_STATES + row) * rows + i] = static_cast<float>(value);
        };
        save(ROW_MAX, s.maximum);
        save(ROW_LOG_SUM, totals.log_sum);
        save(ROW_TEACHER_MAX, alpha > 0 ? s.teacher_maximum : 0);
        save(ROW_TEACHER_LOG_SUM, std::log(totals.teacher_total));
        save(ROW_WEIGHT, weight);
        save(ROW_HARD, hard);
        save(ROW_POSITIVE_MAX, s.positive_max);
        save(ROW_POSITIVE_LOG_SUM, std::log(s.positive_sum));
        save(ROW_DOMINANT_GRADIENT, gradient + lost);
        if (!stats) continue;
        const double figures_of_row[3] = {
            (positive ? 1.0 : 0.0) + lost, totals.log_sum - s.entropy / totals.total,
            (s.positive + (positive ? 1 : 0)) / totals.total};
        for (int64_t k = 0; k < 3; ++k) figures[(direction * 3 + k) * rows + i] = static_cast<float>(figures_of_row[k]);
        negatives[n] = lost == 0 ? state.places[n].best : -1;
    }
}

}  // namespace softmask

STABLE_TORCH_LIBRARY_IMPL(softmask_fast_cpp, CPU, m) {
    m.impl("focal_itc_sums", TORCH_BOX(&softmask::focal_itc_sums));
    m.impl("focal_itc_terms", TORCH_BOX(&softmask::focal_itc_terms));
    m.impl("focal_itc_finish", TORCH_BOX(&softmask::focal_itc_finish));
}
