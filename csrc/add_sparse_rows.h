// Adds to the outputs of a linear layer what changed single weights make of its inputs.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace spt {

// The entries of one span of tokens.
struct SparseRows {
    int64_t begin;         // first token
    int64_t end;           // past the last
    const int32_t* index;  // [nnz], sorted flat positions in [out_features, in_features]
    const void* before;    // [nnz]
    const void* after;     // [nnz]
    int64_t nnz;
};

struct SparseRowsProblem {
    DType dtype;         // of output and input
    DType weight_dtype;  // of what is before and after: that or fp32
    void* output;        // [tokens, out_features]
    const void* input;   // [tokens, in_features]
    int64_t out_features;
    int64_t in_features;
};

// Throws std::invalid_argument, before anything is written, if an index is not usable.
void add_sparse_rows(const SparseRowsProblem& problem, const std::vector<SparseRows>& spans,
                     int n_threads);

}  // namespace spt
