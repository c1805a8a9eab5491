// Top-tau by radix histograms: several passes over the scores, no assumption about them.
#include "top_tau_exact.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"

namespace spt {
namespace {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kLanes = 4;  // histograms side by side: equal neighbours would wait for each other

// Calls `visit` with a function from offset to bit pattern.
template <typename Visit>
void with_patterns(const ScorePiece& piece, Visit&& visit) {
    if (piece.dtype == DType::bf16) {
        const uint16_t* data = static_cast<const uint16_t*>(piece.data);
        visit([data](int64_t i) { return static_cast<uint32_t>(data[i]) << 16; });
    } else {
        const uint32_t* data = static_cast<const uint32_t*>(piece.data);
        visit([data](int64_t i) { return data[i]; });
    }
}

class DigitCounts {
  public:
    explicit DigitCounts(size_t n_tensors) : counts_(n_tensors * kDigits) {}

    void clear() {
        for (auto& count : counts_) count.store(0, std::memory_order_relaxed);
    }

    // Adds the next digit of every positive score of `piece` that starts with `prefix`.
    // Returns whether the piece holds a NaN, an infinity or a negative score.
    bool add(const ScorePiece& piece, uint32_t prefix, int shift) {
        // one more bin takes what does not match, so that the loop has no branch
        uint32_t bins[kLanes][kDigits + 1] = {};
        bool invalid = false;
        with_patterns(piece, [&](auto pattern_at) {
            for (int64_t i = 0; i < piece.n; ++i) {
                const uint32_t pattern = pattern_at(i);
                invalid |= pattern >= 0x7f800000u && pattern != 0x80000000u;
                const bool matches =
                    static_cast<int32_t>(pattern) > 0 &&
                    static_cast<uint64_t>(pattern) >> (shift + kDigitBits) == prefix;
                const uint32_t digit = (pattern >> shift) & (kDigits - 1);
                ++bins[i % kLanes][matches ? digit : kDigits];
            }
        });
        for (int digit = 0; digit < kDigits; ++digit) {
            int64_t sum = 0;
            for (int lane = 0; lane < kLanes; ++lane) sum += bins[lane][digit];
            if (sum != 0) at(piece.tensor, digit).fetch_add(sum, std::memory_order_relaxed);
        }
        return invalid;
    }

    int64_t count(int64_t tensor, int digit) const {
        return counts_[static_cast<size_t>(tensor * kDigits + digit)].load(
            std::memory_order_relaxed);
    }

  private:
    std::atomic<int64_t>& at(int64_t tensor, int digit) {
        return counts_[static_cast<size_t>(tensor * kDigits + digit)];
    }

    std::vector<std::atomic<int64_t>> counts_;
};

// Goes down from the highest digit, adding its scores to `above`, until `above` and the digit
// together count for k. Returns that digit, or -1, and sets `reached` to what was counted.
int walk_down(const DigitCounts& counts, const std::vector<int64_t>& caps, int64_t k,
              std::vector<int64_t>* above, int64_t* reached) {
    for (int digit = kDigits - 1; digit >= 0; --digit) {
        *reached = 0;
        for (size_t m = 0; m < caps.size(); ++m) {
            const int64_t with = (*above)[m] + counts.count(static_cast<int64_t>(m), digit);
            *reached += std::min(with, caps[m]);
        }
        if (*reached >= k) return digit;
        for (size_t m = 0; m < caps.size(); ++m) {
            (*above)[m] += counts.count(static_cast<int64_t>(m), digit);
        }
    }
    return -1;
}

// Ties are ranked by tensor and position: grants them in that order until k is counted.
std::vector<int64_t> grant_ties(const DigitCounts& counts, int digit,
                                const std::vector<int64_t>& above, const std::vector<int64_t>& caps,
                                int64_t k) {
    int64_t missing = k;
    for (size_t m = 0; m < caps.size(); ++m) missing -= std::min(above[m], caps[m]);
    std::vector<int64_t> ties(caps.size(), 0);
    for (size_t m = 0; m < caps.size() && missing > 0; ++m) {
        const int64_t available = counts.count(static_cast<int64_t>(m), digit);
        const int64_t gain = std::min(available, std::max<int64_t>(caps[m] - above[m], 0));
        // a tensor at its cap has its ties selected all the same if the ranking goes on beyond them
        ties[m] = gain < missing ? available : missing;
        missing -= std::min(gain, missing);
    }
    return ties;
}

}  // namespace

int64_t find_threshold(const std::vector<ScorePiece>& pieces, const std::vector<int64_t>& caps,
                       int64_t k, int n_threads, Threshold* threshold,
                       std::vector<uint8_t>* invalid) {
    std::vector<int64_t> above(caps.size(), 0);
    DigitCounts counts(caps.size());
    std::vector<std::atomic<bool>> piece_invalid(pieces.size());
    int64_t reachable = 0;
    uint32_t prefix = 0;
    for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
        counts.clear();
        parallel_for(static_cast<int64_t>(pieces.size()), n_threads, [&](int64_t i) {
            const size_t piece = static_cast<size_t>(i);
            if (counts.add(pieces[piece], prefix, shift)) piece_invalid[piece] = true;
        });

        if (shift == 32 - kDigitBits) {
            for (size_t i = 0; i < pieces.size(); ++i) {
                if (piece_invalid[i]) (*invalid)[static_cast<size_t>(pieces[i].tensor)] = 1;
            }
            std::vector<int64_t> none(caps.size(), 0);
            walk_down(counts, caps, INT64_MAX, &none, &reachable);
            if (k < 1 || reachable < k) return reachable;
        }
        int64_t reached;
        const int digit = walk_down(counts, caps, k, &above, &reached);
        prefix = prefix << kDigitBits | static_cast<uint32_t>(digit);
        if (shift == 0) threshold->ties = grant_ties(counts, digit, above, caps, k);
    }
    threshold->pattern = prefix;
    return reachable;
}

std::vector<std::vector<int64_t>> collect(const std::vector<ScorePiece>& pieces,
                                          const Threshold& threshold, int n_threads) {
    const int64_t n_pieces = static_cast<int64_t>(pieces.size());
    const size_t n_tensors = threshold.ties.size();
    // patterns are compared as signed numbers: -0.0 is then below every score, as 0.0 is
    const int32_t pattern = static_cast<int32_t>(threshold.pattern);

    std::vector<int64_t> n_above(pieces.size());
    std::vector<int64_t> n_equal(pieces.size());
    parallel_for(n_pieces, n_threads, [&](int64_t i) {
        const size_t p = static_cast<size_t>(i);
        with_patterns(pieces[p], [&](auto pattern_at) {
            int64_t above = 0;
            int64_t equal = 0;
            for (int64_t j = 0; j < pieces[p].n; ++j) {
                const int32_t score = static_cast<int32_t>(pattern_at(j));
                above += score > pattern;
                equal += score == pattern;
            }
            n_above[p] = above;
            n_equal[p] = equal;
        });
    });

    std::vector<int64_t> ties = threshold.ties;
    std::vector<int64_t> n_selected(n_tensors, 0);
    std::vector<int64_t> start(pieces.size());
    for (size_t p = 0; p < pieces.size(); ++p) {
        const size_t tensor = static_cast<size_t>(pieces[p].tensor);
        n_equal[p] = std::min(n_equal[p], ties[tensor]);
        ties[tensor] -= n_equal[p];
        start[p] = n_selected[tensor];
        n_selected[tensor] += n_above[p] + n_equal[p];
    }
    std::vector<std::vector<int64_t>> positions(n_tensors);
    for (size_t m = 0; m < n_tensors; ++m) positions[m].resize(static_cast<size_t>(n_selected[m]));

    parallel_for(n_pieces, n_threads, [&](int64_t i) {
        const size_t p = static_cast<size_t>(i);
        const ScorePiece& piece = pieces[p];
        int64_t ties_left = n_equal[p];
        int64_t left = n_above[p] + n_equal[p];
        int64_t* out = positions[static_cast<size_t>(piece.tensor)].data() + start[p];
        with_patterns(piece, [&](auto pattern_at) {
            for (int64_t j = 0; left > 0; ++j) {
                const int32_t score = static_cast<int32_t>(pattern_at(j));
                if (score < pattern) continue;
                if (score == pattern && ties_left-- <= 0) continue;
                *out++ = piece.base + (piece.offsets ? piece.offsets[j] : j);
                --left;
            }
        });
    });
    return positions;
}

}  // namespace spt
