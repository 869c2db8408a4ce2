// AMX's tiles in plain C++, slowly: so that the code which uses them can be tested on processors that have none.
#pragma once

static thread_local uint8_t emulated_tiles[8][16][64];

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_loadconfig
#undef _tile_release
#define _tile_loadconfig(shapes) ((void)(shapes))
#define _tile_release()
#define _tile_zero(t) memset(emulated_tiles[t], 0, sizeof emulated_tiles[t])
#define _tile_loadd(t, from, stride) emulated_load(t, (const uint8_t*)(from), stride)
#define _tile_stored(t, to, stride) emulated_store(t, (uint8_t*)(to), stride)
#define _tile_dpbsud(c, a, b) emulated_multiply(c, a, b)

static void emulated_load(int t, const uint8_t* from, int64_t stride) {
    for (int r = 0; r < 16; r++) memcpy(emulated_tiles[t][r], from + r * stride, 64);
}

static void emulated_store(int t, uint8_t* to, int64_t stride) {
    for (int r = 0; r < 16; r++) memcpy(to + r * stride, emulated_tiles[t][r], 64);
}

// c (16, 16) += a (16, 64 signed) x b (64 unsigned, 16): line k of b holds inputs 4k ... 4k + 3 of each column.
static void emulated_multiply(int c, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            int32_t sum;
            memcpy(&sum, &emulated_tiles[c][m][4 * n], 4);
            for (int k = 0; k < 16; k++)
                for (int j = 0; j < 4; j++) sum += int8_t(emulated_tiles[a][m][4 * k + j]) * int(emulated_tiles[b][k][4 * n + j]);
            memcpy(&emulated_tiles[c][m][4 * n], &sum, 4);
        }
}
