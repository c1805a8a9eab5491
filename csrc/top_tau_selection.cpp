// What top-tau selected, and how it is written out.
#include "top_tau_selection.h"

namespace spt {
namespace {

// Writes base + offset_at(i) for what of the `n` patterns is selected.
template <typename PatternAt, typename OffsetAt>
void write_selected(const Part& part, uint32_t threshold, int64_t base, int64_t n,
                    PatternAt&& pattern_at, OffsetAt&& offset_at, int64_t* out) {
    int64_t* const end = out + part.n_above + part.n_ties;
    if (part.n_ties == 0 || part.n_ties == part.n_at) {
        // without a branch, which a processor could not predict
        const int32_t low = static_cast<int32_t>(part.n_ties == 0 ? threshold : threshold - 1);
        for (int64_t i = 0; i < n && out < end; ++i) {
            *out = base + offset_at(i);
            out += static_cast<int32_t>(pattern_at(i)) > low;
        }
        return;
    }
    int64_t n_ties = part.n_ties;
    for (int64_t i = 0; i < n && out < end; ++i) {
        const int32_t pattern = static_cast<int32_t>(pattern_at(i));
        if (pattern < static_cast<int32_t>(threshold)) continue;
        if (pattern == static_cast<int32_t>(threshold) && n_ties-- <= 0) continue;
        *out++ = base + offset_at(i);
    }
}

}  // namespace

std::vector<int64_t> Selection::counts(size_t n_tensors) const {
    std::vector<int64_t> counts(n_tensors);
    for (size_t p = 0; p < parts.size(); ++p) {
        counts[static_cast<size_t>(pieces[p].tensor)] += parts[p].n_above + parts[p].n_ties;
    }
    return counts;
}

int64_t Selection::write(const std::vector<int64_t*>& outputs, int n_threads) const {
    std::vector<int64_t*> next = outputs;
    std::vector<int64_t*> start(pieces.size());
    std::vector<size_t> touched;
    int64_t n_bytes = 0;
    for (size_t p = 0; p < pieces.size(); ++p) {
        const int64_t n = parts[p].n_above + parts[p].n_ties;
        start[p] = next[static_cast<size_t>(pieces[p].tensor)];
        next[static_cast<size_t>(pieces[p].tensor)] += n;
        if (n == 0) continue;
        touched.push_back(p);
        if (!all_kept) n_bytes += pieces[p].n_bytes();
    }
    parallel_for(static_cast<int64_t>(touched.size()), n_threads, [&](int64_t i) {
        const size_t p = touched[static_cast<size_t>(i)];
        const Part& part = parts[p];
        if (all_kept) {
            const Kept& kept = census[p].kept;
            write_selected(
                part, threshold, pieces[p].base, static_cast<int64_t>(kept.patterns.size()),
                [&](int64_t j) { return kept.patterns[static_cast<size_t>(j)]; },
                [&](int64_t j) {
                    return static_cast<int64_t>(kept.offsets[static_cast<size_t>(j)]);
                },
                start[p]);
        } else if (part.n_ties == 0 || part.n_ties == part.n_at) {
            write_above(pieces[p], part.n_ties == 0 ? threshold : threshold - 1, start[p],
                        start[p] + part.n_above + part.n_ties);
        } else {
            pieces[p].with_patterns([&](auto pattern_at) {
                write_selected(
                    part, threshold, pieces[p].base, pieces[p].n, pattern_at,
                    [](int64_t j) { return j; }, start[p]);
            });
        }
    });
    return n_bytes;
}

}  // namespace spt
