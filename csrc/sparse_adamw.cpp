// One AdamW step for many parameters, with base + delta written into the weight.
#include "sparse_adamw.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "index_check.h"
#include "parallel.h"
#include "stochastic_rounding.h"

namespace spt {
namespace {

constexpr int64_t kPiece = 1 << 13;  // entries: their four arrays stay in the second-level cache

// What a step needs of the hyperparameters, prepared in double as torch does and then rounded.
struct Scalars {
    float sign;
    float decay;
    float lerp_weight;
    float beta2;
    float one_minus_beta2;
    float bias_correction2_sqrt;
    float eps;
    float negative_step_size;
};

Scalars prepare(const AdamWEntry& entry) {
    const double bias_correction1 = 1.0 - std::pow(entry.beta1, entry.step);
    const double bias_correction2 = 1.0 - std::pow(entry.beta2, entry.step);
    Scalars scalars;
    scalars.sign = entry.maximize ? -1.0f : 1.0f;
    scalars.decay = static_cast<float>(1.0 - entry.lr * entry.weight_decay);
    scalars.lerp_weight = static_cast<float>(1.0 - entry.beta1);
    scalars.beta2 = static_cast<float>(entry.beta2);
    scalars.one_minus_beta2 = static_cast<float>(1.0 - entry.beta2);
    scalars.bias_correction2_sqrt = static_cast<float>(std::sqrt(bias_correction2));
    scalars.eps = static_cast<float>(entry.eps);
    scalars.negative_step_size = static_cast<float>(-(entry.lr / bias_correction1));
    return scalars;
}

// The arrays of an entry never overlap, which the compiler has to be told. The fused multiply-adds
// are where torch has them; being explicit, they give the same bits on every processor.
SPT_INLINE void update_inline(const Scalars& s, int64_t n, float* __restrict param,
                              const float* __restrict grad, float* __restrict exp_avg,
                              float* __restrict exp_avg_sq) {
    // torch's lerp starts from the nearer end
    const bool near_start = s.lerp_weight < 0.5f;
    const float weight = near_start ? s.lerp_weight : s.lerp_weight - 1.0f;
    for (int64_t k = 0; k < n; ++k) {
        const float g = s.sign * grad[k];
        const float m = std::fma(weight, g - exp_avg[k], near_start ? exp_avg[k] : g);
        const float v = std::fma(s.one_minus_beta2 * g, g, exp_avg_sq[k] * s.beta2);
        const float denominator = std::sqrt(v) / s.bias_correction2_sqrt + s.eps;
        param[k] = param[k] * s.decay + s.negative_step_size * m / denominator;
        exp_avg[k] = m;
        exp_avg_sq[k] = v;
    }
}

void update_portable(const Scalars& s, int64_t n, float* param, const float* grad, float* exp_avg,
                     float* exp_avg_sq) {
    update_inline(s, n, param, grad, exp_avg, exp_avg_sq);
}

#if SPT_X86
SPT_TARGET_AVX2 void update_avx2(const Scalars& s, int64_t n, float* param, const float* grad,
                                 float* exp_avg, float* exp_avg_sq) {
    update_inline(s, n, param, grad, exp_avg, exp_avg_sq);
}
#endif

void update(const AdamWEntry& entry, const Scalars& scalars, int64_t begin, int64_t end) {
    auto* function = &update_portable;
#if SPT_X86
    if (instruction_set() >= InstructionSet::avx2) function = &update_avx2;
#endif
    function(scalars, end - begin, entry.param + begin, entry.grad + begin, entry.exp_avg + begin,
             entry.exp_avg_sq + begin);
}

template <typename S>
void write_nearest(const AdamWEntry& entry, int64_t begin, int64_t end) {
    using T = typename S::type;
    T* target = static_cast<T*>(entry.target);
    const T* original = static_cast<const T*>(entry.original);
    for (int64_t k = begin; k < end; ++k) {
        target[entry.index[k]] = S::round(S::read(original[k]) + entry.param[k]);
    }
}

template <typename S>
void write_stochastic(const AdamWEntry& entry, uint32_t seed, int64_t begin, int64_t end) {
    const uint32_t prefix = hash_prefix(seed, static_cast<uint32_t>(entry.step), entry.id);
    uint16_t* target = static_cast<uint16_t*>(entry.target);
    const uint16_t* original = static_cast<const uint16_t*>(entry.original);
    for (int64_t k = begin; k < end; ++k) {
        const uint32_t random = mix(prefix ^ static_cast<uint32_t>(k));
        const float value = S::read(original[k]) + entry.param[k];
        target[entry.index[k]] = entry.target_dtype == DType::bf16
                                     ? float_to_bf16_stochastic(value, random)
                                     : float_to_fp16_stochastic(value, random);
    }
}

void write_target(const AdamWEntry& entry, bool stochastic, uint32_t seed, int64_t begin,
                  int64_t end) {
    if (entry.target == nullptr) return;
    if (stochastic && entry.target_dtype == DType::bf16) {
        write_stochastic<Storage<DType::bf16>>(entry, seed, begin, end);
    } else if (stochastic && entry.target_dtype == DType::fp16) {
        write_stochastic<Storage<DType::fp16>>(entry, seed, begin, end);
    } else {
        with_storage(entry.target_dtype,
                     [&](auto storage) { write_nearest<decltype(storage)>(entry, begin, end); });
    }
}

}  // namespace

void sparse_adamw(const std::vector<AdamWEntry>& entries, bool stochastic, uint32_t seed,
                  int n_threads) {
    struct Piece {
        size_t entry;
        int64_t begin;
    };
    std::vector<Piece> pieces;
    std::vector<Scalars> scalars;
    for (size_t i = 0; i < entries.size(); ++i) {
        const AdamWEntry& entry = entries[i];
        if (entry.target != nullptr) {
            check_index(entry.index, entry.n, entry.target_numel,
                        "indices[" + std::to_string(i) + "]");
        }
        scalars.push_back(prepare(entry));
        for (int64_t k = 0; k < entry.n; k += kPiece) pieces.push_back({i, k});
    }
    parallel_for(static_cast<int64_t>(pieces.size()), n_threads, [&](int64_t i) {
        const Piece& piece = pieces[static_cast<size_t>(i)];
        const AdamWEntry& entry = entries[piece.entry];
        const int64_t end = std::min(piece.begin + kPiece, entry.n);
        update(entry, scalars[piece.entry], piece.begin, end);
        write_target(entry, stochastic, seed, piece.begin, end);
    });
}

}  // namespace spt
