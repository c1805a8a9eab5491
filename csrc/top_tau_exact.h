// Top-tau by radix histograms: several passes over the scores, no assumption about them.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace spt {

// A run of scores of one tensor, or of those that a filter has left of it.
//
// A score is ranked by its fp32 bit pattern: non-negative floats order as their patterns do.
struct ScorePiece {
    const void* data;
    DType dtype;
    int64_t n;
    int64_t tensor;
    int64_t base;             // position in the tensor of what offset 0 stands for
    const uint32_t* offsets;  // [n], ascending, or null: 0..n-1
};

struct Threshold {
    uint32_t pattern;  // everything above it is selected
    std::vector<int64_t>
        ties;  // for each tensor how many of the scores equal to it, first ones first
};

// The lowest pattern such that what lies above and at it counts for k.
//
// Returns the count that all positive scores reach together; the threshold is set only if that is
// at least k, and k at least 1. Sets `invalid[tensor]` where a score is NaN, infinite or negative.
int64_t find_threshold(const std::vector<ScorePiece>& pieces, const std::vector<int64_t>& caps,
                       int64_t k, int n_threads, Threshold* threshold,
                       std::vector<uint8_t>* invalid);

// Everything above the threshold, and the ties it grants: for each tensor its positions, ascending.
std::vector<std::vector<int64_t>> collect(const std::vector<ScorePiece>& pieces,
                                          const Threshold& threshold, int n_threads);

}  // namespace spt
