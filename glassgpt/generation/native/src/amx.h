// Rows of codes times a panel of 8 bits by AMX: tiles of 16 x 64 bytes, multiplied 16 x 16 at a time. The sums are whole numbers,
// so they are those of the other kernels; included inside the namespace of an instruction set.
#pragma once

#if defined(GG_AMX_EMULATED)
#include "amx_emulated.h"
#endif

constexpr int kTileRows = 32, kTileColumns = 32;  // of one block: 2 x 2 tiles of sums, 2 of inputs, 2 of weights
constexpr int kTileInputs = 64;

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The block of sums (kTileRows, kTileColumns) of codes (rows, stride) and columns of a panel.
static void block_sums(const Panel& p, int column, const int8_t* codes, int64_t stride, int32_t* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const uint8_t* w = p.data + 4 * column;
    const int64_t line = 4 * p.columns;
    for (int k = 0; k < p.group_inputs; k += kTileInputs, w += kTileInputs / 4 * line) {
        _tile_loadd(4, codes + k, stride);
        _tile_loadd(5, codes + 16 * stride + k, stride);
        _tile_loadd(6, w, line);
        _tile_loadd(7, w + 64, line);
        _tile_dpbsud(0, 4, 6);  // signed inputs, unsigned weights
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, sums, 4 * kTileColumns);
    _tile_stored(1, sums + 16, 4 * kTileColumns);
    _tile_stored(2, sums + 16 * kTileColumns, 4 * kTileColumns);
    _tile_stored(3, sums + 16 * kTileColumns + 16, 4 * kTileColumns);
}

static bool fits_amx(const Panel& p, const Rows& rows, int count) {
    return p.format == kInt8 && p.groups == 1 && p.group_inputs % kTileInputs == 0 && p.columns % kTileColumns == 0 &&
           count * rows.planes >= kTileRows;
}

// As many rows as fill whole blocks; gives their number.
template <int PLANES>
static int multiply_amx(const Panel& p, const Rows& rows, int first, int count, const float* bias, float* y, int64_t y_stride, bool accumulate) {
    static const TileShapes shapes;
    _tile_loadconfig(&shapes);
    constexpr int R = kTileRows / PLANES;
    alignas(64) int32_t sums[kTileRows * kTileColumns];
    int done = 0;
    for (; done + R <= count; done += R) {
        const int row = first + done;
        for (int column = 0; column < p.columns; column += kTileColumns) {
            block_sums(p, column, (const int8_t*)rows.data + int64_t(row) * PLANES * rows.stride, rows.stride, sums);
            for (int r = 0; r < R; r++)
                for (int c = 0; c < kTileColumns; c += L) {
                    I sum[PLANES];
                    for (int plane = 0; plane < PLANES; plane++) {
                        memcpy(&sum[plane], sums + (r * PLANES + plane) * kTileColumns + c, sizeof(I));
                        sum[plane] += all(rows.zeros[(row + r) * PLANES + plane]);
                    }
                    F value = PLANES == 2 ? fma(to_float(sum[0]), all(128.0f), to_float(sum[PLANES - 1])) : to_float(sum[0]);
                    F total = value * (p.scales ? load(p.scales + column + c) : all(1.0f));
                    finish(total, all(rows.scale[row + r]), bias ? bias + column + c : nullptr, y + (done + r) * y_stride + column + c, accumulate);
                }
        }
    }
    _tile_release();
    return done;
}
