// Makes the output of a LayerNorm again from what its backward keeps.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace spt {

struct LayerNormRows {
    const float* input;   // [n_rows, n_columns]
    const float* mean;    // [n_rows]
    const float* rstd;    // [n_rows]
    const float* weight;  // [n_columns], or null
    const float* bias;    // [n_columns], or null
    void* output;         // [n_rows, n_columns] of `output_dtype`
    DType output_dtype;
    int64_t n_rows;
    int64_t n_columns;
};

// output = (input - mean) rstd weight + bias in fp32 and in this order, then rounded, so that it
// has the same bits on every processor.
void rebuild_layer_norm(const LayerNormRows& rows, int n_threads);

}  // namespace spt
