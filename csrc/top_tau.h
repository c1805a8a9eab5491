// Selects the largest scores over a list of tensors that are never joined.
#pragma once

#include <cstdint>
#include <vector>

#include "top_tau_pieces.h"
#include "top_tau_selection.h"

namespace spt {

// The shortest prefix of the ranking (higher score, then earlier tensor, then lower position) in
// which the sum of min(selected in m, cap of m) is k. Adds to `bytes_read` what of the scores it
// read.
//
// Throws std::invalid_argument if a score is NaN, infinite or negative, or if the positive scores
// do not reach k.
Selection top_tau(const std::vector<ScoreTensor>& tensors, int64_t k, int n_threads,
                  int64_t* bytes_read);

}  // namespace spt
