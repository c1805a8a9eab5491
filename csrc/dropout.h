// Sets pseudo-random elements of a tensor to zero, chosen by a hash of their positions.
#pragma once

#include <cstdint>

namespace spt {

struct DropoutKey {
    uint32_t before;     // goes into the hash with the position
    uint32_t between;    // goes into it half-way
    uint32_t threshold;  // an element is kept if its hash is this or more
};

// output[i] = input[i] or 0, bit for bit, for elements of 2, 4 or 8 bytes; the two may be the same.
// The first element has the position `first`; positions count modulo 2^32.
//
// Throws std::invalid_argument for elements of another size.
void dropout(const void* input, void* output, int64_t n, int64_t element_size, int64_t first,
             const DropoutKey& key, int n_threads);

}  // namespace spt
