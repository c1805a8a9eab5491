// Selects the largest scores over a list of tensors that are never joined.
//
// A sample guesses a pivot that a few more than the wanted scores exceed; one pass over everything
// keeps those; the exact selection then sees only them. Where the guess cannot work (ties or caps
// make the selection large, or the margin was too small) the exact selection runs on everything.
#include "top_tau.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "stochastic_rounding.h"
#include "top_tau_exact.h"
#include "top_tau_filter.h"

namespace spt {
namespace {

constexpr int64_t kPiece = 1 << 17;           // scores: half a megabyte, many per thread
constexpr int64_t kWorthFiltering = 1 << 18;  // scores: below this the exact passes take no time
constexpr int64_t kSamples = 1 << 17;

std::vector<ScorePiece> cut(const std::vector<ScoreTensor>& tensors) {
    std::vector<ScorePiece> pieces;
    for (size_t m = 0; m < tensors.size(); ++m) {
        const int64_t width = tensors[m].dtype == DType::bf16 ? 2 : 4;
        const char* data = static_cast<const char*>(tensors[m].data);
        for (int64_t i = 0; i < tensors[m].numel; i += kPiece) {
            pieces.push_back({data + i * width, tensors[m].dtype,
                              std::min(kPiece, tensors[m].numel - i), static_cast<int64_t>(m), i,
                              nullptr});
        }
    }
    return pieces;
}

uint32_t pattern_at(const ScorePiece& piece, int64_t i) {
    if (piece.dtype == DType::bf16) {
        return static_cast<uint32_t>(static_cast<const uint16_t*>(piece.data)[i]) << 16;
    }
    return static_cast<const uint32_t*>(piece.data)[i];
}

// A pattern that somewhat more than k counted scores are expected to reach; 0: there is none.
uint32_t guess_pivot(const std::vector<ScorePiece>& pieces, const std::vector<int64_t>& caps,
                     int64_t n_scores, int64_t k, double n_deviations, int n_threads) {
    const int64_t stride = std::max<int64_t>(n_scores / kSamples, 1);
    std::vector<std::vector<uint32_t>> samples(pieces.size());
    parallel_for(static_cast<int64_t>(pieces.size()), n_threads, [&](int64_t p) {
        const ScorePiece& piece = pieces[static_cast<size_t>(p)];
        std::vector<uint32_t>& sample = samples[static_cast<size_t>(p)];
        sample.reserve(static_cast<size_t>(piece.n / stride + 1));
        for (int64_t i = 0; i < piece.n; i += stride) {
            // one score at random of each stride: a fixed step could follow a column of a matrix
            const uint32_t random = mix(static_cast<uint32_t>(p * kPiece + i));
            const int64_t at = i + static_cast<int64_t>(random % static_cast<uint64_t>(stride));
            if (at >= piece.n) continue;
            const uint32_t pattern = pattern_at(piece, at);
            // what is not a score will be found by the pass over everything
            if (pattern < 0x7f800000u) sample.push_back(pattern);
        }
    });

    std::vector<ScorePiece> sampled;
    for (size_t p = 0; p < pieces.size(); ++p) {
        if (samples[p].empty()) continue;
        sampled.push_back({samples[p].data(), DType::fp32, static_cast<int64_t>(samples[p].size()),
                           pieces[p].tensor, 0, nullptr});
    }
    std::vector<int64_t> sampled_caps;
    for (int64_t cap : caps) sampled_caps.push_back(cap / stride + (cap % stride != 0));

    const double expected = static_cast<double>(k) / static_cast<double>(stride);
    const double wanted = expected + n_deviations * (std::sqrt(expected) + 3.0);
    Threshold threshold{};
    std::vector<uint8_t> invalid(caps.size(), 0);
    find_threshold(sampled, sampled_caps, static_cast<int64_t>(wanted) + 1, n_threads, &threshold,
                   &invalid);
    return threshold.pattern;
}

struct Candidates {
    std::vector<FilteredPiece> storage;
    std::vector<ScorePiece> pieces;
    bool complete = false;  // they hold the whole selection
    bool too_many = false;  // for the memory we are willing to take
};

Candidates filter_all(const std::vector<ScorePiece>& pieces, const std::vector<int64_t>& caps,
                      int64_t k, uint32_t pivot, int64_t limit, int n_threads,
                      std::vector<uint8_t>* invalid) {
    Candidates candidates;
    candidates.storage.resize(pieces.size());
    std::atomic<int64_t> n_kept{0};
    parallel_for(static_cast<int64_t>(pieces.size()), n_threads, [&](int64_t i) {
        if (n_kept.load(std::memory_order_relaxed) > limit) return;
        FilteredPiece& kept = candidates.storage[static_cast<size_t>(i)];
        kept = filter(pieces[static_cast<size_t>(i)], pivot);
        n_kept.fetch_add(static_cast<int64_t>(kept.offsets.size()), std::memory_order_relaxed);
    });
    if (n_kept > limit) {
        candidates.too_many = true;
        return candidates;
    }

    std::vector<int64_t> count(caps.size(), 0);
    for (size_t p = 0; p < pieces.size(); ++p) {
        const FilteredPiece& kept = candidates.storage[p];
        const size_t tensor = static_cast<size_t>(pieces[p].tensor);
        if (kept.negative) (*invalid)[tensor] = 1;
        if (kept.offsets.empty()) continue;
        count[tensor] += static_cast<int64_t>(kept.offsets.size());
        candidates.pieces.push_back({kept.patterns.data(), DType::fp32,
                                     static_cast<int64_t>(kept.offsets.size()), pieces[p].tensor,
                                     pieces[p].base, kept.offsets.data()});
    }
    int64_t reached = 0;
    for (size_t m = 0; m < caps.size(); ++m) reached += std::min(count[m], caps[m]);
    candidates.complete = reached >= k;
    return candidates;
}

[[noreturn]] void throw_invalid(const std::vector<ScorePiece>& pieces,
                                const std::vector<uint8_t>& invalid) {
    for (const ScorePiece& piece : pieces) {
        if (!invalid[static_cast<size_t>(piece.tensor)]) continue;
        for (int64_t i = 0; i < piece.n; ++i) {
            const uint32_t pattern = pattern_at(piece, i);
            if (pattern < 0x7f800000u || pattern == 0x80000000u) continue;
            throw std::invalid_argument("tensors[" + std::to_string(piece.tensor) +
                                        "]: expected finite scores of at least 0, got " +
                                        std::to_string(float_of(pattern)) + " at flat position " +
                                        std::to_string(piece.base + i));
        }
    }
    throw std::logic_error("no invalid score in a tensor that was marked invalid");
}

std::vector<std::vector<int64_t>> select(const std::vector<ScorePiece>& searched,
                                         const std::vector<ScorePiece>& all,
                                         const std::vector<int64_t>& caps, int64_t k, int n_threads,
                                         std::vector<uint8_t> invalid) {
    Threshold threshold{};
    const int64_t reachable = find_threshold(searched, caps, k, n_threads, &threshold, &invalid);
    if (std::find(invalid.begin(), invalid.end(), 1) != invalid.end()) throw_invalid(all, invalid);
    if (reachable < k) {
        throw std::invalid_argument(
            "k is " + std::to_string(k) + ", but only " + std::to_string(reachable) +
            " positive scores can be counted in " + std::to_string(caps.size()) + " tensors");
    }
    if (k < 1) return std::vector<std::vector<int64_t>>(caps.size());
    return collect(searched, threshold, n_threads);
}

}  // namespace

std::vector<std::vector<int64_t>> top_tau(const std::vector<ScoreTensor>& tensors, int64_t k,
                                          int n_threads) {
    const std::vector<ScorePiece> pieces = cut(tensors);
    std::vector<int64_t> caps;
    int64_t n_scores = 0;
    for (const ScoreTensor& tensor : tensors) {
        caps.push_back(std::min(tensor.cap, tensor.numel));
        n_scores += tensor.numel;
    }

    // a cautious second guess costs another pass, the exact selection six
    const int64_t limit = n_scores / 8;
    for (double n_deviations : {5.0, 30.0}) {
        if (n_scores < kWorthFiltering || k < 1 || k > limit / 2) break;
        const uint32_t pivot = guess_pivot(pieces, caps, n_scores, k, n_deviations, n_threads);
        if (pivot == 0) break;
        std::vector<uint8_t> invalid(tensors.size(), 0);
        const Candidates candidates =
            filter_all(pieces, caps, k, pivot, limit, n_threads, &invalid);
        if (candidates.complete) {
            return select(candidates.pieces, pieces, caps, k, n_threads, invalid);
        }
        if (candidates.too_many) break;
    }
    return select(pieces, pieces, caps, k, n_threads, std::vector<uint8_t>(tensors.size(), 0));
}

}  // namespace spt
