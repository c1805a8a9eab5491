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
constexpr double kTileCost = 0.4;

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
    const bool rows_stream = rows.n_slots() >= columns.n_slots();
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

    plan->entry_place.resize(static_cast<size_t>(problem.nnz));
    if (rows_stream && rows_ascend) {
        for_each_entry(problem, held, [&](int64_t k, int64_t, int64_t column) {
            plan->entry_place[static_cast<size_t>(k)] = column_slot[static_cast<size_t>(column)];
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
        plan->entry_place[e] = resident;
    });
}

// Which tile holds an entry, among all that a panel can have: column by column.
class TileGrid {
  public:
    TileGrid(const WeightGradKernels& kernels, int64_t n_resident)
        : n_rows((kPanelSlots + kernels.tile_rows - 1) / kernels.tile_rows) {
        while (1 << log2_width < kernels.tile_columns) ++log2_width;
        n_tiles = n_rows * ((n_resident >> log2_width) + 1);
    }
    int64_t tile(int64_t row, int32_t slot) const { return (slot >> log2_width) * n_rows + row; }

    int64_t n_rows;
    int64_t n_tiles;
    int log2_width = 0;
};

// Decides whether the panel is tiled, and if so replaces its entries' slots by cells of its tiles.
void choose_tiles(const WeightGradKernels& kernels, WeightGradPlan* plan, RowPanel* panel) {
    const TileGrid grid(kernels, plan->resident.n_slots());
    std::vector<int32_t> tile_of(static_cast<size_t>(grid.n_tiles), -1);
    auto for_each_row = [&](auto&& action) {
        for (int64_t s = panel->slot_begin; s < panel->slot_end; ++s) {
            const int64_t row = s - panel->slot_begin;
            int32_t* place = plan->entry_place.data();
            action(row / kernels.tile_rows, row % kernels.tile_rows,
                   place + plan->entry_begin[static_cast<size_t>(s)],
                   place + plan->entry_begin[static_cast<size_t>(s + 1)]);
        }
    };

    for_each_row([&](int64_t tile_row, int64_t, const int32_t* place, const int32_t* end) {
        for (; place < end; ++place) {
            tile_of[static_cast<size_t>(grid.tile(tile_row, *place))] = 0;
        }
    });
    const int64_t tile_size = kernels.tile_rows * kernels.tile_columns;
    const int64_t n_cells = std::count(tile_of.begin(), tile_of.end(), 0) * tile_size;
    const int64_t n_entries = plan->entry_begin[static_cast<size_t>(panel->slot_end)] -
                              plan->entry_begin[static_cast<size_t>(panel->slot_begin)];
    panel->tiled = static_cast<double>(n_entries) > kTileCost * static_cast<double>(n_cells);
    if (!panel->tiled) return;

    for (size_t i = 0; i < tile_of.size(); ++i) {
        if (tile_of[i] < 0) continue;
        tile_of[i] = static_cast<int32_t>(panel->tiles.size());
        panel->tiles.push_back({static_cast<int32_t>(static_cast<int64_t>(i) % grid.n_rows),
                                static_cast<int32_t>(static_cast<int64_t>(i) / grid.n_rows)});
    }
    for_each_row([&](int64_t tile_row, int64_t row, int32_t* place, int32_t* end) {
        for (; place < end; ++place) {
            const int64_t tile = tile_of[static_cast<size_t>(grid.tile(tile_row, *place))];
            *place = static_cast<int32_t>((tile * kernels.tile_rows + row) * kernels.tile_columns +
                                          (*place & (kernels.tile_columns - 1)));
        }
    });
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
        choose_tiles(kernels, &plan, &plan.panels[static_cast<size_t>(p)]);
    });
    for (const RowPanel& panel : plan.panels) {
        (panel.tiled ? plan.any_tiled : plan.any_dots) = true;
    }
    return plan;
}

}  // namespace spt
