// Makes the input of a layer again while it is packed, from what the producer before it keeps.
#pragma once

#include <cstdint>

#include "weight_grad_pack.h"

namespace spt {

// The numbers are those that spt_kernels/native/activation.py has.
enum class ActivationKind : int { none = 0, gelu = 1, tanh_gelu = 2, layer_norm = 3 };

struct Activation {
    ActivationKind kind;
    DType dtype;        // of the layer's input: to this each element is rounded
    const float* mean;  // [tokens], of a LayerNorm alone, as all that follows
    const float* rstd;
    const float* weight;  // [in_features], or null
    const float* bias;    // likewise
};

// Of what pack_columns has written for these columns: values[c * stride + t] becomes its
// activation. Padding stays zero.
void activate_columns(const Activation& activation, const int32_t* columns, int64_t n_columns,
                      TokenRange tokens, float* values, int64_t stride);

// Of what pack_panels has written for these columns.
void activate_panels(const Activation& activation, const int32_t* columns, int64_t n_columns,
                     int64_t width, TokenRange tokens, float* values, int64_t panel_stride);

}  // namespace spt
