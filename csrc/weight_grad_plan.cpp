// Sorts the entries of a sparse weight gradient into work: who is packed when, who is multiplied
// how.
#include "weight_grad_plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "index_check.h"
#include "parallel.h"

namespace spt {
namespace {

// A multiply-add in a tile costs this share of one in a dot product, that loads more per operation.
constexpr double kTileCost = 0.33;

// The entries row by row, whatever order the index has.
struct EntriesByRow {
    const int32_t* position;         // [nnz], ascending
    std::vector<int32_t> order;      // [nnz]: an entry's place in the index; empty: as in the index
    std::vector<int32_t> sorted;     // [nnz], where `position` points if the index is not sorted
    std::vector<int64_t> begin;      // [out_features + 1]
    std::vector<uint8_t> has_entry;  // [in_features]: columns
};

EntriesByRow entries_by_row(const WantedEntries& wanted) {
    EntriesByRow entries;
    entries.position = wanted.index;
    if (!std::is_sorted(wanted.index, wanted.index + wanted.nnz)) {
        entries.order.resize(static_cast<size_t>(wanted.nnz));
        std::iota(entries.order.begin(), entries.order.end(), 0);
        std::stable_sort(entries.order.begin(), entries.order.end(),
                         [&](int32_t a, int32_t b) { return wanted.index[a] < wanted.index[b]; });
        for (int32_t k : entries.order) entries.sorted.push_back(wanted.index[k]);
        entries.position = entries.sorted.data();
    }
    entries.has_entry.assign(static_cast<size_t>(wanted.in_features), 0);
    entries.begin.assign(static_cast<size_t>(wanted.out_features + 1), 0);
    int64_t k = 0;
    for (int64_t row = 0; row < wanted.out_features; ++row) {
        uint8_t* has_entry = entries.has_entry.data();
        const int64_t row_begin = row * wanted.in_features;
        const int64_t row_end = row_begin + wanted.in_features;
        for (; k < wanted.nnz && entries.position[k] < row_end; ++k) {
            has_entry[entries.position[k] - row_begin] = 1;
        }
        entries.begin[static_cast<size_t>(row + 1)] = k;
    }
    return entries;
}

void append_touched(int32_t column, TouchedColumns* touched) {
    const int32_t first = column & ~7;
    if (touched->groups.empty() || touched->groups.back().column != first) {
        touched->groups.push_back({first, static_cast<int32_t>(touched->n_slots()), 0});
    }
    touched->groups.back().mask |= 1u << (column & 7);
    touched->columns.push_back(column);
}

TouchedColumns touched_rows(const WantedEntries& wanted, const EntriesByRow& entries) {
    TouchedColumns rows;
    for (int64_t row = 0; row < wanted.out_features; ++row) {
        const size_t r = static_cast<size_t>(row);
        if (entries.begin[r] < entries.begin[r + 1]) {
            append_touched(static_cast<int32_t>(row), &rows);
        }
    }
    return rows;
}

// Also tells the slot of each column of the weight that has one.
TouchedColumns touched_columns(const WantedEntries& wanted, const EntriesByRow& entries,
                               std::vector<int32_t>* slot_of) {
    TouchedColumns columns;
    slot_of->assign(static_cast<size_t>(wanted.in_features), -1);
    for (int64_t i = 0; i < wanted.in_features; ++i) {
        const size_t column = static_cast<size_t>(i);
        if (!entries.has_entry[column]) continue;
        (*slot_of)[column] = static_cast<int32_t>(columns.n_slots());
        append_touched(static_cast<int32_t>(i), &columns);
    }
    return columns;
}

// Calls action(entry, row slot, column) for every entry.
template <typename Action>
void for_each_entry(const WantedEntries& wanted, const EntriesByRow& entries, Action&& action) {
    int32_t row_slot = -1;
    for (int64_t row = 0; row < wanted.out_features; ++row) {
        const size_t r = static_cast<size_t>(row);
        if (entries.begin[r] == entries.begin[r + 1]) continue;
        ++row_slot;
        const int64_t row_begin = row * wanted.in_features;
        for (int64_t k = entries.begin[r]; k < entries.begin[r + 1]; ++k) {
            action(k, row_slot, static_cast<size_t>(entries.position[k] - row_begin));
        }
    }
}

// A counting sort by column: the columns stream.
void order_by_column(const WantedEntries& wanted, const EntriesByRow& entries,
                     const std::vector<int32_t>& column_slot, WeightGradPlan* plan) {
    std::vector<int64_t>& begin = plan->entry_begin;
    begin.assign(static_cast<size_t>(plan->streamed.n_slots() + 1), 0);
    for_each_entry(wanted, entries, [&](int64_t, int32_t, size_t column) {
        ++begin[static_cast<size_t>(column_slot[column] + 1)];
    });
    for (size_t s = 1; s < begin.size(); ++s) begin[s] += begin[s - 1];

    plan->entry_order.resize(static_cast<size_t>(wanted.nnz));
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for_each_entry(wanted, entries, [&](int64_t k, int32_t row_slot, size_t column) {
        const size_t e = static_cast<size_t>(next[static_cast<size_t>(column_slot[column])]++);
        plan->entry_order[e] =
            entries.order.empty() ? static_cast<int32_t>(k) : entries.order[static_cast<size_t>(k)];
        plan->entry_slot[e] = row_slot;
    });
}

// Numbers the touched rows and columns, and makes the side with fewer of them the resident one:
// that is the one that fits the cache. Then orders the entries by streamed slot.
void order_entries(const WantedEntries& wanted, WeightGradPlan* plan) {
    EntriesByRow entries = entries_by_row(wanted);
    std::vector<int32_t> column_slot;
    TouchedColumns columns = touched_columns(wanted, entries, &column_slot);
    TouchedColumns rows = touched_rows(wanted, entries);
    // where most of it is needed tiles will do, that the cache does not limit: keep the index's
    // order
    const double area =
        static_cast<double>(rows.n_slots()) * static_cast<double>(columns.n_slots());
    plan->rows_stream =
        rows.n_slots() >= columns.n_slots() || static_cast<double>(wanted.nnz) > kTileCost * area;
    plan->streamed = std::move(plan->rows_stream ? rows : columns);
    plan->resident = std::move(plan->rows_stream ? columns : rows);
    plan->entry_slot.resize(static_cast<size_t>(wanted.nnz));
    if (!plan->rows_stream) return order_by_column(wanted, entries, column_slot, plan);

    for (int32_t row : plan->streamed.columns) {
        plan->entry_begin.push_back(entries.begin[static_cast<size_t>(row)]);
    }
    plan->entry_begin.push_back(wanted.nnz);
    for_each_entry(wanted, entries, [&](int64_t k, int32_t, size_t column) {
        plan->entry_slot[static_cast<size_t>(k)] = column_slot[column];
    });
    plan->entry_order = std::move(entries.order);
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

WeightGradPlan plan_weight_grad(const WantedEntries& wanted, const WeightGradKernels& kernels,
                                int n_threads) {
    check_index(wanted.index, wanted.nnz, wanted.out_features * wanted.in_features, "index");
    WeightGradPlan plan;
    plan.kernels = &kernels;
    plan.nnz = wanted.nnz;
    order_entries(wanted, &plan);
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
