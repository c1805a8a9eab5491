// The one pass over all scores: keeps those at or above a pivot.
#include "top_tau_filter.h"

#include <algorithm>
#include <array>

#include "instruction_set.h"
#if SPT_X86
#    include <immintrin.h>
#endif

namespace spt {
namespace {

constexpr int64_t kBlock =
    4096;                      // scores: the buffers for one block fit the stack and the L1 cache
constexpr int64_t kSlack = 8;  // vector stores may write this far beyond the last kept score

struct Block {
    uint32_t offsets[kBlock + kSlack];
    uint32_t patterns[kBlock + kSlack];
};

SPT_INLINE uint32_t pattern_of(uint32_t stored) {
    return stored;
}
SPT_INLINE uint32_t pattern_of(uint16_t stored) {
    return static_cast<uint32_t>(stored) << 16;
}

// Keeps the scores of data[begin..end) above `floor`, appending at `count`; returns the new count.
// As signed numbers, patterns of scores are positive and those of negative floats negative.
template <typename T>
int64_t filter_portable(const T* data, int64_t begin, int64_t end, int32_t floor, int64_t count,
                        Block* block, bool* negative) {
    for (int64_t i = begin; i < end; ++i) {
        const uint32_t pattern = pattern_of(data[i]);
        *negative |= pattern > 0x80000000u;
        block->offsets[count] = static_cast<uint32_t>(i);
        block->patterns[count] = pattern;
        count += static_cast<int32_t>(pattern) > floor;
    }
    return count;
}

#if SPT_X86

// For each 8-bit mask the lanes that are set, moved to the front.
struct CompressTable {
    uint8_t lanes[256][8];
};

constexpr CompressTable make_compress_table() {
    CompressTable table{};
    for (int mask = 0; mask < 256; ++mask) {
        int n = 0;
        for (int lane = 0; lane < 8; ++lane) {
            if (mask >> lane & 1) table.lanes[mask][n++] = static_cast<uint8_t>(lane);
        }
    }
    return table;
}

constexpr CompressTable kCompress = make_compress_table();

SPT_TARGET_AVX2 inline __m256i load_patterns(const uint32_t* data) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
}

SPT_TARGET_AVX2 inline __m256i load_patterns(const uint16_t* data) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
}

SPT_TARGET_AVX2 inline int64_t append(__m256i patterns, __m256i kept, int64_t offset, int64_t count,
                                      Block* block) {
    const unsigned mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(kept)));
    const __m256i lanes = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[mask])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block->patterns + count),
                        _mm256_permutevar8x32_epi32(patterns, lanes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block->offsets + count),
                        _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(offset))));
    return count + __builtin_popcount(mask);
}

template <typename T>
SPT_TARGET_AVX2 int64_t filter_avx2(const T* data, int64_t begin, int64_t end, int32_t floor,
                                    int64_t count, Block* block, bool* negative) {
    const __m256i floors = _mm256_set1_epi32(floor);
    __m256i signs = _mm256_setzero_si256();
    int64_t i = begin;
    for (; i + 32 <= end; i += 32) {
        const __m256i a = load_patterns(data + i);
        const __m256i b = load_patterns(data + i + 8);
        const __m256i c = load_patterns(data + i + 16);
        const __m256i d = load_patterns(data + i + 24);
        signs =
            _mm256_or_si256(signs, _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d)));
        const __m256i keep_a = _mm256_cmpgt_epi32(a, floors);
        const __m256i keep_b = _mm256_cmpgt_epi32(b, floors);
        const __m256i keep_c = _mm256_cmpgt_epi32(c, floors);
        const __m256i keep_d = _mm256_cmpgt_epi32(d, floors);
        const __m256i any =
            _mm256_or_si256(_mm256_or_si256(keep_a, keep_b), _mm256_or_si256(keep_c, keep_d));
        if (_mm256_testz_si256(any, any)) continue;
        count = append(a, keep_a, i, count, block);
        count = append(b, keep_b, i + 8, count, block);
        count = append(c, keep_c, i + 16, count, block);
        count = append(d, keep_d, i + 24, count, block);
    }
    if (_mm256_movemask_ps(_mm256_castsi256_ps(signs)) != 0) {
        // rare: tells -0.0, which is fine, from a negative score
        for (int64_t j = begin; j < i; ++j) *negative |= pattern_of(data[j]) > 0x80000000u;
    }
    return filter_portable(data, i, end, floor, count, block, negative);
}

#endif  // SPT_X86

template <typename T>
FilteredPiece filter_piece(const T* data, int64_t n, int32_t floor) {
    auto* filter_block = &filter_portable<T>;
#if SPT_X86
    if (instruction_set() >= InstructionSet::avx2) filter_block = &filter_avx2<T>;
#endif
    FilteredPiece kept;
    Block block;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, n);
        const int64_t count = filter_block(data, begin, end, floor, 0, &block, &kept.negative);
        kept.offsets.insert(kept.offsets.end(), block.offsets, block.offsets + count);
        kept.patterns.insert(kept.patterns.end(), block.patterns, block.patterns + count);
    }
    return kept;
}

}  // namespace

FilteredPiece filter(const ScorePiece& piece, uint32_t pivot) {
    const int32_t floor = static_cast<int32_t>(pivot) - 1;
    if (piece.dtype == DType::bf16) {
        return filter_piece(static_cast<const uint16_t*>(piece.data), piece.n, floor);
    }
    return filter_piece(static_cast<const uint32_t*>(piece.data), piece.n, floor);
}

}  // namespace spt
