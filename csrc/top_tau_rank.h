// The score at a given rank of many, found by histograms of their bit patterns.
#pragma once

#include <cstdint>
#include <vector>

#include "top_tau_pieces.h"

namespace spt {

// Scores to be ranked; what is outside low < pattern < high is passed over.
struct Ranking {
    const std::vector<ScorePiece>& pieces;
    const std::vector<int64_t>& caps;   // the most that each tensor counts for
    const std::vector<int64_t>& above;  // for each tensor the scores known to be ranked higher
    int64_t weight;                     // how many scores each one here stands for
    uint32_t low;
    uint32_t high;
};

struct Rank {
    uint32_t
        pattern;      // the lowest such that what is above and at it counts for k; 0: there is none
    int64_t reached;  // what that counts for, or if there is none, what everything counts for
    int64_t n;        // how many scores are ranked above or at the pattern, beyond the caps too
    int n_passes;     // over the pieces
};

Rank find_rank(const Ranking& ranking, int64_t k, int n_threads);

}  // namespace spt
