// The weight gradient at chosen positions only: sampled dense-dense product (SDDMM).
#pragma once

#include <cstdint>

#include "weight_grad_pack.h"

namespace spt {

struct SparseWeightGrad {
    Operand grad_output;  // [tokens, out_features]
    Operand input;        // [tokens, in_features]
    int64_t tokens;
    int64_t out_features;
    int64_t in_features;
    const int32_t* index;  // [nnz], flat positions in [out_features, in_features]
    int64_t nnz;
    float* grad;  // [nnz]: the sum over tokens of grad_output[t, row] * input[t, column]
};

// fp32 accumulation in an order that depends on the problem and the instruction set alone.
// Throws std::invalid_argument if a position is out of range.
void sparse_weight_grad(const SparseWeightGrad& problem, int n_threads);

}  // namespace spt
