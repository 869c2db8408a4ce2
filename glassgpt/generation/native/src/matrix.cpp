#include "matrix.h"

Matrix::Matrix(Format format, int N, int K, int group, Arena& arena) : format(format), N(N), K(K) {
    const int step = format == kFloat32 ? 1 : format == kBfloat16 ? 2 : 64;  // 64 inputs of 8 bits are one tile of AMX
    group_inputs = inputs = round_up(K, is_coded() && group ? group : step);
    if (is_coded() && group && group < inputs) {
        group_inputs = group;
        groups = inputs / group;
    }
    const int64_t codes = code_bytes(format, group_inputs) * kPanel;
    panel_bytes = groups > 1 ? groups * (codes + 2 * kPanel) : codes;
    data = arena.take(panels() * panel_bytes);
    if (is_coded()) {
        std::memset(data, format == kInt8 ? 0x80 : 0x88, panels() * panel_bytes);
        if (groups == 1) scales.assign(panels() * kPanel, 0.0f);
        for (int panel = 0; groups > 1 && panel < panels(); panel++)
            for (int g = 0; g < groups; g++) std::memset(data + panel * panel_bytes + scale_place(g, 0), 0, 2 * kPanel);
    }
}

int64_t Matrix::place(int k, int column) const {
    const int group = k / group_inputs, i = k % group_inputs;
    const int64_t start = group * (code_bytes(format, group_inputs) * kPanel + 2 * kPanel);
    switch (format) {
        case kFloat32: return 4 * (int64_t(k) * kPanel + column);
        case kBfloat16: return 2 * (int64_t(k / 2) * 2 * kPanel + 2 * column + k % 2);
        case kInt8: return start + int64_t(i / 4) * 4 * kPanel + 4 * column + i % 4;
        default: return start + int64_t(i / 8) * 4 * kPanel + 4 * column + i % 4;  // the half of the byte is i / 4 % 2
    }
}

int64_t Matrix::scale_place(int group, int column) const {
    const int64_t codes = code_bytes(format, group_inputs) * kPanel;
    return group * (codes + 2 * kPanel) + codes + 2 * column;
}

void Matrix::fill(int panel, int rows, const Stored& numbers) {
    uint8_t* start = data + panel * panel_bytes;
    numbers.read([&](auto get) {
        for (int k = 0; k < K; k++) {
            uint8_t* line = start + place(k, 0);
            if (format == kFloat32)
                for (int n = 0; n < rows; n++) reinterpret_cast<float*>(line)[n] = get(n, k);
            else
                for (int n = 0; n < rows; n++) reinterpret_cast<uint16_t*>(line)[2 * n] = to_bfloat16(get(n, k));
        }
    });
}

void Matrix::fill(int panel, int rows, const uint8_t* codes, const float* row_scales) {
    uint8_t* start = data + panel * panel_bytes;
    // 4 bits lie two codes to a byte, the earlier one in the low half
    auto small = [&](int n, int k) { return k < K ? codes[n * code_row_bytes() + k / 2] >> k % 2 * 4 & 15 : 8; };
    for (int k = 0; k < K && format == kInt4; k += k % 4 == 3 ? 5 : 1) {  // 0-3, 8-11, ...: each with the fourth after it
        uint8_t* line = start + place(k, 0);
        for (int n = 0; n < rows; n++) line[4 * n] = small(n, k) | small(n, k + 4) << 4;
    }
    for (int k = 0; k < K && format == kInt8; k++) {
        uint8_t* line = start + place(k, 0);
        for (int n = 0; n < rows; n++) line[4 * n] = codes[int64_t(n) * K + k];
    }
    for (int n = 0; n < rows; n++)
        for (int g = 0; g < groups; g++) {
            const float scale = row_scales[n * groups + g];
            if (groups == 1) scales[panel * kPanel + n] = scale;
            else reinterpret_cast<uint16_t*>(start + scale_place(g, 0))[n] = to_bfloat16(scale);
        }
}

void Matrix::row(int n, float* out) const {
    const uint8_t* start = data + (n / kPanel) * panel_bytes;
    const int column = n % kPanel;
    for (int k = 0; k < K; k++) {
        const uint8_t* at = start + place(k, column);
        if (format == kFloat32) out[k] = *reinterpret_cast<const float*>(at);
        else if (format == kBfloat16) out[k] = from_bfloat16(*reinterpret_cast<const uint16_t*>(at));
        else {
            const int code = format == kInt8 ? int(*at) - 128 : int(k % group_inputs / 4 % 2 ? *at >> 4 : *at & 15) - 8;
            const int g = k / group_inputs;
            out[k] = code * (groups == 1 ? scales[n] : from_bfloat16(*reinterpret_cast<const uint16_t*>(start + scale_place(g, column))));
        }
    }
}
