/* Linear layers with packed weights on CPUs with AVX2 and nothing wider: any number of tokens, float32 sums.
 *
 * Codes of 2 and 4 bits are looked up: the upper halves of their float32 values, which hold them exactly, come from two
 * tables of 16 bytes, 32 codes at a time. Values are multiplied with their scale, which gives the reference's float32
 * weights to the bit. One token: values meet it in registers. More: BAND rows of SLICE columns are decoded in the first
 * cache, where 4 rows times 3 tokens are multiplied at a time.
 *
 * Either way a result is the sum over slices, in order, of 8 lanes that walk along a slice: the same whichever and however
 * many tokens go together. Lanes follow the order in which codes leave their words, and so do copies of the tokens.
 */
#include "weight.h"

#if !(defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)) || defined(__AVX512F__)
int avx2_here(void) { return 0; }
int64_t avx2_memory(const Weight *w, int64_t tokens, int threads) { return 0; }
int avx2_linear(const Weight *w, const void *x, int64_t tokens, int bytes, void *out, void *memory, int threads) { return 1; }
#else
#include "decode_avx2.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#define BAND 8     /* rows decoded at a time */
#define ROWS 32    /* whose sums a thread keeps */
#define AT_ONCE 96 /* tokens between two readings of the weight: a slice of them fits the second cache */

typedef struct {
    const Weight *w;
    Tables tables;
    const float *x; /* (slices, tokens, columns of the slice), in the order of `copy_token` */
    char *out;      /* (tokens, rows) of `bytes` each */
    int64_t tokens, tiles; /* at once; tiles of words per slice */
    int bytes, last_parts; /* of the last tile: those behind them hold no column and are left out, but for one token */
} Job;

/* Loaded once: compilers would rather read memory again at every use, twice what the processor can. */
#define IN_REGISTER(vector) __asm__("" : "+x"(vector))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Of a slice that is left out of nothing but its end. */
INLINE int64_t columns_of(const Job *job, int64_t begin, int64_t end) {
    const int64_t parts = 16 / job->w->bits, all = job->w->width / PART;
    return ((end - begin) * parts - (end == all ? parts - job->last_parts : 0)) * PART;
}

/* One token, slice by slice, in the order in which `plane_values` gives columns, filled up with zeros. */
static void copy_token(const Job *job, const void *from, int64_t token, float *to) {
    const Weight *w = job->w;
    const int parts = 16 / w->bits, low = in_order(w) ? 8 : 4, high = 12 - low; /* apart: vectors, their halves */
    const int64_t all = w->width / PART;
    for (int64_t begin = 0; begin < all; begin += job->tiles) {
        const int64_t end = least(begin + job->tiles, all);
        float *at = to + begin * job->tokens * parts * PART + token * columns_of(job, begin, end);
        for (int64_t tile = begin; tile < end; tile++)
            for (int half = 0; half < 2; half++)
                for (int plane = 0; plane < parts / 2; plane++)
                    for (int quarter = 0; quarter < 8; quarter++) { /* of two vectors of either part */
                        const int part = plane + quarter / 2 % 2 * (parts / 2);
                        if (tile == all - 1 && part >= job->last_parts) continue;
                        const int64_t k = (tile * parts + part) * PART + half * 16 + quarter / 4 * low + quarter % 2 * high;
                        if (k + 4 > w->columns) {
                            for (int i = 0; i < 4; i++)
                                at[i] = k + i >= w->columns ? 0 : job->bytes == 4 ? ((const float *)from)[k + i]
                                                                                  : of_bf16(((const uint16_t *)from)[k + i]);
                        } else if (job->bytes == 4) {
                            memcpy(at, (const float *)from + k, 16);
                        } else {
                            const __m128i raw = _mm_loadl_epi64((const void *)((const uint16_t *)from + k));
                            _mm_storeu_si128((void *)at, _mm_unpacklo_epi16(_mm_setzero_si128(), raw));
                        }
                        at += 4;
                    }
    }
}

/* Sums of the 8 lanes of each of 4 accumulators. */
INLINE __m128 four_sums(const __m256 a[4]) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a[0], a[1]), _mm256_unpackhi_ps(a[0], a[1]));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(a[2], a[3]), _mm256_unpackhi_ps(a[2], a[3]));
    const __m256 all = _mm256_add_ps((__m256)_mm256_unpacklo_pd((__m256d)ab, (__m256d)cd),
                                     (__m256)_mm256_unpackhi_pd((__m256d)ab, (__m256d)cd));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

/* Sums of up to ROWS rows with their bias to `out`, rounded once. */
static void write_sums(const Job *job, const float *sums, const float *bias, int64_t token, int64_t row, int64_t rows) {
    const int64_t at = token * job->w->rows + row;
    float *full = (float *)job->out + at;
    uint16_t *half = (uint16_t *)job->out + at;
    if (job->bytes == 4) for (int64_t r = 0; r < rows; r++) full[r] = sums[r] + bias[r];
    else for (int64_t r = 0; r < rows; r++) half[r] = bf16_of(sums[r] + bias[r]);
}

/* Rows [first, last) times one token, 4 rows side by side: the chains of their sums are what a row alone would wait for. */
INLINE void rows_once(const Job *job, int64_t first, int64_t last, int bits, int mantissa, int bytes, int affine) {
    const Weight *w = job->w;
    const int parts = 16 / bits;
    const int64_t all = w->width / PART;
    for (int64_t row = first; row < last; row += 4) {
        const float *x = job->x;
        __m128 total = _mm_setzero_ps();
        for (int64_t begin = 0; begin < all; begin += job->tiles) {
            const int64_t end = least(begin + job->tiles, all);
            Scales scales[4];
            const uint16_t *words[4];
            __m256 sums[4];
            for (int r = 0; r < 4; r++) {
                const int64_t which = least(row + r, last - 1); /* the last row fills up */
                load_scales(w, which, begin * parts * PART, end * parts * PART, bits, mantissa, bytes, affine, &scales[r]);
                words[r] = w->words + which * w->width;
                sums[r] = _mm256_setzero_ps();
            }
            for (int64_t tile = begin; tile < end; tile++) {
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    __m256i word[4];
#pragma GCC unroll 4
                    for (int r = 0; r < 4; r++) {
                        const uint16_t *at = words[r] + tile * PART + half * 16;
                        word[r] = _mm256_loadu_si256((const void *)at);
                        if (half == 0) __builtin_prefetch(at + 4 * w->width);
                    }
#pragma GCC unroll 4
                    for (int plane = 0; plane < parts / 2; plane++, x += 32) {
#pragma GCC unroll 4
                        for (int r = 0; r < 4; r++) {
                            __m256 value[4];
                            plane_values(w, &job->tables, &scales[r], word[r], tile, half, plane, bits, mantissa, bytes, affine, value);
#pragma GCC unroll 4
                            for (int v = 0; v < 4; v++) sums[r] = _mm256_fmadd_ps(value[v], _mm256_load_ps(x + 8 * v), sums[r]);
                        }
                    }
                }
            }
            total = _mm_add_ps(total, four_sums(sums));
        }
        float out[4], bias[4];
        const int64_t rows = least(4, last - row);
        _mm_storeu_ps(out, total);
        for (int64_t r = 0; r < rows; r++) bias[r] = bias_at(w, row + r);
        write_sums(job, out, bias, 0, row, rows);
    }
}

/* A tile of a row as float32, but for the parts from KEPT on; returns where the next one goes. */
INLINE float *tile_values(const Weight *w, const Tables *tables, const Scales *scales, const uint16_t *words, int64_t tile,
                          float *to, int kept, int bits, int mantissa, int bytes, int affine) {
    const int parts = 16 / bits;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m256i word = _mm256_loadu_si256((const void *)(words + tile * PART + half * 16));
#pragma GCC unroll 4
        for (int plane = 0; plane < parts / 2; plane++) {
            __m256 value[4];
            plane_values(w, tables, scales, word, tile, half, plane, bits, mantissa, bytes, affine, value);
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                if (plane + v % 2 * (parts / 2) >= kept) continue;
                _mm256_store_ps(to, value[v]);
                to += 8;
            }
        }
    }
    return to;
}

/* Tiles [begin, end) of a row. */
INLINE void row_values(const Job *job, int64_t row, int64_t begin, int64_t end, float *to, int bits, int mantissa, int bytes,
                       int affine) {
    const Weight *w = job->w;
    const int parts = 16 / bits;
    const Tables tables = job->tables; /* which stores cannot change */
    const uint16_t *words = w->words + row * w->width;
    /* The next slice of the row, and behind its end the first of a row of the next band. */
    const int64_t all = w->width / PART, ahead = (end < all ? end - begin : BAND * all - begin) * PART;
    const int64_t whole = end == all && job->last_parts < parts ? end - 1 : end;
    Scales scales;
    load_scales(w, row, begin * parts * PART, end * parts * PART, bits, mantissa, bytes, affine, &scales);
    for (int64_t tile = begin; tile < whole; tile++) {
        __builtin_prefetch(words + tile * PART + ahead);
        to = tile_values(w, &tables, &scales, words, tile, to, parts, bits, mantissa, bytes, affine);
    }
    if (whole < end) tile_values(w, &tables, &scales, words, whole, to, job->last_parts, bits, mantissa, bytes, affine);
}

typedef struct {
    void (*once)(const Job *, int64_t, int64_t);
    void (*values)(const Job *, int64_t, int64_t, int64_t, float *);
} Decoder;
#define DECODER(NAME, BITS, MANTISSA, BYTES, AFFINE)                                                                    \
    static void NAME##_once(const Job *job, int64_t first, int64_t last) {                                              \
        rows_once(job, first, last, BITS, MANTISSA, BYTES, AFFINE);                                                     \
    }                                                                                                                   \
    static void NAME##_values(const Job *job, int64_t row, int64_t begin, int64_t end, float *to) {                     \
        row_values(job, row, begin, end, to, BITS, MANTISSA, BYTES, AFFINE);                                            \
    }
#define ELEMENT(NAME, BITS, MANTISSA)                                                                                   \
    DECODER(NAME, BITS, MANTISSA, 0, 0)                                                                                 \
    DECODER(NAME##_bytes, BITS, MANTISSA, 1, 0)                                                                         \
    DECODER(NAME##_affine, BITS, MANTISSA, 0, 1)                                                                        \
    static const Decoder NAME[3] = {{NAME##_once, NAME##_values},                                                       \
                                    {NAME##_bytes_once, NAME##_bytes_values},                                           \
                                    {NAME##_affine_once, NAME##_affine_values}};
ELEMENT(two, 2, -1)
ELEMENT(four, 4, -1) /* any element, by its table */
ELEMENT(eight, 8, -1)
ELEMENT(e4m3, 8, 3)

/* Decoded values of 4 rows times TOKENS tokens, over one slice, added to `sums` (tokens, ROWS), or put there. */
INLINE void times(const float *values, const float *x, int64_t columns, int tokens, float *sums, int add) {
    __m256 sum[3][4] = {};
    for (int64_t k = 0; k < columns; k += 8) {
        __m256 given[3];
#pragma GCC unroll 3
        for (int t = 0; t < tokens; t++) {
            given[t] = _mm256_load_ps(x + t * columns + k);
            IN_REGISTER(given[t]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            __m256 value = _mm256_load_ps(values + r * SLICE + k);
            IN_REGISTER(value);
#pragma GCC unroll 3
            for (int t = 0; t < tokens; t++) sum[t][r] = _mm256_fmadd_ps(value, given[t], sum[t][r]);
        }
    }
#pragma GCC unroll 3
    for (int t = 0; t < tokens; t++) {
        const __m128 before = add ? _mm_load_ps(sums + t * ROWS) : _mm_setzero_ps();
        _mm_store_ps(sums + t * ROWS, _mm_add_ps(before, four_sums(sum[t])));
    }
}

/* Rows [first, last), at most ROWS, times all tokens; `values` holds a band of a slice, `sums` (tokens, ROWS). */
static void rows_times(const Job *job, const Decoder *decoder, int64_t first, int64_t last, float *values, float *sums) {
    const Weight *w = job->w;
    const int64_t all = w->width / PART, tile = PART * (16 / w->bits);
    if (!all) memset(sums, 0, 4 * ROWS * job->tokens);
    for (int64_t begin = 0; begin < all; begin += job->tiles) {
        const int64_t end = least(begin + job->tiles, all), columns = columns_of(job, begin, end);
        const float *slice = job->x + begin * tile * job->tokens;
        for (int64_t row = first; row < last; row += BAND) {
            const int64_t rows = (least(BAND, last - row) + 3) / 4 * 4;
            for (int64_t r = 0; r < rows; r++)
                decoder->values(job, least(row + r, last - 1), begin, end, values + r * SLICE);
            int64_t token = 0, some;
            for (; token < job->tokens; token += some) {
                const int64_t left = job->tokens - token;
                some = left == 4 || left == 2 ? 2 : 3; /* never one: a single token in all goes through `once` */
                for (int64_t r = 0; r < rows; r += 4) {
                    const float *from = values + r * SLICE, *x = slice + token * columns;
                    float *to = sums + token * ROWS + row - first + r;
                    if (some == 3) times(from, x, columns, 3, to, begin > 0);
                    else times(from, x, columns, 2, to, begin > 0);
                }
            }
        }
    }
    float bias[ROWS];
    for (int64_t row = first; row < last; row++) bias[row - first] = bias_at(w, row);
    for (int64_t token = 0; token < job->tokens; token++) write_sums(job, sums + token * ROWS, bias, token, first, last - first);
}

int avx2_here(void) { return 1; }

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

enum { OWN = 4 * (BAND * SLICE + AT_ONCE * ROWS), TABLE = 4 * 256 };

/* Tokens between two readings of the weight: as many each time. */
static int64_t at_once(int64_t tokens) {
    const int64_t times = (tokens + AT_ONCE - 1) / AT_ONCE;
    return times ? (tokens + times - 1) / times : 0;
}

/* Bytes that `avx2_linear` wants, on a border of 64. */
int64_t avx2_memory(const Weight *w, int64_t tokens, int threads) {
    return TABLE + 4 * at_once(tokens) * w->width * (16 / w->bits) + threads * (int64_t)OWN;
}

/* out (tokens, rows) = x (tokens, columns) times the weight. Elements of x and out have `bytes`: 4 (float32) or 2 (bf16).
 * Returns 0, or 1 where there is no instance for the weight. */
int avx2_linear(const Weight *w, const char *x, int64_t tokens, int bytes, char *out, char *memory, int threads) {
    const int kind = w->bits * 10 + w->minifloat_mantissa;
    const Decoder *decoder = w->bits == 2 ? two : w->bits == 4 ? four : kind == 79 ? eight : kind == 83 ? e4m3 : 0;
    if (!decoder) return 1;
    decoder += w->zeros ? 2 : w->scale_bytes == 1;
    float *ordered = (float *)(memory + TABLE);
    const int64_t padded = w->width * (16 / w->bits), own_rows = w->rows < 4 * threads * ROWS ? BAND : ROWS;
    const int64_t slices = (padded + SLICE - 1) / SLICE, tiles = w->width / PART, step = at_once(tokens);
    char *own = memory + TABLE + 4 * step * padded;
    for (int64_t begin = 0; begin < tokens; begin += step) {
        Job job = {w, make_tables(w, (float *)memory), ordered, out + begin * w->rows * bytes, least(step, tokens - begin),
                   slices ? (tiles + slices - 1) / slices : 1, bytes, 16 / w->bits};
        if (job.tokens > 1) job.last_parts -= (padded - w->columns) / PART;
        const char *from = x + begin * w->columns * bytes;
#pragma omp parallel num_threads(threads)
        {
            float *values = (float *)(own + thread_number() * OWN);
#pragma omp for schedule(static)
            for (int64_t token = 0; token < job.tokens; token++)
                copy_token(&job, from + token * w->columns * bytes, token, ordered);
#pragma omp for schedule(dynamic, 1)
            for (int64_t first = 0; first < w->rows; first += own_rows) {
                const int64_t last = least(first + own_rows, w->rows);
                if (job.tokens == 1) decoder->once(&job, first, last);
                else rows_times(&job, decoder, first, last, values, values + BAND * SLICE);
            }
        }
    }
    return 0;
}
#endif
