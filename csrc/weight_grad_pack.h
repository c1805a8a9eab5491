// Copies blocks of tokens of the touched columns into the layouts that the products read.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace spt {

// A matrix [tokens, columns], of which a touched column is an operand of some entry.
struct Operand {
    const void* data;
    DType dtype;
    int64_t row_stride;  // elements from token to token
    int64_t n_columns;
};

// Eight neighbouring columns, of which at least one is touched.
struct ColumnGroup {
    int32_t column;  // the first of the eight
    int32_t slot;    // of the first touched one: touched columns are numbered in ascending order
    uint32_t mask;   // bit i: column + i is touched
};

struct TokenRange {
    int64_t begin;
    int64_t size;
};

// Floats to which pack_columns pads the tokens of a column with zeros.
constexpr int64_t kTokenPadding = 16;

// Transposes: out[(slot - first_slot) * stride + t], fp32, for every touched column of the groups.
void pack_columns(const Operand& operand, const ColumnGroup* groups, int64_t n_groups,
                  int64_t first_slot, TokenRange tokens, float* out, int64_t stride);

// Interleaves: panel p holds `width` columns from columns[p * width] on, as
// out[p * panel_stride + t * width + i], fp32; the last one is filled up with zeros.
void pack_panels(const Operand& operand, const int32_t* columns, int64_t n_columns, int64_t width,
                 TokenRange tokens, float* out, int64_t panel_stride);

}  // namespace spt
