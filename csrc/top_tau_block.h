// The loops over one block of scores, portable and with AVX2: only top_tau_filter.cpp includes
// this.
#pragma once

#include <cstdint>

#include "instruction_set.h"
#include "top_tau_filter.h"
#if SPT_X86
#    include <immintrin.h>
#endif

namespace spt {
namespace {

constexpr int64_t kBlock = 4096;  // scores: what is kept of one block fits the stack
constexpr int64_t kSlack = 8;     // vector stores may write this far beyond the last kept score
constexpr int64_t kAhead = 1024;  // bytes: where memory is asked for before it is needed

struct Block {
    int64_t count = 0;
    uint32_t offsets[kBlock + kSlack];
    uint32_t patterns[kBlock + kSlack];

    void move_to(Kept* kept) {
        kept->offsets.insert(kept->offsets.end(), offsets, offsets + count);
        kept->patterns.insert(kept->patterns.end(), patterns, patterns + count);
        count = 0;
    }
};

SPT_INLINE uint32_t pattern_of(uint32_t stored) {
    return stored;
}
SPT_INLINE uint32_t pattern_of(uint16_t stored) {
    return static_cast<uint32_t>(stored) << 16;
}

// For the rare block in which a sign is set: tells -0.0, which is fine, from a negative score.
template <typename T>
bool any_below_zero(const T* data, int64_t begin, int64_t end) {
    bool any = false;
    for (int64_t i = begin; i < end; ++i) any |= pattern_of(data[i]) > 0x80000000u;
    return any;
}

// Appends the scores of data[begin..end) above `low` to `block`; returns whether a sign is set.
template <typename T>
bool append_above(const T* data, int64_t begin, int64_t end, int32_t low, Block* block) {
    int64_t count = block->count;
    uint32_t joined = 0;
    for (int64_t i = begin; i < end; ++i) {
        const uint32_t pattern = pattern_of(data[i]);
        joined |= pattern;
        block->offsets[count] = static_cast<uint32_t>(i);
        block->patterns[count] = pattern;
        count += static_cast<int32_t>(pattern) > low;
    }
    block->count = count;
    return (joined & 0x80000000u) != 0;
}

template <typename T>
void census_of(const T* data, int64_t begin, int64_t end, int32_t low, int32_t high, Block* block,
               Census* census) {
    int64_t count = block->count;
    for (int64_t i = begin; i < end; ++i) {
        const uint32_t bits = pattern_of(data[i]);
        const int32_t pattern = static_cast<int32_t>(bits);
        census->invalid |= !is_score(bits);
        census->at_low += pattern == low;
        census->at_high += pattern == high;
        census->above += pattern > high;
        block->offsets[count] = static_cast<uint32_t>(i);
        block->patterns[count] = bits;
        count += pattern > low && pattern < high;
    }
    block->count = count;
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

SPT_TARGET_AVX2 inline void append(__m256i patterns, __m256i kept, int64_t offset, Block* block) {
    const unsigned mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(kept)));
    const __m256i lanes = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[mask])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block->patterns + block->count),
                        _mm256_permutevar8x32_epi32(patterns, lanes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block->offsets + block->count),
                        _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(offset))));
    block->count += __builtin_popcount(mask);
}

// The scores of 64 bytes, as they are stored: as signed numbers of their own width, which order as
// the patterns do.
struct Line {
    __m256i first, second;

    template <typename T>
    SPT_TARGET_AVX2 static SPT_INLINE Line load(const T* data) {
        const char* bytes = reinterpret_cast<const char*>(data);
        SPT_PREFETCH(bytes + kAhead);
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32))};
    }

    SPT_TARGET_AVX2 SPT_INLINE __m256i joined() const { return _mm256_or_si256(first, second); }

    template <typename T>
    SPT_TARGET_AVX2 SPT_INLINE __m256i above(__m256i low) const {
        if constexpr (sizeof(T) == 2) {
            return _mm256_or_si256(_mm256_cmpgt_epi16(first, low), _mm256_cmpgt_epi16(second, low));
        } else {
            return _mm256_or_si256(_mm256_cmpgt_epi32(first, low), _mm256_cmpgt_epi32(second, low));
        }
    }
};

template <typename T>
constexpr int64_t kPerLine = 64 / sizeof(T);

// `low` for comparison with scores as they are stored: a bf16 has no lower half.
template <typename T>
SPT_TARGET_AVX2 inline __m256i stored_low(int32_t low) {
    return sizeof(T) == 2 ? _mm256_set1_epi16(static_cast<short>(low >> 16))
                          : _mm256_set1_epi32(low);
}

template <typename T>
SPT_TARGET_AVX2 inline void append_line(const T* data, int64_t begin, __m256i low, Block* block) {
    for (int64_t i = begin; i < begin + kPerLine<T>; i += 8) {
        const __m256i patterns = load_patterns(data + i);
        append(patterns, _mm256_cmpgt_epi32(patterns, low), i, block);
    }
}

template <typename T>
SPT_TARGET_AVX2 inline bool any_sign(__m256i joined) {
    const uint32_t last_bytes = sizeof(T) == 2 ? 0xaaaaaaaau : 0x88888888u;
    return (static_cast<uint32_t>(_mm256_movemask_epi8(joined)) & last_bytes) != 0;
}

template <typename T>
SPT_TARGET_AVX2 bool append_above_avx2(const T* data, int64_t begin, int64_t end, int32_t low,
                                       Block* block) {
    const __m256i lows = _mm256_set1_epi32(low);
    const __m256i line_lows = stored_low<T>(low);
    __m256i joined = _mm256_setzero_si256();
    int64_t i = begin;
    for (; i + kPerLine<T> <= end; i += kPerLine<T>) {
        const Line line = Line::load(data + i);
        joined = _mm256_or_si256(joined, line.joined());
        const __m256i above = line.template above<T>(line_lows);
        if (!_mm256_testz_si256(above, above)) append_line(data, i, lows, block);
    }
    const bool rest = append_above(data, i, end, low, block);
    return rest || any_sign<T>(joined);
}

// Appends what is above `low` in both pieces, at the same offsets; returns whether a sign is set.
template <typename T>
SPT_TARGET_AVX2 bool append_above_both_avx2(const T* first, const T* second, int64_t begin,
                                            int64_t end, int32_t low, Block* blocks) {
    const __m256i lows = _mm256_set1_epi32(low);
    const __m256i line_lows = stored_low<T>(low);
    __m256i joined = _mm256_setzero_si256();
    int64_t i = begin;
    for (; i + kPerLine<T> <= end; i += kPerLine<T>) {
        const Line a = Line::load(first + i);
        const Line b = Line::load(second + i);
        joined = _mm256_or_si256(joined, _mm256_or_si256(a.joined(), b.joined()));
        const __m256i above =
            _mm256_or_si256(a.template above<T>(line_lows), b.template above<T>(line_lows));
        if (_mm256_testz_si256(above, above)) continue;
        append_line(first, i, lows, &blocks[0]);
        append_line(second, i, lows, &blocks[1]);
    }
    const bool rest = append_above(first, i, end, low, &blocks[0]);
    const bool other_rest = append_above(second, i, end, low, &blocks[1]);
    return rest || other_rest || any_sign<T>(joined);
}

template <typename T>
SPT_TARGET_AVX2 void census_of_avx2(const T* data, int64_t begin, int64_t end, int32_t low,
                                    int32_t high, Block* block, Census* census) {
    const __m256i lows = _mm256_set1_epi32(low);
    const __m256i highs = _mm256_set1_epi32(high);
    __m256i at_low = _mm256_setzero_si256();  // counted downwards: a true comparison is -1
    __m256i at_high = at_low;
    __m256i above = at_low;
    __m256i joined = at_low;
    __m256i largest = at_low;
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) {
        const __m256i patterns = load_patterns(data + i);
        joined = _mm256_or_si256(joined, patterns);
        largest = _mm256_max_epi32(largest, patterns);
        at_low = _mm256_add_epi32(at_low, _mm256_cmpeq_epi32(patterns, lows));
        at_high = _mm256_add_epi32(at_high, _mm256_cmpeq_epi32(patterns, highs));
        above = _mm256_add_epi32(above, _mm256_cmpgt_epi32(patterns, highs));
        const __m256i between = _mm256_and_si256(_mm256_cmpgt_epi32(patterns, lows),
                                                 _mm256_cmpgt_epi32(highs, patterns));
        if (!_mm256_testz_si256(between, between)) append(patterns, between, i, block);
    }
    alignas(32) int32_t counts[3][8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(counts[0]), at_low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(counts[1]), at_high);
    _mm256_store_si256(reinterpret_cast<__m256i*>(counts[2]), above);
    for (int lane = 0; lane < 8; ++lane) {
        census->at_low -= counts[0][lane];
        census->at_high -= counts[1][lane];
        census->above -= counts[2][lane];
    }
    const __m256i infinite =
        _mm256_cmpgt_epi32(largest, _mm256_set1_epi32(static_cast<int32_t>(kInfinity) - 1));
    census->invalid |= !_mm256_testz_si256(infinite, infinite);
    if (_mm256_movemask_ps(_mm256_castsi256_ps(joined)) != 0) {
        census->invalid |= any_below_zero(data, begin, i);
    }
    census_of(data, i, end, low, high, block, census);
}

#endif  // SPT_X86

}  // namespace
}  // namespace spt
