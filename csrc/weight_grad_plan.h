// Sorts the entries of a sparse weight gradient into work: who is packed when, who is multiplied
// how.
#pragma once

#include <cstdint>
#include <vector>

#include "weight_grad_kernels.h"
#include "weight_grad_pack.h"

namespace spt {

// The entries that are wanted of a weight gradient.
struct WantedEntries {
    int64_t out_features;
    int64_t in_features;
    const int32_t* index;  // [nnz], flat positions in [out_features, in_features]
    int64_t nnz;
};

// The touched columns of one operand, numbered in ascending order ("slots").
struct TouchedColumns {
    std::vector<int32_t> columns;  // [n_slots]
    std::vector<ColumnGroup> groups;

    int64_t n_slots() const { return static_cast<int64_t>(columns.size()); }
};

// Some neighbouring slots of the streamed operand, with all their entries.
struct RowPanel {
    int64_t group_begin, group_end;
    int64_t slot_begin, slot_end;
    // Tiles hold the product of tile_rows slots of this panel and tile_columns resident ones.
    // A tiled panel computes each tile that has an entry; otherwise each entry is a dot product.
    bool tiled;
    struct Tile {
        int32_t row, column;  // in tiles
    };
    std::vector<Tile> tiles;  // by column, then row
};

// Which operand streams past the other, that stays in the cache block by block. It serves any
// number of tokens, and needs the index no more.
struct WeightGradPlan {
    const WeightGradKernels* kernels;
    int64_t nnz;
    bool rows_stream;  // the streamed columns are of grad_output, the resident ones of the input
    TouchedColumns streamed;
    TouchedColumns resident;
    std::vector<RowPanel> panels;
    bool any_tiled = false;
    bool any_dots = false;

    // Entries ordered by streamed slot.
    std::vector<int64_t> entry_begin;  // [streamed slots + 1]
    std::vector<int32_t> entry_order;  // [nnz]: its place in the index; empty: as in the index
    std::vector<int32_t> entry_slot;   // [nnz]: its resident slot
};

// At most so many streamed slots are in a panel: a multiple of each instruction set's tile_rows.
constexpr int64_t kPanelSlots = 96;

// Throws std::invalid_argument if a position is out of range.
WeightGradPlan plan_weight_grad(const WantedEntries& wanted, const WeightGradKernels& kernels,
                                int n_threads);

}  // namespace spt
