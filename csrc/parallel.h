// Runs independent pieces of work on a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

#include "team.h"

namespace spt {

// Calls `work(piece)` for every piece in 0..n_pieces-1, each once, on at most `n_threads` threads.
//
// Which thread takes which piece is left to chance, so a piece must write only what no other piece
// writes (or add integers atomically): then the result has the same bits for any number of threads.
// The first exception of a piece is thrown again here once all threads are done.
template <typename Work>
void parallel_for(int64_t n_pieces, int n_threads, Work&& work) {
    const int64_t n_workers = std::min<int64_t>(n_pieces, std::max(n_threads, 1));
    if (n_workers <= 1) {
        for (int64_t piece = 0; piece < n_pieces; ++piece) work(piece);
        return;
    }

    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex failure_mutex;
    auto worker = [&] {
        try {
            for (int64_t piece = next++; piece < n_pieces; piece = next++) work(piece);
        } catch (...) {
            next = n_pieces;
            std::lock_guard<std::mutex> lock(failure_mutex);
            if (!failure) failure = std::current_exception();
        }
    };

    using Worker = decltype(worker);
    run_on_team(
        static_cast<int>(n_workers), [](void* data) { (*static_cast<Worker*>(data))(); }, &worker);
    if (failure) std::rethrow_exception(failure);
}

}  // namespace spt
