// The sum over samples of the squared weight gradient of each.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace spt {

// Activations [samples, tokens, columns] of any strides, in elements.
struct SampleOperand {
    const void* data;
    DType dtype;
    int64_t sample_stride;
    int64_t token_stride;
    int64_t column_stride;
};

struct SquaredGrad {
    SampleOperand grad_output;  // [samples, tokens, out_features]
    SampleOperand input;        // [samples, tokens, in_features]
    int64_t samples;
    int64_t tokens;
    int64_t out_features;
    int64_t in_features;
    float scale;
    float* score;  // [out_features, in_features], contiguous rows
    int64_t score_stride;
};

// score[o, i] += sum over b of (scale * sum over t of grad_output[b, t, o] * input[b, t, i])^2,
// in fp32 and in an order that depends on the number of tokens and the instruction set alone.
// Throws std::invalid_argument if the columns of an operand span 2^31 elements or more.
void accumulate_squared_grad(const SquaredGrad& problem, int n_threads);

}  // namespace spt
