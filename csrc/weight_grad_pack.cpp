// Copies blocks of tokens of the touched columns into the layouts that the products read.
#include "weight_grad_pack.h"

#include <algorithm>
#include <cstring>

#include "instruction_set.h"
#if SPT_X86
#    include <immintrin.h>
#endif

namespace spt {
namespace {

constexpr int64_t kGroup = 8;

// One group by single elements: at the edge of the matrix, for the last tokens, without AVX2.
template <typename S>
void pack_group(const Operand& operand, const ColumnGroup& group, TokenRange tokens, int64_t from,
                float* out, int64_t stride) {
    using T = typename S::type;
    const int64_t padded = (tokens.size + kTokenPadding - 1) / kTokenPadding * kTokenPadding;
    for (int64_t i = 0; i < kGroup; ++i) {
        if (!(group.mask >> i & 1)) continue;
        const T* source = static_cast<const T*>(operand.data) + tokens.begin * operand.row_stride +
                          group.column + i;
        for (int64_t t = from; t < tokens.size; ++t) {
            out[t] = S::read(source[t * operand.row_stride]);
        }
        for (int64_t t = std::max(from, tokens.size); t < padded; ++t) out[t] = 0.0f;
        out += stride;
    }
}

#if SPT_X86

SPT_TARGET_AVX2 inline __m256 load_eight(Storage<DType::fp32>, const float* source) {
    return _mm256_loadu_ps(source);
}

SPT_TARGET_AVX2 inline __m256 load_eight(Storage<DType::bf16>, const uint16_t* source) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

SPT_TARGET_AVX2 inline __m256 load_eight(Storage<DType::fp16>, const uint16_t* source) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}

SPT_TARGET_AVX2 inline void transpose_eight(__m256 (&row)[8]) {
    __m256 pair[8];
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    __m256 quad[8];
    for (int i = 0; i < 8; i += 4) {
        quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        row[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
        row[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
    }
}

template <typename S>
SPT_TARGET_AVX2 void pack_columns_avx2(const Operand& operand, const ColumnGroup* groups,
                                       int64_t n_groups, int64_t first_slot, TokenRange tokens,
                                       float* out, int64_t stride) {
    using T = typename S::type;
    const int64_t row_stride = operand.row_stride;
    const T* data = static_cast<const T*>(operand.data) + tokens.begin * row_stride;
    const int64_t whole = tokens.size / 8 * 8;
    // tokens outside: eight rows are read along their whole width, as they lie in memory
    for (int64_t t = 0; t < whole; t += 8) {
        const T* rows = data + t * row_stride;
        const bool more = t + 16 <= whole;
        for (int64_t g = 0; g < n_groups; ++g) {
            const ColumnGroup& group = groups[g];
            if (group.column + kGroup > operand.n_columns) continue;
            const T* source = rows + group.column;
            __m256 block[8];
            for (int i = 0; i < 8; ++i) block[i] = load_eight(S{}, source + i * row_stride);
            if (more) {
                // the next eight rows are a jump away, which the processor does not foresee
                for (int i = 8; i < 16; ++i) SPT_PREFETCH(source + i * row_stride);
            }
            transpose_eight(block);
            float* target = out + (group.slot - first_slot) * stride + t;
            if (group.mask == 0xff) {
                for (int i = 0; i < 8; ++i) _mm256_storeu_ps(target + i * stride, block[i]);
            } else {
                for (int i = 0; i < 8; ++i) {
                    if (!(group.mask >> i & 1)) continue;
                    _mm256_storeu_ps(target, block[i]);
                    target += stride;
                }
            }
        }
    }
    for (int64_t g = 0; g < n_groups; ++g) {
        const bool at_edge = groups[g].column + kGroup > operand.n_columns;
        pack_group<S>(operand, groups[g], tokens, at_edge ? 0 : whole,
                      out + (groups[g].slot - first_slot) * stride, stride);
    }
}

#endif  // SPT_X86

template <typename S>
void pack_columns_as(const Operand& operand, const ColumnGroup* groups, int64_t n_groups,
                     int64_t first_slot, TokenRange tokens, float* out, int64_t stride) {
#if SPT_X86
    if (instruction_set() >= InstructionSet::avx2) {
        pack_columns_avx2<S>(operand, groups, n_groups, first_slot, tokens, out, stride);
        return;
    }
#endif
    for (int64_t g = 0; g < n_groups; ++g) {
        pack_group<S>(operand, groups[g], tokens, 0, out + (groups[g].slot - first_slot) * stride,
                      stride);
    }
}

template <typename S, int64_t fixed_width>
SPT_INLINE void copy_run(const typename S::type* source, int64_t width, float* target) {
    if constexpr (fixed_width > 0) {
        // through memory of its own, else the compiler must suspect that the two overlap
        typename S::type run[fixed_width];
        float values[fixed_width];
        std::memcpy(run, source, sizeof run);
        for (int64_t i = 0; i < fixed_width; ++i) values[i] = S::read(run[i]);
        std::memcpy(target, values, sizeof values);
    } else {
        for (int64_t i = 0; i < width; ++i) target[i] = S::read(source[i]);
    }
}

// The width is a template argument for the sizes that tiles have, so that copies are unrolled.
template <typename S, int64_t fixed_width>
void pack_panels_as(const Operand& operand, const int32_t* columns, int64_t n_columns,
                    int64_t any_width, TokenRange tokens, float* out, int64_t panel_stride) {
    using T = typename S::type;
    constexpr int64_t kAhead = 8;  // tokens: the next row is a jump that no processor foresees
    const int64_t width = fixed_width > 0 ? fixed_width : any_width;
    const T* source = static_cast<const T*>(operand.data) + tokens.begin * operand.row_stride;
    // tokens outside: a row is read along its whole width, as it lies in memory
    for (int64_t t = 0; t < tokens.size; ++t, source += operand.row_stride) {
        float* target = out + t * width;
        for (int64_t c = 0; c < n_columns; c += width, target += panel_stride) {
            const int64_t n = std::min(width, n_columns - c);
            const int32_t* column = columns + c;
            if (t + kAhead < tokens.size) {
                SPT_PREFETCH(source + kAhead * operand.row_stride + column[0]);
            }
            if (n == width && column[width - 1] - column[0] == width - 1) {
                copy_run<S, fixed_width>(source + column[0], width, target);
                continue;
            }
            for (int64_t i = 0; i < n; ++i) target[i] = S::read(source[column[i]]);
            for (int64_t i = n; i < width; ++i) target[i] = 0.0f;
        }
    }
}

}  // namespace

void pack_columns(const Operand& operand, const ColumnGroup* groups, int64_t n_groups,
                  int64_t first_slot, TokenRange tokens, float* out, int64_t stride) {
    with_storage(operand.dtype, [&](auto storage) {
        pack_columns_as<decltype(storage)>(operand, groups, n_groups, first_slot, tokens, out,
                                           stride);
    });
}

void pack_panels(const Operand& operand, const int32_t* columns, int64_t n_columns, int64_t width,
                 TokenRange tokens, float* out, int64_t panel_stride) {
    with_storage(operand.dtype, [&](auto storage) {
        using S = decltype(storage);
        auto* pack = &pack_panels_as<S, 0>;
        if (width == 6) pack = &pack_panels_as<S, 6>;
        if (width == 12) pack = &pack_panels_as<S, 12>;
        if (width == 16) pack = &pack_panels_as<S, 16>;
        if (width == 32) pack = &pack_panels_as<S, 32>;
        pack(operand, columns, n_columns, width, tokens, out, panel_stride);
    });
}

}  // namespace spt
