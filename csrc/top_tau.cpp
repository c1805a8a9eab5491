// Selects the largest scores over a list of tensors that are never joined.
//
// A sample guesses between which scores the last selected one lies; one pass over everything keeps
// what lies between them and counts the rest; the exact rank is then found among what was kept.
// Where the guess cannot work (caps that bind in thousands of small tensors mislead a sample) the
// rank is found by passes over everything.
#include "top_tau.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "top_tau_filter.h"
#include "top_tau_guess.h"
#include "top_tau_rank.h"

namespace spt {
namespace {

constexpr int64_t kWorthGuessing = 1 << 18;  // scores: below this keeping everything takes no time

[[noreturn]] void throw_invalid(const ScorePiece& piece) {
    piece.with_patterns([&](auto pattern_at) {
        for (int64_t i = 0; i < piece.n; ++i) {
            if (is_score(pattern_at(i))) continue;
            throw std::invalid_argument("tensors[" + std::to_string(piece.tensor) +
                                        "]: expected finite scores of at least 0, got " +
                                        std::to_string(float_of(pattern_at(i))) +
                                        " at flat position " + std::to_string(piece.base + i));
        }
    });
    throw std::logic_error("no invalid score in a piece that was marked invalid");
}

// One pass over everything. Empty if more would have to be kept than is worth the memory.
std::vector<Census> take_census(const Scores& scores, const Bracket& bracket, int n_threads) {
    std::vector<Census> census(scores.pieces.size());
    const int64_t limit = std::max(scores.n / 8, kWorthGuessing);
    std::atomic<int64_t> n_kept{0};
    scores.for_tasks(n_threads, [&](const PieceTask& task) {
        if (n_kept.load(std::memory_order_relaxed) > limit) return;
        size_t p = task.first;
        if (task.paired && !bracket.counted) {
            keep_above(scores.pieces[p], scores.pieces[p + 1], bracket.low, &census[p],
                       &census[p + 1]);
            p += 2;
        }
        for (; p < task.last; ++p) {
            census[p] = bracket.counted ? keep_between(scores.pieces[p], bracket.low, bracket.high)
                                        : keep_above(scores.pieces[p], bracket.low);
        }
        int64_t n = 0;
        for (p = task.first; p < task.last; ++p) {
            uint32_t largest = 0;
            for (uint32_t pattern : census[p].kept.patterns) largest = std::max(largest, pattern);
            census[p].invalid |= largest >= kInfinity;
            n += static_cast<int64_t>(census[p].kept.patterns.size());
        }
        n_kept.fetch_add(n, std::memory_order_relaxed);
    });
    if (n_kept > limit) census.clear();
    for (size_t p = 0; p < census.size(); ++p) {
        if (census[p].invalid) throw_invalid(scores.pieces[p]);
    }
    return census;
}

std::vector<int64_t> sum_by_tensor(const Scores& scores, const std::vector<Part>& parts,
                                   bool with_ties) {
    std::vector<int64_t> sum(scores.caps.size());
    for (size_t p = 0; p < parts.size(); ++p) {
        sum[static_cast<size_t>(scores.pieces[p].tensor)] +=
            parts[p].n_above + (with_ties ? parts[p].n_at : 0);
    }
    return sum;
}

// What scores at and above a threshold count for, by tensor.
int64_t counted(const Scores& scores, const std::vector<int64_t>& selected) {
    int64_t sum = 0;
    for (size_t m = 0; m < scores.caps.size(); ++m) sum += std::min(selected[m], scores.caps[m]);
    return sum;
}

// What is above the threshold and at it, of each piece, if that lies below the bracket's high end.
void count_parts(const Scores& scores, const Bracket& bracket, int n_threads, Selection* found) {
    scores.for_tasks(n_threads, [&](const PieceTask& task) {
        for (size_t p = task.first; p < task.last; ++p) {
            const Census& census = found->census[p];
            int64_t above = 0;
            int64_t at = 0;
            for (uint32_t pattern : census.kept.patterns) {
                above += pattern > found->threshold;
                at += pattern == found->threshold;
            }
            if (found->threshold == bracket.low) at = census.at_low;
            found->parts[p] = {census.above + census.at_high + above, at, 0};
        }
    });
}

[[noreturn]] void throw_too_large(int64_t k, int64_t reached, size_t n_tensors) {
    throw std::invalid_argument("k is " + std::to_string(k) + ", but only " +
                                std::to_string(reached) + " positive scores can be counted in " +
                                std::to_string(n_tensors) + " tensors");
}

// Sets the threshold and the parts but for the ties. Returns whether it lies in the bracket.
bool find_threshold(const Scores& scores, const Bracket& bracket, int64_t k, int n_threads,
                    Selection* found) {
    const std::vector<Census>& census = found->census;
    std::vector<ScorePiece> kept;
    for (size_t p = 0; p < census.size(); ++p) {
        found->parts[p] = {census[p].above, census[p].at_high, 0};
        const std::vector<uint32_t>& patterns = census[p].kept.patterns;
        if (patterns.empty()) continue;
        kept.push_back({patterns.data(), DType::fp32, static_cast<int64_t>(patterns.size()),
                        scores.pieces[p].tensor, 0});
    }
    if (counted(scores, sum_by_tensor(scores, found->parts, false)) >= k) return false;
    const std::vector<int64_t> from_high = sum_by_tensor(scores, found->parts, true);
    found->threshold = bracket.high;
    if (counted(scores, from_high) >= k) return true;

    const Rank rank =
        find_rank({kept, scores.caps, from_high, 1, bracket.low, bracket.high}, k, n_threads);
    if (rank.pattern == 0 && bracket.low == 0) {
        throw_too_large(k, rank.reached, scores.caps.size());
    }
    found->threshold = rank.pattern != 0 ? rank.pattern : bracket.low;
    count_parts(scores, bracket, n_threads, found);
    return counted(scores, sum_by_tensor(scores, found->parts, true)) >= k;
}

// Ties are ranked by tensor and position: grants them in that order until k is counted.
void grant_ties(const Scores& scores, int64_t k, Selection* found) {
    const std::vector<int64_t> above = sum_by_tensor(scores, found->parts, false);
    const std::vector<int64_t> from = sum_by_tensor(scores, found->parts, true);
    int64_t missing = k - counted(scores, above);
    std::vector<int64_t> ties(above.size());
    for (size_t m = 0; m < ties.size() && missing > 0; ++m) {
        const int64_t gain = std::min(from[m], scores.caps[m]) - std::min(above[m], scores.caps[m]);
        // a tensor at its cap has its ties selected all the same if the ranking goes on beyond them
        ties[m] = gain < missing ? from[m] - above[m] : missing;
        missing -= std::min(gain, missing);
    }
    for (size_t p = 0; p < found->parts.size(); ++p) {
        int64_t& left = ties[static_cast<size_t>(scores.pieces[p].tensor)];
        found->parts[p].n_ties = std::min(found->parts[p].n_at, left);
        left -= found->parts[p].n_ties;
    }
}

// Returns whether the last selected score lies in the bracket; `found` then holds everything.
bool select(const Scores& scores, const Bracket& bracket, int64_t k, int n_threads,
            Selection* found) {
    found->census = take_census(scores, bracket, n_threads);
    if (found->census.size() < scores.pieces.size()) return false;
    found->parts.assign(scores.pieces.size(), Part{});
    found->all_kept = !bracket.counted;
    if (k > 0) {
        if (!find_threshold(scores, bracket, k, n_threads, found)) return false;
        grant_ties(scores, k, found);
    }
    found->pieces = scores.pieces;
    return true;
}

}  // namespace

Selection top_tau(const std::vector<ScoreTensor>& tensors, int64_t k, int n_threads,
                  int64_t* bytes_read) {
    const Scores scores(tensors);
    int64_t n_bytes = 0;
    for (const ScorePiece& piece : scores.pieces) n_bytes += piece.n_bytes();
    Selection found;
    if (scores.n < kWorthGuessing) {
        *bytes_read += n_bytes;
        select(scores, {0, kInfinity, false}, k, n_threads, &found);
        return found;
    }
    for (double n_deviations : {5.0, 30.0}) {
        const Bracket guess = guess_bracket(scores.pieces, scores.caps, scores.n, k, n_deviations,
                                            n_threads, bytes_read);
        *bytes_read += n_bytes;
        if (select(scores, guess, k, n_threads, &found)) return found;
    }
    const std::vector<int64_t> none(scores.caps.size());
    const Rank rank = find_rank({scores.pieces, scores.caps, none, 1, 0, kInfinity}, k, n_threads);
    *bytes_read += (1 + rank.n_passes) * n_bytes;
    select(scores, {rank.pattern, rank.pattern + 1, true}, k, n_threads, &found);
    return found;
}

}  // namespace spt
