// Makes the input of a layer again while it is packed, from what the producer before it keeps.
#include "activation.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "instruction_set.h"

namespace spt {
namespace {

// Polynomials of least greatest error, constant term first: log2(erfc(a / sqrt(2)) / 2) for
// 0 <= a < kTail (to 9e-9 (1 + a) of erfc), 2^f for |f| <= 1/2 (2e-9).
constexpr float kTail = 5.7f;  // of a normal distribution, which fp32 does not tell from zero
constexpr float kLog2Tail[] = {-1.0f,           -1.15110469f,     -0.45921728f,     -0.0524501204f,
                               0.00695923762f,  -1.34055545e-05f, -0.000267860712f, 6.95205454e-05f,
                               -8.6097798e-06f, 4.45410933e-07f};
constexpr float kExp2[] = {1.0f,           0.693147182f,   0.240226462f,   0.0555032864f,
                           0.00961848907f, 0.00133999309f, 0.000153458212f};
constexpr float kLog2E = 1.44269504f;

template <size_t n>
SPT_INLINE float polynomial(const float (&coefficients)[n], float x) {
    float sum = coefficients[n - 1];
    for (size_t i = n - 1; i-- > 0;) sum = sum * x + coefficients[i];
    return sum;
}

// 2^x for -126 <= x < 127.
SPT_INLINE float exp2_within(float x) {
    constexpr float kToWhole = 12582912.0f;  // 1.5 * 2^23: below it there are no fractions
    const float whole = (x + kToWhole) - kToWhole;
    const int32_t exponent = static_cast<int32_t>(whole) + 127;
    return polynomial(kExp2, x - whole) * float_of(static_cast<uint32_t>(exponent) << 23);
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|): without the cancellation of 1 + erf(x), and without
// branches, so that compilers make vectors of it.
struct Gelu {
    static SPT_INLINE float of(float x) {
        const float size = std::fabs(x);
        const float tail = exp2_within(polynomial(kLog2Tail, std::min(size, kTail)));
        return (x < 0.0f ? 0.0f : x) - (size < kTail ? size * tail : 0.0f);
    }
};

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
struct TanhGelu {
    static SPT_INLINE float of(float x) {
        constexpr float kTwiceSqrtTwoByPi = 1.59576912f;
        const float exponent = -kLog2E * kTwiceSqrtTwoByPi * (x + 0.044715f * x * x * x);
        const float gelu = x / (1.0f + exp2_within(std::min(std::max(exponent, -126.0f), 126.0f)));
        return exponent > 126.0f ? 0.0f : gelu;
    }
};

template <typename S>
SPT_INLINE float rounded(float value) {
    return S::read(S::round(value));
}

template <typename Function, typename S>
SPT_INLINE void activate_run(float* values, int64_t n) {
    for (int64_t i = 0; i < n; ++i) values[i] = rounded<S>(Function::of(values[i]));
}

// One column of a LayerNorm: in the order of operations in which rebuild_layer_norm makes it.
template <typename S>
SPT_INLINE void normalize_column(const Activation& norm, int32_t column, TokenRange tokens,
                                 float* values) {
    const float* mean = norm.mean + tokens.begin;
    const float* rstd = norm.rstd + tokens.begin;
    const float weight = norm.weight ? norm.weight[column] : 1.0f;
    const float bias = norm.bias ? norm.bias[column] : 0.0f;
    for (int64_t t = 0; t < tokens.size; ++t) {
        values[t] = rounded<S>((values[t] - mean[t]) * rstd[t] * weight + bias);
    }
}

// One panel of it, whose columns' weights and biases lie side by side.
template <typename S>
SPT_INLINE void normalize_panel(const Activation& norm, const float* weight, const float* bias,
                                int64_t width, TokenRange tokens, float* values) {
    for (int64_t t = 0; t < tokens.size; ++t, values += width) {
        const float mean = norm.mean[tokens.begin + t], rstd = norm.rstd[tokens.begin + t];
        for (int64_t i = 0; i < width; ++i) {
            values[i] = rounded<S>((values[i] - mean) * rstd * weight[i] + bias[i]);
        }
    }
}

// What is done to packed values, compiled once for each instruction set.
struct Functions {
    void (*gelu)(float* values, int64_t n);
    void (*tanh_gelu)(float* values, int64_t n);
    void (*column)(const Activation& norm, int32_t column, TokenRange tokens, float* values);
    void (*panel)(const Activation& norm, const float* weight, const float* bias, int64_t width,
                  TokenRange tokens, float* values);
};

#define SPT_FUNCTIONS(NAME, TARGET)                                                              \
    template <typename S>                                                                        \
    struct NAME {                                                                                \
        TARGET static void gelu(float* values, int64_t n) { activate_run<Gelu, S>(values, n); }  \
        TARGET static void tanh_gelu(float* values, int64_t n) {                                 \
            activate_run<TanhGelu, S>(values, n);                                                \
        }                                                                                        \
        TARGET static void column(const Activation& norm, int32_t column, TokenRange tokens,     \
                                  float* values) {                                               \
            normalize_column<S>(norm, column, tokens, values);                                   \
        }                                                                                        \
        TARGET static void panel(const Activation& norm, const float* weight, const float* bias, \
                                 int64_t width, TokenRange tokens, float* values) {              \
            normalize_panel<S>(norm, weight, bias, width, tokens, values);                       \
        }                                                                                        \
        static constexpr Functions all{&gelu, &tanh_gelu, &column, &panel};                      \
    };

SPT_FUNCTIONS(Portable, )
#if SPT_X86
SPT_FUNCTIONS(Avx2, SPT_TARGET_AVX2)
SPT_FUNCTIONS(Avx512, SPT_TARGET_AVX512)
#endif
#undef SPT_FUNCTIONS

Functions functions_of(DType dtype) {
    Functions found{};
    with_storage(dtype, [&](auto storage) {
        using S = decltype(storage);
        found = Portable<S>::all;
#if SPT_X86
        if (instruction_set() == InstructionSet::avx2) found = Avx2<S>::all;
        if (instruction_set() == InstructionSet::avx512) found = Avx512<S>::all;
#endif
    });
    return found;
}

}  // namespace

void activate_columns(const Activation& activation, const int32_t* columns, int64_t n_columns,
                      TokenRange tokens, float* values, int64_t stride) {
    if (activation.kind == ActivationKind::none) return;
    const Functions functions = functions_of(activation.dtype);
    if (activation.kind == ActivationKind::layer_norm) {
        for (int64_t c = 0; c < n_columns; ++c) {
            functions.column(activation, columns[c], tokens, values + c * stride);
        }
        return;
    }
    // a GELU leaves the zeros of the padding, and whole vectors have no remainder
    const int64_t padded = (tokens.size + kTokenPadding - 1) / kTokenPadding * kTokenPadding;
    auto* gelu = activation.kind == ActivationKind::gelu ? functions.gelu : functions.tanh_gelu;
    for (int64_t c = 0; c < n_columns; ++c) gelu(values + c * stride, padded);
}

void activate_panels(const Activation& activation, const int32_t* columns, int64_t n_columns,
                     int64_t width, TokenRange tokens, float* values, int64_t panel_stride) {
    if (activation.kind == ActivationKind::none) return;
    const Functions functions = functions_of(activation.dtype);
    const size_t n = static_cast<size_t>(width);
    std::vector<float> weight(n), bias(n);
    for (int64_t c = 0; c < n_columns; c += width, values += panel_stride) {
        if (activation.kind == ActivationKind::gelu) {
            functions.gelu(values, tokens.size * width);
        } else if (activation.kind == ActivationKind::tanh_gelu) {
            functions.tanh_gelu(values, tokens.size * width);
        } else {
            // columns that fill the last panel up stay zero
            std::fill(weight.begin(), weight.end(), 0.0f);
            std::fill(bias.begin(), bias.end(), 0.0f);
            for (int64_t i = 0; i < std::min(width, n_columns - c); ++i) {
                const int32_t column = columns[c + i];
                weight[static_cast<size_t>(i)] =
                    activation.weight ? activation.weight[column] : 1.0f;
                bias[static_cast<size_t>(i)] = activation.bias ? activation.bias[column] : 0.0f;
            }
            functions.panel(activation, weight.data(), bias.data(), width, tokens, values);
        }
    }
}

}  // namespace spt
