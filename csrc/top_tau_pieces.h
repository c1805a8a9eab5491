// The runs of scores that top-tau works on, and how threads share them out.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "dtype.h"
#include "parallel.h"

namespace spt {

// A run of consecutive scores of one tensor, or of those that a filter has left of it.
//
// A score is ranked by its fp32 bit pattern: non-negative floats order as their patterns do. As
// signed numbers, patterns of scores are positive, and those of negative floats and -0.0 negative.
struct ScorePiece {
    const void* data;
    DType dtype;  // fp32 or bf16
    int64_t n;
    int64_t tensor;
    int64_t base;  // position in the tensor of the first one

    // Calls `visit` with a function from offset to bit pattern.
    template <typename Visit>
    void with_patterns(Visit&& visit) const {
        if (dtype == DType::bf16) {
            const uint16_t* halves = static_cast<const uint16_t*>(data);
            visit([halves](int64_t i) { return static_cast<uint32_t>(halves[i]) << 16; });
        } else {
            const uint32_t* words = static_cast<const uint32_t*>(data);
            visit([words](int64_t i) { return words[i]; });
        }
    }

    int64_t n_bytes() const { return n * (dtype == DType::bf16 ? 2 : 4); }
};

constexpr uint32_t kInfinity = 0x7f800000u;

inline bool is_score(uint32_t pattern) {
    return pattern < kInfinity || pattern == 0x80000000u;  // -0.0 is a zero
}

struct ScoreTensor {
    const void* data;
    DType dtype;  // fp32 or bf16
    int64_t numel;
    int64_t cap;  // the most that this tensor counts for
};

// Some pieces that one thread works on; the first two are of equal length if `paired`.
struct PieceTask {
    size_t first;
    size_t last;
    bool paired;
};

// All scores that are ranked, cut into pieces.
struct Scores {
    std::vector<ScorePiece> pieces;  // by tensor, then by position
    std::vector<PieceTask> tasks;
    std::vector<int64_t> caps;  // INT64_MAX for a tensor that counts whole
    int64_t n = 0;

    explicit Scores(const std::vector<ScoreTensor>& tensors);

    template <typename Work>
    void for_tasks(int n_threads, Work&& work) const {
        parallel_for(static_cast<int64_t>(tasks.size()), n_threads,
                     [&](int64_t i) { work(tasks[static_cast<size_t>(i)]); });
    }
};

// Calls `work(worker, i)` for every i in 0..n-1; what a worker owns is touched by one thread only.
template <typename Work>
void parallel_for_workers(int64_t n, int n_workers, Work&& work) {
    std::atomic<int64_t> next{0};
    parallel_for(n_workers, n_workers, [&](int64_t worker) {
        for (int64_t i = next++; i < n; i = next++) work(worker, i);
    });
}

}  // namespace spt
