// What a kernel library offers, and how the numbers lie in memory. One library is compiled for each instruction set
// (kernels.cpp, several times); `engine.cpp` picks one when it starts and knows nothing of vectors.
#pragma once
// Functions here are static: each library has its own copy, in its own instructions.
#include <cstdint>
#include <cstring>

// ---- how a matrix lies in memory ------------------------------------------------------------------------------------
//
// A matrix W (N, K), which makes N outputs from K inputs, is cut into panels of 32 outputs. In a panel the inputs run
// slowly and the outputs quickly, so that one pass over it from front to back makes 32 outputs, of up to a dozen rows at once:
//
//   float32   [K][32]                                      one input at a time
//   bfloat16  [K / 2][32][2]                               two, as one instruction multiplies pairs
//   8 bits    [K / 4][32][4]                               four; a code is unsigned, 128 stands for zero
//   4 bits    [K / 8][32][4]                               low half bytes: inputs 0-3 of the eight, high ones: 4-7; zero is 8
//
// Codes have one float scale for each output, or, where inputs are grouped, a bfloat16 scale for each output and group:
// then 32 of them follow the codes of each group. K is padded with inputs that are zero, N with outputs that are.
// Keys and values in the cache lie in the same way: see engine.cpp.

constexpr int kPanel = 32;  // outputs in a panel
constexpr int kPage = 64;   // positions whose keys and values lie together
constexpr int kAhead = 8192;  // bytes that are fetched ahead of their use: far enough for memory, near enough for the first cache

enum Format : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };

struct Panel {
    Format format;
    int columns;              // outputs that lie side by side: 32, a page's positions or a head's width
    int wanted;               // so many of them are made, or a few more
    int groups;               // along K
    int group_inputs;         // inputs that share a scale; all (padded) where there is one group
    const uint8_t* data;
    const float* scales;      // of the columns; null where the scales lie in `data`, or where there are none
    int64_t ahead;            // bytes from what is read to what is fetched meanwhile
};

// Rows of inputs, made ready to be multiplied by panels of a format. Codes of 16 bits are two rows of 8: x = scale * (128 * high + low).
struct Rows {
    const void* data;         // float, bfloat16 or int8, `stride` numbers from row to row
    int64_t stride;
    int planes;               // 2 where a row is a high and a low one, which lie one after the other
    const float* scale;       // one each; codes only
    const int32_t* zeros;     // of each (plane of a) row and group: what is to be added as the code 0 is not the number 0; codes only
};

// One query that looks at keys [first, position] of its sequence.
struct Query {
    const float* q;           // (W)
    float* z;                 // (W): the result
    int32_t position, first;
    const float* bias;        // added to the score, by distance; null where there is none
};

// Keys and values of one head: pages of 64 positions.
struct Pages {
    Format format;
    int head_width;           // W
    int padded_width;         // columns of the values' panel
    const uint8_t* const* pages;
    int64_t key_offset, value_offset, next_offset; // in a page, for this head, and of the next one's keys
    int64_t key_scale_offset, value_scale_offset;  // 64 floats each; 8 bits only
};

enum Activation : int32_t { kGelu = 0, kSwiglu = 1, kRelu2 = 2 };

struct Kernels {
    const char* name;
    // y (rows, columns) = rows x panel + bias, or y += that. Row by row the same bits, however many rows there are.
    void (*multiply)(const Panel&, const Rows&, int first_row, int row_count, const float* bias, float* y, int64_t y_stride,
                     bool accumulate);
    // One row of inputs x (K) made ready; `inputs` is K padded. Returns nothing: data, scale and zeros are written where told.
    void (*prepare)(Format, int planes, const float* x, int K, int inputs, int group_inputs, void* data, float* scale, int32_t* zeros);
    // LayerNorm (bias may be null), or RMSNorm.
    void (*norm)(const float* x, int width, bool rms, float epsilon, const float* weight, const float* bias, float* y);
    // hidden = act(hidden), or, for SwiGLU, silu(gate) * hidden; `count` is that of whole panels.
    void (*activate)(Activation, float* hidden, const float* gate, int count);
    // softmax(q k) v for up to kQueries queries of one sequence and one head of keys.
    void (*attend)(const Pages&, const Query* queries, int count, float scale, float* scratch);
    // Of x (n): max, and sum of exp(x - max).
    void (*log_sum)(const float* x, int n, float* maximum, float* total);
    // e**((x - largest) / temperature) of x (n), none above `largest`.
    void (*shares)(const float* x, int n, float largest, float temperature, float* shares);
    // Operations a second of one thread's multiply-adds in registers, float32, bfloat16 or 8 bits; each counts as two.
    double (*rate)(Format);
    // Reads so many bytes (a multiple of 256) as fast as it can; gives some number made of them.
    uint64_t (*read)(const uint8_t*, int64_t bytes);
};

constexpr int kQueries = 12;  // of one call of `attend`

// Floats of scratch that `attend` needs for sequences of up to `positions`.
static inline int64_t attend_scratch(int64_t positions, int64_t head_width) {
    int64_t padded = (positions + kPage - 1) / kPage * kPage, wide = (head_width + 63) / 64 * 64;
    return kQueries * (2 * padded + 2 * wide + padded / kPage * 2 + 64);
}

static inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
static inline int64_t code_bytes(Format format, int inputs) {  // of one column
    return format == kFloat32 ? 4 * inputs : format == kBfloat16 ? 2 * inputs : format == kInt8 ? inputs : inputs / 2;
}
static inline uint16_t to_bfloat16(float x) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bits >> 16) | 0x40;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline float from_float16(uint16_t x) {
    uint32_t bits = uint32_t(x & 0x7fff) << 13;  // exponent and fraction are in place, but the exponent counts from 15 and not from 127
    float value;
    memcpy(&value, &bits, 4);
    value *= 5192296858534827628530496329220096.0f;  // 2**112; numbers below the normal ones come out right, too
    memcpy(&bits, &value, 4);
    bits |= ((x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u) | uint32_t(x & 0x8000) << 16;  // infinite, NaN; the sign
    memcpy(&value, &bits, 4);
    return value;
}
static inline float from_bfloat16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
