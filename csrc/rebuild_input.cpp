// Makes the output of a LayerNorm again from what its backward keeps.
#include "rebuild_input.h"

#include <algorithm>

#include "instruction_set.h"
#include "parallel.h"

namespace spt {
namespace {

constexpr int64_t kPiece = 1 << 15;  // elements: enough to pay for handing a piece to a thread

template <bool has_weight, bool has_bias, typename Out>
SPT_INLINE void write_row(const float* input, float mean, float rstd, const float* weight,
                          const float* bias, typename Out::type* output, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        float y = (input[i] - mean) * rstd;
        if (has_weight) y *= weight[i];
        if (has_bias) y += bias[i];
        output[i] = Out::round(y);
    }
}

template <typename Out>
SPT_INLINE void write_rows(const LayerNormRows& rows, int64_t begin, int64_t end) {
    const float *weight = rows.weight, *bias = rows.bias;
    const int64_t n = rows.n_columns;
    for (int64_t row = begin; row < end; ++row) {
        const float* input = rows.input + row * n;
        const float mean = rows.mean[row], rstd = rows.rstd[row];
        auto* output = static_cast<typename Out::type*>(rows.output) + row * n;
        if (weight && bias) {
            write_row<true, true, Out>(input, mean, rstd, weight, bias, output, n);
        } else if (weight) {
            write_row<true, false, Out>(input, mean, rstd, weight, bias, output, n);
        } else if (bias) {
            write_row<false, true, Out>(input, mean, rstd, weight, bias, output, n);
        } else {
            write_row<false, false, Out>(input, mean, rstd, weight, bias, output, n);
        }
    }
}

template <typename Out>
void write_rows_portable(const LayerNormRows& rows, int64_t begin, int64_t end) {
    write_rows<Out>(rows, begin, end);
}

#if SPT_X86
template <typename Out>
SPT_TARGET_AVX2 void write_rows_avx2(const LayerNormRows& rows, int64_t begin, int64_t end) {
    write_rows<Out>(rows, begin, end);
}
#endif

}  // namespace

void rebuild_layer_norm(const LayerNormRows& rows, int n_threads) {
    const int64_t rows_of_piece =
        std::max<int64_t>(1, kPiece / std::max<int64_t>(1, rows.n_columns));
    const int64_t n_pieces = (rows.n_rows + rows_of_piece - 1) / rows_of_piece;
    with_storage(rows.output_dtype, [&](auto storage) {
        using Out = decltype(storage);
        auto* write = &write_rows_portable<Out>;
#if SPT_X86
        if (instruction_set() >= InstructionSet::avx2) write = &write_rows_avx2<Out>;
#endif
        parallel_for(n_pieces, n_threads, [&](int64_t piece) {
            const int64_t begin = piece * rows_of_piece;
            write(rows, begin, std::min(begin + rows_of_piece, rows.n_rows));
        });
    });
}

}  // namespace spt
