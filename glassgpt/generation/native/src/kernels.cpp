// The arithmetic, compiled once for each instruction set (GG_ISA names it). Rules that hold for all of it:
//  - a row's result never depends on which rows stand beside it: every sum runs over the same numbers in the same order,
//    so one token at a time, a batch and a whole prompt give the same bits;
//  - loops over single numbers are plain C: the compiler makes vectors of them.
#include "kernels.h"

#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#if defined(GG_AVX512) || defined(GG_AVX2)
#include <immintrin.h>
#endif

namespace GG_ISA {
#include "simd.h"

// ---- rows x panel -----------------------------------------------------------------------------------------------------

#if defined(GG_AVX512)
constexpr int kVectors = 2;       // of columns in a tile: a panel, so that memory is read as it lies
constexpr int kSums = 24;         // in registers: of 32, with the weights and the inputs beside them
#elif defined(GG_AVX2)
constexpr int kVectors = 2;       // with 16 registers
constexpr int kSums = 12;
#else
constexpr int kVectors = 4;
constexpr int kSums = 8;
#endif

static inline void finish(F value, const float* bias, float* y, bool accumulate) {
    if (bias) value = value + load(bias);
    store(y, accumulate ? load(y) + value : value);
}

// The same for value * scale. Every product that is added to something is written as an fma: left to itself, the compiler
// would round it once in one copy of a tile and twice in another.
static inline void finish(F value, F scale, const float* bias, float* y, bool accumulate) {
    if (bias) return finish(fma(value, scale, load(bias)), nullptr, y, accumulate);
    store(y, accumulate ? fma(value, scale, load(y)) : value * scale);
}

// R rows, C vectors of columns.
template <int R, int C>
static void tile_float32(const Panel& p, int column, const Rows& rows, int first, const float* bias, float* y, int64_t y_stride,
                         bool accumulate) {
    F sum[R][C] = {};
    const float* a = (const float*)rows.data + first * rows.stride;
    const uint8_t* w = p.data + 4 * column;
    for (int k = 0; k < p.group_inputs; k++, w += 4 * p.columns) {
        F weight[C];
        for (int c = 0; c < C; c++) weight[c] = load((const float*)w + c * L), fetch_ahead(w + p.ahead + 4 * c * L);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) sum[r][c] = fma(weight[c], all(a[r * rows.stride + k]), sum[r][c]);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) finish(sum[r][c], bias ? bias + column + c * L : nullptr, y + r * y_stride + column + c * L, accumulate);
}

template <int R, int C>
static void tile_bfloat16(const Panel& p, int column, const Rows& rows, int first, const float* bias, float* y, int64_t y_stride,
                          bool accumulate) {
    F sum[R][C] = {};
    const uint16_t* a = (const uint16_t*)rows.data + first * rows.stride;
    const uint8_t* w = p.data + 4 * column;
    for (int k = 0; k < p.group_inputs; k += 2, w += 4 * p.columns) {
        I weight[C];
        for (int c = 0; c < C; c++) weight[c] = load_codes(w + 4 * c * L), fetch_ahead(w + p.ahead + 4 * c * L);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) sum[r][c] = dot2(sum[r][c], weight[c], word(a + r * rows.stride + k));
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) finish(sum[r][c], bias ? bias + column + c * L : nullptr, y + r * y_stride + column + c * L, accumulate);
}

// Codes: whole numbers are summed exactly within a group, then scaled and added up as floats.
template <bool SMALL, bool GROUPED, int PLANES, int R, int C>
static void tile_codes(const Panel& p, int column, const Rows& rows, int first, const float* bias, float* y, int64_t y_stride,
                       bool accumulate) {
    constexpr int kRows = R * PLANES;
    const int8_t* a = (const int8_t*)rows.data + first * PLANES * rows.stride;
    const int32_t* zeros = rows.zeros + first * PLANES * p.groups;
    const uint8_t* w = p.data + 4 * column;
    const int step = 4 * p.columns;
    const int groups = GROUPED ? p.groups : 1;
    F total[R][C];
    if (GROUPED)
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) total[r][c] = F{};
    for (int g = 0; g < groups; g++, a += p.group_inputs) {
        I sum[kRows][C];
        for (int r = 0; r < kRows; r++)
            for (int c = 0; c < C; c++) sum[r][c] = all(zeros[r * p.groups + g]);
        for (int k = 0; k < p.group_inputs; k += SMALL ? 8 : 4, w += step) {
            I codes[C];
            for (int c = 0; c < C; c++) codes[c] = load_codes(w + 4 * c * L), fetch_ahead(w + p.ahead + 4 * c * L);
            if (SMALL) {
                const I low = all(0x0f0f0f0f);
                for (int r = 0; r < kRows; r++)
                    for (int c = 0; c < C; c++) sum[r][c] = dot4_small(sum[r][c], codes[c] & low, word(a + r * rows.stride + k));
                for (int r = 0; r < kRows; r++)
                    for (int c = 0; c < C; c++) sum[r][c] = dot4_small(sum[r][c], (codes[c] >> 4) & low, word(a + r * rows.stride + k + 4));
            } else {
                for (int r = 0; r < kRows; r++)
                    for (int c = 0; c < C; c++) sum[r][c] = dot4(sum[r][c], codes[c], word(a + r * rows.stride + k));
            }
        }
        for (int c = 0; c < C; c++) {
            F scale = GROUPED ? load_bfloat16(w - 4 * column + 2 * (column + c * L)) : p.scales ? load(p.scales + column + c * L) : all(1.0f);
            for (int r = 0; r < R; r++) {
                F value = PLANES == 2 ? fma(to_float(sum[2 * r][c]), all(128.0f), to_float(sum[2 * r + 1][c])) : to_float(sum[r][c]);
                total[r][c] = GROUPED ? fma(value, scale, total[r][c]) : value * scale;
            }
        }
        w += 2 * p.columns;  // the scales of the group
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++)
            finish(total[r][c], all(rows.scale[first + r]), bias ? bias + column + c * L : nullptr, y + r * y_stride + column + c * L,
                   accumulate);
}

using Tile = void (*)(const Panel&, int column, const Rows&, int first, const float* bias, float* y, int64_t y_stride, bool accumulate);

template <int R, int C> struct Float32 { static constexpr Tile run = tile_float32<R, C>; };
template <int R, int C> struct Bfloat16 { static constexpr Tile run = tile_bfloat16<R, C>; };
template <int R, int C> struct Int8 { static constexpr Tile run = tile_codes<false, false, 1, R, C>; };
template <int R, int C> struct Int8Fine { static constexpr Tile run = tile_codes<false, false, 2, R, C>; };
template <int R, int C> struct Int8Grouped { static constexpr Tile run = tile_codes<false, true, 1, R, C>; };
template <int R, int C> struct Int8GroupedFine { static constexpr Tile run = tile_codes<false, true, 2, R, C>; };
template <int R, int C> struct Int4 { static constexpr Tile run = tile_codes<true, false, 1, R, C>; };
template <int R, int C> struct Int4Fine { static constexpr Tile run = tile_codes<true, false, 2, R, C>; };
template <int R, int C> struct Int4Grouped { static constexpr Tile run = tile_codes<true, true, 1, R, C>; };
template <int R, int C> struct Int4GroupedFine { static constexpr Tile run = tile_codes<true, true, 2, R, C>; };

// The tile for `rows` rows, at most MAX, and C vectors.
template <template <int, int> class Kind, int MAX, int C>
static Tile tile_of(int rows) {
    if constexpr (MAX > 1)
        if (rows < MAX) return tile_of<Kind, MAX - 1, C>(rows);
    return Kind<MAX, C>::run;
}

// All columns and rows of one panel, MAX rows at a time at most: their sums must fit the registers.
template <template <int, int> class Kind, int SUMS>
static void tiles(const Panel& p, const Rows& rows, int first, int count, const float* bias, float* y, int64_t y_stride, bool accumulate) {
    constexpr int kMost = SUMS / kVectors < 1 ? 1 : SUMS / kVectors;
    constexpr int kFew = kMost < 4 ? 1 : kMost / 4;  // rows whose products are so few that each would wait for the last: side by side
    const int turns = (count + kMost - 1) / kMost;
    for (int column = 0, vectors; column < p.wanted; column += vectors * L) {
        vectors = count <= kFew && column + 2 * kVectors * L <= p.columns ? 2 * kVectors : column + kVectors * L <= p.columns ? kVectors : 1;
        for (int turn = 0, row = 0, now; turn < turns; turn++, row += now) {
            now = (count - row) / (turns - turn);  // as even as can be
            const Tile tile = vectors == 1 ? tile_of<Kind, kMost, 1>(now) : vectors == kVectors ? tile_of<Kind, kMost, kVectors>(now)
                                                                                               : tile_of<Kind, kFew, 2 * kVectors>(now);
            tile(p, column, rows, first + row, bias, y + row * y_stride, y_stride, accumulate);
        }
    }
}

#if defined(GG_AMX)
#include "amx.h"
#endif

static void multiply(const Panel& p, const Rows& rows, int first, int count, const float* bias, float* y, int64_t y_stride, bool accumulate) {
#if defined(GG_AMX)
    if (fits_amx(p, rows, count)) {
        const int done = (rows.planes == 2 ? multiply_amx<2> : multiply_amx<1>)(p, rows, first, count, bias, y, y_stride, accumulate);
        first += done, count -= done, y += done * y_stride;
    }
#endif
    // a row of codes has one sum, or two (planes), and where groups are scaled one by one also their total
    const bool fine = rows.planes == 2, grouped = p.groups > 1;
    if (p.format == kFloat32) return tiles<Float32, kSums>(p, rows, first, count, bias, y, y_stride, accumulate);
    if (p.format == kBfloat16) return tiles<Bfloat16, kSums>(p, rows, first, count, bias, y, y_stride, accumulate);
    const bool small = p.format == kInt4;
    if (small && grouped && fine) return tiles<Int4GroupedFine, kSums / 3>(p, rows, first, count, bias, y, y_stride, accumulate);
    if (small && grouped) return tiles<Int4Grouped, kSums * 2 / 3>(p, rows, first, count, bias, y, y_stride, accumulate);
    if (small && fine) return tiles<Int4Fine, kSums / 2>(p, rows, first, count, bias, y, y_stride, accumulate);
    if (small) return tiles<Int4, kSums>(p, rows, first, count, bias, y, y_stride, accumulate);
    if (grouped && fine) return tiles<Int8GroupedFine, kSums / 3>(p, rows, first, count, bias, y, y_stride, accumulate);
    if (grouped) return tiles<Int8Grouped, kSums * 2 / 3>(p, rows, first, count, bias, y, y_stride, accumulate);
    if (fine) return tiles<Int8Fine, kSums / 2>(p, rows, first, count, bias, y, y_stride, accumulate);
    tiles<Int8, kSums>(p, rows, first, count, bias, y, y_stride, accumulate);
}

// ---- rows made ready ----------------------------------------------------------------------------------------------------

// Of four vectors that were filled side by side, as one would wait for itself.
static inline float largest_of(const F (&x)[4], float most) {
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < L; i++) most = x[j][i] > most ? x[j][i] : most;
    return most;
}
static inline float added(const F (&x)[4]) {
    float sum = 0;
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < L; i++) sum += x[j][i];
    return sum;
}

static inline int32_t added(const int32_t* x, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    return sum;
}

static void prepare(Format format, int planes, const float* x, int K, int inputs, int group_inputs, void* data, float* scale, int32_t* zeros) {
    if (format == kFloat32) {
        float* y = (float*)data;
        memcpy(y, x, 4 * K);
        for (int k = K; k < inputs; k++) y[k] = 0;
        return;
    }
    if (format == kBfloat16) {
        uint16_t* y = (uint16_t*)data;
        int whole = 0;
#if defined(GG_BF16)
        for (; whole + L <= K; whole += L) {
            __m256bh short_ones = _mm512_cvtneps_pbh((__m512)load(x + whole));
            memcpy(y + whole, &short_ones, 2 * L);
        }
#endif
#pragma omp simd
        for (int k = whole; k < K; k++) y[k] = to_bfloat16(x[k]);
        for (int k = K; k < inputs; k++) y[k] = 0;
        return;
    }
    float largest = 0, nothing = 0;  // nothing is NaN where a number is not finite
    F most_of[4] = {}, nothing_of[4] = {};  // four sums at a time: one would wait for itself
    int done = 0;
    for (; done + 4 * L <= K; done += 4 * L)
        for (int i = 0; i < 4; i++) {
            F x4 = load(x + done + i * L), size = x4 < 0 ? -x4 : x4;
            most_of[i] = size > most_of[i] ? size : most_of[i];
            nothing_of[i] += x4 - x4;
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < L; j++) largest = most_of[i][j] > largest ? most_of[i][j] : largest, nothing += nothing_of[i][j];
    for (; done < K; done++) largest = std::fabs(x[done]) > largest ? std::fabs(x[done]) : largest, nothing += x[done] - x[done];
    const bool broken = nothing != 0;
    const float most = planes == 2 ? 127 * 128 + 63 : 127;  // the largest code: what the two planes can say together
    *scale = broken ? std::numeric_limits<float>::quiet_NaN() : largest / most;
    const float inverse = !broken && largest > 1e-30f ? most / largest : 0;  // numbers so small count as 0: most / largest would be infinite
    int8_t* high = (int8_t*)data;
    int8_t* low = high + inputs;
    if (planes == 2) {
#pragma omp simd
        for (int k = 0; k < K; k++) {
            int code = broken ? 0 : int(std::rint(x[k] * inverse));
            int upper = (code + 64) >> 7;  // to the nearest, so that the rest is -64 to 63
            high[k] = int8_t(upper);
            low[k] = int8_t(code - upper * 128);
        }
        for (int k = K; k < inputs; k++) high[k] = low[k] = 0;
    } else {
#pragma omp simd
        for (int k = 0; k < K; k++) high[k] = int8_t(broken ? 0 : int(std::rint(x[k] * inverse)));
        for (int k = K; k < inputs; k++) high[k] = 0;
    }
    // the planes lie one after the other, and so do their groups
    const int count = planes * inputs / group_inputs, zero = format == kInt4 ? 8 : kZero8;
    const int whole = group_inputs / (4 * L), side_by_side = 4 * L % group_inputs ? 1 : 4 * L / group_inputs;
    for (int g = 0; g < count;) {
        const int8_t* codes = high + g * group_inputs;
        int32_t lanes[L];
        if (side_by_side > 1 && g + side_by_side <= count) {  // a vector is several groups
            const int size = group_inputs / 4;
            store(lanes, sums_of_four(codes));
            for (int i = 0; i < side_by_side; i++, g++) zeros[g] = -zero * added(lanes + i * size, size);
            continue;
        }
        I sum = {};
        for (int i = 0; i < whole; i++) sum += sums_of_four(codes + i * 4 * L);
        store(lanes, sum);
        int32_t rest = 0;
        for (int k = whole * 4 * L; k < group_inputs; k++) rest += codes[k];
        zeros[g++] = -zero * (added(lanes, L) + rest);
    }
}

// ---- single numbers -----------------------------------------------------------------------------------------------------

// e**x to 1e-7, relative; 0 below -87 (Cephes' polynomial, Moshier 1989). NaN stays NaN.
static inline F exponential(F x) {
    const F low = all(-87.0f), high = all(88.0f);
    F held = low > x ? low : x;
    held = high < held ? high : held;
    const F shifted = fma(held, all(1.442695041f), all(12582912.0f));  // 1.5 * 2**23: whole numbers stand in its last bits
    const F n = shifted - all(12582912.0f);
    F r = fma(n, all(-0.693359375f), held);
    r = fma(n, all(2.12194440e-4f), r);
    F p = fma(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    const F power = (F)(((I)shifted << 23) + (127 << 23));
    return x < low ? F{} : p * power;
}

static void norm(const float* x, int width, bool rms, float epsilon, const float* weight, const float* bias, float* y) {
    float sum = 0, squares = 0;
    if (!rms)
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < width; i++) sum += x[i];
    const float mean = sum / width;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < width; i++) squares += (x[i] - mean) * (x[i] - mean);
    const float factor = 1.0f / std::sqrt(squares / width + epsilon);
    if (bias)
#pragma omp simd
        for (int i = 0; i < width; i++) y[i] = (x[i] - mean) * factor * weight[i] + bias[i];
    else
#pragma omp simd
        for (int i = 0; i < width; i++) y[i] = (x[i] - mean) * factor * weight[i];
}

static void activate(Activation kind, float* hidden, const float* gate, int count) {
    if (kind == kGelu)  // x / (1 + e**-2u) = 0.5 x (1 + tanh u)
        for (int i = 0; i < count; i += L) {
            const F x = load(hidden + i), u = 0.7978845608f * fma(x * x, 0.044715f * x, x);
            store(hidden + i, x / (1.0f + exponential(-2.0f * u)));
        }
    else if (kind == kRelu2)
        for (int i = 0; i < count; i += L) {
            const F x = load(hidden + i);
            store(hidden + i, x < 0 ? F{} : x * x);
        }
    else
        for (int i = 0; i < count; i += L) {
            const F x = load(gate + i);
            store(hidden + i, x / (1.0f + exponential(-x)) * load(hidden + i));
        }
}

static void log_sum(const float* x, int n, float* maximum, float* total) {
    const float none = -std::numeric_limits<float>::infinity();
    F most_of[4] = {all(none), all(none), all(none), all(none)}, sums[4] = {};
    const int whole = n / (4 * L) * (4 * L);
    for (int i = 0; i < whole; i += 4 * L)
        for (int j = 0; j < 4; j++) {
            const F number = load(x + i + j * L);
            most_of[j] = number > most_of[j] ? number : most_of[j];
        }
    float most = largest_of(most_of, none);
    for (int i = whole; i < n; i++) most = x[i] > most ? x[i] : most;
    const float base = most == none ? 0 : most;  // all of them may be -inf
    for (int i = 0; i < whole; i += 4 * L)
        for (int j = 0; j < 4; j++) sums[j] += exponential(load(x + i + j * L) - base);
    for (int i = whole; i < n; i += L) {
        F rest = all(none);
        memcpy(&rest, x + i, 4 * (n - i < L ? n - i : L));
        sums[0] += exponential(rest - base);
    }
    *maximum = most;
    *total = added(sums);  // NaN if any x is
}

static void shares(const float* x, int n, float largest, float temperature, float* shares) {
    const int whole = n / L * L;
    for (int i = 0; i < whole; i += L) store(shares + i, exponential((load(x + i) - largest) / temperature));
    if (whole < n) {
        F rest = {};
        memcpy(&rest, x + whole, 4 * (n - whole));
        rest = exponential((rest - largest) / temperature);
        memcpy(shares + whole, &rest, 4 * (n - whole));
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------------

// Scores of one query (keys first ... position) to e**(score - largest); what it does not see is 0. Gives their sum. All loops
// run over whole pages, begin to end: what is not seen adds nothing, and a sum's order is the same for every batch.
static float exponentials(float* s, const Query& query, float scale, int begin, int end) {
    const float none = -std::numeric_limits<float>::infinity();
    for (int i = begin; i < query.first; i++) s[i] = none;
    for (int i = query.position + 1; i < end; i++) s[i] = none;
    if (query.bias) {
#pragma omp simd
        for (int i = query.first; i <= query.position; i++) s[i] = s[i] * scale + query.bias[query.position - i];
        scale = 1.0f;
    }
    F most_of[4] = {all(none), all(none), all(none), all(none)}, sums[4] = {};
    for (int i = begin; i < end; i += 4 * L)
        for (int j = 0; j < 4; j++) {
            F score = load(s + i + j * L);
            most_of[j] = score > most_of[j] ? score : most_of[j];
        }
    const float most = largest_of(most_of, none);
    for (int i = begin; i < end; i += 4 * L)
        for (int j = 0; j < 4; j++) {
            const F share = exponential((load(s + i + j * L) - most) * scale);
            store(s + i + j * L, share);
            sums[j] += share;
        }
    return added(sums);
}

static void attend(const Pages& cache, const Query* queries, int count, float scale, float* scratch) {
    const int W = cache.head_width, wide = round_up(W, 64), planes = cache.format == kInt8 ? 2 : 1;
    int first = queries[0].first, last = queries[0].position;
    for (int i = 1; i < count; i++) {
        first = queries[i].first < first ? queries[i].first : first;
        last = queries[i].position > last ? queries[i].position : last;
    }
    const int first_page = first / kPage, end_page = last / kPage + 1, begin = first_page * kPage, end = end_page * kPage;
    const int key_inputs = round_up(W, 4), pages = end_page - first_page;
    auto used = [&](int page) { return last + 1 - page * kPage < kPage ? last + 1 - page * kPage : kPage; };  // positions that anybody sees
    float* scores = scratch;                                // (count, end)
    void* ready = scores + int64_t(kQueries) * end;         // rows of queries, then of shares
    float* row_scale = (float*)ready + int64_t(kQueries) * (end > wide ? end : wide);
    float total[kQueries];                                  // what the shares add up to
    int32_t* zeros = (int32_t*)(row_scale + kQueries);      // (count, planes, pages)
    float* raw = (float*)(zeros + int64_t(kQueries) * planes * (end / kPage)); // (count, padded width)

    const int unit = cache.format == kFloat32 ? 4 : cache.format == kBfloat16 ? 2 : 1;
    for (int i = 0; i < count; i++)
        prepare(cache.format, planes, queries[i].q, W, key_inputs, key_inputs, (char*)ready + int64_t(i) * planes * key_inputs * unit,
                row_scale + i, zeros + i * planes);
    Rows rows = {ready, key_inputs, planes, row_scale, zeros};
    for (int page = first_page; page < end_page; page++) {
        const uint8_t* data = cache.pages[page];
        const uint8_t* next = page + 1 < end_page ? cache.pages[page + 1] + cache.key_offset : cache.pages[first_page] + cache.value_offset;
        Panel keys = {cache.format, kPage, used(page), 1, key_inputs, data + cache.key_offset,
                      cache.format == kInt8 ? (const float*)(data + cache.key_scale_offset) : nullptr, next - (data + cache.key_offset)};
        multiply(keys, rows, 0, count, nullptr, scores + page * kPage, end, false);
    }
    for (int i = 0; i < count; i++) {
        float* s = scores + int64_t(i) * end;
        total[i] = exponentials(s, queries[i], scale, begin, end);
        if (cache.format == kInt8)  // values have a scale for each position: the shares take it over
            for (int page = first_page; page < end_page; page++) {
                const float* value_scale = (const float*)(cache.pages[page] + cache.value_scale_offset);
                for (int j = 0; j < kPage; j++) s[page * kPage + j] *= value_scale[j];
            }
        prepare(cache.format, planes, s + begin, end - begin, end - begin, kPage, (char*)ready + int64_t(i) * planes * (end - begin) * unit,
                row_scale + i, zeros + int64_t(i) * planes * pages);
    }
    for (int page = first_page; page < end_page; page++) {
        const uint8_t* data = cache.pages[page] + cache.value_offset;
        const uint8_t* next = page + 1 < end_page ? cache.pages[page + 1] + cache.value_offset : cache.pages[first_page] + cache.next_offset;
        Panel values = {cache.format, cache.padded_width, cache.padded_width, 1, round_up(used(page), 4), data, nullptr, next - data};
        const int64_t skipped = int64_t(page - first_page) * kPage;
        int32_t page_zeros[kQueries * 2];
        if (cache.format == kInt8)
            for (int i = 0; i < count * planes; i++) page_zeros[i] = zeros[i * pages + page - first_page];
        Rows shares = {(const char*)ready + skipped * unit, end - begin, planes, row_scale, page_zeros};
        multiply(values, shares, 0, count, nullptr, raw, cache.padded_width, page > first_page);
    }
    for (int i = 0; i < count; i++) {
        const float *from = raw + i * cache.padded_width, share = 1.0f / total[i];
        float* to = queries[i].z;
#pragma omp simd
        for (int k = 0; k < W; k++) to[k] = from[k] * share;
    }
}

// ---- how fast it could be ---------------------------------------------------------------------------------------------------

template <Format FORMAT>
static double rate_of() {
    constexpr int kChains = 12, kRounds = 8'000'000, kProducts = FORMAT == kFloat32 ? L : FORMAT == kBfloat16 ? 2 * L : 4 * L;
    F f[kChains], small = all(1e-9f);
    I n[kChains], ones = all(0x01010101);
    for (int i = 0; i < kChains; i++) f[i] = all(float(i)), n[i] = all(i);  // alike, they would be computed once
    auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < kRounds; round++) {
        for (int i = 0; i < kChains; i++) {
            if (FORMAT == kFloat32) f[i] = fma(small, small, f[i]);
            else if (FORMAT == kBfloat16) f[i] = dot2(f[i], ones, 0x01010101);
            else n[i] = dot4(n[i], ones, 0x01010101);
        }
        asm volatile("");  // the rounds are not counted together
    }
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    volatile float kept = 0;  // somebody reads the sums
    for (int i = 0; i < kChains; i++) kept = kept + f[i][0] + float(n[i][0]);
    return 2.0 * kProducts * kChains * kRounds / seconds;
}

static double rate(Format format) {
    return format == kFloat32 ? rate_of<kFloat32>() : format == kBfloat16 ? rate_of<kBfloat16>() : rate_of<kInt8>();
}

static uint64_t read(const uint8_t* data, int64_t bytes) {
    I sum[4] = {};
    for (int64_t i = 0; i < bytes; i += 16 * L)
        for (int c = 0; c < 4; c++) sum[c] ^= load_codes(data + i + 4 * c * L), fetch_ahead(data + i + kAhead + 4 * c * L);
    I all_of_it = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
    return uint32_t(all_of_it[0]) + uint64_t(uint32_t(all_of_it[L - 1]));
}

extern const Kernels kernels;
const Kernels kernels = {GG_NAME, multiply, prepare, norm, activate, attend, log_sum, shares, rate, read};
}  // namespace GG_ISA
