/* A packed weight as the C kernels see it; `_Weight` of cpu.py has its fields. */
#ifndef QAT_PACKED_WEIGHT
#define QAT_PACKED_WEIGHT
#include <stdint.h>
#include <string.h>

#define PART 32 /* columns whose codes lie at the same place of 32 words, see qat/serving/words.py */
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const uint16_t *words; /* (rows, width) */
    const void *scales;    /* (rows, groups): bf16, float32, or bytes that look up `scale_table` */
    const int8_t *zeros;   /* (rows, groups) or null */
    const void *bias;      /* (rows), bf16 or float32, or null */
    const float *table;    /* value of each code, as stored in words */
    const float *scale_table;
    float global_scale;
    int64_t rows, columns, width, groups;
    int32_t group_shift; /* log2 of the columns per scale; large where a row has one */
    int32_t bits, scale_bytes, bias_bytes, minifloat_mantissa; /* mantissa bits, or -1 for integers */
    float step;                                    /* value of the smallest positive code */
    int32_t half_scales; /* 2 bytes are a half float, which cpu_avx2.c alone reads */
} Weight;

INLINE float of_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Nearest, ties to even. */
INLINE uint16_t bf16_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value == value ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : 0x7FC0;
}

INLINE float scale_at(const Weight *w, int64_t group, int64_t row, int bf16) {
    int64_t at = row * w->groups + group;
    if (!bf16 && w->scale_bytes == 1) return w->scale_table[((const uint8_t *)w->scales)[at]];
    if (!bf16 && w->scale_bytes == 4) return ((const float *)w->scales)[at];
    return of_bf16(((const uint16_t *)w->scales)[at]);
}

INLINE float bias_at(const Weight *w, int64_t row) {
    if (!w->bias) return 0;
    return w->bias_bytes == 4 ? ((const float *)w->bias)[row] : of_bf16(((const uint16_t *)w->bias)[row]);
}
#endif
