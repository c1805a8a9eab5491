// Hashes the bytes of many tensors to 128 bits each, as fast as memory gives them.
#pragma once

#include <cstdint>
#include <vector>

namespace spt {

// A tensor, of which the elements at `index` count as if they were those of `original`.
struct FingerprintInput {
    const void* data;  // [numel], contiguous
    int64_t numel;
    int64_t element_size;  // bytes: 1, 2, 4 or 8
    const int32_t* index;  // [nnz], sorted, unique
    const void* original;  // [nnz]
    int64_t nnz;
};

struct Fingerprint {
    uint64_t first = 0;
    uint64_t second = 0;
};

// The definition is in spt_kernels/reference/fingerprint.py.
//
// Throws std::invalid_argument if a position is out of range.
std::vector<Fingerprint> fingerprint(const std::vector<FingerprintInput>& inputs, int n_threads);

}  // namespace spt
