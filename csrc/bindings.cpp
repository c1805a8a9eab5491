// The Python module spt_kernels._native: addresses come in as integers, nothing here is checked
// but what would crash. spt_kernels/native is its only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
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

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;
using Sizes = std::vector<int64_t>;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// What top_tau found, until Python has tensors of the right sizes to write it into.
class Selection {
  public:
    Selection(const std::vector<spt::ScoreTensor>& tensors, int64_t k, int n_threads)
        : selection_(spt::top_tau(tensors, k, n_threads, &bytes_read_)),
          n_tensors_(tensors.size()),
          n_threads_(n_threads) {}

    Sizes counts() const { return selection_.counts(n_tensors_); }

    // Reads the scores again if there were too many to keep.
    void write(const Addresses& outputs) {
        std::vector<int64_t*> positions;
        for (Address output : outputs) positions.push_back(pointer<int64_t>(output));
        py::gil_scoped_release unlocked;
        bytes_read_ += selection_.write(positions, n_threads_);
    }

    int64_t bytes_read() const { return bytes_read_; }

  private:
    int64_t bytes_read_ = 0;
    spt::Selection selection_;
    size_t n_tensors_;
    int n_threads_;
};

Selection top_tau(const Addresses& data, const std::vector<int>& dtypes, const Sizes& numels,
                  const Sizes& caps, int64_t k, int n_threads) {
    std::vector<spt::ScoreTensor> tensors;
    for (size_t m = 0; m < data.size(); ++m) {
        tensors.push_back({pointer<void>(data[m]), static_cast<spt::DType>(dtypes.at(m)),
                           numels.at(m), caps.at(m)});
    }
    py::gil_scoped_release unlocked;
    return Selection(tensors, k, n_threads);
}

void write_delta(const Addresses& targets, const std::vector<int>& dtypes, const Sizes& numels,
                 const Addresses& indices, const Addresses& originals, const Addresses& deltas,
                 const Sizes& nnzs, int n_threads) {
    std::vector<spt::DeltaWrite> writes;
    for (size_t i = 0; i < targets.size(); ++i) {
        writes.push_back({static_cast<spt::DType>(dtypes.at(i)), pointer<void>(targets[i]),
                          numels.at(i), pointer<int32_t>(indices.at(i)),
                          pointer<void>(originals.at(i)),
                          deltas.empty() ? nullptr : pointer<float>(deltas.at(i)), nnzs.at(i)});
    }
    py::gil_scoped_release unlocked;
    spt::write_delta(writes, n_threads);
}

// A row of `spans`: first token, the one past the last, nnz, addresses of index, before and after.
void add_sparse_rows(
    Address output, Address input, const std::array<int64_t, 2>& features,
    const std::array<int, 2>& dtypes,
    const std::vector<std::tuple<int64_t, int64_t, int64_t, Address, Address, Address>>& spans,
    int n_threads) {
    const spt::SparseRowsProblem problem{static_cast<spt::DType>(dtypes[0]),
                                         static_cast<spt::DType>(dtypes[1]),
                                         pointer<void>(output),
                                         pointer<void>(input),
                                         features[0],
                                         features[1]};
    std::vector<spt::SparseRows> rows;
    for (const auto& [begin, end, nnz, index, before, after] : spans) {
        rows.push_back({begin, end, pointer<int32_t>(index), pointer<void>(before),
                        pointer<void>(after), nnz});
    }
    py::gil_scoped_release unlocked;
    spt::add_sparse_rows(problem, rows, n_threads);
}

void dropout(Address input, Address output, int64_t n, int64_t element_size, int64_t first,
             const std::array<uint32_t, 3>& key, int n_threads) {
    py::gil_scoped_release unlocked;
    spt::dropout(pointer<void>(input), pointer<void>(output), n, element_size, first,
                 {key[0], key[1], key[2]}, n_threads);
}

// `weight` and `bias` may be 0, for none.
void rebuild_layer_norm(Address input, Address mean, Address rstd, Address weight, Address bias,
                        Address output, int output_dtype, int64_t n_rows, int64_t n_columns,
                        int n_threads) {
    const spt::LayerNormRows rows{pointer<float>(input),
                                  pointer<float>(mean),
                                  pointer<float>(rstd),
                                  pointer<float>(weight),
                                  pointer<float>(bias),
                                  pointer<void>(output),
                                  static_cast<spt::DType>(output_dtype),
                                  n_rows,
                                  n_columns};
    py::gil_scoped_release unlocked;
    spt::rebuild_layer_norm(rows, n_threads);
}

// `output` is [tensors, 2] of 64 bits.
void fingerprint(const Addresses& data, const Sizes& numels, const Sizes& element_sizes,
                 const Addresses& indices, const Addresses& originals, const Sizes& nnzs,
                 Address output, int n_threads) {
    std::vector<spt::FingerprintInput> inputs;
    for (size_t m = 0; m < data.size(); ++m) {
        inputs.push_back({pointer<void>(data[m]), numels.at(m), element_sizes.at(m),
                          pointer<int32_t>(indices.at(m)), pointer<void>(originals.at(m)),
                          nnzs.at(m)});
    }
    py::gil_scoped_release unlocked;
    uint64_t* next = pointer<uint64_t>(output);
    for (const spt::Fingerprint& found : spt::fingerprint(inputs, n_threads)) {
        *next++ = found.first;
        *next++ = found.second;
    }
}

// The entries of SparseAdamW, without their gradients and numbers. `arrays` holds for each entry:
// param, exp_avg, exp_avg_sq, target, index, original.
std::vector<spt::AdamWEntry> adamw_entries(const std::vector<Addresses>& arrays, const Sizes& sizes,
                                           const std::vector<int>& dtypes,
                                           const Sizes& target_numels,
                                           const std::vector<uint32_t>& ids) {
    std::vector<spt::AdamWEntry> entries;
    for (size_t i = 0; i < sizes.size(); ++i) {
        spt::AdamWEntry entry{};
        entry.param = pointer<float>(arrays.at(0).at(i));
        entry.exp_avg = pointer<float>(arrays.at(1).at(i));
        entry.exp_avg_sq = pointer<float>(arrays.at(2).at(i));
        entry.n = sizes[i];
        entry.target_dtype = static_cast<spt::DType>(dtypes.at(i));
        entry.target_numel = target_numels.at(i);
        entry.target = entry.target_numel == 0 ? nullptr : pointer<void>(arrays.at(3).at(i));
        entry.index = pointer<int32_t>(arrays.at(4).at(i));
        entry.original = pointer<void>(arrays.at(5).at(i));
        entry.id = ids.at(i);
        entries.push_back(entry);
    }
    return entries;
}

// `hyper` is fp64 [n_entries, 8], of which the first seven are AdamWNumbers in their order.
void sparse_adamw(const std::vector<Addresses>& arrays, const Sizes& sizes,
                  const std::vector<int>& dtypes, const Sizes& target_numels,
                  const std::vector<uint32_t>& ids, const Addresses& grads, Address hyper,
                  bool stochastic, uint32_t seed, int n_threads) {
    std::vector<spt::AdamWEntry> taken;
    const auto entries = adamw_entries(arrays, sizes, dtypes, target_numels, ids);
    for (size_t i = 0; i < entries.size(); ++i) {
        const double* row = pointer<double>(hyper) + 8 * i;
        if (row[5] < 1.0) continue;  // step 0: the gradients overflowed, nothing is updated
        taken.push_back(entries[i]);
        taken.back().grad = pointer<float>(grads.at(i));
        taken.back().numbers = {row[0], row[1], row[2], row[3], row[4], row[5], row[6] != 0.0};
    }
    py::gil_scoped_release unlocked;
    spt::SparseAdamW adamw(std::move(taken));
    adamw.step(stochastic, seed, n_threads);
}

// A SparseAdamW that also counts the steps, in the fp32 scalars at `steps`; `groups` holds for each
// entry which row of the numbers it takes.
class AdamWPlan {
  public:
    AdamWPlan(const std::vector<Addresses>& arrays, const Sizes& sizes,
              const std::vector<int>& dtypes, const Sizes& target_numels,
              const std::vector<uint32_t>& ids, Addresses steps, std::vector<size_t> groups)
        : adamw_(adamw_entries(arrays, sizes, dtypes, target_numels, ids)),
          steps_(std::move(steps)),
          groups_(std::move(groups)) {}

    // `numbers` holds for each group: lr, beta1, beta2, eps, weight_decay, maximize.
    void step(const Addresses& grads, const std::vector<std::array<double, 6>>& numbers,
              bool stochastic, uint32_t seed, int n_threads) {
        auto& entries = adamw_.entries();
        for (size_t i = 0; i < entries.size(); ++i) {
            const std::array<double, 6>& row = numbers.at(groups_.at(i));
            float& count = *pointer<float>(steps_.at(i));
            count += 1.0f;
            entries[i].grad = pointer<float>(grads.at(i));
            entries[i].numbers = {row[0], row[1], row[2], row[3], row[4], count, row[5] != 0.0};
        }
        py::gil_scoped_release unlocked;
        adamw_.step(stochastic, seed, n_threads);
    }

  private:
    spt::SparseAdamW adamw_;
    Addresses steps_;
    std::vector<size_t> groups_;
};

spt::Activation activation_of(int kind, int dtype, Address mean, Address rstd, Address weight,
                              Address bias) {
    return {static_cast<spt::ActivationKind>(kind),
            static_cast<spt::DType>(dtype),
            pointer<float>(mean),
            pointer<float>(rstd),
            pointer<float>(weight),
            pointer<float>(bias)};
}

// The entries of a sparse weight gradient, sorted into work once for many calls.
class WeightGradPlan {
  public:
    WeightGradPlan(int64_t out_features, int64_t in_features, Address index, int64_t nnz,
                   int n_threads)
        : out_features_(out_features), in_features_(in_features) {
        const spt::WantedEntries wanted{out_features, in_features, pointer<int32_t>(index), nnz};
        py::gil_scoped_release unlocked;
        plan_ = spt::plan_weight_grad(wanted, spt::weight_grad_kernels(), n_threads);
    }

    // An operand is address, dtype, row stride; then follow the fields of the activation.
    void run(int64_t tokens, Address grad_output, int grad_output_dtype, int64_t grad_output_stride,
             Address input, int input_dtype, int64_t input_stride, int kind, int dtype,
             Address mean, Address rstd, Address weight, Address bias, Address grad,
             int n_threads) const {
        const spt::SparseWeightGrad problem{
            {pointer<void>(grad_output), static_cast<spt::DType>(grad_output_dtype),
             grad_output_stride, out_features_},
            {pointer<void>(input), static_cast<spt::DType>(input_dtype), input_stride,
             in_features_},
            activation_of(kind, dtype, mean, rstd, weight, bias),
            tokens,
            pointer<float>(grad)};
        py::gil_scoped_release unlocked;
        spt::sparse_weight_grad(plan_, problem, n_threads);
    }

  private:
    int64_t out_features_, in_features_;
    spt::WeightGradPlan plan_;
};

// `shape` is tokens, in_features, out_features, rank, ranges, and of these first, width and step.
spt::Lora lora_of(const std::array<int64_t, 8>& shape, double scale, Address a, Address b) {
    return {shape[0],          shape[1],         shape[2],
            shape[3],          shape[4],         shape[5],
            shape[6],          shape[7],         static_cast<float>(scale),
            pointer<float>(a), pointer<float>(b)};
}

void add_lora(const std::array<int64_t, 8>& shape, double scale, Address a, Address b,
              Address input, Address output) {
    const spt::Lora lora = lora_of(shape, scale, a, b);
    py::gil_scoped_release unlocked;
    spt::add_lora(lora, pointer<float>(input), pointer<float>(output));
}

void lora_gradients(const std::array<int64_t, 8>& shape, double scale, Address a, Address b,
                    Address grad_output, Address input, int kind, int dtype, Address mean,
                    Address rstd, Address weight, Address bias, Address grad_a, Address grad_b,
                    Address grad_input) {
    const spt::Lora lora = lora_of(shape, scale, a, b);
    const spt::LoraGradients gradients{pointer<float>(grad_output),
                                       pointer<float>(input),
                                       activation_of(kind, dtype, mean, rstd, weight, bias),
                                       pointer<float>(grad_a),
                                       pointer<float>(grad_b),
                                       pointer<float>(grad_input)};
    py::gil_scoped_release unlocked;
    spt::lora_gradients(lora, gradients);
}

// `corner` is the block's first row and first column, `shape` its rows and columns.
void sample_block(Address cells, const std::array<int64_t, 2>& corner,
                  const std::array<int64_t, 2>& shape, int64_t in_features, Address index,
                  Address row_begin, Address next, Address grad, int n_threads) {
    const spt::SampledBlock block{pointer<float>(cells),
                                  corner[0],
                                  shape[0],
                                  corner[1],
                                  shape[1],
                                  in_features,
                                  pointer<int32_t>(index),
                                  pointer<int32_t>(row_begin),
                                  pointer<int32_t>(next),
                                  pointer<float>(grad)};
    py::gil_scoped_release unlocked;
    spt::sample_block(block, n_threads);
}

// `shape` is samples, tokens, out_features, in_features; an operand is address, dtype and strides.
void accumulate_squared_grad(Address score, int64_t score_stride,
                             const std::array<int64_t, 4>& shape,
                             const std::tuple<Address, int, std::array<int64_t, 3>>& grad_output,
                             const std::tuple<Address, int, std::array<int64_t, 3>>& input,
                             double scale, int n_threads) {
    auto operand = [](const std::tuple<Address, int, std::array<int64_t, 3>>& fields) {
        const std::array<int64_t, 3>& strides = std::get<2>(fields);
        return spt::SampleOperand{pointer<void>(std::get<0>(fields)),
                                  static_cast<spt::DType>(std::get<1>(fields)), strides[0],
                                  strides[1], strides[2]};
    };
    const spt::SquaredGrad problem{
        operand(grad_output),      operand(input),        shape[0],    shape[1], shape[2], shape[3],
        static_cast<float>(scale), pointer<float>(score), score_stride};
    py::gil_scoped_release unlocked;
    spt::accumulate_squared_grad(problem, n_threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "CPU kernels of spt_kernels over raw addresses; use spt_kernels.native";

    py::class_<Selection>(module, "Selection")
        .def("counts", &Selection::counts)
        .def("write", &Selection::write)
        .def("bytes_read", &Selection::bytes_read);
    module.def("top_tau", &top_tau);
    module.def("add_sparse_rows", &add_sparse_rows);
    module.def("dropout", &dropout);
    module.def("rebuild_layer_norm", &rebuild_layer_norm);
    module.def("fingerprint", &fingerprint);
    module.def("add_lora", &add_lora);
    module.def("lora_gradients", &lora_gradients);
    module.def("write_delta", &write_delta);
    module.def("sparse_adamw", &sparse_adamw);
    py::class_<AdamWPlan>(module, "AdamWPlan")
        .def(py::init<const std::vector<Addresses>&, const Sizes&, const std::vector<int>&,
                      const Sizes&, const std::vector<uint32_t>&, Addresses, std::vector<size_t>>())
        .def("step", &AdamWPlan::step);
    py::class_<WeightGradPlan>(module, "WeightGradPlan")
        .def(py::init<int64_t, int64_t, Address, int64_t, int>())
        .def("run", &WeightGradPlan::run);
    module.def("sample_block", &sample_block);
    module.def("accumulate_squared_grad", &accumulate_squared_grad);

    module.def("instruction_set", [] { return static_cast<int>(spt::instruction_set()); });
    module.def("limit_instruction_set", [](int limit) {
        spt::limit_instruction_set(static_cast<spt::InstructionSet>(limit));
    });
}
