/* Dynamic fake quantization of a layer's input on a CPU: maximum, scale and rounding while a block is in the cache.
 *
 * Bit for bit the arithmetic of qat/activations.py: every operation rounds once to float32, so this file must be compiled
 * without contraction into fused multiply-adds. Rows here are blocks: a token, or a group of one.
 */
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

typedef struct {
    float max, inverse_max, low, high, min_normal; /* of the element */
    float scale_max, scale_min_normal; /* of E4M3 */
    float amax_floor, scale_floor, tiny, divisor;
    int32_t mantissa;       /* of the element; -1 for integers */
    int32_t scale_mantissa; /* of E4M3 */
    int32_t max_exponent, scale, rule; /* see the enums */
} Rule;
enum { F32, BF16, E4M3, E8M0 };
enum { CEIL, EVEN, FLOOR };

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
INLINE float of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE int is_nan(float x) { return x != x; }
INLINE float bf16_of(float x) { return is_nan(x) ? x : of_bits((bits_of(x) + 0x7FFF + ((bits_of(x) >> 16) & 1)) & 0xFFFF0000u); }

/* A value on a minifloat's grid, half to even: adding 1.5 * 2^(23-m) binades drops all lower bits. */
INLINE float on_grid(float x, float low, float high, float min_normal, int mantissa) {
    if (is_nan(x)) return x;
    x = x < low ? low : x > high ? high : x;
    float binade = of_bits(bits_of(x) & 0x7F800000u);
    binade = (binade < min_normal ? min_normal : binade) * (1.5f * (float)(1 << (23 - mantissa)));
    float up = x + binade;
    return up - binade;
}

static float power_of_two(float amax, const Rule *r) {
    if (!(amax < of_bits(0x7F800000u))) return of_bits(0x7FC00000u);
    int32_t field;
    if (r->rule == CEIL) {
        uint32_t bits = bits_of(amax / r->max);
        field = bits >> 23;
        field = field == 0 ? bits > 0x00400000u : field + ((bits & 0x007FFFFFu) != 0);
        if (bits == 0) field = 127; /* the quotient underflowed: the reference takes 1, and every code is zero */
    } else {
        uint32_t bits = bits_of(amax) + (r->rule == EVEN ? 1u << (22 - r->mantissa) : 0);
        field = (int32_t)(bits >> 23) - r->max_exponent;
    }
    if (!(amax > 0) || field < 0) field = 0;
    if (field > 254) field = 254;
    return of_bits(field == 0 ? 0x00400000u : (uint32_t)field << 23);
}

static float scale_for(float amax, const Rule *r) {
    if (r->scale == E8M0) return power_of_two(amax, r);
    if (r->scale == E4M3) {
        float share = amax * r->inverse_max, relative = r->divisor * share;
        float stored = on_grid(relative, -r->scale_max, r->scale_max, r->scale_min_normal, r->scale_mantissa);
        return (stored == 0 ? r->scale_max : stored) * (1.0f / r->divisor);
    }
    float scale = (amax < r->amax_floor ? r->amax_floor : amax) / r->max;
    if (scale < r->scale_floor) scale = r->scale_floor;
    if (!(scale < of_bits(0x7F800000u))) return of_bits(0x7FC00000u);
    if (scale < r->tiny) scale = r->tiny;
    return r->scale == BF16 ? bf16_of(scale) : scale;
}

INLINE vf load(const void *at, int bytes) {
    if (bytes == 4) {
        vf x;
        memcpy(&x, at, sizeof x);
        return x;
    }
    vh half;
    memcpy(&half, at, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

INLINE void store(void *at, vf x, int bytes) {
    if (bytes == 4) {
        memcpy(at, &x, sizeof x);
        return;
    }
    vu bits = (vu)x, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(x != x);
    vh half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7FC0), vh);
    memcpy(at, &half, sizeof half);
}

INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf quantized(vf x, float scale, const Rule *r, int mantissa) {
    vf y = x / scale;
    y = pick(y < r->low, (vf){} + r->low, y); /* comparisons with NaN are false: it stays */
    y = pick(y > r->high, (vf){} + r->high, y);
    vf unit;
    if (mantissa < 0) {
        unit = (vf){} + 12582912.0f; /* 1.5 * 2^23 */
    } else {
        unit = (vf)((vi)y & 0x7F800000);
        unit = pick(unit < r->min_normal, (vf){} + r->min_normal, unit) * (1.5f * (float)(1 << (23 - mantissa)));
    }
    vf up = y + unit;
    return (up - unit) * scale;
}

/* Blocks [first, last) of `columns` values, a multiple of 16. */
INLINE void blocks(const char *x, char *out, float *scales, int64_t first, int64_t last, int64_t columns, const Rule *r,
                   int bytes, int mantissa) {
    for (int64_t block = first; block < last; block++) {
        const char *from = x + block * columns * bytes;
        char *to = out + block * columns * bytes;
        vi most = {};
        for (int64_t k = 0; k < columns; k += LANES) { /* the bits of a NaN count as larger than infinity */
            vi bits = (vi)load(from + k * bytes, bytes) & 0x7FFFFFFF;
            most = (vi)pick(bits > most, (vf)bits, (vf)most);
        }
        int32_t largest = 0;
        for (int lane = 0; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest;
        float scale = scale_for(of_bits(largest), r);
        if (scales) scales[block] = scale;
        for (int64_t k = 0; k < columns; k += LANES)
            store(to + k * bytes, quantized(load(from + k * bytes, bytes), scale, r, mantissa), bytes);
    }
}

typedef void (*Blocks)(const char *, char *, float *, int64_t, int64_t, int64_t, const Rule *);
#define INSTANCE(NAME, BYTES, MANTISSA)                                                                                 \
    static void NAME(const char *x, char *out, float *scales, int64_t first, int64_t last, int64_t columns,             \
                     const Rule *r) {                                                                                   \
        blocks(x, out, scales, first, last, columns, r, BYTES, MANTISSA);                                               \
    }
INSTANCE(int_half, 2, -1)
INSTANCE(int_full, 4, -1)
INSTANCE(e2m1_half, 2, 1)
INSTANCE(e2m1_full, 4, 1)
INSTANCE(e4m3_half, 2, 3)
INSTANCE(e4m3_full, 4, 3)

/* out = x on its grid: `many` blocks of `columns` elements of `bytes` (4: float32, 2: bf16) each, one after the other.
 * Returns 0, or 1 where the element is not known. */
int fake_quantize_input(const Rule *r, const void *x, void *out, float *scales, int64_t many, int64_t columns, int bytes,
                        int threads) {
    Blocks run = r->mantissa == -1 ? (bytes == 2 ? int_half : int_full)
               : r->mantissa == 1  ? (bytes == 2 ? e2m1_half : e2m1_full)
               : r->mantissa == 3  ? (bytes == 2 ? e4m3_half : e4m3_full) : 0;
    if (!run || columns % LANES) return 1;
    const int64_t share = 1 + 16384 / columns; /* less is not worth another thread */
    const int64_t parts = (many + share - 1) / share;
    if (parts < 2 || threads < 2) {
        run(x, out, scales, 0, many, columns, r);
        return 0;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < parts; part++)
        run(x, out, scales, part * share, (part + 1) * share < many ? (part + 1) * share : many, columns, r);
    return 0;
}
