// The inner products of weight gradients, for the instruction set at hand.
#pragma once

#include <cstdint>

namespace spt {

constexpr int64_t kLineFloats = 16;  // of a line of the cache

struct WeightGradKernels {
    int tile_rows;
    int tile_columns;

    // sums[k] += sum over t of a[t] * b[slots[k] * stride + t]; tokens padded to kTokenPadding, not
    // 0.
    void (*dot_row)(const float* a, const float* b, int64_t stride, const int32_t* slots, int64_t n,
                    int64_t tokens, float* sums);

    // c[i * c_stride + j] += sum over t of a[t * tile_rows + i] * b[t * tile_columns + j];
    // tokens not 0. Meanwhile kLineFloats floats a token are fetched from `next` on, into the
    // second level of the cache; it may point anywhere.
    void (*add_tile)(const float* a, const float* b, int64_t tokens, float* c, int64_t c_stride,
                     const float* next);

    // c[i * c_stride + j] += (scale * (partial[i * tile_columns + j] + that sum))^2; partial null:
    // zeros. Fetches likewise.
    void (*add_squared_tile)(const float* a, const float* b, int64_t tokens, const float* partial,
                             float scale, float* c, int64_t c_stride, const float* next);
};

const WeightGradKernels& weight_grad_kernels();

}  // namespace spt
