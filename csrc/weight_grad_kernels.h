// The inner products of weight gradients, for the instruction set at hand.
#pragma once

#include <cstdint>

namespace spt {

struct WeightGradKernels {
    int tile_rows;
    int tile_columns;

    // sums[k] += sum over t of a[t] * b[slots[k] * stride + t]; tokens padded to kTokenPadding, not
    // 0.
    void (*dot_row)(const float* a, const float* b, int64_t stride, const int32_t* slots, int64_t n,
                    int64_t tokens, float* sums);

    // c[i * c_stride + j] += sum over t of a[t * tile_rows + i] * b[t * tile_columns + j];
    // tokens not 0.
    void (*add_tile)(const float* a, const float* b, int64_t tokens, float* c, int64_t c_stride);

    // c[i * c_stride + j] += (scale * (partial[i * tile_columns + j] + that sum))^2; partial null:
    // zeros.
    void (*add_squared_tile)(const float* a, const float* b, int64_t tokens, const float* partial,
                             float scale, float* c, int64_t c_stride);
};

const WeightGradKernels& weight_grad_kernels();

}  // namespace spt
