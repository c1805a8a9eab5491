// Takes the wanted entries out of a block of a dense weight gradient.
#pragma once

#include <cstdint>

namespace spt {

struct SampledBlock {
    const float* cells;  // [n_rows, n_columns]
    int64_t first_row, n_rows;
    int64_t first_column, n_columns;
    int64_t in_features;
    const int32_t* index;      // [nnz], ascending flat positions in [out_features, in_features]
    const int32_t* row_begin;  // [out_features + 1]: the entries before each row
    int32_t* next;             // [out_features]: a row's first entry that was not taken yet
    float* grad;               // [nnz]
};

// grad[k] = the cell of entry k for the block's entries, and moves `next` behind them. Blocks of
// the same rows have to come from left to right.
// Throws std::invalid_argument if an entry lies outside of the row that row_begin says it is in.
void sample_block(const SampledBlock& block, int n_threads);

}  // namespace spt
