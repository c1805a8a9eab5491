// Runs every kernel on small awkward problems, for the sanitizers to watch.
//
// The results are compared with plain loops; exit code 1 and a line on stderr if one is wrong.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "add_sparse_rows.h"
#include "dropout.h"
#include "fingerprint.h"
#include "instruction_set.h"
#include "low_rank.h"
#include "rebuild_input.h"
#include "sparse_adamw.h"
#include "sparse_weight_grad.h"
#include "squared_grad.h"
#include "top_tau.h"
#include "weight_grad_sample.h"
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

void test_add_sparse_rows(int n_threads) {
    Random random(11);
    for (auto [tokens, n_out, n_in, step] :
         {std::array<int64_t, 4>{1, 1, 1, 1}, std::array<int64_t, 4>{130, 5, 7, 3},
          std::array<int64_t, 4>{66, 3, 40, 50}}) {
        const std::vector<float> input = random.whole(tokens * n_in);
        std::vector<float> output = random.whole(tokens * n_out), expected = output;
        std::vector<int32_t> index;
        for (int64_t k = 0; k < n_out * n_in; k += step) index.push_back(static_cast<int32_t>(k));
        const auto nnz = static_cast<int64_t>(index.size());
        const std::vector<float> before = random.whole(nnz), after = random.whole(nnz);
        const int64_t begin = tokens / 3;
        for (int64_t t = begin; t < tokens; ++t) {
            for (int64_t k = 0; k < nnz; ++k) {
                const auto at = static_cast<size_t>(k);
                expected[static_cast<size_t>(t * n_out + index[at] / n_in)] +=
                    (after[at] - before[at]) *
                    input[static_cast<size_t>(t * n_in + index[at] % n_in)];
            }
        }
        const spt::SparseRowsProblem problem{DType::fp32,  DType::fp32, output.data(),
                                             input.data(), n_out,       n_in};
        spt::SparseRows rows{begin, tokens, index.data(), before.data(), after.data(), nnz};
        spt::add_sparse_rows(problem, {rows}, n_threads);
        expect(output == expected, "sums over changed weights");
        index.back() = static_cast<int32_t>(n_out * n_in);
        expect_refused([&] { spt::add_sparse_rows(problem, {rows}, n_threads); },
                       "a changed weight out of range");
        expect(output == expected, "nothing is added with a position out of range");
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
            entry.numbers.lr = 0.5;
            entry.numbers.beta1 = 0.9;
            entry.numbers.beta2 = 0.999;
            entry.numbers.eps = 1e-8;
            entry.numbers.step = 1;
            spt::AdamWEntry dense = entry;
            std::vector<float> dense_param = before;
            std::vector<float> dense_m = exp_avg;
            std::vector<float> dense_v = exp_avg_sq;
            dense.param = dense_param.data();
            dense.exp_avg = dense_m.data();
            dense.exp_avg_sq = dense_v.data();
            dense.target = nullptr;
            spt::SparseAdamW adamw({entry, dense});
            adamw.step(stochastic, 7, n_threads);
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
                    const spt::WantedEntries wanted{shape.first, shape.second, index.data(),
                                                    static_cast<int64_t>(index.size())};
                    const spt::WeightGradPlan plan =
                        spt::plan_weight_grad(wanted, spt::weight_grad_kernels(), n_threads);
                    spt::SparseWeightGrad problem{{gy, dtype, shape.first, shape.first},
                                                  {x, dtype, shape.second, shape.second},
                                                  {},
                                                  tokens,
                                                  grad.data()};
                    spt::sparse_weight_grad(plan, problem, n_threads);
                    expect(grad == expected, "sparse_weight_grad at " + std::to_string(tokens) +
                                                 " tokens of " + std::to_string(shape.first) + "x" +
                                                 std::to_string(shape.second));
                }
            }
        }
    }
}

void test_activated_weight_grad(int n_threads) {
    Random random(8);
    const int64_t n_out = 57, n_in = 130;
    for (int64_t tokens : {1, 17, 300}) {
        const auto grad_output = random.whole(tokens * n_out), input = random.whole(tokens * n_in);
        const auto mean = random.whole(tokens), rstd = random.whole(tokens);
        const auto weight = random.whole(n_in), bias = random.whole(n_in);
        for (uint32_t one_in : {1u, 3u, 40u}) {
            // wide and narrow, so that each side streams once
            for (bool is_turned : {false, true}) {
                const int64_t rows = is_turned ? n_in : n_out, columns = is_turned ? n_out : n_in;
                const auto& gy = is_turned ? input : grad_output;
                const auto& x = is_turned ? grad_output : input;
                const std::vector<int32_t> index = random.index(rows * columns, one_in);
                const spt::WeightGradPlan plan = spt::plan_weight_grad(
                    {rows, columns, index.data(), static_cast<int64_t>(index.size())},
                    spt::weight_grad_kernels(), n_threads);
                auto check = [&](const spt::Activation& activation, auto&& activated, float most,
                                 const std::string& name) {
                    std::vector<float> grad(index.size(), NAN);
                    spt::sparse_weight_grad(plan,
                                            {{gy.data(), DType::fp32, rows, rows},
                                             {x.data(), DType::fp32, columns, columns},
                                             activation,
                                             tokens,
                                             grad.data()},
                                            n_threads);
                    for (size_t k = 0; k < index.size(); ++k) {
                        double expected = 0.0, size = 0.0;
                        for (int64_t t = 0; t < tokens; ++t) {
                            const auto column = static_cast<size_t>(index[k] % columns);
                            const auto row = static_cast<size_t>(t * rows + index[k] / columns);
                            const auto cell = static_cast<size_t>(t * columns) + column;
                            const double term = static_cast<double>(gy[row]) *
                                                activated(static_cast<double>(x[cell]),
                                                          static_cast<size_t>(t), column);
                            expected += term;
                            size += std::fabs(gy[row]) * (1.0 + std::fabs(x[cell]));
                        }
                        expect(std::fabs(grad[k] - expected) <= most * size,
                               name + " in sparse_weight_grad");
                    }
                };
                const spt::Activation norm{spt::ActivationKind::layer_norm,
                                           DType::fp32,
                                           mean.data(),
                                           rstd.data(),
                                           weight.data(),
                                           bias.data()};
                auto normalized = [&](double value, size_t t, size_t column) {
                    return (value - mean[t]) * rstd[t] * weight[column] + bias[column];
                };
                check(norm, normalized, 0.0f, "LayerNorm");
                spt::Activation gelu{};
                gelu.kind = spt::ActivationKind::gelu;
                auto of_gelu = [](double value, size_t, size_t) {
                    return value * std::erfc(-value / std::sqrt(2.0)) / 2;
                };
                check(gelu, of_gelu, 1e-6f, "GELU");
                gelu.kind = spt::ActivationKind::tanh_gelu;
                auto of_tanh = [](double value, size_t, size_t) {
                    const double cubic = value + 0.044715 * value * value * value;
                    return value / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * cubic));
                };
                check(gelu, of_tanh, 1e-6f, "tanh GELU");
            }
        }
    }
}

void test_lora() {
    Random random(9);
    const int64_t tokens = 5, n_in = 37, rank = 2, n_ranges = 2, first = 3, width = 19, step = 21;
    const int64_t n_out = 50, n_factors = n_ranges * rank;
    const auto input = random.whole(tokens * n_in), grad_output = random.whole(tokens * n_out);
    const auto a = random.whole(n_factors * n_in), b = random.whole(n_ranges * width * rank);
    const spt::Lora lora{tokens, n_in, n_out, rank,     n_ranges, first,
                         width,  step, 0.5f,  a.data(), b.data()};
    auto output = random.whole(tokens * n_out), grad_input = random.whole(tokens * n_in);
    auto expected = output, expected_input = grad_input;
    std::vector<float> grad_a(a.size(), NAN), grad_b(b.size(), NAN);
    std::vector<float> expected_a(a.size(), 0.0f), expected_b(b.size(), 0.0f);
    auto at = [](auto& values, int64_t i) -> auto& { return values[static_cast<size_t>(i)]; };
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t k = 0; k < n_factors; ++k) {
            float inner = 0.0f, grad_inner = 0.0f;
            for (int64_t i = 0; i < n_in; ++i)
                inner += at(input, t * n_in + i) * at(a, k * n_in + i);
            for (int64_t o = 0; o < width; ++o) {
                const int64_t cell = t * n_out + first + k / rank * step + o;
                const int64_t up = (k / rank * width + o) * rank + k % rank;
                at(expected, cell) += 0.5f * inner * at(b, up);
                at(expected_b, up) += 0.5f * inner * at(grad_output, cell);
                grad_inner += 0.5f * at(grad_output, cell) * at(b, up);
            }
            for (int64_t i = 0; i < n_in; ++i) {
                at(expected_a, k * n_in + i) += grad_inner * at(input, t * n_in + i);
                at(expected_input, t * n_in + i) += grad_inner * at(a, k * n_in + i);
            }
        }
    }
    spt::add_lora(lora, input.data(), output.data());
    expect(output == expected, "add_lora");
    const spt::LoraGradients gradients{grad_output.data(), input.data(),  {},
                                       grad_a.data(),      grad_b.data(), grad_input.data()};
    spt::lora_gradients(lora, gradients);
    expect(grad_a == expected_a, "lora_gradients of a");
    expect(grad_b == expected_b, "lora_gradients of b");
    expect(grad_input == expected_input, "lora_gradients of the input");
}

void test_sample_block(int n_threads) {
    Random random(5);
    const int64_t n_rows = 70;
    const int64_t n_columns = 45;
    const std::vector<float> cells = random.whole(n_rows * n_columns);
    for (uint32_t one_in : {1u, 2u, 60u}) {
        std::vector<int32_t> index = random.index(n_rows * n_columns, one_in);
        std::vector<int32_t> row_begin(1, 0);
        for (int64_t row = 1; row <= n_rows; ++row) {
            const auto end = std::lower_bound(index.begin(), index.end(), row * n_columns);
            row_begin.push_back(static_cast<int32_t>(end - index.begin()));
        }
        std::vector<int32_t> next(row_begin.begin(), row_begin.end() - 1);
        std::vector<float> grad(index.size(), NAN);
        for (int64_t column : {int64_t{0}, int64_t{20}}) {
            const int64_t width = column == 0 ? 20 : n_columns - 20;
            std::vector<float> part;
            for (int64_t cell = 0; cell < n_rows * width; ++cell) {
                part.push_back(
                    cells[static_cast<size_t>(cell / width * n_columns + column + cell % width)]);
            }
            spt::sample_block({part.data(), 0, n_rows, column, width, n_columns, index.data(),
                               row_begin.data(), next.data(), grad.data()},
                              n_threads);
        }
        for (size_t k = 0; k < index.size(); ++k) {
            expect(grad[k] == cells[static_cast<size_t>(index[k])], "sampled cells");
        }
        index.back() = 0;  // in another row than row_begin says
        std::copy(row_begin.begin(), row_begin.end() - 1, next.begin());
        expect_refused(
            [&] {
                spt::sample_block({cells.data(), 0, n_rows, 0, n_columns, n_columns, index.data(),
                                   row_begin.data(), next.data(), grad.data()},
                                  n_threads);
            },
            "a position in another row");
    }
}

void test_squared_grad(int n_threads) {
    Random random(5);
    for (auto shape : {std::pair<int64_t, int64_t>{1, 1}, {13, 30}, {130, 57}}) {
        for (int64_t tokens : {0, 1, 17, 700}) {
            const int64_t samples = 3;
            const std::vector<float> grad_output = random.whole(samples * tokens * shape.first);
            const std::vector<float> input = random.whole(samples * tokens * shape.second);
            std::vector<float> expected(static_cast<size_t>(shape.first * shape.second), 1.0f);
            for (int64_t b = 0; b < samples; ++b) {
                for (int64_t k = 0; k < shape.first * shape.second; ++k) {
                    float gradient = 0.0f;
                    for (int64_t t = b * tokens; t < (b + 1) * tokens; ++t) {
                        gradient +=
                            grad_output[static_cast<size_t>(t * shape.first + k / shape.second)] *
                            input[static_cast<size_t>(t * shape.second + k % shape.second)];
                    }
                    expected[static_cast<size_t>(k)] += 0.25f * gradient * gradient;
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
                std::vector<float> score(expected.size(), 1.0f);
                const spt::SquaredGrad problem{{gy, dtype, tokens * shape.first, shape.first, 1},
                                               {x, dtype, tokens * shape.second, shape.second, 1},
                                               samples,
                                               tokens,
                                               shape.first,
                                               shape.second,
                                               0.5f,
                                               score.data(),
                                               shape.second};
                spt::accumulate_squared_grad(problem, n_threads);
                expect(score == expected, "squared_grad at " + std::to_string(tokens) +
                                              " tokens of " + std::to_string(shape.first) + "x" +
                                              std::to_string(shape.second));
            }
        }
    }
    float score = 0.0f;
    const spt::SampleOperand wide{&score, DType::fp32, 0, 0, int64_t{1} << 31};
    expect_refused(
        [&] { spt::accumulate_squared_grad({wide, wide, 1, 1, 2, 2, 1.0f, &score, 2}, 1); },
        "columns too far apart");
}

// Tensors of awkward sizes in memory of exactly their size; patched ones against changed ones.
void test_fingerprint(int n_threads) {
    Random random(5);
    for (int64_t element_size : {1, 2, 4, 8}) {
        for (int64_t numel : {0, 1, 7, 33, 300001}) {
            std::vector<char> data(static_cast<size_t>(numel * element_size));
            for (char& byte : data) byte = static_cast<char>(random.bits());
            const auto index = random.index(numel, 3);
            std::vector<char> original(index.size() * static_cast<size_t>(element_size));
            for (char& byte : original) byte = static_cast<char>(random.bits());
            std::vector<char> changed = data;
            for (size_t k = 0; k < index.size(); ++k) {
                std::copy_n(original.begin() + static_cast<int64_t>(k) * element_size, element_size,
                            changed.begin() + index[k] * element_size);
            }
            const auto nnz = static_cast<int64_t>(index.size());
            const auto found = spt::fingerprint(
                {{data.data(), numel, element_size, index.data(), original.data(), nnz},
                 {changed.data(), numel, element_size, nullptr, nullptr, 0}},
                n_threads);
            expect(found[0].first == found[1].first && found[0].second == found[1].second,
                   "fingerprint of " + std::to_string(numel) + " elements");
        }
    }
    const float weight = 0.0f;
    const int32_t outside = 1;
    expect_refused([&] { spt::fingerprint({{&weight, 1, 4, &outside, &weight, 1}}, n_threads); },
                   "a position out of range in fingerprint");
}

void test_dropout(int n_threads) {
    Random random(6);
    const spt::DropoutKey key{0x12345678u, 0x9abcdef0u, 0x40000000u};
    for (int64_t n : {0, 1, 31, 200003}) {
        const auto wide = random.whole(n);
        const auto half = to_half(wide, DType::bf16);
        std::vector<float> dropped(wide.size(), NAN);
        std::vector<uint16_t> dropped_half = half;
        spt::dropout(wide.data(), dropped.data(), n, 4, -5, key, n_threads);
        spt::dropout(dropped_half.data(), dropped_half.data(), n, 2, -5, key, n_threads);
        std::vector<float> kept = wide;
        for (size_t i = 0; i < kept.size(); ++i) {
            if (dropped_half[i] != half[i]) kept[i] = 0.0f;
        }
        expect(dropped == kept, "dropout of " + std::to_string(n) + " elements");
    }
    expect_refused([&] { spt::dropout(nullptr, nullptr, 1, 3, 0, key, n_threads); },
                   "elements of 3 bytes in dropout");
}

void test_rebuild_layer_norm(int n_threads) {
    Random random(7);
    for (const auto& [n_rows, n_columns] :
         {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {300, 257}}) {
        const auto input = random.whole(n_rows * n_columns);
        const auto mean = random.whole(n_rows), rstd = random.whole(n_rows);
        const auto weight = random.whole(n_columns), bias = random.whole(n_columns);
        for (int parts = 0; parts < 4; ++parts) {
            const float* weight_of = parts & 1 ? weight.data() : nullptr;
            const float* bias_of = parts & 2 ? bias.data() : nullptr;
            std::vector<float> output(static_cast<size_t>(n_rows * n_columns), NAN), expected;
            std::vector<uint16_t> half(output.size());
            for (int64_t row = 0; row < n_rows; ++row) {
                for (int64_t column = 0; column < n_columns; ++column) {
                    const auto r = static_cast<size_t>(row), c = static_cast<size_t>(column);
                    float y = input[static_cast<size_t>(row * n_columns + column)] - mean[r];
                    y *= rstd[r];
                    if (weight_of) y *= weight[c];
                    expected.push_back(bias_of ? y + bias[c] : y);
                }
            }
            spt::LayerNormRows rows{input.data(),  mean.data(), rstd.data(), weight_of, bias_of,
                                    output.data(), DType::fp32, n_rows,      n_columns};
            spt::rebuild_layer_norm(rows, n_threads);
            expect(output == expected, "LayerNorm of " + std::to_string(n_rows) + " rows");
            rows.output = half.data();
            rows.output_dtype = DType::bf16;
            spt::rebuild_layer_norm(rows, n_threads);
            expect(half == to_half(expected, DType::bf16), "LayerNorm rounded to bf16");
        }
    }
}

}  // namespace

int main() {
    for (auto limit : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512}) {
        spt::limit_instruction_set(limit);
        for (int n_threads : {1, 3}) {
            test_top_tau(n_threads);
            test_add_sparse_rows(n_threads);
            test_write_delta(n_threads);
            test_sparse_adamw(n_threads);
            test_sparse_weight_grad(n_threads);
            test_activated_weight_grad(n_threads);
            test_lora();
            test_sample_block(n_threads);
            test_squared_grad(n_threads);
            test_fingerprint(n_threads);
            test_dropout(n_threads);
            test_rebuild_layer_norm(n_threads);
        }
    }
    if (n_failures == 0) std::puts("native kernels: all results are right");
    return n_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
