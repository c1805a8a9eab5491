// Writes original + delta, or the originals alone, into the touched positions of many tensors.
#include "write_delta.h"

#include <algorithm>
#include <string>

#include "index_check.h"
#include "parallel.h"

namespace spt {
namespace {

constexpr int64_t kPiece = 1 << 15;  // entries: enough to pay for handing a piece to a thread

template <typename S>
void write_piece(const DeltaWrite& write, int64_t begin, int64_t end) {
    using T = typename S::type;
    T* target = static_cast<T*>(write.target);
    const T* original = static_cast<const T*>(write.original);
    if (write.delta == nullptr) {
        for (int64_t k = begin; k < end; ++k) target[write.index[k]] = original[k];
        return;
    }
    for (int64_t k = begin; k < end; ++k) {
        target[write.index[k]] = S::round(S::read(original[k]) + write.delta[k]);
    }
}

}  // namespace

void write_delta(const std::vector<DeltaWrite>& writes, int n_threads) {
    struct Piece {
        const DeltaWrite* write;
        int64_t begin;
    };
    std::vector<Piece> pieces;
    for (size_t i = 0; i < writes.size(); ++i) {
        const DeltaWrite& write = writes[i];
        check_index(write.index, write.nnz, write.numel, "indices[" + std::to_string(i) + "]");
        for (int64_t k = 0; k < write.nnz; k += kPiece) pieces.push_back({&write, k});
    }
    parallel_for(static_cast<int64_t>(pieces.size()), n_threads, [&](int64_t i) {
        const Piece& piece = pieces[static_cast<size_t>(i)];
        const int64_t end = std::min(piece.begin + kPiece, piece.write->nnz);
        with_storage(piece.write->dtype, [&](auto storage) {
            write_piece<decltype(storage)>(*piece.write, piece.begin, end);
        });
    });
}

}  // namespace spt
