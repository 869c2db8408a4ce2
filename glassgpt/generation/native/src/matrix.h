// A matrix in panels (kernels.h says how they lie): packed from rows, and read back row by row.
#pragma once
#include "kernels.h"
#include "memory.h"

#include <vector>

// Numbers (rows, columns) as a file has them, row and column any steps apart.
enum Number : int32_t { kStoredFloat32, kStoredBfloat16, kStoredFloat16 };
struct Stored {
    Number number;
    const void* data;
    int64_t row_step, column_step;

    Stored from_row(int64_t row) const {
        return {number, static_cast<const char*>(data) + row * row_step * (number == kStoredFloat32 ? 4 : 2), row_step, column_step};
    }
    // work(get), where get(row, column) gives a float.
    template <class Work>
    auto read(Work work) const {
        auto place = [this](int64_t row, int64_t column) { return row * row_step + column * column_step; };
        const auto* halves = static_cast<const uint16_t*>(data);
        if (number == kStoredFloat32) return work([&](int64_t r, int64_t c) { return static_cast<const float*>(data)[place(r, c)]; });
        if (number == kStoredBfloat16) return work([&](int64_t r, int64_t c) { return from_bfloat16(halves[place(r, c)]); });
        return work([&](int64_t r, int64_t c) { return from_float16(halves[place(r, c)]); });
    }
};

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
    int64_t code_row_bytes() const { return format == kInt8 ? K : (K + 1) / 2; }
    bool is_coded() const { return format == kInt8 || format == kInt4; }
    Panel panel(int index) const {
        return {format, kPanel, kPanel, groups, group_inputs, data + index * panel_bytes, scales.empty() ? nullptr : scales.data() + index * kPanel, kAhead};
    }
    // Fills the outputs of one panel from rows of floats (rows, K).
    void fill(int panel, int rows, const Stored& numbers);
    // The same from codes (rows, K; 4 bits two to a byte) and scales (rows, groups).
    void fill(int panel, int rows, const uint8_t* codes, const float* scales);
    // Row n as floats (K).
    void row(int n, float* out) const;

private:
    int64_t place(int k, int column) const;  // where a number lies in its panel, in bytes
    int64_t scale_place(int group, int column) const;
};
