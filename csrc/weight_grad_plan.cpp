// Sorts the entries of a sparse weight gradient into work: who is packed when, who is multiplied
// how.
#include "weight_grad_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "index_check.h"

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

// For each column of the matrix the one of `input` that holds it, or -1.
std::vector<int32_t> held_columns(const SparseWeightGrad& problem) {
    std::vector<int32_t> held(static_cast<size_t>(problem.in_features), -1);
    if (problem.columns == nullptr) {
        for (size_t c = 0; c < held.size(); ++c) held[c] = static_cast<int32_t>(c);
        return held;
    }
    check_index(problem.columns, problem.input.n_columns, problem.in_features, "columns");
    for (int64_t i = 0; i < problem.input.n_columns; ++i) {
        held[static_cast<size_t>(problem.columns[i])] = static_cast<int32_t>(i);
    }
    return held;
}

// Stable counting sort of 0..n-1 by key; `begin` becomes where each key's items start.
std::vector<int32_t> sort_by(const std::vector<int32_t>& key, const std::vector<int32_t>& slot_of,
                             int64_t n_slots, const std::vector<int32_t>& items,
                             std::vector<int64_t>* begin) {
    begin->assign(static_cast<size_t>(n_slots + 1), 0);
    for (int32_t column : key)
        ++(*begin)[static_cast<size_t>(slot_of[static_cast<size_t>(column)] + 1)];
    for (size_t s = 1; s < begin->size(); ++s) (*begin)[s] += (*begin)[s - 1];
    std::vector<int64_t> next(begin->begin(), begin->end() - 1);
    std::vector<int32_t> order(key.size());
    for (int32_t item : items) {
        const int32_t slot = slot_of[static_cast<size_t>(key[static_cast<size_t>(item)])];
        order[static_cast<size_t>(next[static_cast<size_t>(slot)]++)] = item;
    }
    return order;
}

// Decides whether the panel is tiled, and if so replaces its entries' slots by cells of its tiles.
void choose_tiles(const WeightGradKernels& kernels, WeightGradPlan* plan, RowPanel* panel) {
    const int64_t n_rows = (kPanelSlots + kernels.tile_rows - 1) / kernels.tile_rows;
    const int64_t n_columns = plan->resident.n_slots() / kernels.tile_columns + 1;
    std::vector<int32_t> tile_of(static_cast<size_t>(n_rows * n_columns), -1);
    auto visit = [&](auto&& action) {
        for (int64_t s = panel->slot_begin; s < panel->slot_end; ++s) {
            const int64_t row = s - panel->slot_begin;
            for (int64_t e = plan->entry_begin[static_cast<size_t>(s)];
                 e < plan->entry_begin[static_cast<size_t>(s + 1)]; ++e) {
                int32_t& place = plan->entry_place[static_cast<size_t>(e)];
                const int64_t tile =
                    place / kernels.tile_columns * n_rows + row / kernels.tile_rows;
                action(tile_of[static_cast<size_t>(tile)], row, place);
            }
        }
    };

    int64_t n_entries = 0;
    int64_t n_tiles = 0;
    visit([&](int32_t& tile, int64_t, int32_t) {
        ++n_entries;
        n_tiles += tile < 0;
        tile = 0;
    });
    const double tile_work =
        static_cast<double>(n_tiles * kernels.tile_rows * kernels.tile_columns);
    panel->tiled = static_cast<double>(n_entries) > kTileCost * tile_work;
    if (!panel->tiled) return;

    for (size_t i = 0; i < tile_of.size(); ++i) {
        if (tile_of[i] < 0) continue;
        tile_of[i] = static_cast<int32_t>(panel->tiles.size());
        panel->tiles.push_back({static_cast<int32_t>(static_cast<int64_t>(i) % n_rows),
                                static_cast<int32_t>(static_cast<int64_t>(i) / n_rows)});
    }
    visit([&](int32_t& tile, int64_t row, int32_t& place) {
        place = static_cast<int32_t>((tile * kernels.tile_rows + row % kernels.tile_rows) *
                                         kernels.tile_columns +
                                     place % kernels.tile_columns);
    });
}

void cut_into_panels(const WeightGradKernels& kernels, WeightGradPlan* plan) {
    const std::vector<ColumnGroup>& groups = plan->streamed.groups;
    const int64_t n_groups = static_cast<int64_t>(groups.size());
    auto slot_at = [&](int64_t group) {
        return group < n_groups ? groups[static_cast<size_t>(group)].slot
                                : plan->streamed.n_slots();
    };
    for (int64_t begin = 0; begin < n_groups;) {
        int64_t end = begin + 1;
        while (end < n_groups && slot_at(end + 1) - slot_at(begin) <= kPanelSlots) ++end;
        RowPanel panel{begin, end, slot_at(begin), slot_at(end), false, {}};
        choose_tiles(kernels, plan, &panel);
        (panel.tiled ? plan->any_tiled : plan->any_dots) = true;
        plan->panels.push_back(std::move(panel));
        begin = end;
    }
}

}  // namespace

WeightGradPlan plan_weight_grad(const SparseWeightGrad& problem, const WeightGradKernels& kernels) {
    check_index(problem.index, problem.nnz, problem.out_features * problem.in_features, "index");
    const std::vector<int32_t> held = held_columns(problem);
    const size_t nnz = static_cast<size_t>(problem.nnz);
    std::vector<int32_t> row(nnz);
    std::vector<int32_t> column(nnz);
    std::vector<int32_t> row_slot(static_cast<size_t>(problem.out_features), -1);
    std::vector<int32_t> column_slot(static_cast<size_t>(problem.input.n_columns), -1);
    const int32_t in_features = static_cast<int32_t>(problem.in_features);
    for (size_t k = 0; k < nnz; ++k) {
        row[k] = problem.index[k] / in_features;
        const int32_t wanted = problem.index[k] - row[k] * in_features;
        column[k] = held[static_cast<size_t>(wanted)];
        if (column[k] < 0) {
            throw std::invalid_argument(
                "columns: expected every column that index touches, got none "
                "for column " +
                std::to_string(wanted));
        }
        row_slot[static_cast<size_t>(row[k])] = 0;
        column_slot[static_cast<size_t>(column[k])] = 0;
    }

    WeightGradPlan plan;
    plan.streamed = number_touched(problem.grad_output, &row_slot);
    plan.resident = number_touched(problem.input, &column_slot);
    // the operand with fewer touched columns is the one that fits the cache
    if (plan.streamed.n_slots() < plan.resident.n_slots()) {
        std::swap(plan.streamed, plan.resident);
        std::swap(row, column);
        std::swap(row_slot, column_slot);
    }

    std::vector<int32_t> items(nnz);
    for (size_t k = 0; k < nnz; ++k) items[k] = static_cast<int32_t>(k);
    std::vector<int64_t> unused;
    items = sort_by(column, column_slot, plan.resident.n_slots(), items, &unused);
    plan.entry_order = sort_by(row, row_slot, plan.streamed.n_slots(), items, &plan.entry_begin);
    plan.entry_place.resize(nnz);
    for (size_t e = 0; e < nnz; ++e) {
        const size_t k = static_cast<size_t>(plan.entry_order[e]);
        plan.entry_place[e] = column_slot[static_cast<size_t>(column[k])];
    }
    cut_into_panels(kernels, &plan);
    return plan;
}

}  // namespace spt
