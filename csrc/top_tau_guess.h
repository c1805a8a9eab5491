// Guesses from a sample between which scores the last one of a selection lies.
#pragma once

#include <cstdint>
#include <vector>

#include "top_tau_pieces.h"

namespace spt {

// The last selected score is expected between these patterns, or at one of them; low < high.
struct Bracket {
    uint32_t low;   // 0: everything above zero may be selected
    uint32_t high;  // kInfinity: nothing is known to be selected
    bool counted;   // too much lies above `low` to be kept: what is not in between is counted
};

// `n_deviations` is how cautious to be: standard deviations of the sample that are allowed for.
// `caps` are INT64_MAX for a tensor that counts whole. Adds to `bytes_read` what was read.
Bracket guess_bracket(const std::vector<ScorePiece>& pieces, const std::vector<int64_t>& caps,
                      int64_t n_scores, int64_t k, double n_deviations, int n_threads,
                      int64_t* bytes_read);

}  // namespace spt
