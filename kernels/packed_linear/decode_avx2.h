/* Packed weights to float32 in vectors of 8 lanes: AVX2 and F16C.
 *
 * 16 words hold 16 columns of every part. Their lower bytes hold the codes of one half of the parts and their upper bytes
 * those of the other; a plane is a pair of parts at the same bits of both. It leaves as 4 vectors: columns 0 to 3 and 8 to
 * 11 of the lower part, of the upper part, then columns 4 to 7 and 12 to 15 of both, which is how bytes unpack; or columns 0
 * to 7 and then 8 to 15 where nothing is unpacked (`in_order`).
 */
#include "weight.h"
#include <immintrin.h>

#define SLICE 768 /* columns at most whose sums are made together */
#define GROUPS (SLICE / 16)
#define WHOLE 8388608.0f /* 2^23: its float32 pattern counts up by whole numbers */

/* What is the same for a whole weight. */
typedef struct {
    __m256i low, high; /* bytes 2 and 3 of the value of every code of 2 or 4 bits */
    const float *bytes; /* scale of every byte, times the global scale */
} Tables;

/* Scales and zero points of a slice of a row, from the slice's first group on. */
typedef struct {
    float factors[GROUPS], zeros[GROUPS];
    const uint8_t *bytes;
    uint8_t padded[GROUPS];
    int64_t base;
} __attribute__((aligned(32))) Scales;

/* E4M3's fields are a half float's with another bias. */
INLINE float unit_of(const Weight *w) { return w->minifloat_mantissa == 3 ? 256 * w->global_scale : w->global_scale; }

INLINE Tables make_tables(const Weight *w, float *bytes) {
    uint8_t low[16] = {0}, high[16] = {0};
    for (int code = 0; code < 1 << w->bits && code < 16; code++) {
        uint32_t pattern;
        memcpy(&pattern, w->table + code, 4);
        low[code] = pattern >> 16, high[code] = pattern >> 24;
    }
    if (w->scale_bytes == 1)
        for (int scale = 0; scale < 256; scale++) bytes[scale] = w->scale_table[scale] * unit_of(w);
    return (Tables){_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)low)),
                    _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)high)), bytes};
}

/* For columns [first, last), of which the last ones may lie beyond the row: 0 there. */
INLINE void load_scales(const Weight *w, int64_t row, int64_t first, int64_t last, int bits, int mantissa, int bytes,
                        int affine, Scales *to) {
    const int64_t base = first >> w->group_shift, end = ((last - 1) >> w->group_shift) + 1;
    const int64_t count = (end < w->groups ? end : w->groups) - base, at = row * w->groups + base;
    to->base = base;
    if (bytes) {
        to->bytes = (const uint8_t *)w->scales + at;
        if (end <= w->groups) return;
        memset(to->padded, 0, GROUPS);
        memcpy(to->padded, to->bytes, count);
        to->bytes = to->padded;
        return;
    }
    const float unit = unit_of(w);
    const uint16_t *from = (const uint16_t *)w->scales + at;
    int64_t i = 0;
    if (w->scale_bytes == 2 && !w->half_scales && at + (end - base + 7) / 8 * 8 <= w->rows * w->groups) {
        for (; i < end - base; i += 8) { /* and of the next row, which nothing but zeros meets */
            const __m256 wide = (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(from + i))), 16);
            _mm256_store_ps(to->factors + i, _mm256_mul_ps(wide, _mm256_set1_ps(unit)));
        }
    } else {
        for (; i < count; i++) {
            const float scale = w->scale_bytes == 4 ? ((const float *)w->scales)[at + i]
                              : w->half_scales ? _cvtsh_ss(from[i]) : of_bf16(from[i]);
            to->factors[i] = scale * unit;
        }
        for (; i < end - base; i++) to->factors[i] = 0;
    }
    if (!affine) return;
    const float offset = bits == 8 && mantissa < 0 ? WHOLE + 128 : 0;
    for (i = 0; i < count; i++) to->zeros[i] = offset + w->zeros[at + i];
    for (; i < end - base; i++) to->zeros[i] = offset;
}

/* Whether the columns of 4 vectors are 0 to 7 and 8 to 15. */
INLINE int in_order(const Weight *w) { return w->minifloat_mantissa == 3; }

/* 4 vectors of a plane before their scale; `zero` is what to subtract from the first part and the second. */
INLINE void plane_codes(const Tables *tables, __m256i word, int plane, int bits, int mantissa, int affine,
                        const __m256 zero[2], __m256 value[4]) {
    if (bits < 8) {
        const __m256i code = _mm256_and_si256(plane ? _mm256_srli_epi16(word, plane * bits) : word,
                                              _mm256_set1_epi8((1 << bits) - 1));
        const __m256i low = _mm256_shuffle_epi8(tables->low, code), high = _mm256_shuffle_epi8(tables->high, code);
        const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
        const __m256i upper = _mm256_set1_epi32(0xFFFF0000);
        value[0] = (__m256)_mm256_slli_epi32(first, 16), value[1] = (__m256)_mm256_and_si256(first, upper);
        value[2] = (__m256)_mm256_slli_epi32(second, 16), value[3] = (__m256)_mm256_and_si256(second, upper);
        if (affine)
            for (int v = 0; v < 4; v++) value[v] = _mm256_sub_ps(value[v], zero[v % 2]);
    } else if (mantissa < 0) { /* the code as the last bits of 2^23 */
        const __m256i one = _mm256_and_si256(word, _mm256_set1_epi16(0xFF)), two = _mm256_srli_epi16(word, 8);
        const __m256i whole = _mm256_set1_epi16(0x4B00);
        value[0] = _mm256_sub_ps((__m256)_mm256_unpacklo_epi16(one, whole), zero[0]);
        value[1] = _mm256_sub_ps((__m256)_mm256_unpacklo_epi16(two, whole), zero[1]);
        value[2] = _mm256_sub_ps((__m256)_mm256_unpackhi_epi16(one, whole), zero[0]);
        value[3] = _mm256_sub_ps((__m256)_mm256_unpackhi_epi16(two, whole), zero[1]);
    } else { /* a half float / 256; NaN is refused at load. Its sign is shifted in twice, and masked once. */
        const __m256i kept = _mm256_set1_epi16((short)0xBF80);
        for (int part = 0; part < 2; part++) {
            const __m256i code = part ? word : _mm256_slli_epi16(word, 8);
            const __m256i half = _mm256_and_si256(_mm256_srai_epi16(code, 1), kept);
            value[part] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
            value[2 + part] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
        }
    }
}

/* 4 vectors of a plane of half a tile: the reference's float32 weights. */
INLINE void plane_values(const Weight *w, const Tables *tables, const Scales *scales, __m256i word, int64_t tile, int half,
                         int plane, int bits, int mantissa, int bytes, int affine, __m256 value[4]) {
    const int parts = 16 / bits;
    __m256 factor[2], zero[2];
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
        const int64_t column = (tile * parts + plane + part * (parts / 2)) * PART + half * 16;
        const int64_t group = (column >> w->group_shift) - scales->base;
        factor[part] = _mm256_broadcast_ss(bytes ? tables->bytes + scales->bytes[group] : scales->factors + group);
        zero[part] = affine ? _mm256_broadcast_ss(scales->zeros + group) : _mm256_set1_ps(WHOLE + 128);
    }
    plane_codes(tables, word, plane, bits, mantissa, affine, zero, value);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) value[v] = _mm256_mul_ps(value[v], factor[v % 2]);
}
