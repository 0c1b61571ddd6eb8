/* Linear layers with packed weights on a CPU: decodes words (see qat/serving/words.py) in registers and never writes a dense
 * weight for a few tokens; for many tokens it writes a slice of the dense weight for a library product.
 *
 * Plain C with vector extensions, so that every compiler for every CPU takes it: lanes are 16 columns, which no scale
 * divides. Elements of 4 bits are one table lookup where the CPU has one of 16 floats (AVX-512), else integer
 * arithmetic; minifloats are decoded through integers, because subnormal floats are slow or flushed on some CPUs.
 */
#include "weight.h"
#include <stdlib.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define BLOCK 16 /* rows that a thread takes at a time */
#define AHEAD 8192 /* bytes */
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

/* Values of the codes in the lowest BITS bits of each lane, in units that `step` or the table make right. */
INLINE vf decode(vi code, int bits, int mantissa, vf table, float step) {
    vi mask = (vi){} + ((1 << bits) - 1);
#ifdef __AVX512F__
    if (bits == 4) return (vf)_mm512_permutexvar_ps((__m512i)code, (__m512)table); /* reads 4 bits of each lane */
#endif
    code &= mask;
#ifdef __AVX512F__
    if (bits == 8 && mantissa == 3) { /* E4M3's fields are a half float's with another bias; NaN is refused at load */
        vi half = ((code & 0x80) << 8) | ((code & 0x7F) << 7);
        return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)half)) * 256.0f;
    }
#endif
    if (mantissa < 0) return to_float(code - (1 << (bits - 1)));
    vi magnitude = code & ((1 << (bits - 1)) - 1), exponent = magnitude >> mantissa;
    vi normal = (exponent > 0) & 1;
    vi whole = ((magnitude & ((1 << mantissa) - 1)) + (normal << mantissa)) << (exponent - normal);
    vf value = to_float(whole) * step;
    vi sign = (code >> (bits - 1)) << 31;
    return (vf)((vi)value | sign);
}

INLINE vf load(const float *at) {
    vf value;
    memcpy(&value, at, sizeof value);
    return value;
}

INLINE float sum(vf x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

INLINE vi widen(vh raw) {
#ifdef __AVX512F__
    return (vi)_mm512_cvtepu16_epi32((__m256i)raw); /* which GCC makes of two halves */
#else
    return __builtin_convertvector(raw, vi);
#endif
}

/* What tile_times and tile_values start from: the words of a tile as two vectors. */
INLINE void tile_words(const Weight *w, int64_t row, int64_t tile, vi word[2]) {
    const uint16_t *words = w->words + row * w->width + tile * PART;
    __builtin_prefetch((const char *)words + AHEAD); /* rows are short for the processor's own prefetcher */
    for (int half = 0; half < 2; half++) {
        vh raw;
        memcpy(&raw, words + half * LANES, sizeof raw);
        word[half] = widen(raw);
    }
}

/* The group of a column; the last tile may reach beyond the columns. */
INLINE int64_t group_of(const Weight *w, int64_t column, int small, int whole) {
    int64_t group = column >> (small ? 4 : w->group_shift);
    return whole || group < w->groups ? group : w->groups - 1;
}

/* Half a part: 16 values before their scale. */
INLINE vf half_values(const Weight *w, int64_t row, int64_t group, vi word, int part, int bits, int mantissa, int affine,
                      vf table) {
    vf value = decode(word >> (part * bits), bits, mantissa, table, w->step);
    return affine ? value - (float)w->zeros[row * w->groups + group] : value;
}

/* One tile of ROWS rows times TOKENS rows of x, which is loaded once for all rows. Everything but the addresses is a
 * constant after inlining. */
INLINE void tile_times(const Weight *w, int64_t row, int64_t tile, const float *x, int64_t stride, int rows, int tokens,
                       int bits, int mantissa, int small, int affine, int bf16, int whole, vf table, vf total[2][4][2]) {
    const int parts = 16 / bits;
    vi word[2][2];
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) tile_words(w, row + r, tile, word[r]);
#pragma GCC unroll 8
    for (int part = 0; part < parts; part++) {
        const int64_t first = (tile * parts + part) * PART;
        const int64_t group = group_of(w, first, small, whole), next = small ? group_of(w, first + LANES, 1, whole) : group;
        float one[2], two[2];
        vf low[2], high[2];
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
            low[r] = half_values(w, row + r, group, word[r][0], part, bits, mantissa, affine, table);
            high[r] = half_values(w, row + r, next, word[r][1], part, bits, mantissa, affine, table);
            one[r] = scale_at(w, group, row + r, bf16);
            two[r] = small ? scale_at(w, next, row + r, bf16) : one[r];
        }
#pragma GCC unroll 4
        for (int token = 0; token < tokens; token++) {
            const vf a = load(x + token * stride + first), b = load(x + token * stride + first + LANES);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                vf *sum = &total[r][token][part % 2];
                if (small) {
                    *sum += one[r] * (low[r] * a);
                    *sum += two[r] * (high[r] * b);
                } else {
                    *sum += one[r] * (low[r] * a + high[r] * b);
                }
            }
        }
    }
}

/* ROWS rows times up to 4 rows of x, rounded once to elements of `bytes`. */
INLINE void some_rows(const Weight *w, const float *x, int64_t stride, char *out, int bytes, int64_t row, int rows,
                      int tokens, int bits, int mantissa, int small, int affine, int bf16, vf table) {
    const int64_t tiles = w->width / PART;
    vf total[2][4][2] = {};
    const int64_t whole = w->columns / (PART * 16 / bits);
    for (int64_t tile = 0; tile < whole; tile++)
        tile_times(w, row, tile, x, stride, rows, tokens, bits, mantissa, small, affine, bf16, 1, table, total);
    if (whole < tiles) tile_times(w, row, whole, x, stride, rows, tokens, bits, mantissa, small, affine, bf16, 0, table, total);
    for (int r = 0; r < rows; r++) {
        for (int token = 0; token < tokens; token++) {
            int64_t at = token * w->rows + row + r;
            float value = sum(total[r][token][0] + total[r][token][1]) * w->global_scale + bias_at(w, row + r);
            if (bytes == 4) ((float *)out)[at] = value;
            else ((uint16_t *)out)[at] = bf16_of(value);
        }
    }
}

/* Rows [first, last); the instances below fix everything that decides what is executed. */
INLINE void rows_times(const Weight *w, const float *x, int64_t stride, char *out, int bytes, int64_t first,
                       int64_t last, int tokens, int bits, int mantissa, int small, int affine, int bf16) {
    const vf table = bits == 4 ? load(w->table) : (vf){};
    int64_t row = first;
    for (; row + 2 <= last; row += 2)
        some_rows(w, x, stride, out, bytes, row, 2, tokens, bits, mantissa, small, affine, bf16, table);
    if (row < last) some_rows(w, x, stride, out, bytes, row, 1, tokens, bits, mantissa, small, affine, bf16, table);
}

/* Which of an element's instances below: plain, small groups, zero points, bf16 scales. */
static int variant(const Weight *w) {
    return w->zeros ? 2 : (1ll << w->group_shift) < PART ? 1 : w->scale_bytes == 2 ? 3 : 0;
}

typedef void (*Rows)(const Weight *, const float *, int64_t, char *, int, int64_t, int64_t);
#define INSTANCE(NAME, TOKENS, BITS, MANTISSA, SMALL, AFFINE, BF16)                                                     \
    static void NAME(const Weight *w, const float *x, int64_t stride, char *out, int bytes, int64_t first,              \
                     int64_t last) {                                                                                    \
        rows_times(w, x, stride, out, bytes, first, last, TOKENS, BITS, MANTISSA, SMALL, AFFINE, BF16);                 \
    }
/* BF16 scales, which integers have, are worth instances of their own; NVFP4 and the MX formats have bytes. */
#define ELEMENT(NAME, BITS, MANTISSA)                                                                                   \
    INSTANCE(NAME##_one, 1, BITS, MANTISSA, 0, 0, 0)                                                                    \
    INSTANCE(NAME##_four, 4, BITS, MANTISSA, 0, 0, 0)                                                                   \
    INSTANCE(NAME##_small_one, 1, BITS, MANTISSA, 1, 0, 0)                                                              \
    INSTANCE(NAME##_small_four, 4, BITS, MANTISSA, 1, 0, 0)                                                             \
    INSTANCE(NAME##_affine_one, 1, BITS, MANTISSA, 0, 1, 0)                                                             \
    INSTANCE(NAME##_affine_four, 4, BITS, MANTISSA, 0, 1, 0)                                                            \
    INSTANCE(NAME##_bf16_one, 1, BITS, MANTISSA, 0, 0, 1)                                                               \
    INSTANCE(NAME##_bf16_four, 4, BITS, MANTISSA, 0, 0, 1)                                                              \
    static const Rows NAME[4][2] = {{NAME##_one, NAME##_four},                                                          \
                                    {NAME##_small_one, NAME##_small_four},                                              \
                                    {NAME##_affine_one, NAME##_affine_four},                                            \
                                    {NAME##_bf16_one, NAME##_bf16_four}};
ELEMENT(int2, 2, -1)
ELEMENT(int4, 4, -1)
ELEMENT(int8, 8, -1)
ELEMENT(e2m1, 4, 1)
ELEMENT(e4m3, 8, 3)

/* out (tokens, rows) = x (tokens, columns) times the weight. Elements of x and out have `bytes`: 4 (float32) or 2 (bf16).
 * Returns 0, 1 where the element is not known, or 2 without memory for x in float32. */
int packed_linear(const Weight *w, const void *x, int64_t tokens, int bytes, void *out, int threads) {
    const int kind = w->bits * 10 + w->minifloat_mantissa;
    const Rows(*element)[2] = kind == 19 ? int2 : kind == 39 ? int4 : kind == 79 ? int8 : kind == 41 ? e2m1
                            : kind == 83 ? e4m3 : 0;
    if (!element) return 1;
    const Rows *rows = element[variant(w)];
    const int64_t padded = w->width * (16 / w->bits); /* whole tiles */
    float *scratch = malloc(4 * tokens * padded + 1);
    if (!scratch) return 2;
    for (int64_t token = 0; token < tokens; token++) {
        float *to = scratch + token * padded;
        if (bytes == 4) memcpy(to, (const float *)x + token * w->columns, 4 * w->columns);
        else for (int64_t k = 0; k < w->columns; k++) to[k] = of_bf16(((const uint16_t *)x)[token * w->columns + k]);
        memset(to + w->columns, 0, 4 * (padded - w->columns));
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < (w->rows + BLOCK - 1) / BLOCK; block++) {
        int64_t first = block * BLOCK, last = first + BLOCK < w->rows ? first + BLOCK : w->rows, done = 0;
        for (; done + 4 <= tokens; done += 4)
            rows[1](w, scratch + done * padded, padded, (char *)out + done * w->rows * bytes, bytes, first, last);
        for (; done < tokens; done++)
            rows[0](w, scratch + done * padded, padded, (char *)out + done * w->rows * bytes, bytes, first, last);
    }
    free(scratch);
    return 0;
}

INLINE vh to_bf16(vf value) {
    typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
    vu bits = (vu)value;
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
#ifdef __AVX512F__
    return (vh)_mm512_cvtepi32_epi16((__m512i)bits);
#else
    return __builtin_convertvector(bits, vh);
#endif
}

/* One tile of a row, in float32 or bf16, to `out`; the last tile may end before its words do. */
INLINE void tile_values(const Weight *w, int64_t row, int64_t tile, char *out, int bytes, int bits, int mantissa, int small,
                        int affine, int bf16, int whole, vf table) {
    const int parts = 16 / bits;
    vi word[2];
    tile_words(w, row, tile, word);
#pragma GCC unroll 8
    for (int part = 0; part < parts; part++) {
        const int64_t first = (tile * parts + part) * PART;
        const int64_t group = group_of(w, first, small, whole), next = small ? group_of(w, first + LANES, 1, whole) : group;
        const float one = scale_at(w, group, row, bf16) * w->global_scale;
        const float two = small ? scale_at(w, next, row, bf16) * w->global_scale : one;
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int64_t at = first + half * LANES;
            vf value = half_values(w, row, half ? next : group, word[half], part, bits, mantissa, affine, table);
            value *= half ? two : one;
            const vh rounded = to_bf16(value);
            const void *from = bytes == 2 ? (const void *)&rounded : (const void *)&value;
            if (whole || at + LANES <= w->columns) memcpy(out + at * bytes, from, bytes * LANES);
            else if (at < w->columns) memcpy(out + at * bytes, from, bytes * (w->columns - at));
        }
    }
}

/* Values of rows [first, last), (last - first, columns). */
INLINE void rows_values(const Weight *w, int64_t first, int64_t last, char *out, int bytes, int bits, int mantissa,
                        int small, int affine, int bf16) {
    const Weight copy = *w; /* which stores to `out` cannot change */
    w = &copy;
    const vf table = bits == 4 ? load(w->table) : (vf){};
    const int64_t tiles = w->width / PART, whole = w->columns / (PART * 16 / bits);
    for (int64_t row = first; row < last; row++, out += w->columns * bytes) {
        for (int64_t tile = 0; tile < whole; tile++)
            tile_values(w, row, tile, out, bytes, bits, mantissa, small, affine, bf16, 1, table);
        if (whole < tiles) tile_values(w, row, whole, out, bytes, bits, mantissa, small, affine, bf16, 0, table);
    }
}

typedef void (*Values)(const Weight *, int64_t, int64_t, char *);
#define VALUES(NAME, BITS, MANTISSA, BYTES, SMALL, AFFINE, BF16)                                                       \
    static void NAME(const Weight *w, int64_t first, int64_t last, char *out) {                                         \
        rows_values(w, first, last, out, BYTES, BITS, MANTISSA, SMALL, AFFINE, BF16);                                   \
    }
#define ELEMENT_VALUES(NAME, BITS, MANTISSA)                                                                            \
    VALUES(NAME##_half, BITS, MANTISSA, 2, 0, 0, 0)                                                                     \
    VALUES(NAME##_full, BITS, MANTISSA, 4, 0, 0, 0)                                                                     \
    VALUES(NAME##_small_half, BITS, MANTISSA, 2, 1, 0, 0)                                                               \
    VALUES(NAME##_small_full, BITS, MANTISSA, 4, 1, 0, 0)                                                               \
    VALUES(NAME##_affine_half, BITS, MANTISSA, 2, 0, 1, 0)                                                              \
    VALUES(NAME##_affine_full, BITS, MANTISSA, 4, 0, 1, 0)                                                              \
    VALUES(NAME##_bf16_half, BITS, MANTISSA, 2, 0, 0, 1)                                                                \
    VALUES(NAME##_bf16_full, BITS, MANTISSA, 4, 0, 0, 1)                                                                \
    static const Values NAME##_values[4][2] = {{NAME##_half, NAME##_full},                                              \
                                               {NAME##_small_half, NAME##_small_full},                                  \
                                               {NAME##_affine_half, NAME##_affine_full},                                \
                                               {NAME##_bf16_half, NAME##_bf16_full}};
ELEMENT_VALUES(int2, 2, -1)
ELEMENT_VALUES(int4, 4, -1)
ELEMENT_VALUES(int8, 8, -1)
ELEMENT_VALUES(e2m1, 4, 1)
ELEMENT_VALUES(e4m3, 8, 3)

/* Dense values of rows [first, last): (last - first, columns), each of 2 (bf16) or 4 (float32) bytes. */
int dense_rows(const Weight *w, int64_t first, int64_t last, void *out, int bytes, int threads) {
    const int kind = w->bits * 10 + w->minifloat_mantissa;
    const Values(*element)[2] = kind == 19 ? int2_values : kind == 39 ? int4_values : kind == 79 ? int8_values
                              : kind == 41 ? e2m1_values : kind == 83 ? e4m3_values : 0;
    if (!element) return 1;
    const Values values = element[variant(w)][bytes == 4];
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < (last - first + BLOCK - 1) / BLOCK; block++) {
        int64_t from = first + block * BLOCK, to = from + BLOCK < last ? from + BLOCK : last;
        values(w, from, to, (char *)out + (from - first) * w->columns * bytes);
    }
    return 0;
}
