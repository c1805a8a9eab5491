// Runs one function on several threads at once.
//
// Where PyTorch brought an OpenMP runtime into the process, its threads are used: between two of
// PyTorch's operations they wait in a busy loop, and threads of our own would have to share the
// processors with them.
#include "team.h"

#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#    include <dlfcn.h>
#    include <pthread.h>
#endif

namespace spt {
namespace {

// What compilers call for `#pragma omp parallel`; LLVM's and Intel's runtimes have it too.
using StartTeam = void (*)(void (*work)(void*), void* data, unsigned n_threads, unsigned flags);

// A forked process has none of its parent's threads, for which GCC's OpenMP would wait forever.
// They may have been started by PyTorch alone: forks are watched for from when this is loaded.
bool is_forked = false;
#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
#endif

StartTeam find_openmp() {
#if defined(__unix__) || defined(__APPLE__)
    return reinterpret_cast<StartTeam>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

void run_on_own_threads(int n_threads, void (*work)(void*), void* data) {
    std::vector<std::thread> threads;
    threads.reserve(static_cast<size_t>(n_threads - 1));
    for (int i = 1; i < n_threads; ++i) {
        try {
            threads.emplace_back(work, data);
        } catch (const std::system_error&) {
            break;  // the system grants no more threads: those that run share the work
        }
    }
    work(data);
    for (std::thread& thread : threads) thread.join();
}

}  // namespace

void run_on_team(int n_threads, void (*work)(void*), void* data) {
    static const StartTeam start_team = find_openmp();
    if (start_team != nullptr && !is_forked) {
        start_team(work, data, static_cast<unsigned>(n_threads), 0);
    } else {
        run_on_own_threads(n_threads, work, data);
    }
}

}  // namespace spt
