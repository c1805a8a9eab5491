// The inner products of weight gradients, for the instruction set at hand.
//
// Compiled with -ffp-contract=fast: `x += a * b` is a fused multiply-add where there is one.
#include "weight_grad_kernels.h"

#include <cstring>

#include "instruction_set.h"
#if SPT_X86
#    include <immintrin.h>
#endif

namespace spt {
namespace {

// Sums of eight vectors, each over its lanes.
using Vector4 = float __attribute__((vector_size(16)));

SPT_INLINE void add_across(const Vector4 (&partial)[8], float* total) {
    for (int j = 0; j < 8; ++j) {
        total[j] = (partial[j][0] + partial[j][1]) + (partial[j][2] + partial[j][3]);
    }
}

#define SPT_PATH portable
#define SPT_TARGET
#define SPT_WIDTH 4
#define SPT_TILE_ROWS 4
#define SPT_TILE_VECTORS 2
#include "weight_grad_kernels.inl"

#if SPT_X86

SPT_TARGET_AVX2 SPT_INLINE void add_across(const __m256 (&partial)[8], float* total) {
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(partial[0], partial[1]),
                                      _mm256_hadd_ps(partial[2], partial[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(partial[4], partial[5]),
                                       _mm256_hadd_ps(partial[6], partial[7]));
    _mm256_storeu_ps(total, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                          _mm256_permute2f128_ps(low, high, 0x31)));
}

#    define SPT_PATH avx2
#    define SPT_TARGET SPT_TARGET_AVX2
#    define SPT_WIDTH 8
#    define SPT_TILE_ROWS 6
#    define SPT_TILE_VECTORS 2
#    include "weight_grad_kernels.inl"

// Without intrinsics, so that it can be compiled for AVX2 and tested where there is no AVX-512.
using Vector16 = float __attribute__((vector_size(64)));

SPT_TARGET_AVX512 SPT_INLINE void add_across(const Vector16 (&partial)[8], float* total) {
    __m256 folded[8];
    for (int j = 0; j < 8; ++j) {
        __m256 half[2];
        std::memcpy(half, &partial[j], sizeof half);
        folded[j] = _mm256_add_ps(half[0], half[1]);
    }
    add_across(folded, total);
}

#    define SPT_PATH avx512
#    define SPT_TARGET SPT_TARGET_AVX512
#    define SPT_WIDTH 16
#    define SPT_TILE_ROWS 12
#    define SPT_TILE_VECTORS 2
#    include "weight_grad_kernels.inl"

#endif  // SPT_X86

}  // namespace

const WeightGradKernels& weight_grad_kernels() {
#if SPT_X86
    if (instruction_set() == InstructionSet::avx512) return avx512::kKernels;
    if (instruction_set() == InstructionSet::avx2) return avx2::kKernels;
#endif
    return portable::kKernels;
}

}  // namespace spt
