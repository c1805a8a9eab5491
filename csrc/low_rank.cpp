// The products of a LoRA that is too small to be worth a library's calls, a token at a time.
//
// Compiled with -ffp-contract=fast: `x += a * b` is a fused multiply-add where there is one.
#include "low_rank.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "instruction_set.h"

namespace spt {
namespace {

constexpr int64_t kLanes = 16;

SPT_INLINE float dot(const float* a, const float* b, int64_t n) {
    float sums[kLanes] = {};  // side by side, so that compilers make vectors of them
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
    }
    for (int64_t lane = 0; i + lane < n; ++lane) sums[lane] += a[i + lane] * b[i + lane];
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    return sums[0];
}

SPT_INLINE void add_scaled(float factor, const float* values, int64_t n, float* sums) {
    for (int64_t i = 0; i < n; ++i) sums[i] += factor * values[i];
}

// b by factors: [n_ranges * rank, width], each with the features of its range side by side.
std::vector<float> by_factors(const Lora& lora) {
    std::vector<float> rows(static_cast<size_t>(lora.n_ranges * lora.rank * lora.width));
    for (int64_t range = 0; range < lora.n_ranges; ++range) {
        float* to = rows.data() + range * lora.rank * lora.width;
        const float* from = lora.b + range * lora.width * lora.rank;
        for (int64_t k = 0; k < lora.rank; ++k) {
            for (int64_t o = 0; o < lora.width; ++o)
                to[k * lora.width + o] = from[o * lora.rank + k];
        }
    }
    return rows;
}

SPT_INLINE void add_forward(const Lora& lora, const float* b, const float* input, float* output) {
    const int64_t n_factors = lora.n_ranges * lora.rank;
    for (int64_t t = 0; t < lora.tokens; ++t) {
        const float* x = input + t * lora.in_features;
        float* y = output + t * lora.out_features + lora.first;
        for (int64_t k = 0; k < n_factors; ++k) {
            const float factor = dot(x, lora.a + k * lora.in_features, lora.in_features);
            add_scaled(lora.scale * factor, b + k * lora.width, lora.width,
                       y + k / lora.rank * lora.step);
        }
    }
}

SPT_INLINE void add_backward(const Lora& lora, const LoraGradients& gradients, const float* b,
                             const float* input, float* grad_b) {
    const int64_t n_factors = lora.n_ranges * lora.rank;
    for (int64_t t = 0; t < lora.tokens; ++t) {
        const float* x = input + t * lora.in_features;
        const float* gy = gradients.grad_output + t * lora.out_features + lora.first;
        for (int64_t k = 0; k < n_factors; ++k) {
            const float* a = lora.a + k * lora.in_features;
            const float* part = gy + k / lora.rank * lora.step;
            const float grad_inner = lora.scale * dot(part, b + k * lora.width, lora.width);
            add_scaled(lora.scale * dot(x, a, lora.in_features), part, lora.width,
                       grad_b + k * lora.width);
            add_scaled(grad_inner, x, lora.in_features, gradients.grad_a + k * lora.in_features);
            if (gradients.grad_input != nullptr) {
                add_scaled(grad_inner, a, lora.in_features,
                           gradients.grad_input + t * lora.in_features);
            }
        }
    }
}

#define SPT_LORA(NAME, TARGET)                                                                    \
    TARGET void forward_##NAME(const Lora& lora, const float* b, const float* input,              \
                               float* output) {                                                   \
        add_forward(lora, b, input, output);                                                      \
    }                                                                                             \
    TARGET void backward_##NAME(const Lora& lora, const LoraGradients& gradients, const float* b, \
                                const float* input, float* grad_b) {                              \
        add_backward(lora, gradients, b, input, grad_b);                                          \
    }

SPT_LORA(portable, )
#if SPT_X86
SPT_LORA(avx2, SPT_TARGET_AVX2)
SPT_LORA(avx512, SPT_TARGET_AVX512)
#endif
#undef SPT_LORA

}  // namespace

void add_lora(const Lora& lora, const float* input, float* output) {
    auto* forward = &forward_portable;
#if SPT_X86
    if (instruction_set() == InstructionSet::avx2) forward = &forward_avx2;
    if (instruction_set() == InstructionSet::avx512) forward = &forward_avx512;
#endif
    const std::vector<float> b = by_factors(lora);
    forward(lora, b.data(), input, output);
}

void lora_gradients(const Lora& lora, const LoraGradients& gradients) {
    auto* backward = &backward_portable;
#if SPT_X86
    if (instruction_set() == InstructionSet::avx2) backward = &backward_avx2;
    if (instruction_set() == InstructionSet::avx512) backward = &backward_avx512;
#endif
    const std::vector<float> b = by_factors(lora);
    const float* input = gradients.input;
    std::vector<float> activated;
    if (gradients.activation.kind != ActivationKind::none) {
        activated.assign(input, input + lora.tokens * lora.in_features);
        // one panel of all columns
        std::vector<int32_t> columns(static_cast<size_t>(lora.in_features));
        std::iota(columns.begin(), columns.end(), 0);
        activate_panels(gradients.activation, columns.data(), lora.in_features, lora.in_features,
                        {0, lora.tokens}, activated.data(), 0);
        input = activated.data();
    }
    std::fill(gradients.grad_a, gradients.grad_a + lora.n_ranges * lora.rank * lora.in_features,
              0.0f);
    std::vector<float> grad_b(b.size(), 0.0f);
    backward(lora, gradients, b.data(), input, grad_b.data());
    for (int64_t range = 0; range < lora.n_ranges; ++range) {
        const float* from = grad_b.data() + range * lora.rank * lora.width;
        float* to = gradients.grad_b + range * lora.width * lora.rank;
        for (int64_t k = 0; k < lora.rank; ++k) {
            for (int64_t o = 0; o < lora.width; ++o)
                to[o * lora.rank + k] = from[k * lora.width + o];
        }
    }
}

}  // namespace spt
