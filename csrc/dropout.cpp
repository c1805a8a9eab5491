// Sets pseudo-random elements of a tensor to zero, chosen by a hash of their positions.
#include "dropout.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "instruction_set.h"
#include "parallel.h"

namespace spt {
namespace {

constexpr int64_t kPiece = 1 << 16;  // elements: enough to pay for handing a piece to a thread

// The finaliser "lowbias32" with the second word of the key in its middle: with one word in front
// alone, the masks of two seeds would be the same mask with its elements in another order.
SPT_INLINE uint32_t hash(uint32_t position, const DropoutKey& key) {
    uint32_t x = position ^ key.before;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x ^= key.between;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

template <typename T>
SPT_INLINE void drop(const T* input, T* output, int64_t n, uint32_t first, DropoutKey key) {
    for (int64_t i = 0; i < n; ++i) {
        const T value = input[i];
        output[i] = hash(first + static_cast<uint32_t>(i), key) >= key.threshold ? value : T{0};
    }
}

template <typename T>
void drop_portable(const T* input, T* output, int64_t n, uint32_t first, const DropoutKey& key) {
    drop(input, output, n, first, key);
}

#if SPT_X86
template <typename T>
SPT_TARGET_AVX2 void drop_avx2(const T* input, T* output, int64_t n, uint32_t first,
                               const DropoutKey& key) {
    drop(input, output, n, first, key);
}
#endif

template <typename T>
void drop_all(const void* input, void* output, int64_t n, int64_t first, const DropoutKey& key,
              int n_threads) {
    auto* drop_piece = &drop_portable<T>;
#if SPT_X86
    if (instruction_set() >= InstructionSet::avx2) drop_piece = &drop_avx2<T>;
#endif
    parallel_for((n + kPiece - 1) / kPiece, n_threads, [&](int64_t piece) {
        const int64_t begin = piece * kPiece;
        drop_piece(static_cast<const T*>(input) + begin, static_cast<T*>(output) + begin,
                   std::min(kPiece, n - begin), static_cast<uint32_t>(first + begin), key);
    });
}

}  // namespace

void dropout(const void* input, void* output, int64_t n, int64_t element_size, int64_t first,
             const DropoutKey& key, int n_threads) {
    switch (element_size) {
        case 2:
            return drop_all<uint16_t>(input, output, n, first, key, n_threads);
        case 4:
            return drop_all<uint32_t>(input, output, n, first, key, n_threads);
        case 8:
            return drop_all<uint64_t>(input, output, n, first, key, n_threads);
        default:
            throw std::invalid_argument("expected elements of 2, 4 or 8 bytes, got " +
                                        std::to_string(element_size));
    }
}

}  // namespace spt
