// The passes over all scores: which of them lie above, at or between given bit patterns.
#include "top_tau_filter.h"

#include <algorithm>
#include <type_traits>

#include "top_tau_block.h"

namespace spt {
namespace {

#if SPT_X86
bool has_avx2() {
    return instruction_set() >= InstructionSet::avx2;
}
#endif

// Both pieces of a pair, with the best function for it.
template <typename T>
bool append_above_both(const T* first, const T* second, int64_t begin, int64_t end, int32_t low,
                       Block* blocks) {
#if SPT_X86
    if (has_avx2()) return append_above_both_avx2(first, second, begin, end, low, blocks);
#endif
    const bool sign = append_above(first, begin, end, low, &blocks[0]);
    return append_above(second, begin, end, low, &blocks[1]) || sign;
}

template <typename T>
void keep_above_both(const T* first, const T* second, int64_t n, int32_t low, Census* of_first,
                     Census* of_second) {
    Block blocks[2];
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, n);
        if (append_above_both(first, second, begin, end, low, blocks)) {
            of_first->invalid |= any_below_zero(first, begin, end);
            of_second->invalid |= any_below_zero(second, begin, end);
        }
        blocks[0].move_to(&of_first->kept);
        blocks[1].move_to(&of_second->kept);
    }
}

// Calls `visit(data, append, census)` with the data as it is stored and the best functions for it.
template <typename Visit>
void with_stored(const ScorePiece& piece, Visit&& visit) {
    auto call = [&](auto* data) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
        auto* append = &append_above<T>;
        auto* census = &census_of<T>;
#if SPT_X86
        if (has_avx2()) {
            append = &append_above_avx2<T>;
            census = &census_of_avx2<T>;
        }
#endif
        visit(data, append, census);
    };
    if (piece.dtype == DType::bf16) {
        call(static_cast<const uint16_t*>(piece.data));
    } else {
        call(static_cast<const uint32_t*>(piece.data));
    }
}

}  // namespace

Census keep_above(const ScorePiece& piece, uint32_t low) {
    Census census;
    Block block;
    with_stored(piece, [&](auto* data, auto* append, auto*) {
        for (int64_t begin = 0; begin < piece.n; begin += kBlock) {
            const int64_t end = std::min(begin + kBlock, piece.n);
            if (append(data, begin, end, static_cast<int32_t>(low), &block)) {
                census.invalid |= any_below_zero(data, begin, end);
            }
            block.move_to(&census.kept);
        }
    });
    return census;
}

void keep_above(const ScorePiece& first, const ScorePiece& second, uint32_t low, Census* of_first,
                Census* of_second) {
    const int32_t signed_low = static_cast<int32_t>(low);
    if (first.dtype == DType::bf16) {
        keep_above_both(static_cast<const uint16_t*>(first.data),
                        static_cast<const uint16_t*>(second.data), first.n, signed_low, of_first,
                        of_second);
    } else {
        keep_above_both(static_cast<const uint32_t*>(first.data),
                        static_cast<const uint32_t*>(second.data), first.n, signed_low, of_first,
                        of_second);
    }
}

Census keep_between(const ScorePiece& piece, uint32_t low, uint32_t high) {
    Census census;
    Block block;
    with_stored(piece, [&](auto* data, auto*, auto* count) {
        for (int64_t begin = 0; begin < piece.n; begin += kBlock) {
            const int64_t end = std::min(begin + kBlock, piece.n);
            count(data, begin, end, static_cast<int32_t>(low), static_cast<int32_t>(high), &block,
                  &census);
            block.move_to(&census.kept);
        }
    });
    return census;
}

void write_above(const ScorePiece& piece, uint32_t low, int64_t* out, int64_t* end) {
    Block block;
    with_stored(piece, [&](auto* data, auto* append, auto*) {
        for (int64_t begin = 0; begin < piece.n && out < end; begin += kBlock) {
            const int64_t stop = std::min(begin + kBlock, piece.n);
            append(data, begin, stop, static_cast<int32_t>(low), &block);
            const int64_t n = std::min<int64_t>(block.count, end - out);
            for (int64_t i = 0; i < n; ++i) *out++ = piece.base + block.offsets[i];
            block.count = 0;
        }
    });
}

}  // namespace spt
