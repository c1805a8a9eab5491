// Writes original + delta, or the originals alone, into the touched positions of many tensors.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace spt {

struct DeltaWrite {
    DType dtype;   // of target and original
    void* target;  // [numel], written at index
    int64_t numel;
    const int32_t* index;  // [nnz], unique
    const void* original;  // [nnz]
    const float* delta;    // [nnz], or null: restore the originals bit for bit
    int64_t nnz;
};

// Throws std::invalid_argument, before anything is written, if an index is not usable.
void write_delta(const std::vector<DeltaWrite>& writes, int n_threads);

}  // namespace spt
