// What the CPU kernels share: rows of any dtype and stride as float32, an exponential and a small matrix product that
// the compiler vectorises. Everything here is inlined into functions marked SOFTMASK_CLONES, which exist once per
// instruction set and are chosen when the library is loaded.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#error "softmask_fast needs GCC 12 or later (function clones for x86-64-v3 and -v4, _Float16); name another one in $CXX"
#endif
#if defined(__x86_64__) && defined(__clang__)
#warning "softmask_fast: clang compiles for the oldest x86-64 alone, which is slow; $CXX=g++ uses AVX2 and AVX-512"
#endif
#if defined(__x86_64__) && !defined(__clang__)
#define SOFTMASK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SOFTMASK_CLONES
#endif
#define SOFTMASK_INLINE static inline __attribute__((always_inline))

namespace softmask {

// Buffers are padded to this many floats, so that no vector loop has a remainder.
constexpr int64_t LANES = 16;
// One register of AVX-512, and one of AVX2. Without AVX-512 a Vector lives in memory and every operation on it is slow.
// Templates take the structure, because a template argument would lose the alignment.
struct WideRegister {
    typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));
};
constexpr int64_t OCTET = LANES / 2;
struct NarrowRegister {
    typedef float Vector __attribute__((vector_size(OCTET * sizeof(float)), aligned(4)));
};
typedef NarrowRegister::Vector Octet;
#if defined(__x86_64__)
static const bool WIDE = __builtin_cpu_supports("avx512f");
#else
constexpr bool WIDE = false;
#endif

constexpr int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

enum class Dtype { Float, Half, BFloat };

inline Dtype dtype_of(const torch::stable::Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case torch::headeronly::ScalarType::Float: return Dtype::Float;
        case torch::headeronly::ScalarType::Half: return Dtype::Half;
        case torch::headeronly::ScalarType::BFloat16: return Dtype::BFloat;
        default: STD_TORCH_CHECK(false, name, ": expected dtype float32, float16 or bfloat16");
    }
}

// A row of `size` elements, `stride` elements apart.
struct Row {
    char* data;
    Dtype dtype;
    int64_t stride;
};

// A tensor of up to four dimensions as rows along its last one: at(i, j, k) or fewer indices.
struct Rows {
    char* data;
    Dtype dtype;
    int64_t element;
    int64_t strides[4] = {0, 0, 0, 0};
    int64_t dims;

    Rows(const torch::stable::Tensor& tensor, const char* name)
        : data(static_cast<char*>(tensor.data_ptr())), dtype(dtype_of(tensor, name)), dims(tensor.dim()) {
        element = dtype == Dtype::Float ? 4 : 2;
        for (int64_t i = 0; i < dims; ++i) strides[i] = tensor.stride(i);
    }

    Row at(int64_t i, int64_t j = 0, int64_t k = 0) const {
        int64_t offset = i * strides[0];
        if (dims > 2) offset += j * strides[1];
        if (dims > 3) offset += k * strides[2];
        return {data + offset * element, dtype, strides[dims - 1]};
    }

    // Bytes from one row to the next.
    int64_t step() const { return strides[dims - 2] * element; }
};

SOFTMASK_INLINE float from_bfloat(uint16_t bits) {
    uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// Round to nearest even, NaN stays NaN.
SOFTMASK_INLINE uint16_t to_bfloat(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    uint16_t rounded = static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
    return value != value ? uint16_t(0x7fc0) : rounded;
}

// target[i] = row[i] * factor
SOFTMASK_INLINE void load(const Row& row, int64_t size, float factor, float* __restrict target) {
    if (row.dtype == Dtype::Float) {
        const float* source = reinterpret_cast<const float*>(row.data);
        if (row.stride == 1) {
            for (int64_t i = 0; i < size; ++i) target[i] = source[i] * factor;
        } else {
            for (int64_t i = 0; i < size; ++i) target[i] = source[i * row.stride] * factor;
        }
    } else if (row.dtype == Dtype::BFloat) {
        const uint16_t* source = reinterpret_cast<const uint16_t*>(row.data);
        if (row.stride == 1) {
            for (int64_t i = 0; i < size; ++i) target[i] = from_bfloat(source[i]) * factor;
        } else {
            for (int64_t i = 0; i < size; ++i) target[i] = from_bfloat(source[i * row.stride]) * factor;
        }
    } else {
        const _Float16* source = reinterpret_cast<const _Float16*>(row.data);
        if (row.stride == 1) {
            for (int64_t i = 0; i < size; ++i) target[i] = static_cast<float>(source[i]) * factor;
        } else {
            for (int64_t i = 0; i < size; ++i) target[i] = static_cast<float>(source[i * row.stride]) * factor;
        }
    }
}

// row[i] = source[i] * factor
SOFTMASK_INLINE void store(const float* __restrict source, int64_t size, float factor, const Row& row) {
    if (row.dtype == Dtype::Float) {
        float* target = reinterpret_cast<float*>(row.data);
        if (row.stride == 1) {
            for (int64_t i = 0; i < size; ++i) target[i] = source[i] * factor;
        } else {
            for (int64_t i = 0; i < size; ++i) target[i * row.stride] = source[i] * factor;
        }
    } else if (row.dtype == Dtype::BFloat) {
        uint16_t* target = reinterpret_cast<uint16_t*>(row.data);
        for (int64_t i = 0; i < size; ++i) target[i * row.stride] = to_bfloat(source[i] * factor);
    } else {
        _Float16* target = reinterpret_cast<_Float16*>(row.data);
        for (int64_t i = 0; i < size; ++i) target[i * row.stride] = static_cast<_Float16>(source[i] * factor);
    }
}

// Whether stream() may write a row.
SOFTMASK_INLINE bool can_stream(const Row& row, int64_t size) {
#if defined(__SSE2__)
    const bool aligned = size % 4 == 0 && reinterpret_cast<uintptr_t>(row.data) % 16 == 0;
    return row.dtype == Dtype::Float && row.stride == 1 && aligned;
#else
    return false;
#endif
}

// target[i] = source[i] * factor, past the caches: a line that is overwritten whole is not read first, which saves a
// third of the traffic of a copy. finish_stream() makes the stores of this thread visible to others.
SOFTMASK_INLINE void stream(const float* __restrict source, int64_t size, float factor, float* __restrict target) {
#if defined(__SSE2__)
    const __m128 factors = _mm_set1_ps(factor);
    for (int64_t i = 0; i < size; i += 4) _mm_stream_ps(target + i, _mm_mul_ps(_mm_loadu_ps(source + i), factors));
#endif
}

SOFTMASK_INLINE void finish_stream() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

SOFTMASK_INLINE bool is_dense(const Row& row) { return row.dtype == Dtype::Float && row.stride == 1; }

// The row itself where it is float32 and dense, else a copy of it in `buffer`.
SOFTMASK_INLINE const float* dense(const Row& row, int64_t size, float* buffer) {
    if (is_dense(row)) return reinterpret_cast<const float*>(row.data);
    load(row, size, 1.0f, buffer);
    return buffer;
}

// Asks for the memory some pages ahead of what is read or written now, so that its address is translated in time: in
// pages of 4 KiB, and in a virtual machine most of all, that takes longer than the reading, and the processor's own
// prefetching stops at the end of a page. An address behind the end of a tensor does no harm.
SOFTMASK_INLINE void touch_ahead(const char* data) { __builtin_prefetch(data + 8 * 4096); }

SOFTMASK_INLINE float sum_lanes(Octet v) {
    typedef float Quarter __attribute__((vector_size(16)));
    const Quarter quarter = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
    return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

// products[i] = <vector, rows[i]>; several rows at a time and two sums for each, because a sum has to wait for each of
// its additions.
template <int COUNT>
SOFTMASK_INLINE void dot(const float* vector, const float* const* rows, int64_t size, float* products) {
    Octet even[COUNT] = {}, odd[COUNT] = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const Octet first = *reinterpret_cast<const Octet*>(vector + i);
        const Octet second = *reinterpret_cast<const Octet*>(vector + i + OCTET);
        for (int row = 0; row < COUNT; ++row) {
            even[row] += first * *reinterpret_cast<const Octet*>(rows[row] + i);
            odd[row] += second * *reinterpret_cast<const Octet*>(rows[row] + i + OCTET);
        }
    }
    for (int row = 0; row < COUNT; ++row) {
        float rest = 0.0f;
        for (int64_t j = i; j < size; ++j) rest += vector[j] * rows[row][j];
        products[row] = rest + sum_lanes(even[row] + odd[row]);
    }
}

// e^x for x <= 0, to about 1 unit in the last place; 0 below -87.3 and for -inf. x = n ln 2 + r, a polynomial in r, and
// n added to the exponent bits.
SOFTMASK_INLINE float exp_negative(float x) {
    const float clamped = x < -87.3f ? -87.3f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float shifted = clamped * 1.44269504f + magic;
    const float n = shifted - magic;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &p, 4);
    bits += static_cast<int32_t>(n) << 23;
    float value;
    std::memcpy(&value, &bits, 4);
    return x < -87.3f ? 0.0f : value;
}

// Tasks that one thread takes, of `operations` multiplications each: together some 20 to 100 us of work. Waking the
// thread pool costs more than a small call takes, above all on a busy machine.
constexpr int64_t tasks_per_thread(int64_t operations) {
    constexpr int64_t enough = 1 << 19;
    return operations >= enough ? 1 : enough / (operations > 0 ? operations : 1);
}

// C (+)= A B for one register tile of ROWS rows and COLUMNS vectors; B and C have dense rows, A any two strides.
template <class Register, int ROWS, int COLUMNS>
SOFTMASK_INLINE void tile(
    const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_row, float* c, int64_t c_row,
    int64_t depth, bool accumulate) {
    typedef typename Register::Vector V;
    constexpr int64_t lanes = sizeof(V) / sizeof(float);
    V sums[ROWS][COLUMNS];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLUMNS; ++j)
            sums[i][j] = accumulate ? *reinterpret_cast<V*>(c + i * c_row + j * lanes) : V{};
    for (int64_t k = 0; k < depth; ++k) {
        V right[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) right[j] = *reinterpret_cast<const V*>(b + k * b_row + j * lanes);
        for (int i = 0; i < ROWS; ++i) {
            const float left = a[i * a_row + k * a_depth];
            for (int j = 0; j < COLUMNS; ++j) sums[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLUMNS; ++j) *reinterpret_cast<V*>(c + i * c_row + j * lanes) = sums[i][j];
}

// ROWS is what the registers hold: 32 of AVX-512, 16 of AVX2.
template <class Register, int ROWS, int COLUMNS>
SOFTMASK_INLINE void tile_column(
    const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_row, float* c, int64_t c_row,
    int64_t rows, int64_t depth, bool accumulate) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        tile<Register, ROWS, COLUMNS>(a + i * a_row, a_row, a_depth, b, b_row, c + i * c_row, c_row, depth, accumulate);
    for (; i + 2 <= rows; i += 2)
        tile<Register, 2, COLUMNS>(a + i * a_row, a_row, a_depth, b, b_row, c + i * c_row, c_row, depth, accumulate);
    for (; i < rows; ++i)
        tile<Register, 1, COLUMNS>(a + i * a_row, a_row, a_depth, b, b_row, c + i * c_row, c_row, depth, accumulate);
}

// C (rows, columns) (+)= A (rows, depth) B (depth, columns), float32. `columns` is a multiple of LANES; rows of B and C
// are dense, b_row and c_row floats apart; element (i, k) of A is a[i * a_row + k * a_depth], so A may be transposed.
SOFTMASK_INLINE void multiply(
    const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_row, float* c, int64_t c_row,
    int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
    int64_t j = 0;
    if (WIDE) {
        for (; j + 2 * LANES <= columns; j += 2 * LANES)
            tile_column<WideRegister, 8, 2>(a, a_row, a_depth, b + j, b_row, c + j, c_row, rows, depth, accumulate);
        for (; j < columns; j += LANES)
            tile_column<WideRegister, 8, 1>(a, a_row, a_depth, b + j, b_row, c + j, c_row, rows, depth, accumulate);
    } else {
        for (; j < columns; j += LANES)
            tile_column<NarrowRegister, 6, 2>(a, a_row, a_depth, b + j, b_row, c + j, c_row, rows, depth, accumulate);
    }
}

}  // namespace softmask
