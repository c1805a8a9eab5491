// One AdamW step for many parameters, with base + delta written into the weight.
#include "sparse_adamw.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>

#include "index_check.h"
#include "parallel.h"
#include "stochastic_rounding.h"

namespace spt {
namespace {

// Entries that a thread takes at once: few enough for the threads to end together.
constexpr int64_t kPiece = 1 << 11;

// Entries that are updated before they are written. A write waits for memory nearly every time, and
// the arithmetic of the next block is done meanwhile if that is near enough in the instruction
// stream.
constexpr int64_t kBlock = 32;

bool same(const AdamWNumbers& a, const AdamWNumbers& b) {
    auto all = [](const AdamWNumbers& n) {
        return std::tie(n.lr, n.beta1, n.beta2, n.eps, n.weight_decay, n.step, n.maximize);
    };
    return all(a) == all(b);
}

AdamWScalars prepare(const AdamWNumbers& numbers) {
    const double bias_correction1 = 1.0 - std::pow(numbers.beta1, numbers.step);
    const double bias_correction2 = 1.0 - std::pow(numbers.beta2, numbers.step);
    AdamWScalars scalars{};
    scalars.sign = numbers.maximize ? -1.0f : 1.0f;
    scalars.decay = static_cast<float>(1.0 - numbers.lr * numbers.weight_decay);
    scalars.lerp_weight = static_cast<float>(1.0 - numbers.beta1);
    scalars.beta2 = static_cast<float>(numbers.beta2);
    scalars.one_minus_beta2 = static_cast<float>(1.0 - numbers.beta2);
    scalars.bias_correction2_sqrt = static_cast<float>(std::sqrt(bias_correction2));
    scalars.eps = static_cast<float>(numbers.eps);
    scalars.negative_step_size = static_cast<float>(-(numbers.lr / bias_correction1));
    return scalars;
}

// The arrays of an entry never overlap, which the compiler has to be told. The fused multiply-adds
// are where torch has them; being explicit, they give the same bits on every processor.
SPT_INLINE void update(const AdamWScalars& s, int64_t n, float* __restrict param,
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

// How base + delta is rounded into a target.
struct NoTarget {};

template <DType dtype>
struct Nearest : Storage<dtype> {
    static SPT_INLINE auto round(float value, uint32_t, int64_t) {
        return Storage<dtype>::round(value);
    }
};

template <DType dtype>
struct Stochastic : Storage<dtype> {
    static SPT_INLINE uint16_t round(float value, uint32_t prefix, int64_t k) {
        const uint32_t random = mix(prefix ^ static_cast<uint32_t>(k));
        return dtype == DType::bf16 ? float_to_bf16_stochastic(value, random)
                                    : float_to_fp16_stochastic(value, random);
    }
};

template <typename Rounding>
SPT_INLINE void write_block(Rounding, const AdamWEntry& entry, const AdamWScalars& scalars,
                            int64_t begin, int64_t n) {
    using T = typename Rounding::type;
    const float* param = entry.param + begin;
    const T* original = static_cast<const T*>(entry.original) + begin;
    const int32_t* index = entry.index + begin;
    T values[kBlock];
    for (int64_t k = 0; k < n; ++k) {
        values[k] = Rounding::round(Rounding::read(original[k]) + param[k], scalars.random_prefix,
                                    begin + k);
    }
    // looked at anew in each step, which is hidden behind the writes: the index may have changed
    if (!index_fits(index, n, entry.target_numel)) {
        check_index(index, n, entry.target_numel, "an index");
    }
    T* target = static_cast<T*>(entry.target);
    for (int64_t k = 0; k < n; ++k) target[index[k]] = values[k];
}

SPT_INLINE void write_block(NoTarget, const AdamWEntry&, const AdamWScalars&, int64_t, int64_t) {}

template <typename Rounding>
SPT_INLINE void take_inline(const AdamWEntry& entry, const AdamWScalars& scalars, int64_t begin,
                            int64_t end) {
    int64_t k = begin;
    for (; k + kBlock <= end; k += kBlock) {  // a length that the compiler knows
        update(scalars, kBlock, entry.param + k, entry.grad + k, entry.exp_avg + k,
               entry.exp_avg_sq + k);
        write_block(Rounding{}, entry, scalars, k, kBlock);
    }
    update(scalars, end - k, entry.param + k, entry.grad + k, entry.exp_avg + k,
           entry.exp_avg_sq + k);
    write_block(Rounding{}, entry, scalars, k, end - k);
}

template <typename Rounding>
void take_portable(const AdamWEntry& entry, const AdamWScalars& scalars, int64_t begin,
                   int64_t end) {
    take_inline<Rounding>(entry, scalars, begin, end);
}

#if SPT_X86
template <typename Rounding>
SPT_TARGET_AVX2 void take_avx2(const AdamWEntry& entry, const AdamWScalars& scalars, int64_t begin,
                               int64_t end) {
    take_inline<Rounding>(entry, scalars, begin, end);
}
#endif

template <typename Rounding>
void take_best(const AdamWEntry& entry, const AdamWScalars& scalars, int64_t begin, int64_t end) {
#if SPT_X86
    if (instruction_set() >= InstructionSet::avx2) {
        return take_avx2<Rounding>(entry, scalars, begin, end);
    }
#endif
    take_portable<Rounding>(entry, scalars, begin, end);
}

}  // namespace

SparseAdamW::SparseAdamW(std::vector<AdamWEntry> entries)
    : entries_(std::move(entries)), scalars_(entries_.size()) {
    for (size_t i = 0; i < entries_.size(); ++i) {
        const AdamWEntry& entry = entries_[i];
        if (entry.target != nullptr) {
            check_index(entry.index, entry.n, entry.target_numel,
                        "indices[" + std::to_string(i) + "]");
        }
        for (int64_t k = 0; k < entry.n; k += kPiece) pieces_.push_back({i, k});
    }
}

void SparseAdamW::step(bool stochastic, uint32_t seed, int n_threads) {
    for (size_t i = 0; i < entries_.size(); ++i) {
        const AdamWNumbers& numbers = entries_[i].numbers;
        const bool repeats = i > 0 && same(numbers, entries_[i - 1].numbers);
        scalars_[i] = repeats ? scalars_[i - 1] : prepare(numbers);
        scalars_[i].random_prefix =
            hash_prefix(seed, static_cast<uint32_t>(numbers.step), entries_[i].id);
    }
    parallel_for(static_cast<int64_t>(pieces_.size()), n_threads,
                 [&](int64_t i) { take(pieces_[static_cast<size_t>(i)], stochastic); });
}

void SparseAdamW::take(const Piece& piece, bool stochastic) const {
    const AdamWEntry& entry = entries_[piece.entry];
    auto* function = &take_best<NoTarget>;
    if (entry.target != nullptr) {
        switch (entry.target_dtype) {
            case DType::fp32:
                function = &take_best<Nearest<DType::fp32>>;
                break;
            case DType::bf16:
                function = stochastic ? &take_best<Stochastic<DType::bf16>>
                                      : &take_best<Nearest<DType::bf16>>;
                break;
            case DType::fp16:
                function = stochastic ? &take_best<Stochastic<DType::fp16>>
                                      : &take_best<Nearest<DType::fp16>>;
                break;
        }
    }
    function(entry, scalars_[piece.entry], piece.begin, std::min(piece.begin + kPiece, entry.n));
}

}  // namespace spt
