// What top-tau selected, and how it is written out.
#pragma once

#include <cstdint>
#include <vector>

#include "top_tau_filter.h"
#include "top_tau_pieces.h"

namespace spt {

// What of a piece is selected: all scores above the threshold, and the first ones at it.
struct Part {
    int64_t n_above = 0;
    int64_t n_at = 0;    // how many there are
    int64_t n_ties = 0;  // how many of them are selected
};

// A selection that is counted. It can be written as long as the scores stay where they are.
struct Selection {
    std::vector<ScorePiece> pieces;  // by tensor, then by position
    std::vector<Census> census;      // of each piece
    std::vector<Part> parts;         // of each piece
    uint32_t threshold = 0;
    bool all_kept = false;  // everything that is selected is in the census

    // How many scores of each of `n_tensors` tensors are selected.
    std::vector<int64_t> counts(size_t n_tensors) const;

    // Writes the positions of each tensor, ascending, to outputs[m][0..counts[m]).
    // Returns how many bytes of scores it had to read again.
    int64_t write(const std::vector<int64_t*>& outputs, int n_threads) const;
};

}  // namespace spt
