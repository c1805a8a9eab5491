// Proves that every position of an index lies inside its tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "instruction_set.h"

namespace spt {

// Whether 0 <= index[k] < numel for every k, where numel is at most 2^31.
SPT_INLINE bool index_fits(const int32_t* index, int64_t nnz, int64_t numel) {
    uint32_t highest = 0;  // of all positions without their sign: a negative one is beyond 2^31
    for (int64_t k = 0; k < nnz; ++k) {
        highest = std::max(highest, static_cast<uint32_t>(index[k]));
    }
    return nnz == 0 || highest < numel;
}

// Throws std::invalid_argument unless `index_fits`.
inline void check_index(const int32_t* index, int64_t nnz, int64_t numel, const std::string& name) {
    if (!index_fits(index, nnz, numel)) {
        const int32_t lowest = *std::min_element(index, index + nnz);
        const int32_t highest = *std::max_element(index, index + nnz);
        throw std::invalid_argument(name + ": expected positions in 0.." +
                                    std::to_string(numel - 1) + ", got " +
                                    std::to_string(lowest < 0 ? lowest : highest));
    }
}

}  // namespace spt
