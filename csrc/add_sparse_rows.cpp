// Adds to the outputs of a linear layer what changed single weights make of its inputs.
//
// A piece is a few tokens of one span. Their inputs are laid side by side, channel by channel, so
// that one entry is a product of a number and a vector of tokens; the sum of a row of the weight is
// added to the output when its last entry is in.
#include "add_sparse_rows.h"

#include <algorithm>
#include <string>

#include "index_check.h"
#include "parallel.h"

namespace spt {
namespace {

constexpr int64_t kTokens = 64;  // of a piece: 768 channels of them stay in a second-level cache
constexpr int64_t kReuse = 4;    // entries per column below which laying out all would not pay

template <typename S, typename W>
class Piece {
  public:
    Piece(const SparseRowsProblem& problem, const SparseRows& rows, int64_t begin)
        : problem_(problem),
          rows_(rows),
          begin_(begin),
          n_tokens_(std::min(kTokens, rows.end - begin)) {}

    void run() {
        if (rows_.nnz * kReuse >= problem_.in_features) lay_out();
        float sums[kTokens];
        int64_t row = -1;
        for (int64_t k = 0; k < rows_.nnz; ++k) {
            const int64_t own_row = rows_.index[k] / problem_.in_features;
            if (own_row != row) {
                if (row >= 0) add(row, sums);
                std::fill_n(sums, kTokens, 0.0f);
                row = own_row;
            }
            const float change = value(rows_.after, k) - value(rows_.before, k);
            const float* tokens = column(rows_.index[k] - row * problem_.in_features);
            for (int64_t t = 0; t < kTokens; ++t) sums[t] += change * tokens[t];
        }
        if (row >= 0) add(row, sums);
    }

  private:
    using T = typename S::type;

    // A weight as the product sees it: rounded to the dtype of the layer's output.
    float value(const void* values, int64_t k) const {
        return S::read(S::round(W::read(static_cast<const typename W::type*>(values)[k])));
    }

    const T* token(int64_t t) const {
        return static_cast<const T*>(problem_.input) + (begin_ + t) * problem_.in_features;
    }

    void lay_out() {
        columns_.assign(static_cast<size_t>(problem_.in_features * kTokens), 0.0f);
        for (int64_t t = 0; t < n_tokens_; ++t) {
            const T* from = token(t);
            float* to = columns_.data() + t;
            for (int64_t i = 0; i < problem_.in_features; ++i) to[i * kTokens] = S::read(from[i]);
        }
    }

    const float* column(int64_t i) {
        if (!columns_.empty()) return columns_.data() + i * kTokens;
        for (int64_t t = 0; t < n_tokens_; ++t) gathered_[t] = S::read(token(t)[i]);
        return gathered_;
    }

    void add(int64_t row, const float* sums) {
        T* to = static_cast<T*>(problem_.output) + begin_ * problem_.out_features + row;
        for (int64_t t = 0; t < n_tokens_; ++t, to += problem_.out_features) {
            *to = S::round(S::read(*to) + sums[t]);
        }
    }

    const SparseRowsProblem& problem_;
    const SparseRows& rows_;
    int64_t begin_;
    int64_t n_tokens_;
    std::vector<float> columns_;  // [in_features, kTokens]
    float gathered_[kTokens] = {};
};

}  // namespace

void add_sparse_rows(const SparseRowsProblem& problem, const std::vector<SparseRows>& spans,
                     int n_threads) {
    struct Place {
        const SparseRows* rows;
        int64_t begin;
    };
    std::vector<Place> pieces;
    for (size_t i = 0; i < spans.size(); ++i) {
        const SparseRows& rows = spans[i];
        check_index(rows.index, rows.nnz, problem.out_features * problem.in_features,
                    "indices[" + std::to_string(i) + "]");
        for (int64_t t = rows.begin; t < rows.end; t += kTokens) pieces.push_back({&rows, t});
    }
    parallel_for(static_cast<int64_t>(pieces.size()), n_threads, [&](int64_t i) {
        const Place& place = pieces[static_cast<size_t>(i)];
        with_storage(problem.dtype, [&](auto storage) {
            with_storage(problem.weight_dtype, [&](auto weight) {
                Piece<decltype(storage), decltype(weight)>(problem, *place.rows, place.begin).run();
            });
        });
    });
}

}  // namespace spt
