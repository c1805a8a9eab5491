// Runs independent pieces of work on a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace spt {

// Pieces of work that other threads begin at once, while the caller may still do something else.
//
// Which thread takes which piece is left to chance, so a piece must write only what no other piece
// writes (or add integers atomically): then the result has the same bits for any number of threads.
class ParallelRun {
  public:
    // `work(piece)` is called for every piece in 0..n_pieces-1, each once, on at most `n_threads`
    // threads, of which the caller's is one.
    ParallelRun(int64_t n_pieces, int n_threads, std::function<void(int64_t)> work)
        : n_pieces_(n_pieces), work_(std::move(work)) {
        const int64_t n_workers = std::min<int64_t>(n_pieces, std::max(n_threads, 1));
        if (n_workers <= 1) return;
        threads_.reserve(static_cast<size_t>(n_workers - 1));
        for (int64_t i = 1; i < n_workers; ++i) {
            try {
                threads_.emplace_back([this] { take_pieces(); });
            } catch (const std::system_error&) {
                break;  // the system grants no more threads: those that run share the work
            }
        }
    }
    ParallelRun(const ParallelRun&) = delete;
    ParallelRun& operator=(const ParallelRun&) = delete;
    ~ParallelRun() {
        next_ = n_pieces_;
        join();
    }

    // Takes part until all pieces are done; throws the first exception of a piece again.
    void finish() {
        take_pieces();
        join();
        if (failure_) std::rethrow_exception(failure_);
    }

  private:
    void take_pieces() {
        try {
            for (int64_t piece = next_++; piece < n_pieces_; piece = next_++) work_(piece);
        } catch (...) {
            next_ = n_pieces_;
            std::lock_guard<std::mutex> lock(failure_mutex_);
            if (!failure_) failure_ = std::current_exception();
        }
    }

    void join() {
        for (std::thread& thread : threads_) thread.join();
        threads_.clear();
    }

    const int64_t n_pieces_;
    const std::function<void(int64_t)> work_;
    std::atomic<int64_t> next_{0};
    std::exception_ptr failure_;
    std::mutex failure_mutex_;
    std::vector<std::thread> threads_;
};

// A `ParallelRun` that the caller waits for.
template <typename Work>
void parallel_for(int64_t n_pieces, int n_threads, Work&& work) {
    ParallelRun(n_pieces, n_threads, std::ref(work)).finish();
}

}  // namespace spt
