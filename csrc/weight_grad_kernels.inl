// The inner products in vectors of SPT_WIDTH floats; included once for each instruction set.
namespace SPT_PATH {

using Vector = float __attribute__((vector_size(SPT_WIDTH * 4)));

constexpr int kTileColumns = SPT_TILE_VECTORS * SPT_WIDTH;

SPT_TARGET SPT_INLINE Vector load(const float* source) {
    Vector vector;
    std::memcpy(&vector, source, sizeof vector);
    return vector;
}

SPT_TARGET SPT_INLINE void store(float* target, Vector vector) {
    std::memcpy(target, &vector, sizeof vector);
}

template <int n>
SPT_TARGET inline void dot(const float* a, const float* b, int64_t stride, const int32_t* slots,
                           int64_t tokens, float* sums) {
    const float* column[n];
    for (int j = 0; j < n; ++j) column[j] = b + slots[j] * stride;
    Vector partial[8] = {};
    // at least one round, else the compiler keeps the sums in memory for the case of none
    int64_t t = 0;
    do {
        const Vector shared = load(a + t);
        for (int j = 0; j < n; ++j) partial[j] += shared * load(column[j] + t);
        t += SPT_WIDTH;
    } while (t < tokens);
    float total[8];
    add_across(partial, total);
    for (int j = 0; j < n; ++j) sums[j] += total[j];
}

SPT_TARGET void dot_row(const float* a, const float* b, int64_t stride, const int32_t* slots,
                        int64_t n, int64_t tokens, float* sums) {
    for (; n >= 8; n -= 8, slots += 8, sums += 8) dot<8>(a, b, stride, slots, tokens, sums);
    switch (n) {
        case 1:
            return dot<1>(a, b, stride, slots, tokens, sums);
        case 2:
            return dot<2>(a, b, stride, slots, tokens, sums);
        case 3:
            return dot<3>(a, b, stride, slots, tokens, sums);
        case 4:
            return dot<4>(a, b, stride, slots, tokens, sums);
        case 5:
            return dot<5>(a, b, stride, slots, tokens, sums);
        case 6:
            return dot<6>(a, b, stride, slots, tokens, sums);
        case 7:
            return dot<7>(a, b, stride, slots, tokens, sums);
        default:
            return;
    }
}

using Tile = Vector[SPT_TILE_ROWS][SPT_TILE_VECTORS];

// sum += the product. The cells it is meant for have left the inner caches since they were last
// used, so they are fetched meanwhile: a row with each of the first tokens. All of them at once
// would wait for each other, and their addresses would take registers away from the tile.
SPT_TARGET SPT_INLINE void multiply(const float* a, const float* b, int64_t tokens, const float* c,
                                    int64_t c_stride, const float* next, Tile& sum) {
    const float* last_row = c + (SPT_TILE_ROWS - 1) * c_stride;
    do {
        for (int j = 0; j < kTileColumns; j += kLineFloats) SPT_PREFETCH(c + j);
        c += c == last_row ? 0 : c_stride;
        Vector row[SPT_TILE_VECTORS];
        for (int v = 0; v < SPT_TILE_VECTORS; ++v) row[v] = load(b + v * SPT_WIDTH);
        for (int i = 0; i < SPT_TILE_ROWS; ++i) {
            for (int v = 0; v < SPT_TILE_VECTORS; ++v) sum[i][v] += a[i] * row[v];
        }
        SPT_PREFETCH_OUTER(next);
        next += kLineFloats;
        a += SPT_TILE_ROWS;
        b += kTileColumns;
    } while (--tokens > 0);
}

SPT_TARGET void add_tile(const float* a, const float* b, int64_t tokens, float* c, int64_t c_stride,
                         const float* next) {
    Tile sum = {};
    multiply(a, b, tokens, c, c_stride, next, sum);
    for (int i = 0; i < SPT_TILE_ROWS; ++i) {
        for (int v = 0; v < SPT_TILE_VECTORS; ++v) {
            float* cells = c + i * c_stride + v * SPT_WIDTH;
            store(cells, load(cells) + sum[i][v]);
        }
    }
}

SPT_TARGET void add_squared_tile(const float* a, const float* b, int64_t tokens,
                                 const float* partial, float scale, float* c, int64_t c_stride,
                                 const float* next) {
    Tile sum = {};
    multiply(a, b, tokens, c, c_stride, next, sum);
    for (int i = 0; i < SPT_TILE_ROWS; ++i) {
        for (int v = 0; v < SPT_TILE_VECTORS; ++v) {
            Vector gradient = sum[i][v];
            if (partial != nullptr) gradient += load(partial + i * kTileColumns + v * SPT_WIDTH);
            gradient *= scale;
            float* cells = c + i * c_stride + v * SPT_WIDTH;
            store(cells, load(cells) + gradient * gradient);
        }
    }
}

constexpr WeightGradKernels kKernels{SPT_TILE_ROWS, kTileColumns, &dot_row, &add_tile,
                                     &add_squared_tile};

}  // namespace SPT_PATH

#undef SPT_PATH
#undef SPT_TARGET
#undef SPT_WIDTH
#undef SPT_TILE_ROWS
#undef SPT_TILE_VECTORS
