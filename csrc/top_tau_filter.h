// The one pass over all scores: keeps those at or above a pivot.
#pragma once

#include <cstdint>
#include <vector>

#include "top_tau_exact.h"

namespace spt {

struct FilteredPiece {
    std::vector<uint32_t> offsets;   // into the piece, ascending
    std::vector<uint32_t> patterns;  // fp32 bit patterns of the scores there
    bool negative = false;           // a score below 0 was met; -0.0 is none
};

// Scores whose pattern is at least `pivot` (at least 1). NaN and infinity are always kept.
FilteredPiece filter(const ScorePiece& piece, uint32_t pivot);

}  // namespace spt
