// Guesses from a sample between which scores the last one of a selection lies.
#include "top_tau_guess.h"

#include <algorithm>
#include <cmath>

#include "stochastic_rounding.h"
#include "top_tau_rank.h"

namespace spt {
namespace {

constexpr int64_t kSamples = 1 << 16;
constexpr int64_t kMinStride = 256;  // what is read for the sample stays small beside a pass
constexpr int64_t kCacheLine = 64;   // bytes: what reading a lone score costs
// Keeping a score takes as long as another pass takes for about this many
constexpr int64_t kScoresPerKept = 16;

struct Sample {
    std::vector<uint32_t> patterns;  // 0 where there was nothing to take
    std::vector<ScorePiece> pieces;
};

Sample take_sample(const std::vector<ScorePiece>& pieces, int64_t stride, int n_threads) {
    Sample sample;
    std::vector<int64_t> start{0};
    for (const ScorePiece& piece : pieces) {
        start.push_back(start.back() + (piece.n + stride - 1) / stride);
    }
    sample.patterns.resize(static_cast<size_t>(start.back()));
    parallel_for_workers(static_cast<int64_t>(pieces.size()), n_threads, [&](int64_t, int64_t p) {
        const ScorePiece& piece = pieces[static_cast<size_t>(p)];
        uint32_t* out = sample.patterns.data() + start[static_cast<size_t>(p)];
        const uint32_t seed = mix(static_cast<uint32_t>(p));
        piece.with_patterns([&](auto pattern_at) {
            for (int64_t i = 0; i < piece.n; i += stride, ++out) {
                // one score at random of each stride: a fixed step could follow a column of a
                // matrix
                const uint64_t random = mix(seed + static_cast<uint32_t>(i / stride));
                const int64_t at =
                    i + static_cast<int64_t>(random * static_cast<uint64_t>(stride) >> 32);
                if (at < piece.n) *out = pattern_at(at);
            }
        });
    });
    for (size_t p = 0; p < pieces.size(); ++p) {
        sample.pieces.push_back({sample.patterns.data() + start[p], DType::fp32,
                                 start[p + 1] - start[p], pieces[p].tensor, 0});
    }
    return sample;
}

}  // namespace

Bracket guess_bracket(const std::vector<ScorePiece>& pieces, const std::vector<int64_t>& caps,
                      int64_t n_scores, int64_t k, double n_deviations, int n_threads,
                      int64_t* bytes_read) {
    const int64_t stride = std::max(n_scores / kSamples, kMinStride);
    const Sample sample = take_sample(pieces, stride, n_threads);
    *bytes_read += static_cast<int64_t>(sample.patterns.size()) * kCacheLine;

    const double expected = static_cast<double>(k) / static_cast<double>(stride);
    const double margin = n_deviations * (std::sqrt(expected) + 3.0);
    const std::vector<int64_t> none(caps.size());
    const Ranking ranking{sample.pieces, caps, none, stride, 0, kInfinity};

    const int64_t lower = static_cast<int64_t>(expected + margin) + 1;
    const Rank low = find_rank(ranking, lower * stride, n_threads);
    if (low.n <= n_scores / kScoresPerKept) {
        // few enough to keep them all, those at the low end included
        return {std::max(low.pattern, uint32_t{1}) - 1, kInfinity, false};
    }
    const int64_t upper = static_cast<int64_t>(expected - margin);
    const Rank high = upper < 1 ? Rank{} : find_rank(ranking, upper * stride, n_threads);
    const uint32_t top = high.pattern == 0 ? kInfinity : high.pattern;
    return {low.pattern, std::max(top, low.pattern + 1), true};
}

}  // namespace spt
