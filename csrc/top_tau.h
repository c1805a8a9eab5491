// Selects the largest scores over a list of tensors that are never joined.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace spt {

struct ScoreTensor {
    const void* data;
    DType dtype;  // fp32 or bf16
    int64_t numel;
    int64_t cap;  // the most that this tensor counts for
};

// The shortest prefix of the ranking (higher score, then earlier tensor, then lower position) in
// which the sum of min(selected in m, cap of m) is k: for each tensor its positions, ascending.
//
// Throws std::invalid_argument if a score is NaN, infinite or negative, or if the positive scores
// do not reach k.
std::vector<std::vector<int64_t>> top_tau(const std::vector<ScoreTensor>& tensors, int64_t k,
                                          int n_threads);

}  // namespace spt
