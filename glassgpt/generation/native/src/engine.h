// The C interface of the library: what Python calls. A function that gives an int gives 0, or below 0 when it failed;
// `glass_error` then says why.
#pragma once
#include <cstdint>

#define GLASS __attribute__((visibility("default")))

extern "C" {

struct glass_shape {
    int32_t vocab, context, layers, width, heads, kv_heads, head_width, hidden;
    int32_t rms_norm, gated, activation, cache_format, planes;  // planes: 1 for activations of 8 bits, 2 for 16
    float epsilon, scale, logit_cap;                            // 0: no cap
};

enum glass_matrix { kQkv, kOut, kUp, kGate, kDown, kHead, kEmbedding, kMatrices };
enum glass_vector {
    kNorm1, kNorm1Bias, kNorm2, kNorm2Bias, kQueryNorm, kQueryNormBias, kKeyNorm, kKeyNormBias,
    kQkvBias, kOutBias, kUpBias, kGateBias, kDownBias,
    kDistance,                                                  // (heads, context): added to a score by how far back the key lies
    kFinalNorm, kFinalNormBias, kEmbeddingNorm, kEmbeddingNormBias,
    kPosition,                                                  // (context, width): added to the embeddings
    kCosine, kSine,                                             // (context, head width / 2): turns of queries and keys
    kVectors
};

struct glass_engine;

GLASS const char* glass_error();
// The instruction sets of this machine for which there are kernels, best first, parted by spaces.
GLASS const char* glass_kernels();
// `kernels` names one of them; null for the best.
GLASS glass_engine* glass_new(const glass_shape*, int32_t threads, const char* kernels);
GLASS void glass_free(glass_engine*);
GLASS const char* glass_engine_kernels(const glass_engine*);
GLASS int64_t glass_bytes(const glass_engine*);  // of weights

// Weights, layer by layer (what belongs to no layer has layer 0). `format` as in kernels.h; group 0: one scale an output.
GLASS int32_t glass_matrix_new(glass_engine*, int32_t layer, int32_t matrix, int32_t format, int32_t N, int32_t K, int32_t group);
// Outputs first ... first + rows - 1, first a multiple of 32, of a matrix of floats: numbers as a file has them (matrix.h, Number),
// the steps from row to row and from column to column.
GLASS int32_t glass_matrix_fill(glass_engine*, int32_t layer, int32_t matrix, int32_t first, int32_t rows, int32_t number, const void* values,
                                int64_t row_step, int64_t column_step);
// The same of a matrix of codes: (rows, K), 4 bits two to a byte with the earlier one in the low half, and scales (rows, groups).
GLASS int32_t glass_matrix_fill_codes(glass_engine*, int32_t layer, int32_t matrix, int32_t first, int32_t rows, const uint8_t* codes, const float* scales);
GLASS int32_t glass_vector_set(glass_engine*, int32_t layer, int32_t vector, const float* values, int64_t count);
GLASS int32_t glass_window_set(glass_engine*, int32_t layer, int32_t tokens);

// Texts.
GLASS int32_t glass_sequence_new(glass_engine*);
GLASS int32_t glass_sequence_fork(glass_engine*, int32_t sequence);  // a copy that shares what they have in common
GLASS int32_t glass_sequence_rewind(glass_engine*, int32_t sequence, int32_t length);
GLASS int32_t glass_sequence_length(glass_engine*, int32_t sequence);
GLASS int32_t glass_sequence_free(glass_engine*, int32_t sequence);
GLASS int64_t glass_cache_bytes(glass_engine*);

// Appends `count` tokens, token i to sequences[i], in order. For the `wanted` ones of them (ascending numbers): logits
// (wanted, stride), stride at least the vocabulary rounded up to 32; the first largest of the first `ids` logits of each
// row, and the logarithm of the sum of their exponentials.
GLASS int32_t glass_forward(glass_engine*, int32_t count, const int32_t* tokens, const int32_t* sequences, int32_t wanted, const int32_t* rows,
                      int32_t ids, float* logits, int64_t stride, int32_t* best, float* log_total);

// One of `ids` ids, drawn by `point` (at least 0, below 1) from what the rules leave of the logits (draw.h). `best` is the first
// largest logit's; the temperature is above 0.
GLASS int32_t glass_draw(const glass_engine*, const float* logits, int32_t ids, int32_t best, double temperature, int32_t top_k, double top_p,
                         double min_p, double point);

// Numbers of a file as float32 (rows, columns); gives how many of them are 0 or not finite.
GLASS int64_t glass_floats(int32_t number, const void* from, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, float* to);

// The machine: bytes a second read by so many threads from `bytes` of memory; operations a second (a multiply-add is two).
GLASS double glass_bandwidth(int64_t bytes, int32_t threads);
GLASS double glass_rate(int32_t format, int32_t threads, const char* kernels);
}
