// Hashes the bytes of many tensors to 128 bits each, as fast as memory gives them.
#include "fingerprint.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>

#include "index_check.h"
#include "instruction_set.h"
#include "parallel.h"
#if SPT_X86
#    include <immintrin.h>
#endif

namespace spt {
namespace {

constexpr int64_t kWord = 8;                     // bytes
constexpr int64_t kPiece = 1 << 15;              // words: a piece fits the L2 cache
constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;  // between the keys of neighbouring words
constexpr int kRounds = 3;
constexpr uint64_t kFactors[kRounds] = {0x7feb352a, 0x6c8e9cf6, 0x5851f42e};
constexpr uint64_t kLastFactor = 0x7a1d1b36;

SPT_INLINE uint64_t mixed(uint64_t x, uint64_t factor) {
    return x ^ (x & 0xffffffffu) * factor;
}

SPT_INLINE void add_word(uint64_t word, int64_t position, Fingerprint* sum) {
    uint64_t x = word + (static_cast<uint64_t>(position) + 1) * kStep;
    for (uint64_t factor : kFactors) {
        x = mixed(x, factor);
        x = x << 32 | x >> 32;
    }
    sum->first += x;
    sum->second += mixed(x, kLastFactor);
}

// The last word may reach beyond the end, where it is zero.
uint64_t load_word(const FingerprintInput& input, int64_t position) {
    const int64_t begin = position * kWord;
    const int64_t n_bytes = std::min(kWord, input.numel * input.element_size - begin);
    uint64_t word = 0;
    std::memcpy(&word, static_cast<const char*>(input.data) + begin, static_cast<size_t>(n_bytes));
    return word;
}

// The words [begin, end) that lie within the tensor as a whole.
Fingerprint hash_portable(const void* data, int64_t begin, int64_t end) {
    Fingerprint sum;
    for (int64_t i = begin; i < end; ++i) {
        uint64_t word;
        std::memcpy(&word, static_cast<const char*>(data) + i * kWord, kWord);
        add_word(word, i, &sum);
    }
    return sum;
}

#if SPT_X86

SPT_TARGET_AVX2 inline __m256i mixed(__m256i x, uint64_t factor) {
    const __m256i factors = _mm256_set1_epi64x(static_cast<int64_t>(factor));
    return _mm256_xor_si256(x, _mm256_mul_epu32(x, factors));
}

SPT_TARGET_AVX2 Fingerprint hash_avx2(const void* data, int64_t begin, int64_t end) {
    const uint64_t first_key = (static_cast<uint64_t>(begin) + 1) * kStep;
    __m256i keys = _mm256_setr_epi64x(
        static_cast<int64_t>(first_key), static_cast<int64_t>(first_key + kStep),
        static_cast<int64_t>(first_key + 2 * kStep), static_cast<int64_t>(first_key + 3 * kStep));
    const __m256i step = _mm256_set1_epi64x(static_cast<int64_t>(4 * kStep));
    __m256i first = _mm256_setzero_si256();
    __m256i second = _mm256_setzero_si256();
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
        const char* from = static_cast<const char*>(data) + i * kWord;
        __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        x = _mm256_add_epi64(x, keys);
        keys = _mm256_add_epi64(keys, step);
        for (int round = 0; round < kRounds; ++round) {
            x = mixed(x, kFactors[round]);
            x = _mm256_shuffle_epi32(x, _MM_SHUFFLE(2, 3, 0, 1));  // the two halves of each word
        }
        first = _mm256_add_epi64(first, x);
        second = _mm256_add_epi64(second, mixed(x, kLastFactor));
    }
    Fingerprint sum = hash_portable(data, i, end);
    alignas(32) uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), first);
    for (uint64_t lane : lanes) sum.first += lane;
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), second);
    for (uint64_t lane : lanes) sum.second += lane;
    return sum;
}

#endif  // SPT_X86

// Replaces, in the sum over the words [begin, end), those that hold positions of the index by what
// they are with the originals in place.
void patch(const FingerprintInput& input, int64_t begin, int64_t end, Fingerprint* sum) {
    const int64_t per_word = kWord / input.element_size;
    const int32_t* last = input.index + input.nnz;
    const int32_t* next = std::lower_bound(input.index, last, begin * per_word);
    while (next < last && *next < end * per_word) {
        const int64_t position = *next / per_word;
        uint64_t word = load_word(input, position);
        Fingerprint removed;
        add_word(word, position, &removed);
        for (; next < last && *next / per_word == position; ++next) {
            const int64_t within = (*next % per_word) * input.element_size;
            std::memcpy(reinterpret_cast<char*>(&word) + within,
                        static_cast<const char*>(input.original) +
                            (next - input.index) * input.element_size,
                        static_cast<size_t>(input.element_size));
        }
        add_word(word, position, sum);
        sum->first -= removed.first;
        sum->second -= removed.second;
    }
}

}  // namespace

std::vector<Fingerprint> fingerprint(const std::vector<FingerprintInput>& inputs, int n_threads) {
    auto* hash = &hash_portable;
#if SPT_X86
    if (instruction_set() >= InstructionSet::avx2) hash = &hash_avx2;
#endif
    struct Piece {
        size_t input;
        int64_t begin, end;
    };
    std::vector<Piece> pieces;
    for (size_t m = 0; m < inputs.size(); ++m) {
        const FingerprintInput& input = inputs[m];
        check_index(input.index, input.nnz, input.numel, "indices[" + std::to_string(m) + "]");
        const int64_t n_words = (input.numel * input.element_size + kWord - 1) / kWord;
        for (int64_t i = 0; i < n_words; i += kPiece) {
            pieces.push_back({m, i, std::min(i + kPiece, n_words)});
        }
    }

    // sums of integers, which have the same bits in any order
    const size_t n = inputs.size();
    const auto sums = std::make_unique<std::atomic<uint64_t>[]>(2 * n);
    parallel_for(static_cast<int64_t>(pieces.size()), n_threads, [&](int64_t i) {
        const Piece& piece = pieces[static_cast<size_t>(i)];
        const FingerprintInput& input = inputs[piece.input];
        const int64_t n_whole = input.numel * input.element_size / kWord;
        Fingerprint sum = hash(input.data, piece.begin, std::min(piece.end, n_whole));
        if (piece.end > n_whole) add_word(load_word(input, n_whole), n_whole, &sum);
        patch(input, piece.begin, piece.end, &sum);  // while the piece is in the cache
        sums[2 * piece.input].fetch_add(sum.first, std::memory_order_relaxed);
        sums[2 * piece.input + 1].fetch_add(sum.second, std::memory_order_relaxed);
    });

    std::vector<Fingerprint> found(n);
    for (size_t m = 0; m < n; ++m) found[m] = {sums[2 * m], sums[2 * m + 1]};
    return found;
}

}  // namespace spt
