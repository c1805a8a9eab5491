// The products of a LoRA that is too small to be worth a library's calls, a token at a time.
#pragma once

#include <cstdint>

#include "activation.h"

namespace spt {

// On `n_ranges` ranges of output features, each `width` wide and `step` from the one before it.
// Tensors are fp32 and contiguous.
struct Lora {
    int64_t tokens;
    int64_t in_features;
    int64_t out_features;
    int64_t rank;  // of one range
    int64_t n_ranges;
    int64_t first, width, step;
    float scale;
    const float* a;  // [n_ranges * rank, in_features]
    const float* b;  // [n_ranges * width, rank]
};

// output [tokens, out_features] += scale * (input a^T) b^T, range by range.
void add_lora(const Lora& lora, const float* input, float* output);

struct LoraGradients {
    const float* grad_output;  // [tokens, out_features]
    const float* input;        // [tokens, in_features]: what the activation is of
    Activation activation;
    float* grad_a;      // is written
    float* grad_b;      // likewise
    float* grad_input;  // [tokens, in_features], is added to; or null
};

void lora_gradients(const Lora& lora, const LoraGradients& gradients);

}  // namespace spt
