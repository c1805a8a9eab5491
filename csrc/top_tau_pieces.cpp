// The runs of scores that top-tau works on, and how threads share them out.
#include "top_tau_pieces.h"

namespace spt {
namespace {

constexpr int64_t kStream = 1 << 19;      // scores: two megabytes, many per thread
constexpr int64_t kWorthATask = 1 << 16;  // scores

}  // namespace

Scores::Scores(const std::vector<ScoreTensor>& tensors) {
    int64_t room = 0;  // scores that the last task still takes
    for (const ScoreTensor& tensor : tensors) {
        const int64_t m = static_cast<int64_t>(caps.size());
        const int64_t width = tensor.dtype == DType::bf16 ? 2 : 4;
        int64_t begin = 0;
        auto add = [&](int64_t length) {
            const char* data = static_cast<const char*>(tensor.data) + begin * width;
            pieces.push_back({data, tensor.dtype, length, m, begin});
            begin += length;
        };
        if (tensor.numel >= kWorthATask) {
            const int64_t n_pairs = (tensor.numel + 2 * kStream - 1) / (2 * kStream);
            const int64_t length = tensor.numel / (2 * n_pairs) / 64 * 64;  // whole cache lines
            for (int64_t pair = 0; pair < n_pairs; ++pair) {
                tasks.push_back({pieces.size(), pieces.size() + 2, true});
                add(length);
                add(length);
            }
            room = 0;
        }
        if (begin < tensor.numel) {
            if (room <= 0) {
                tasks.push_back({pieces.size(), pieces.size(), false});
                room = kWorthATask;
            }
            room -= tensor.numel - begin;
            add(tensor.numel - begin);
            tasks.back().last = pieces.size();
        }
        caps.push_back(tensor.cap >= tensor.numel ? INT64_MAX : tensor.cap);
        n += tensor.numel;
    }
}

}  // namespace spt
