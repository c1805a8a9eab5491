// The weight gradient at chosen positions only: sampled dense-dense product (SDDMM).
#pragma once

#include <cstdint>

#include "activation.h"
#include "weight_grad_plan.h"

namespace spt {

struct SparseWeightGrad {
    Operand grad_output;    // [tokens, out_features]
    Operand input;          // [tokens, in_features]: what the activation is of
    Activation activation;  // the weight's input is this of `input`
    int64_t tokens;
    float* grad;  // [nnz]: the sum over tokens of grad_output[t, row] * activation[t, column]
};

// fp32 accumulation in an order that depends on the plan and the number of tokens alone.
void sparse_weight_grad(const WeightGradPlan& plan, const SparseWeightGrad& problem, int n_threads);

}  // namespace spt
