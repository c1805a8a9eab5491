// One AdamW step for many parameters, with base + delta written into the weight.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace spt {

// The numbers of a step.
struct AdamWNumbers {
    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    double step;  // 1 for the first step
    bool maximize;
};

struct AdamWEntry {
    float* param;  // [n], updated like the two states below
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    int64_t n;

    // Where base + delta goes; target is null for a dense parameter, that has no base.
    DType target_dtype;
    void* target;
    int64_t target_numel;
    const int32_t* index;  // [n], unique
    const void* original;  // [n], target's dtype
    uint32_t id;           // tells the entries apart in the random bits of stochastic rounding

    AdamWNumbers numbers;
};

// What a step needs of its numbers, prepared in double as torch does and then rounded.
struct AdamWScalars {
    float sign;
    float decay;
    float lerp_weight;
    float beta2;
    float one_minus_beta2;
    float bias_correction2_sqrt;
    float eps;
    float negative_step_size;
    uint32_t random_prefix;
};

// The entries of a model and how their work is cut, to be kept from step to step.
//
// The arithmetic and its order are those of torch.optim.AdamW(foreach=False).
class SparseAdamW {
  public:
    // Throws std::invalid_argument if an index is not usable.
    explicit SparseAdamW(std::vector<AdamWEntry> entries);

    std::vector<AdamWEntry>& entries() { return entries_; }

    // Throws std::invalid_argument if a position has come to lie outside its target; nothing is
    // written there, but some entries may then be a step ahead of others.
    void step(bool stochastic, uint32_t seed, int n_threads);

  private:
    struct Piece {
        size_t entry;
        int64_t begin;
    };
    void take(const Piece& piece, bool stochastic) const;

    std::vector<AdamWEntry> entries_;
    std::vector<Piece> pieces_;
    std::vector<AdamWScalars> scalars_;
};

}  // namespace spt
