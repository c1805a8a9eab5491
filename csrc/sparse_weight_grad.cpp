// The weight gradient at chosen positions only: sampled dense-dense product (SDDMM).
//
// Tokens are taken in chunks. Of each, the resident operand's touched columns are packed once, for
// all threads; then every panel of the streamed operand is packed, block of tokens by block, and
// multiplied while it is in the cache. A sum belongs to one panel and takes the blocks in order.
#include "sparse_weight_grad.h"

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "parallel.h"

namespace spt {
namespace {

constexpr int64_t kChunkBytes = 8 << 20;       // packed resident operand: within a last-level cache
constexpr int64_t kResidentBytes = 384 << 10;  // one block of it: within a second-level cache
constexpr int64_t kTileTokens = 256;           // a tile's resident columns stay in the first level
constexpr size_t kTiledPanels = 4;             // that share a fetch of the resident tiles
constexpr int64_t kTasksPerThread = 2;         // more would fetch more, fewer balance worse
constexpr int64_t kStreamPadding = 16;         // floats: keeps columns off each other's cache sets

int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

class Product {
  public:
    Product(const WeightGradPlan& plan, const SparseWeightGrad& problem, int n_threads)
        : problem_(problem), plan_(plan), kernels_(*plan.kernels) {
        if (!plan_.entry_order.empty()) sums_.resize(static_cast<size_t>(plan_.nnz));
        entry_sums_ = plan_.entry_order.empty() ? problem.grad : sums_.data();
        std::fill(entry_sums_, entry_sums_ + plan_.nnz, 0.0f);

        const int64_t n_resident = std::max<int64_t>(plan_.resident.n_slots(), 1);
        block_ = 256;
        while (block_ > 64 && block_ * n_resident * 4 > kResidentBytes) block_ /= 2;
        block_ = std::min(block_, std::max(round_up(problem.tokens, kTokenPadding), kTokenPadding));
        const int64_t fitting = kChunkBytes / (4 * n_resident) / kTileTokens * kTileTokens;
        // with every chunk the cells of the tiles are added to the entries: that must stay rare
        const int64_t fewest = plan_.any_tiled ? 2048 : kTileTokens;
        chunk_ = std::min(std::clamp<int64_t>(fitting, fewest, 4096),
                          round_up(problem.tokens, kTileTokens));
        n_tile_columns_ = round_up(n_resident, kernels_.tile_columns) / kernels_.tile_columns;

        // below a few million multiplications starting a thread takes longer than it saves
        const int64_t work = problem.tokens * (plan_.nnz + 8 * plan_.streamed.n_slots());
        n_threads_ = static_cast<int>(std::clamp<int64_t>(work >> 21, 1, n_threads));
        cut_into_tasks();
    }

    void run() {
        if (plan_.any_dots) {
            columns_.allocate((chunk_ + block_ - 1) / block_ * plan_.resident.n_slots() * stride());
        }
        if (plan_.any_tiled) {
            tiles_.allocate(n_tile_columns_ * kernels_.tile_columns * chunk_);
        }
        for (int64_t begin = 0; begin < problem_.tokens; begin += chunk_) {
            const TokenRange chunk{begin, std::min(chunk_, problem_.tokens - begin)};
            if (plan_.any_dots) pack_resident_columns(chunk);
            if (plan_.any_tiled) pack_resident_tiles(chunk);
            parallel_for(static_cast<int64_t>(tasks_.size()), n_threads_, [&](int64_t i) {
                const Task& task = tasks_[static_cast<size_t>(i)];
                if (plan_.panels[task.begin].tiled) {
                    multiply_tiles(task, chunk);
                } else {
                    multiply_dots(task, chunk);
                }
            });
        }
        for (size_t e = 0; e < sums_.size(); ++e) problem_.grad[plan_.entry_order[e]] = sums_[e];
    }

  private:
    // Panels begin..end-1, all tiled or all not.
    struct Task {
        size_t begin, end;
    };

    int64_t stride() const { return block_ + kStreamPadding; }

    const Operand& streamed() const {
        return plan_.rows_stream ? problem_.grad_output : problem_.input;
    }

    const Operand& resident() const {
        return plan_.rows_stream ? problem_.input : problem_.grad_output;
    }

    int64_t entries_before(int64_t slot) const {
        return plan_.entry_begin[static_cast<size_t>(slot)];
    }

    // Panels share a task so that what is fetched of the resident operand serves many of them.
    void cut_into_tasks() {
        auto cost = [&](const RowPanel& panel) {
            if (panel.tiled) return static_cast<int64_t>(panel.tiles.size());
            return entries_before(panel.slot_end) - entries_before(panel.slot_begin) +
                   8 * (panel.group_end - panel.group_begin);
        };
        int64_t total[2] = {0, 0};
        for (const RowPanel& panel : plan_.panels) total[panel.tiled] += cost(panel);
        int64_t in_task = 0;
        for (size_t p = 0; p < plan_.panels.size(); ++p) {
            const RowPanel& panel = plan_.panels[p];
            const int64_t share = total[panel.tiled] / (kTasksPerThread * n_threads_) + 1;
            const bool joins = p > 0 && panel.tiled == plan_.panels[p - 1].tiled &&
                               in_task + cost(panel) / 2 < share &&
                               !(panel.tiled && p - tasks_.back().begin == kTiledPanels);
            if (!joins) {
                tasks_.push_back({p, p});
                in_task = 0;
            }
            tasks_.back().end = p + 1;
            in_task += cost(panel);
        }
    }

    void pack_resident_columns(TokenRange chunk) {
        const std::vector<ColumnGroup>& groups = plan_.resident.groups;
        const int64_t n_groups = static_cast<int64_t>(groups.size());
        const int64_t n_blocks = (chunk.size + block_ - 1) / block_;
        parallel_for(n_blocks, n_threads_, [&](int64_t block) {
            const TokenRange tokens = part(chunk, block, block_);
            pack_columns(resident(), groups.data(), n_groups, 0, tokens, resident_block(block),
                         stride());
            if (plan_.rows_stream) {
                activate_columns(problem_.activation, plan_.resident.columns.data(),
                                 plan_.resident.n_slots(), tokens, resident_block(block), stride());
            }
        });
    }

    void pack_resident_tiles(TokenRange chunk) {
        const int64_t width = kernels_.tile_columns;
        const int64_t n_blocks = (chunk.size + kTileTokens - 1) / kTileTokens;
        parallel_for(n_blocks, n_threads_, [&](int64_t block) {
            const TokenRange tokens = part(chunk, block, kTileTokens);
            const int32_t* columns = plan_.resident.columns.data();
            const int64_t n_columns = plan_.resident.n_slots();
            pack_panels(resident(), columns, n_columns, width, tokens, resident_tile(block, 0),
                        width * kTileTokens);
            if (plan_.rows_stream) {
                activate_panels(problem_.activation, columns, n_columns, width, tokens,
                                resident_tile(block, 0), width * kTileTokens);
            }
        });
    }

    void multiply_dots(const Task& task, TokenRange chunk) {
        Buffer packed;  // [slot][stride]
        packed.allocate(kPanelSlots * stride());
        const int64_t n_blocks = (chunk.size + block_ - 1) / block_;
        for (int64_t block = 0; block < n_blocks; ++block) {
            const TokenRange tokens = part(chunk, block, block_);
            const int64_t padded = round_up(tokens.size, kTokenPadding);
            for (size_t p = task.begin; p < task.end; ++p) {
                const RowPanel& panel = plan_.panels[p];
                pack_columns(streamed(), plan_.streamed.groups.data() + panel.group_begin,
                             panel.group_end - panel.group_begin, panel.slot_begin, tokens,
                             packed.data(), stride());
                if (!plan_.rows_stream) {
                    activate_columns(
                        problem_.activation, plan_.streamed.columns.data() + panel.slot_begin,
                        panel.slot_end - panel.slot_begin, tokens, packed.data(), stride());
                }
                for (int64_t s = panel.slot_begin; s < panel.slot_end; ++s) {
                    const int64_t e = entries_before(s);
                    kernels_.dot_row(packed.data() + (s - panel.slot_begin) * stride(),
                                     resident_block(block), stride(), plan_.entry_slot.data() + e,
                                     entries_before(s + 1) - e, padded, entry_sums_ + e);
                }
            }
        }
    }

    void multiply_tiles(const Task& task, TokenRange chunk) {
        const int64_t height = kernels_.tile_rows;
        const int64_t cell_stride = n_tile_columns_ * kernels_.tile_columns;
        const int64_t n_cells = round_up(kPanelSlots, height) * cell_stride;
        const int64_t row_size = height * kTileTokens + kStreamPadding;
        const int64_t panel_size = round_up(kPanelSlots, height) / height * row_size;
        const RowPanel* panels = plan_.panels.data() + task.begin;
        const size_t n_panels = task.end - task.begin;
        Buffer packed;  // [panel][tile row][token][tile_rows], padded
        packed.allocate(static_cast<int64_t>(n_panels) * panel_size);
        Buffer cells;  // [panel][slot][resident slot]
        cells.allocate(static_cast<int64_t>(n_panels) * n_cells);
        std::fill(cells.data(), cells.data() + static_cast<int64_t>(n_panels) * n_cells, 0.0f);

        const int64_t n_blocks = (chunk.size + kTileTokens - 1) / kTileTokens;
        for (int64_t block = 0; block < n_blocks; ++block) {
            const TokenRange tokens = part(chunk, block, kTileTokens);
            for (size_t p = 0; p < n_panels; ++p) {
                const int32_t* columns = plan_.streamed.columns.data() + panels[p].slot_begin;
                const int64_t n_columns = panels[p].slot_end - panels[p].slot_begin;
                float* rows = packed.data() + static_cast<int64_t>(p) * panel_size;
                pack_panels(streamed(), columns, n_columns, height, tokens, rows, row_size);
                if (!plan_.rows_stream) {
                    activate_panels(problem_.activation, columns, n_columns, height, tokens, rows,
                                    row_size);
                }
            }
            std::vector<size_t> next(n_panels, 0);
            for (int64_t column = 0; column < n_tile_columns_; ++column) {
                for (size_t p = 0; p < n_panels; ++p) {
                    const std::vector<RowPanel::Tile>& tiles = panels[p].tiles;
                    const float* rows = packed.data() + static_cast<int64_t>(p) * panel_size;
                    float* sums = cells.data() + static_cast<int64_t>(p) * n_cells +
                                  column * kernels_.tile_columns;
                    for (size_t& i = next[p]; i < tiles.size() && tiles[i].column == column; ++i) {
                        kernels_.add_tile(rows + tiles[i].row * row_size,
                                          resident_tile(block, column), tokens.size,
                                          sums + tiles[i].row * height * cell_stride, cell_stride,
                                          resident_tile(block, column));
                    }
                }
            }
        }
        for (size_t p = 0; p < n_panels; ++p) {
            for (int64_t s = panels[p].slot_begin; s < panels[p].slot_end; ++s) {
                const float* sums = cells.data() + static_cast<int64_t>(p) * n_cells +
                                    (s - panels[p].slot_begin) * cell_stride;
                for (int64_t e = entries_before(s); e < entries_before(s + 1); ++e) {
                    entry_sums_[e] += sums[plan_.entry_slot[static_cast<size_t>(e)]];
                }
            }
        }
    }

    static TokenRange part(TokenRange chunk, int64_t block, int64_t size) {
        const int64_t begin = block * size;
        return {chunk.begin + begin, std::min(size, chunk.size - begin)};
    }

    float* resident_block(int64_t block) {
        return columns_.data() + block * plan_.resident.n_slots() * stride();
    }

    float* resident_tile(int64_t block, int64_t column) {
        return tiles_.data() +
               (block * n_tile_columns_ + column) * kernels_.tile_columns * kTileTokens;
    }

    const SparseWeightGrad& problem_;
    const WeightGradPlan& plan_;
    const WeightGradKernels& kernels_;
    int n_threads_;
    int64_t block_;           // tokens of a dot product at a time
    int64_t chunk_;           // tokens of which the resident operand is packed at a time
    int64_t n_tile_columns_;  // tiles side by side
    std::vector<Task> tasks_;
    std::vector<float> sums_;  // [nnz] in the order of the plan, if that is not the index's own
    float* entry_sums_;        // there, or straight in the result
    Buffer columns_;           // resident operand for dot products: [block][slot][stride]
    Buffer tiles_;             // and for tiles: [block][tile column][token][tile_columns]
};

}  // namespace

void sparse_weight_grad(const WeightGradPlan& plan, const SparseWeightGrad& problem,
                        int n_threads) {
    if (plan.nnz > 0) Product(plan, problem, n_threads).run();
}

}  // namespace spt
