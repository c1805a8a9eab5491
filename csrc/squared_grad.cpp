// The sum over samples of the squared weight gradient of each.
//
// The input of a few samples is packed for all threads; then each thread takes rows of the score,
// packs their output gradients sample by sample and multiplies tile by tile. A tile of one sample's
// gradient is squared in registers as soon as its last token is in: no gradient is ever in memory.
#include "squared_grad.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.h"
#include "parallel.h"
#include "weight_grad_kernels.h"
#include "weight_grad_pack.h"

namespace spt {
namespace {

constexpr int64_t kPackedBytes = 4 << 20;  // packed input: within a last-level cache
constexpr int64_t kFewestColumns = 256;    // fewer would pack the output gradients too often
constexpr int64_t kBlockTokens = 320;      // a tile's columns of the input stay in the first level
constexpr int64_t kMostRows = 96;          // of output gradients: within a second-level cache
constexpr int64_t kTasksPerThread = 4;

int64_t pieces(int64_t whole, int64_t piece) {
    return (whole + piece - 1) / piece;
}

int64_t round_up(int64_t value, int64_t multiple) {
    return pieces(value, multiple) * multiple;
}

// Where each column of an operand is, from the first on.
std::vector<int32_t> column_offsets(const SampleOperand& operand, int64_t n_columns,
                                    const char* name) {
    if ((n_columns - 1) * operand.column_stride > INT32_MAX) {
        throw std::invalid_argument(std::string(name) +
                                    ": expected columns that span less than 2^31 elements");
    }
    std::vector<int32_t> offsets(static_cast<size_t>(n_columns));
    for (int64_t i = 0; i < n_columns; ++i) {
        offsets[static_cast<size_t>(i)] = static_cast<int32_t>(i * operand.column_stride);
    }
    return offsets;
}

class Accumulation {
  public:
    Accumulation(const SquaredGrad& problem, const WeightGradKernels& kernels, int n_threads)
        : problem_(problem),
          kernels_(kernels),
          grad_offsets_(column_offsets(problem.grad_output, problem.out_features, "grad_output")),
          input_offsets_(column_offsets(problem.input, problem.in_features, "input")),
          n_blocks_(pieces(problem.tokens, kBlockTokens)),
          block_(pieces(problem.tokens, n_blocks_)) {
        const int64_t column_bytes = n_blocks_ * block_ * static_cast<int64_t>(sizeof(float));
        n_columns_ =
            std::min(std::max(kPackedBytes / column_bytes, kFewestColumns), problem.in_features);
        n_columns_ = round_up(n_columns_, kernels.tile_columns);
        const int64_t fitting = std::max<int64_t>(kPackedBytes / (n_columns_ * column_bytes), 1);
        // as many chunks, but alike
        n_samples_ = pieces(problem.samples, pieces(problem.samples, fitting));

        // below a few million multiplications starting a thread takes longer than it saves
        const int64_t work =
            problem.samples * problem.tokens * problem.out_features * problem.in_features;
        n_threads_ = static_cast<int>(std::clamp<int64_t>(work >> 21, 1, n_threads));
        const int64_t share = pieces(problem.out_features, kTasksPerThread * n_threads_);
        n_rows_ = std::min(round_up(share, kernels.tile_rows), kMostRows);
    }

    void run() {
        packed_.allocate(n_samples_ * n_blocks_ * n_columns_ * block_);
        for (int64_t column = 0; column < problem_.in_features; column += n_columns_) {
            const Range columns{column, std::min(n_columns_, problem_.in_features - column)};
            for (int64_t sample = 0; sample < problem_.samples; sample += n_samples_) {
                const Range samples{sample, std::min(n_samples_, problem_.samples - sample)};
                parallel_for(samples.size * n_blocks_, n_threads_,
                             [&](int64_t piece) { pack_input(columns, samples, piece); });
                parallel_for(pieces(problem_.out_features, n_rows_), n_threads_,
                             [&](int64_t i) { add_rows(i * n_rows_, columns, samples); });
            }
        }
    }

  private:
    struct Range {
        int64_t begin, size;
    };

    TokenRange block(int64_t i) const {
        return {i * block_, std::min(block_, problem_.tokens - i * block_)};
    }

    // [sample and block][tile column][token][tile_columns]
    float* packed(int64_t piece, int64_t tile_column) {
        return packed_.data() + piece * n_columns_ * block_ +
               tile_column * kernels_.tile_columns * block_;
    }

    void pack(const SampleOperand& operand, const int32_t* offsets, int64_t n_columns,
              int64_t width, int64_t sample, TokenRange tokens, float* out) const {
        const int64_t element_size = operand.dtype == DType::fp32 ? 4 : 2;
        const char* data =
            static_cast<const char*>(operand.data) + sample * operand.sample_stride * element_size;
        pack_panels({data, operand.dtype, operand.token_stride, n_columns}, offsets, n_columns,
                    width, tokens, out, width * block_);
    }

    void pack_input(Range columns, Range samples, int64_t piece) {
        pack(problem_.input, input_offsets_.data() + columns.begin, columns.size,
             kernels_.tile_columns, samples.begin + piece / n_blocks_, block(piece % n_blocks_),
             packed(piece, 0));
    }

    void add_rows(int64_t first_row, Range columns, Range samples) {
        const Range rows{first_row, std::min(n_rows_, problem_.out_features - first_row)};
        const int64_t tile_size = kernels_.tile_rows * kernels_.tile_columns;
        const int64_t n_tile_rows = pieces(rows.size, kernels_.tile_rows);
        const int64_t n_tile_columns = pieces(columns.size, kernels_.tile_columns);
        const int64_t n_partial = n_blocks_ > 1 ? n_tile_rows * n_tile_columns * tile_size : 0;
        // the first rows of tiles fetch a share each of the next column's input
        const int64_t n_fetching = kernels_.tile_columns / kLineFloats;
        Buffer grads;  // [tile row][token][tile_rows]
        grads.allocate(n_rows_ * block_);
        Buffer partials;  // [tile column][tile row] of the sample's gradient, up to its last block
        partials.allocate(n_partial);
        for (int64_t piece = 0; piece < samples.size * n_blocks_; ++piece) {
            const int64_t i = piece % n_blocks_;
            const TokenRange tokens = block(i);
            pack(problem_.grad_output, grad_offsets_.data() + rows.begin, rows.size,
                 kernels_.tile_rows, samples.begin + piece / n_blocks_, tokens, grads.data());
            const int64_t share = tokens.size * kLineFloats;
            if (i == 0) std::fill(partials.data(), partials.data() + n_partial, 0.0f);
            for (int64_t c = 0; c < n_tile_columns; ++c) {
                const float* input = packed(piece, c);
                for (int64_t r = 0; r < n_tile_rows; ++r) {
                    const float* grad = grads.data() + r * kernels_.tile_rows * block_;
                    const float* next = r < n_fetching ? packed(piece, c + 1) + r * share : input;
                    float* partial = n_partial == 0
                                         ? nullptr
                                         : partials.data() + (c * n_tile_rows + r) * tile_size;
                    if (i < n_blocks_ - 1) {
                        kernels_.add_tile(grad, input, tokens.size, partial, kernels_.tile_columns,
                                          next);
                    } else {
                        add_squared(rows.begin + r * kernels_.tile_rows,
                                    columns.begin + c * kernels_.tile_columns, grad, input,
                                    tokens.size, partial, next);
                    }
                }
            }
        }
    }

    // The last block of a tile's tokens; at the edges of the score the tile is put together aside.
    void add_squared(int64_t row, int64_t column, const float* grad, const float* input,
                     int64_t tokens, const float* partial, const float* next) {
        float* cells = problem_.score + row * problem_.score_stride + column;
        const int64_t stride = kernels_.tile_columns;
        const int64_t n_rows = std::min<int64_t>(kernels_.tile_rows, problem_.out_features - row);
        const int64_t n_columns = std::min(stride, problem_.in_features - column);
        if (n_rows == kernels_.tile_rows && n_columns == stride) {
            kernels_.add_squared_tile(grad, input, tokens, partial, problem_.scale, cells,
                                      problem_.score_stride, next);
            return;
        }
        float aside[kMostTileCells] = {};
        for (int64_t i = 0; i < n_rows; ++i) {
            std::copy_n(cells + i * problem_.score_stride, n_columns, aside + i * stride);
        }
        kernels_.add_squared_tile(grad, input, tokens, partial, problem_.scale, aside, stride,
                                  next);
        for (int64_t i = 0; i < n_rows; ++i) {
            std::copy_n(aside + i * stride, n_columns, cells + i * problem_.score_stride);
        }
    }

    static constexpr int64_t kMostTileCells = 12 * 32;

    const SquaredGrad& problem_;
    const WeightGradKernels& kernels_;
    const std::vector<int32_t> grad_offsets_;
    const std::vector<int32_t> input_offsets_;
    const int64_t n_blocks_;  // of a sample's tokens
    const int64_t block_;     // tokens
    int64_t n_columns_;       // of the input, packed at a time
    int64_t n_samples_;       // packed at a time
    int64_t n_rows_;          // of the score, in one task
    int n_threads_;
    Buffer packed_;
};

}  // namespace

void accumulate_squared_grad(const SquaredGrad& problem, int n_threads) {
    if (problem.samples * problem.tokens == 0) return;
    if (problem.out_features * problem.in_features == 0) return;
    Accumulation(problem, weight_grad_kernels(), n_threads).run();
}

}  // namespace spt
