// The score at a given rank of many, found by histograms of their bit patterns.
#include "top_tau_rank.h"

#include <algorithm>

namespace spt {
namespace {

constexpr int kMaxDigitBits = 11;
constexpr int kMinDigitBits = 4;
constexpr int64_t kMaxCounts = 1 << 18;     // per thread, so that they stay in its cache
constexpr int64_t kWorthThreads = 1 << 16;  // scores: below this a thread takes longer to start

// Tensors that cannot reach their caps share one row of counts; each of the others has its own.
struct Rows {
    std::vector<int64_t> of_tensor;
    std::vector<int64_t> caps;
    std::vector<int64_t> above;
};

Rows make_rows(const Ranking& ranking) {
    std::vector<int64_t> most = ranking.above;
    for (const ScorePiece& piece : ranking.pieces) {
        most[static_cast<size_t>(piece.tensor)] += piece.n * ranking.weight;
    }
    Rows rows{{}, {INT64_MAX}, {0}};
    for (size_t m = 0; m < most.size(); ++m) {
        if (most[m] <= ranking.caps[m]) {
            rows.of_tensor.push_back(0);
            rows.above[0] += ranking.above[m];
        } else {
            rows.of_tensor.push_back(static_cast<int64_t>(rows.caps.size()));
            rows.caps.push_back(ranking.caps[m]);
            rows.above.push_back(ranking.above[m]);
        }
    }
    return rows;
}

// A stretch of bit patterns, and the digit that parts it.
struct Digit {
    uint32_t first;
    uint32_t size;
    int shift;

    int64_t n_bins() const { return ((size - 1) >> shift) + 1; }
};

Digit make_digit(uint32_t first, uint32_t size, int64_t n_rows) {
    int bits = kMaxDigitBits;
    while (bits > kMinDigitBits && n_rows << bits > kMaxCounts) --bits;
    Digit digit{first, size, 0};
    while ((size - 1) >> digit.shift >> bits != 0) ++digit.shift;
    return digit;
}

// [row, bin] how many scores have which digit.
std::vector<int64_t> count_digits(const Ranking& ranking, const Rows& rows, const Digit& digit,
                                  int n_threads) {
    const int64_t n_bins = digit.n_bins();
    const size_t n_counts = rows.caps.size() * static_cast<size_t>(n_bins);
    int64_t n_scores = 0;
    for (const ScorePiece& piece : ranking.pieces) n_scores += piece.n;
    const int n_workers = n_scores < kWorthThreads ? 1 : std::max(n_threads, 1);
    std::vector<std::vector<int64_t>> counts(static_cast<size_t>(n_workers));

    const int64_t n_pieces = static_cast<int64_t>(ranking.pieces.size());
    parallel_for_workers(n_pieces, n_workers, [&](int64_t worker, int64_t p) {
        std::vector<int64_t>& own = counts[static_cast<size_t>(worker)];
        if (own.empty()) own.resize(n_counts);
        const ScorePiece& piece = ranking.pieces[static_cast<size_t>(p)];
        int64_t* bins = own.data() + rows.of_tensor[static_cast<size_t>(piece.tensor)] * n_bins;
        piece.with_patterns([&](auto pattern_at) {
            for (int64_t i = 0; i < piece.n; ++i) {
                const uint32_t place = pattern_at(i) - digit.first;
                if (place < digit.size) ++bins[place >> digit.shift];
            }
        });
    });

    std::vector<int64_t> sum(n_counts);
    for (const std::vector<int64_t>& own : counts) {
        for (size_t i = 0; i < own.size(); ++i) sum[i] += own[i];
    }
    return sum;
}

// Goes down from the highest bin, adding its scores to `above`, until `above` and the bin together
// count for k. Returns that bin, or -1; sets `reached` to what was counted.
int64_t walk_down(const std::vector<int64_t>& counts, int64_t n_bins, int64_t weight, int64_t k,
                  Rows* rows, int64_t* reached) {
    const size_t n_rows = rows->caps.size();
    for (int64_t bin = n_bins - 1; bin >= 0; --bin) {
        *reached = 0;
        for (size_t r = 0; r < n_rows; ++r) {
            const int64_t here = counts[r * static_cast<size_t>(n_bins) + static_cast<size_t>(bin)];
            *reached += std::min(rows->above[r] + here * weight, rows->caps[r]);
        }
        if (*reached >= k) return bin;
        for (size_t r = 0; r < n_rows; ++r) {
            rows->above[r] +=
                counts[r * static_cast<size_t>(n_bins) + static_cast<size_t>(bin)] * weight;
        }
    }
    return -1;
}

}  // namespace

Rank find_rank(const Ranking& ranking, int64_t k, int n_threads) {
    Rows rows = make_rows(ranking);
    Rank rank{0, 0, 0, 0};
    for (size_t r = 0; r < rows.caps.size(); ++r) {
        rank.reached += std::min(rows.above[r], rows.caps[r]);
    }
    if (ranking.high - ranking.low < 2) return rank;

    const int64_t n_rows = static_cast<int64_t>(rows.caps.size());
    Digit digit = make_digit(ranking.low + 1, ranking.high - ranking.low - 1, n_rows);
    for (;;) {
        const int64_t n_bins = digit.n_bins();
        const std::vector<int64_t> counts = count_digits(ranking, rows, digit, n_threads);
        const int64_t bin = walk_down(counts, n_bins, ranking.weight, k, &rows, &rank.reached);
        ++rank.n_passes;
        if (bin < 0) {
            for (int64_t above : rows.above) rank.n += above;
            return rank;
        }
        const uint32_t start = static_cast<uint32_t>(bin) << digit.shift;
        if (digit.shift == 0) {
            rank.pattern = digit.first + start;
            for (size_t r = 0; r < rows.caps.size(); ++r) {
                const size_t at = r * static_cast<size_t>(n_bins) + static_cast<size_t>(bin);
                rank.n += rows.above[r] + counts[at] * ranking.weight;
            }
            return rank;
        }
        const uint32_t size = std::min(uint32_t{1} << digit.shift, digit.size - start);
        digit = make_digit(digit.first + start, size, n_rows);
    }
}

}  // namespace spt
