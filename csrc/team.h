// Runs one function on several threads at once.
#pragma once

namespace spt {

// Calls `work(data)` on the calling thread and on up to n_threads - 1 others, and returns when all
// calls have. There may be fewer calls than asked for, but always one; `work` must not throw.
void run_on_team(int n_threads, void (*work)(void*), void* data);

}  // namespace spt
