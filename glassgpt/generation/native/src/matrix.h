// A matrix in panels (kernels.h says how they lie): packed from rows, and read back row by row.
#pragma once
#include "kernels.h"
#include "memory.h"

#include <vector>

struct Matrix {
    Format format = kFloat32;
    int N = 0, K = 0;              // outputs, inputs
    int inputs = 0;                // K padded
    int groups = 1, group_inputs = 0;
    int64_t panel_bytes = 0;
    uint8_t* data = nullptr;
    std::vector<float> scales;     // (N padded), where a column has one scale

    Matrix() = default;
    Matrix(Format format, int N, int K, int group, Arena& arena);

    int panels() const { return (N + kPanel - 1) / kPanel; }
    int64_t row_bytes() const { return format == kInt8 ? K : format == kInt4 ? (K + 1) / 2 : 4 * int64_t(K); }  // as `fill` reads them
    bool is_coded() const { return format == kInt8 || format == kInt4; }
    Panel panel(int index) const {
        return {format, kPanel, kPanel, groups, group_inputs, data + index * panel_bytes, scales.empty() ? nullptr : scales.data() + index * kPanel, kAhead};
    }
    // Fills the outputs of one panel from rows: floats (rows, K), or codes (rows, K; 4 bits two to a byte) with scales (rows, groups).
    void fill(int panel, int rows, const void* values, const float* scales);
    // Row n as floats (K).
    void row(int n, float* out) const;

private:
    int64_t place(int k, int column) const;  // where a number lies in its panel, in bytes
    int64_t scale_place(int group, int column) const;
};
