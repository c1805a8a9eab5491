// The passes over all scores: which of them lie above, at or between given bit patterns.
#pragma once

#include <cstdint>
#include <vector>

#include "top_tau_pieces.h"

namespace spt {

// Some scores of a piece.
struct Kept {
    std::vector<uint32_t> offsets;   // into the piece, ascending
    std::vector<uint32_t> patterns;  // fp32 bit patterns of the scores there
};

// What is known of a piece after a pass over it.
struct Census {
    Kept kept;             // scores between the two patterns that were asked for
    int64_t at_low = 0;    // counted, not kept: as many as there are
    int64_t at_high = 0;   // likewise
    int64_t above = 0;     // above the high pattern, likewise
    bool invalid = false;  // a score below 0, infinite or NaN was met
};

// Keeps all scores above `low`. NaN and infinity are among them and not reported as invalid.
Census keep_above(const ScorePiece& piece, uint32_t low);

// `keep_above` for two pieces as long as each other and of one dtype, in less time than one after
// the other: the processor fetches two streams from memory faster than one.
void keep_above(const ScorePiece& first, const ScorePiece& second, uint32_t low, Census* of_first,
                Census* of_second);

// Keeps the scores above `low` and below `high`, and counts the others that are at `low` or more.
Census keep_between(const ScorePiece& piece, uint32_t low, uint32_t high);

// Writes the positions in the tensor of all scores above `low`, ascending, to [out, end): no
// further, should the scores have changed since they were counted.
void write_above(const ScorePiece& piece, uint32_t low, int64_t* out, int64_t* end);

}  // namespace spt
