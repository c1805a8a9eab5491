// Sorts the entries of a sparse weight gradient into work: who is packed when, who is multiplied
// how.
#include "weight_grad_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "index_check.h"
#include "parallel.h"

namespace spt {
namespace {

// A multiply-add in a tile costs this share of one in a dot product, that loads more per operation.
constexpr double kTileCost = 0.33;

// Numbers the columns whose `slot_of` is not negative, and stores the number there.
TouchedColumns number_touched(const Operand& operand, std::vector<int32_t>* slot_of) {
    TouchedColumns touched;
    touched.operand = operand;
    for (int32_t column = 0; column < static_cast<int32_t>(slot_of->size()); ++column) {
        if ((*slot_of)[static_cast<size_t>(column)] < 0) continue;
        const int32_t slot = static_cast<int32_t>(touched.n_slots());
        (*slot_of)[static_cast<size_t>(column)] = slot;
        touched.columns.push_back(column);
        const int32_t first = column & ~7;
        if (touched.groups.empty() || touched.groups.back().column != first) {
            touched.groups.push_back({first, slot, 0});
        }
        touched.groups.back().mask |= 1u << (column & 7);
    }
    return touched;
}

// For each column of the matrix the one of `input` that holds it, or -1; empty: it holds all.
std::vector<int32_t> held_columns(const SparseWeightGrad& problem) {
    if (problem.columns == nullptr) return {};
    check_index(problem.columns, problem.input.n_columns, problem.in_features, "columns");
    std::vector<int32_t> held(static_cast<size_t>(problem.in_features), -1);
    for (int64_t i = 0; i < problem.input.n_columns; ++i) {
        held[static_cast<size_t>(problem.columns[i])] = static_cast<int32_t>(i);
    }
    return held;
}

// Calls action(k, row, column of `input`) for every entry. Rows are followed as they come: a
// division is made only where a new one begins.
template <typename Action>
void for_each_entry(const SparseWeightGrad& problem, const std::vector<int32_t>& held,
                    Action&& action) {
    int64_t row = 0;
    int64_t row_begin = 0;
    for (int64_t k = 0; k < problem.nnz; ++k) {
        const int64_t position = problem.index[k];
        if (position < row_begin || position >= row_begin + problem.in_features) {
            row = position / problem.in_features;
            row_begin = row * problem.in_features;
        }
        const int64_t column = position - row_begin;
        action(k, row, held.empty() ? column : held[static_cast<size_t>(column)]);
    }
}

// Numbers the touched rows and columns, and makes the side with fewer of them the resident one:
// that is the one that fits the cache. Then orders the entries by streamed slot.
void order_entries(const SparseWeightGrad& problem, WeightGradPlan* plan) {
    const std::vector<int32_t> held = held_columns(problem);
    std::vector<int32_t> row_slot(static_cast<size_t>(problem.out_features), -1);
    std::vector<int32_t> column_slot(static_cast<size_t>(problem.input.n_columns), -1);
    bool rows_ascend = true;
    int64_t previous = 0;
    for_each_entry(problem, held, [&](int64_t, int64_t row, int64_t column) {
        if (column < 0) {
            throw std::invalid_argument("columns: expected every column that index touches");
        }
        rows_ascend &= row >= previous;
        previous = row;
        row_slot[static_cast<size_t>(row)] = 0;
        column_slot[static_cast<size_t>(column)] = 0;
    });
    TouchedColumns rows = number_touched(problem.grad_output, &row_slot);
    TouchedColumns columns = number_touched(problem.input, &column_slot);
    // where most of it is needed tiles will do, that the cache does not limit: keep the index's
    // order
    const double area =
        static_cast<double>(rows.n_slots()) * static_cast<double>(columns.n_slots());
    const bool rows_stream =
        rows.n_slots() >= columns.n_slots() || static_cast<double>(problem.nnz) > kTileCost * area;
    plan->streamed = std::move(rows_stream ? rows : columns);
    plan->resident = std::move(rows_stream ? columns : rows);

    // a counting sort; in the order of the index if that will do
    std::vector<int64_t>& begin = plan->entry_begin;
    begin.assign(static_cast<size_t>(plan->streamed.n_slots() + 1), 0);
    for_each_entry(problem, held, [&](int64_t, int64_t row, int64_t column) {
        const int32_t slot = rows_stream ? row_slot[static_cast<size_t>(row)]
                                         : column_slot[static_cast<size_t>(column)];
        ++begin[static_cast<size_t>(slot + 1)];
    });
    for (size_t s = 1; s < begin.size(); ++s) begin[s] += begin[s - 1];

    plan->entry_slot.resize(static_cast<size_t>(problem.nnz));
    if (rows_stream && rows_ascend) {
        for_each_entry(problem, held, [&](int64_t k, int64_t, int64_t column) {
            plan->entry_slot[static_cast<size_t>(k)] = column_slot[static_cast<size_t>(column)];
        });
        return;
    }
    plan->entry_order.resize(static_cast<size_t>(problem.nnz));
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for_each_entry(problem, held, [&](int64_t k, int64_t row, int64_t column) {
        int32_t streamed = row_slot[static_cast<size_t>(row)];
        int32_t resident = column_slot[static_cast<size_t>(column)];
        if (!rows_stream) std::swap(streamed, resident);
        const size_t e = static_cast<size_t>(next[static_cast<size_t>(streamed)]++);
        plan->entry_order[e] = static_cast<int32_t>(k);
        plan->entry_slot[e] = resident;
    });
}

// Decides whether the panel is tiled, and lists its tiles if so.
void choose_tiles(const WeightGradKernels& kernels, const WeightGradPlan& plan, RowPanel* panel) {
    const int64_t n_rows = (kPanelSlots + kernels.tile_rows - 1) / kernels.tile_rows;
    int log2_width = 0;
    while (1 << log2_width < kernels.tile_columns) ++log2_width;
    const int64_t n_columns = (plan.resident.n_slots() >> log2_width) + 1;
    std::vector<uint8_t> needed(static_cast<size_t>(n_rows * n_columns), 0);
    for (int64_t s = panel->slot_begin; s < panel->slot_end; ++s) {
        uint8_t* row = needed.data() + (s - panel->slot_begin) / kernels.tile_rows;
        const int64_t end = plan.entry_begin[static_cast<size_t>(s + 1)];
        for (int64_t e = plan.entry_begin[static_cast<size_t>(s)]; e < end; ++e) {
            row[(plan.entry_slot[static_cast<size_t>(e)] >> log2_width) * n_rows] = 1;
        }
    }
    const int64_t n_tiles = std::count(needed.begin(), needed.end(), 1);
    const int64_t n_cells = n_tiles * kernels.tile_rows * kernels.tile_columns;
    const int64_t n_entries = plan.entry_begin[static_cast<size_t>(panel->slot_end)] -
                              plan.entry_begin[static_cast<size_t>(panel->slot_begin)];
    panel->tiled = static_cast<double>(n_entries) > kTileCost * static_cast<double>(n_cells);
    if (!panel->tiled) return;

    for (int64_t i = 0; i < n_rows * n_columns; ++i) {
        if (needed[static_cast<size_t>(i)]) {
            panel->tiles.push_back(
                {static_cast<int32_t>(i % n_rows), static_cast<int32_t>(i / n_rows)});
        }
    }
}

void cut_into_panels(WeightGradPlan* plan) {
    const std::vector<ColumnGroup>& groups = plan->streamed.groups;
    const int64_t n_groups = static_cast<int64_t>(groups.size());
    auto slot_at = [&](int64_t group) {
        return group < n_groups ? groups[static_cast<size_t>(group)].slot
                                : plan->streamed.n_slots();
    };
    for (int64_t begin = 0; begin < n_groups;) {
        int64_t end = begin + 1;
        while (end < n_groups && slot_at(end + 1) - slot_at(begin) <= kPanelSlots) ++end;
        plan->panels.push_back({begin, end, slot_at(begin), slot_at(end), false, {}});
        begin = end;
    }
}

}  // namespace

WeightGradPlan plan_weight_grad(const SparseWeightGrad& problem, const WeightGradKernels& kernels,
                                int n_threads) {
    check_index(problem.index, problem.nnz, problem.out_features * problem.in_features, "index");
    WeightGradPlan plan;
    order_entries(problem, &plan);
    cut_into_panels(&plan);
    parallel_for(static_cast<int64_t>(plan.panels.size()), n_threads, [&](int64_t p) {
        choose_tiles(kernels, plan, &plan.panels[static_cast<size_t>(p)]);
    });
    for (const RowPanel& panel : plan.panels) {
        (panel.tiled ? plan.any_tiled : plan.any_dots) = true;
    }
    return plan;
}

}  // namespace spt
