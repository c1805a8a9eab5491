// One AdamW step for many parameters, with base + delta written into the weight.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace spt {

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

    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    double step;  // 1 for the first step
    bool maximize;
    uint32_t id;  // tells the entries apart in the random bits of stochastic rounding
};

// The arithmetic and its order are those of torch.optim.AdamW(foreach=False).
// Throws std::invalid_argument, before anything is written, if an index is not usable.
void sparse_adamw(const std::vector<AdamWEntry>& entries, bool stochastic, uint32_t seed,
                  int n_threads);

}  // namespace spt
