// Takes the wanted entries out of a block of a dense weight gradient.
#include "weight_grad_sample.h"

#include <algorithm>
#include <stdexcept>

#include "instruction_set.h"
#include "parallel.h"
#if SPT_X86
#    include <immintrin.h>
#endif

namespace spt {
namespace {

constexpr int64_t kPieceRows = 32;
constexpr int64_t kFewEntries = 1 << 14;

// grad[k] = cells[index[k] - begin]; whether every one was among the n cells. One that is not reads
// the last cell.
SPT_INLINE bool take_plain(const float* cells, int32_t n, const int32_t* index, int32_t begin,
                           int64_t n_entries, float* grad) {
    bool inside = true;
    for (int64_t k = 0; k < n_entries; ++k) {
        const uint32_t wanted = static_cast<uint32_t>(index[k]) - static_cast<uint32_t>(begin);
        const uint32_t found = std::min(wanted, static_cast<uint32_t>(n - 1));
        grad[k] = cells[found];
        inside &= wanted == found;
    }
    return inside;
}

#if SPT_X86
SPT_TARGET_AVX2 bool take_avx2(const float* cells, int32_t n, const int32_t* index, int32_t begin,
                               int64_t n_entries, float* grad) {
    const __m256i first = _mm256_set1_epi32(begin);
    const __m256i last = _mm256_set1_epi32(n - 1);
    __m256i inside = _mm256_set1_epi32(-1);
    int64_t k = 0;
    for (; k + 8 <= n_entries; k += 8) {
        const __m256i position = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + k));
        const __m256i wanted = _mm256_sub_epi32(position, first);
        const __m256i found = _mm256_min_epu32(wanted, last);
        inside = _mm256_and_si256(inside, _mm256_cmpeq_epi32(wanted, found));
        _mm256_storeu_ps(grad + k, _mm256_i32gather_ps(cells, found, 4));
    }
    return _mm256_movemask_epi8(inside) == -1 &&
           take_plain(cells, n, index + k, begin, n_entries - k, grad + k);
}
#endif

bool take(const float* cells, int32_t n, const int32_t* index, int32_t begin, int64_t n_entries,
          float* grad) {
#if SPT_X86
    if (instruction_set() >= InstructionSet::avx2) {
        return take_avx2(cells, n, index, begin, n_entries, grad);
    }
#endif
    return take_plain(cells, n, index, begin, n_entries, grad);
}

void sample_row(const SampledBlock& block, int64_t row) {
    const int64_t begin = row * block.in_features + block.first_column;
    const int64_t first = block.next[row];
    int64_t last = block.row_begin[row + 1];
    if (block.first_column + block.n_columns < block.in_features) {
        const int64_t stop = begin + block.n_columns;
        last = std::lower_bound(block.index + first, block.index + last, stop) - block.index;
    }
    block.next[row] = static_cast<int32_t>(last);
    if (!take(block.cells + (row - block.first_row) * block.n_columns,
              static_cast<int32_t>(block.n_columns), block.index + first,
              static_cast<int32_t>(begin), last - first, block.grad + first)) {
        throw std::invalid_argument("index: expected the positions that row_begin was made from");
    }
}

}  // namespace

void sample_block(const SampledBlock& block, int n_threads) {
    const int64_t n_pieces = (block.n_rows + kPieceRows - 1) / kPieceRows;
    // so few entries are taken sooner than a second thread is woken
    const int64_t n_entries =
        block.row_begin[block.first_row + block.n_rows] - block.row_begin[block.first_row];
    parallel_for(n_pieces, n_entries < kFewEntries ? 1 : n_threads, [&](int64_t piece) {
        const int64_t first = piece * kPieceRows;
        const int64_t last = std::min(first + kPieceRows, block.n_rows);
        for (int64_t row = first; row < last; ++row) sample_row(block, block.first_row + row);
    });
}

}  // namespace spt
