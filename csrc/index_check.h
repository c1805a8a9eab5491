// Proves that every position of an index lies inside its tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace spt {

// Throws std::invalid_argument unless 0 <= index[k] < numel for every k.
inline void check_index(const int32_t* index, int64_t nnz, int64_t numel, const std::string& name) {
    if (nnz == 0) return;
    int32_t lowest = index[0];
    int32_t highest = index[0];
    for (int64_t k = 1; k < nnz; ++k) {
        lowest = std::min(lowest, index[k]);
        highest = std::max(highest, index[k]);
    }
    if (lowest < 0 || highest >= numel) {
        throw std::invalid_argument(name + ": expected positions in 0.." +
                                    std::to_string(numel - 1) + ", got " +
                                    std::to_string(lowest < 0 ? lowest : highest));
    }
}

}  // namespace spt
