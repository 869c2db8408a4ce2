// The few vector operations that the kernels are written with: L numbers side by side. GCC's and Clang's vector types do
// the arithmetic on every machine; only what they cannot say is written for each instruction set.
// Included inside the namespace of an instruction set.
#pragma once

#if defined(GG_AVX512)
constexpr int L = 16;
#elif defined(GG_AVX2)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float F __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));

static inline F load(const float* p) { F v; memcpy(&v, p, sizeof v); return v; }
static inline I load_codes(const uint8_t* p) { I v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, F v) { memcpy(p, &v, sizeof v); }
static inline void store(int32_t* p, I v) { memcpy(p, &v, sizeof v); }
static inline F all(float x) { return F{} + x; }
static inline I all(int32_t x) { return I{} + x; }
static inline F to_float(I x) { return __builtin_convertvector(x, F); }
static inline int32_t word(const void* p) { int32_t v; memcpy(&v, p, 4); return v; }
static inline void fetch_ahead(const uint8_t* p) { __builtin_prefetch(p); }

// a * b + c with one rounding where the machine has it: written out, so that every copy of a loop rounds alike.
static inline F fma(F a, F b, F c) {
#if defined(GG_AVX512)
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(GG_AVX2)
    return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// L bfloat16 numbers as floats.
static inline F load_bfloat16(const uint8_t* p) {
    uint16_t x[L];
    memcpy(x, p, sizeof x);
    I bits;
#if defined(GG_AVX512)
    bits = (I)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(GG_AVX2)
    bits = (I)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    for (int i = 0; i < L; i++) bits[i] = x[i];
#endif
    return (F)(bits << 16);
}

// acc + low * low' + high * high' for pairs of bfloat16 numbers: L pairs of `w` with the one pair `a`.
static inline F dot2(F acc, I w, int32_t a) {
#if defined(GG_BF16)
    return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)all(a));
#else
    I pair = all(a);
    acc = fma((F)(w << 16), (F)(pair << 16), acc);
    return fma((F)(w & int32_t(0xffff0000)), (F)(pair & int32_t(0xffff0000)), acc);
#endif
}

// acc + four products of bytes: L times four codes of weights (unsigned, 8 bits) with the four signed ones in `a`.
// kZero8 is what a weight of zero still counts in it.
#if defined(GG_VNNI)
constexpr int kZero8 = 128;
#else
constexpr int kZero8 = 0;
#endif

static inline I dot4(I acc, I w, int32_t a) {
#if defined(GG_VNNI) && defined(GG_AVX512)
    return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)all(a));
#elif defined(GG_VNNI)
    return (I)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)all(a));
#elif defined(GG_AVX2)
    // |a| * (w with the sign of a): sums of two products stay within 16 bits, as codes are -127 to 127
    __m256i codes = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8(char(0x80))), four = (__m256i)all(a);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(four), _mm256_sign_epi8(codes, four));
    return acc + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int i = 0; i < L; i++)
        for (int j = 0; j < 4; j++) acc[i] += (int((uint32_t(w[i]) >> 8 * j) & 255) - 128) * int8_t(uint32_t(a) >> 8 * j);
    return acc;
#endif
}

// The sums of four codes (signed) each, L times.
static inline I sums_of_four(const int8_t* codes) {
    I x = load_codes((const uint8_t*)codes);
#if defined(GG_VNNI) && defined(GG_AVX512)
    return (I)_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), (__m512i)x);
#elif defined(GG_AVX2)
    return (I)_mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), (__m256i)x), _mm256_set1_epi16(1));
#else
    return (x << 24 >> 24) + (x << 16 >> 24) + (x << 8 >> 24) + (x >> 24);
#endif
}

// The same for codes of 0 to 15, whose zero (8) is always left in.
static inline I dot4_small(I acc, I w, int32_t a) {
#if defined(GG_VNNI)
    return dot4(acc, w, a);
#elif defined(GG_AVX2)
    __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)all(a));
    return acc + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int i = 0; i < L; i++)
        for (int j = 0; j < 4; j++) acc[i] += int((uint32_t(w[i]) >> 8 * j) & 255) * int8_t(uint32_t(a) >> 8 * j);
    return acc;
#endif
}
