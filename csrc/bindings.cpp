// The Python module spt_kernels._native: addresses come in as integers, nothing here is checked
// but what would crash. spt_kernels/native.py is its only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "instruction_set.h"
#include "sparse_adamw.h"
#include "sparse_weight_grad.h"
#include "top_tau.h"
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

// `arrays` holds for each entry: param, grad, exp_avg, exp_avg_sq, target, index, original.
// `hyper` is fp64 [n_entries, 8] in the order of the fields of AdamWEntry.
void sparse_adamw(const std::vector<Addresses>& arrays, const Sizes& sizes,
                  const std::vector<int>& dtypes, const Sizes& target_numels, Address hyper,
                  bool stochastic, uint32_t seed, int n_threads) {
    std::vector<spt::AdamWEntry> entries;
    for (size_t i = 0; i < sizes.size(); ++i) {
        const double* row = pointer<double>(hyper) + 8 * i;
        if (row[5] < 1.0) continue;  // step 0: the gradients overflowed, nothing is updated
        spt::AdamWEntry entry;
        entry.param = pointer<float>(arrays.at(0).at(i));
        entry.grad = pointer<float>(arrays.at(1).at(i));
        entry.exp_avg = pointer<float>(arrays.at(2).at(i));
        entry.exp_avg_sq = pointer<float>(arrays.at(3).at(i));
        entry.n = sizes[i];
        entry.target_dtype = static_cast<spt::DType>(dtypes.at(i));
        entry.target_numel = target_numels.at(i);
        entry.target = entry.target_numel == 0 ? nullptr : pointer<void>(arrays.at(4).at(i));
        entry.index = pointer<int32_t>(arrays.at(5).at(i));
        entry.original = pointer<void>(arrays.at(6).at(i));
        entry.lr = row[0];
        entry.beta1 = row[1];
        entry.beta2 = row[2];
        entry.eps = row[3];
        entry.weight_decay = row[4];
        entry.step = row[5];
        entry.maximize = row[6] != 0.0;
        entry.id = static_cast<uint32_t>(static_cast<int64_t>(row[7]));
        entries.push_back(entry);
    }
    py::gil_scoped_release unlocked;
    spt::sparse_adamw(entries, stochastic, seed, n_threads);
}

// `shape` is tokens, out_features, in_features; an operand is address, dtype, row stride, columns.
void sparse_weight_grad(const std::array<int64_t, 3>& shape,
                        const std::tuple<Address, int, int64_t, int64_t>& grad_output,
                        const std::tuple<Address, int, int64_t, int64_t>& input, Address columns,
                        Address index, int64_t nnz, Address grad, int n_threads) {
    auto operand = [](const std::tuple<Address, int, int64_t, int64_t>& fields) {
        return spt::Operand{pointer<void>(std::get<0>(fields)),
                            static_cast<spt::DType>(std::get<1>(fields)), std::get<2>(fields),
                            std::get<3>(fields)};
    };
    const spt::SparseWeightGrad problem{operand(grad_output),
                                        operand(input),
                                        shape[0],
                                        shape[1],
                                        shape[2],
                                        pointer<int32_t>(columns),
                                        pointer<int32_t>(index),
                                        nnz,
                                        pointer<float>(grad)};
    py::gil_scoped_release unlocked;
    spt::sparse_weight_grad(problem, n_threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "CPU kernels of spt_kernels over raw addresses; use spt_kernels.native";

    py::class_<Selection>(module, "Selection")
        .def("counts", &Selection::counts)
        .def("write", &Selection::write)
        .def("bytes_read", &Selection::bytes_read);
    module.def("top_tau", &top_tau);
    module.def("write_delta", &write_delta);
    module.def("sparse_adamw", &sparse_adamw);
    module.def("sparse_weight_grad", &sparse_weight_grad);

    module.def("instruction_set", [] { return static_cast<int>(spt::instruction_set()); });
    module.def("limit_instruction_set", [](int limit) {
        spt::limit_instruction_set(static_cast<spt::InstructionSet>(limit));
    });
}
