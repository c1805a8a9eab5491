// Runs every kernel on small awkward problems, for the sanitizers to watch.
//
// The results are compared with plain loops; exit code 1 and a line on stderr if one is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "instruction_set.h"
#include "sparse_adamw.h"
#include "sparse_weight_grad.h"
#include "top_tau.h"
#include "write_delta.h"

namespace {

using spt::DType;
using spt::InstructionSet;

int n_failures = 0;

void expect(bool holds, const std::string& what) {
    if (holds) return;
    std::fprintf(stderr, "wrong: %s\n", what.c_str());
    ++n_failures;
}

template <typename Call>
void expect_refused(Call&& call, const std::string& what) {
    try {
        call();
    } catch (const std::invalid_argument&) {
        return;
    }
    expect(false, what + " is refused");
}

// Small whole numbers, so that every sum is exact in fp32 and every number in bf16 and fp16.
class Random {
  public:
    explicit Random(uint32_t seed) : state_(seed * 2654435761u + 1) {}
    uint32_t bits() {
        state_ = state_ * 1664525u + 1013904223u;
        return state_ >> 8;
    }
    std::vector<float> whole(int64_t n) {
        std::vector<float> numbers(static_cast<size_t>(n));
        for (float& number : numbers) number = static_cast<float>(bits() % 9) - 4.0f;
        return numbers;
    }
    std::vector<int32_t> index(int64_t numel, uint32_t one_in) {
        std::vector<int32_t> index;
        for (int32_t i = 0; i < numel; ++i) {
            if (bits() % one_in == 0) index.push_back(i);
        }
        return index;
    }

  private:
    uint32_t state_;
};

// Memory of exactly the right size, so that a read beyond the end is seen.
std::vector<uint16_t> to_half(const std::vector<float>& numbers, DType dtype) {
    std::vector<uint16_t> halves;
    for (float number : numbers) {
        halves.push_back(dtype == DType::bf16 ? spt::float_to_bf16(number)
                                              : spt::float_to_fp16(number));
    }
    return halves;
}

void test_top_tau(int n_threads) {
    Random random(1);
    int64_t bytes_read = 0;
    for (int64_t numel : {0, 1, 31, 33, 5000, 400003}) {
        std::vector<float> scores(static_cast<size_t>(numel));
        for (float& score : scores) score = static_cast<float>(random.bits() % 100000);
        std::vector<uint16_t> ties(static_cast<size_t>(numel), 0x3f80);  // bf16 1.0
        const std::vector<spt::ScoreTensor> tensors{
            {scores.data(), DType::fp32, numel, numel / 200},
            {ties.data(), DType::bf16, numel, numel}};
        // a hundredth is kept, most of the scores are read again
        for (int64_t k : {numel / 100 + 1, numel / 2 + 1}) {
            auto select = [&] { return spt::top_tau(tensors, k, n_threads, &bytes_read); };
            if (numel == 0) {
                expect_refused(select, "too large a k");
                continue;
            }
            const spt::Selection selection = select();
            const std::vector<int64_t> counts = selection.counts(2);
            std::vector<std::vector<int64_t>> selected{
                std::vector<int64_t>(static_cast<size_t>(counts[0])),
                std::vector<int64_t>(static_cast<size_t>(counts[1]))};
            bytes_read += selection.write({selected[0].data(), selected[1].data()}, n_threads);
            expect(std::min(counts[0], numel / 200) + counts[1] == k,
                   "top_tau counts for k at numel " + std::to_string(numel));
            for (size_t i = 0; i < selected[1].size(); ++i) {
                expect(selected[1][i] == static_cast<int64_t>(i), "ties are taken in order");
            }
            for (size_t i = 1; i < selected[0].size(); ++i) {
                expect(selected[0][i - 1] < selected[0][i], "positions ascend");
            }
            scores.back() = -1.0f;
            expect_refused(select, "a negative score");
            scores.back() = 0.0f;
        }
    }
}

void test_write_delta(int n_threads) {
    Random random(2);
    for (int64_t numel : {1, 100, 200000}) {
        std::vector<float> target = random.whole(numel);
        const std::vector<float> before = target;
        std::vector<int32_t> index = random.index(numel, 3);
        const std::vector<float> delta = random.whole(static_cast<int64_t>(index.size()));
        std::vector<float> original;
        for (int32_t i : index) original.push_back(target[static_cast<size_t>(i)]);
        const int64_t nnz = static_cast<int64_t>(index.size());
        spt::DeltaWrite write{DType::fp32,     target.data(), numel, index.data(),
                              original.data(), delta.data(),  nnz};
        spt::write_delta({write}, n_threads);
        for (size_t k = 0; k < index.size(); ++k) {
            expect(target[static_cast<size_t>(index[k])] == original[k] + delta[k], "delta write");
        }
        write.delta = nullptr;
        spt::write_delta({write}, n_threads);
        expect(target == before, "restore");
        if (nnz == 0) continue;
        index.back() = static_cast<int32_t>(numel);
        expect_refused([&] { spt::write_delta({write}, n_threads); }, "a position out of range");
    }
}

void test_sparse_adamw(int n_threads) {
    Random random(3);
    for (DType dtype : {DType::fp32, DType::bf16, DType::fp16}) {
        for (bool stochastic : {false, true}) {
            const int64_t numel = 60000;
            const std::vector<int32_t> index = random.index(numel, 2);
            const int64_t n = static_cast<int64_t>(index.size());
            std::vector<float> param = random.whole(n);
            const std::vector<float> grad(index.size(), 2.0f);
            std::vector<float> exp_avg(index.size(), 0.0f);
            std::vector<float> exp_avg_sq(index.size(), 0.0f);
            std::vector<float> target(static_cast<size_t>(numel), 0.0f);
            const std::vector<float> original(index.size(), 0.0f);
            const std::vector<float> before = param;
            spt::AdamWEntry entry{};
            entry.param = param.data();
            entry.grad = grad.data();
            entry.exp_avg = exp_avg.data();
            entry.exp_avg_sq = exp_avg_sq.data();
            entry.n = n;
            entry.target_dtype = dtype;
            entry.target = target.data();  // large enough for every dtype
            entry.target_numel = numel;
            entry.index = index.data();
            entry.original = original.data();
            entry.lr = 0.5;
            entry.beta1 = 0.9;
            entry.beta2 = 0.999;
            entry.eps = 1e-8;
            entry.step = 1;
            spt::AdamWEntry dense = entry;
            std::vector<float> dense_param = before;
            std::vector<float> dense_m = exp_avg;
            std::vector<float> dense_v = exp_avg_sq;
            dense.param = dense_param.data();
            dense.exp_avg = dense_m.data();
            dense.exp_avg_sq = dense_v.data();
            dense.target = nullptr;
            spt::sparse_adamw({entry, dense}, stochastic, 7, n_threads);
            for (size_t k = 0; k < index.size(); ++k) {
                expect(std::fabs(param[k] - (before[k] - 0.5f)) < 1e-5f, "first step is lr long");
            }
            expect(param == dense_param, "entries with and without a target agree");
        }
    }
}

void test_sparse_weight_grad(int n_threads) {
    Random random(4);
    for (auto shape : {std::pair<int64_t, int64_t>{1, 1}, {13, 30}, {130, 57}, {57, 130}}) {
        for (int64_t tokens : {0, 1, 17, 130, 1300}) {
            const std::vector<float> grad_output = random.whole(tokens * shape.first);
            const std::vector<float> input = random.whole(tokens * shape.second);
            for (uint32_t one_in : {1u, 3u, 40u}) {
                const std::vector<int32_t> index = random.index(shape.first * shape.second, one_in);
                std::vector<float> expected(index.size(), 0.0f);
                for (size_t k = 0; k < index.size(); ++k) {
                    for (int64_t t = 0; t < tokens; ++t) {
                        const int64_t row = t * shape.first + index[k] / shape.second;
                        const int64_t column = t * shape.second + index[k] % shape.second;
                        expected[k] += grad_output[static_cast<size_t>(row)] *
                                       input[static_cast<size_t>(column)];
                    }
                }
                for (DType dtype : {DType::fp32, DType::bf16, DType::fp16}) {
                    const auto grad_half = to_half(grad_output, dtype);
                    const auto input_half = to_half(input, dtype);
                    const bool wide = dtype == DType::fp32;
                    const void* gy = wide ? static_cast<const void*>(grad_output.data())
                                          : static_cast<const void*>(grad_half.data());
                    const void* x = wide ? static_cast<const void*>(input.data())
                                         : static_cast<const void*>(input_half.data());
                    std::vector<float> grad(index.size(), NAN);
                    spt::SparseWeightGrad problem{{gy, dtype, shape.first, shape.first},
                                                  {x, dtype, shape.second, shape.second},
                                                  tokens,
                                                  shape.first,
                                                  shape.second,
                                                  nullptr,
                                                  index.data(),
                                                  static_cast<int64_t>(index.size()),
                                                  grad.data()};
                    spt::sparse_weight_grad(problem, n_threads);
                    expect(grad == expected, "sparse_weight_grad at " + std::to_string(tokens) +
                                                 " tokens of " + std::to_string(shape.first) + "x" +
                                                 std::to_string(shape.second));
                }
            }
        }
    }
}

}  // namespace

int main() {
    for (auto limit : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512}) {
        spt::limit_instruction_set(limit);
        for (int n_threads : {1, 3}) {
            test_top_tau(n_threads);
            test_write_delta(n_threads);
            test_sparse_adamw(n_threads);
            test_sparse_weight_grad(n_threads);
        }
    }
    if (n_failures == 0) std::puts("native kernels: all results are right");
    return n_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
