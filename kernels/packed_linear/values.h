/* Packed weights to BF16 numbers, rounded as every engine that dequantizes rounds them, in the tiles that cpu_bf16.c
 * multiplies: AVX-512 BF16.
 *
 * 4-bit and 2-bit codes are looked up: a permutation of 16-bit lanes finds 32 rounded products of code and scale at
 * once, in a table per scale. Where scales are bytes, all tables are made before the product.
 */
#include "weight.h"
#include <immintrin.h>

#define SIDE 16                 /* rows or tokens of a tile */
#define TILE (SIDE * PART)      /* its BF16 numbers; rows of 32 columns */
#define PAIR (2 * SIDE)         /* rows or tokens multiplied together */
#define BLOCK 768               /* columns decoded at a time at most */
#define GROUPS 64               /* scales at most of a block */
typedef uint16_t bf16;

INLINE __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

/* What a block of a row is multiplied with: GROUPS scales from its first one on; 0 beyond the row, whose last tile of words
 * may be longer. */
typedef struct {
    float factors[GROUPS], zeros[GROUPS];
    uint8_t bytes[GROUPS];
} __attribute__((aligned(64))) Scales;

INLINE void load_scales(const Weight *w, int64_t row, int64_t group, int64_t count, int bytes, Scales *to) {
    const int64_t at = row * w->groups + group, left = w->groups - group;
    const __mmask64 there = left >= GROUPS ? ~0ull : (1ull << left) - 1;
    if (w->scale_bytes == 1) {
        _mm512_store_si512(to->bytes, _mm512_maskz_loadu_epi8(there, (const uint8_t *)w->scales + at));
        if (bytes) return;
    }
    for (int64_t first = 0; first < count; first += 16) {
        const __mmask16 some = there >> first;
        __m512 factor, zero = _mm512_setzero_ps();
        if (w->scale_bytes == 1) {
            const __m512i index = _mm512_cvtepu8_epi32(_mm_load_si128((const void *)(to->bytes + first)));
            factor = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, index, w->scale_table, 4);
        } else if (w->scale_bytes == 4) {
            factor = _mm512_maskz_loadu_ps(some, (const float *)w->scales + at + first);
        } else {
            const __m256i raw = _mm256_maskz_loadu_epi16(some, (const uint16_t *)w->scales + at + first);
            factor = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
        }
        _mm512_store_ps(to->factors + first, _mm512_mul_ps(factor, _mm512_set1_ps(w->global_scale)));
        if (w->zeros) zero = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, w->zeros + at + first)));
        _mm512_store_ps(to->zeros + first, zero);
    }
}

/* 32 BF16 products of code and scale: 16 for the lower lanes of a vector, then 16 for the upper ones. */
INLINE __m512i table_of(const Scales *scales, int64_t group, int small, int bytes, const bf16 *tables, __m512 values) {
    if (bytes) {
        const __m256i low = _mm256_load_si256((const void *)(tables + scales->bytes[group] * 16));
        if (!small) return _mm512_broadcast_i64x4(low);
        const __m256i high = _mm256_load_si256((const void *)(tables + scales->bytes[group + 1] * 16));
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    values = _mm512_sub_ps(values, _mm512_set1_ps(scales->zeros[group]));
    const __m512 low = _mm512_mul_ps(values, _mm512_set1_ps(scales->factors[group]));
    if (!small) return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(low));
    return rounded(low, _mm512_mul_ps(values, _mm512_set1_ps(scales->factors[group + 1])));
}

/* 32 numbers of 8 bits, in the lower bytes of 16-bit lanes. */
INLINE __m512i wide_values(const Scales *scales, int64_t group, int small, __m512i code, int mantissa) {
    const __m512 one = _mm512_set1_ps(scales->factors[group]), two = small ? _mm512_set1_ps(scales->factors[group + 1]) : one;
    __m512 low, high;
    if (mantissa == 3) { /* E4M3's fields are a half float's with another bias; NaN is refused at load */
        const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
        const __m512i half = _mm512_or_si512(sign, _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x7F)), 7));
        low = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), _mm512_set1_ps(256));
        high = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), _mm512_set1_ps(256));
    } else {
        const __m512 zero = _mm512_set1_ps(128 + scales->zeros[group]);
        low = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(code)));
        high = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(code, 1)));
        low = _mm512_sub_ps(low, zero), high = _mm512_sub_ps(high, zero);
    }
    return rounded(_mm512_mul_ps(low, one), _mm512_mul_ps(high, two));
}

/* Word tiles [first, last) of `rows` rows, at most BLOCK columns, decoded as the tiles of BF16 that both roads read: 32
 * columns of 16 rows each, tiles along a row beside each other, `apart` numbers between 16 rows and the next. SPAN: parts
 * of a tile under one scale, at least. */
INLINE void block_values(const Weight *w, int64_t row, int64_t rows, int64_t first, int64_t last, const bf16 *tables,
                         bf16 *out, int64_t apart, int bits, int mantissa, int small, int bytes, int span) {
    const Weight copy = *w; /* which stores to `out` cannot change */
    w = &copy;
    const int parts = 16 / bits, shift = small ? 4 : w->group_shift;
    const int64_t top = first * parts * PART >> shift, count = ((last * parts * PART - 1) >> shift) - top + 1;
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1), low4 = _mm512_set1_epi16(15);
    __m512 values = _mm512_setzero_ps();
    if (bits < 8 && !bytes) {
        const __m512i codes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        values = _mm512_permutexvar_ps(_mm512_and_si512(codes, _mm512_set1_epi32((1 << bits) - 1)),
                                       bits == 4 ? _mm512_loadu_ps(w->table) : _mm512_maskz_loadu_ps(15, w->table));
    }
    /* The next block of the row, and behind its end the first of a row of the next pair. */
    const int64_t ahead = (last < w->width / PART ? last - first : w->width / PART * PAIR - first) * PART;
    Scales scales;
    for (int64_t r = 0; r < rows; r++, row++) {
        const uint16_t *words = w->words + row * w->width;
        bf16 *to = out + r / SIDE * apart + r % SIDE * PART;
        load_scales(w, row, top, count, bytes, &scales);
        for (int64_t tile = first; tile < last; tile++) {
            const __m512i word = _mm512_loadu_si512(words + tile * PART);
            __builtin_prefetch(words + tile * PART + ahead);
            __m512i table = upper;
            int64_t group = 0;
#pragma GCC unroll 8
            for (int part = 0; part < parts; part++, to += TILE) {
                const __m512i code = part ? _mm512_srli_epi16(word, part * bits) : word;
                if (part % span == 0) group = ((tile * parts + part) * PART >> shift) - top;
                __m512i value;
                if (bits == 8) {
                    value = wide_values(&scales, group, small, _mm512_and_si512(code, _mm512_set1_epi16(255)), mantissa);
                } else {
                    if (part % span == 0) table = table_of(&scales, group, small, bytes, tables, values);
                    /* The table's halves are alike, unless groups are small: then the fifth bit chooses the half. */
                    value = _mm512_permutexvar_epi16(small ? _mm512_ternarylogic_epi32(code, low4, upper, 0xEA) : code, table);
                }
                _mm512_store_si512(to, value);
            }
        }
    }
}

typedef void (*Decode)(const Weight *, int64_t, int64_t, int64_t, int64_t, const bf16 *, bf16 *, int64_t);
#define DECODE(NAME, BITS, MANTISSA, SMALL, BYTES, SPAN)                                                                \
    static void NAME(const Weight *w, int64_t row, int64_t rows, int64_t first, int64_t last, const bf16 *tables,       \
                     bf16 *out, int64_t apart) {                                                                        \
        block_values(w, row, rows, first, last, tables, out, apart, BITS, MANTISSA, SMALL, BYTES, SPAN);                \
    }
#define ALL_SPANS(NAME, BITS)                                                                                           \
    DECODE(NAME##_small, BITS, -1, 1, 0, 1)                                                                             \
    DECODE(NAME##_32, BITS, -1, 0, 0, 1)                                                                                \
    DECODE(NAME##_64, BITS, -1, 0, 0, 2)                                                                                \
    DECODE(NAME##_128, BITS, -1, 0, 0, 4)                                                                               \
    DECODE(NAME##_small_bytes, BITS, -1, 1, 1, 1)                                                                       \
    DECODE(NAME##_bytes, BITS, -1, 0, 1, 1)                                                                             \
    static const Decode NAME[2][4] = {{NAME##_small, NAME##_32, NAME##_64, NAME##_128},                                 \
                                      {NAME##_small_bytes, NAME##_bytes, NAME##_bytes, NAME##_bytes}};
ALL_SPANS(two, 2)
ALL_SPANS(four, 4)
DECODE(eight, 8, -1, 0, 0, 1)
DECODE(eight_small, 8, -1, 1, 0, 1)
DECODE(e4m3, 8, 3, 0, 0, 1)
DECODE(e4m3_small, 8, 3, 1, 0, 1)

/* The instance for a weight, or null; 2 and 4 bits take any element, by its table. */
static Decode decoder(const Weight *w, int bytes) {
    const int scale = w->group_shift > 7 ? 3 : w->group_shift - 4;
    if (scale < 0) return 0;
    if (w->bits == 2) return two[bytes][scale];
    if (w->bits == 4) return four[bytes][scale];
    if (w->minifloat_mantissa == 3) return scale ? e4m3 : e4m3_small;
    return w->minifloat_mantissa < 0 ? scale ? eight : eight_small : 0;
}

/* 16 BF16 products for every byte that a scale can be. */
static void make_tables(const Weight *w, bf16 *tables) {
    float values[16];
    for (int code = 0; code < 16; code++) values[code] = w->table[code & ((1 << w->bits) - 1)];
    for (int scale = 0; scale < 256; scale++) {
        const __m512 factor = _mm512_set1_ps(w->scale_table[scale] * w->global_scale);
        const __m256i products = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(values), factor));
        _mm256_store_si256((void *)(tables + scale * 16), products);
    }
}
