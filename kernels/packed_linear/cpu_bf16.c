/* Linear layers with packed weights on CPUs that multiply BF16: tiles of the weight are decoded to BF16 in the cache, as
 * every engine that dequantizes rounds them, and multiplied there, with float32 sums.
 *
 * Two roads. `TILES` (AMX): 16 rows of the weight times 16 tokens per instruction; K is walked in order by one
 * accumulator, 32 columns a step, which are the sums of oneDNN's BF16 product on the same units, bit for bit. `DOTS`
 * (AVX-512 BF16): a row times a token, 32 columns a step. On neither does a token's result depend on the others.
 */
#include "weight.h"

enum { DOTS = 1, TILES = 2 };

#if !(defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__))
int bf16_roads(void) { return 0; }
int64_t bf16_memory(const Weight *w, int64_t tokens, int threads, int road) { return 0; }
int bf16_linear(const Weight *w, const void *x, int64_t tokens, void *out, void *memory, int threads, int road) { return 1; }
#else
#include "values.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAVE_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define AT_ONCE 1024    /* tokens between two readings of the weight */
#define FEW_COLUMNS 256 /* decoded at a time for a pair of tokens */

typedef struct {
    const Weight *w;
    Decode decode;
    const bf16 *tables, *x; /* x as the road wants it */
    bf16 *out;              /* (tokens, rows) */
    int64_t tokens, steps;  /* at once, and of 32 columns */
} Job;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))

/* ---- dots ---- */

/* Sums of 16 lanes of each of 4 accumulators. */
INLINE __m128 four_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd),
                               (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* 4 rows of decoded tiles times TOKENS tokens; x is (tokens, steps, 32). */
INLINE void dots_of(const Job *job, const bf16 *values, int64_t row, int rows, int64_t token, int tokens) {
    __m512 sums[4][4] = {};
    const bf16 *x = job->x + token * job->steps * PART;
    for (int64_t step = 0; step < job->steps; step++) {
        __m512bh value[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) value[r] = (__m512bh)_mm512_load_si512(values + step * TILE + r * PART);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            const __m512bh given = (__m512bh)_mm512_load_si512(x + (t * job->steps + step) * PART);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], value[r], given);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        float total[4];
        _mm_storeu_ps(total, four_sums(sums[0][t], sums[1][t], sums[2][t], sums[3][t]));
        bf16 *to = job->out + (token + t) * job->w->rows + row;
        for (int r = 0; r < rows; r++) to[r] = bf16_of(total[r] + bias_at(job->w, row + r));
    }
}

/* Rows [first, last), 16 at a time; `values` holds as many decoded. */
static void dots_rows(const Job *job, int64_t first, int64_t last, bf16 *values) {
    const int64_t tiles = job->w->width / PART, parts = 16 / job->w->bits, block = BLOCK / (PART * parts);
    for (int64_t row = first; row < last; row += SIDE) {
        const int64_t rows = last - row < SIDE ? last - row : SIDE;
        for (int64_t tile = 0; tile < tiles; tile += block)
            job->decode(job->w, row, rows, tile, least(tile + block, tiles), job->tables, values + tile * parts * TILE, 0);
        int64_t token = 0;
        for (; token + 4 <= job->tokens; token += 4)
            for (int64_t r = 0; r < rows; r += 4)
                dots_of(job, values + r * PART, row + r, rows - r < 4 ? rows - r : 4, token, 4);
        for (; token < job->tokens; token++)
            for (int64_t r = 0; r < rows; r += 4)
                dots_of(job, values + r * PART, row + r, rows - r < 4 ? rows - r : 4, token, 1);
    }
}

/* One token, filled up with zeros. */
static void copy_token(const Job *job, const bf16 *x, int64_t token, bf16 *to) {
    const int64_t columns = job->w->columns, padded = job->steps * PART;
    memcpy(to + token * padded, x + token * columns, 2 * columns);
    memset(to + token * padded + columns, 0, 2 * (padded - columns));
}

/* ---- tiles ---- */
#ifdef HAVE_TILES

/* GCC's tile instructions do not say which memory they read, so what is stored before them could come after them. */
#define ALL_IN_MEMORY(at) __asm__ volatile("" : : "r"(at) : "memory")

/* Linux hands the tiles' registers out on demand. */
static int tiles_allowed(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* 16 rows of 16 lanes: rows become lanes. */
INLINE void turn(__m512 at[SIDE]) {
    __m512 turned[SIDE];
    for (int r = 0; r < SIDE; r += 2) {
        turned[r] = _mm512_unpacklo_ps(at[r], at[r + 1]);
        turned[r + 1] = _mm512_unpackhi_ps(at[r], at[r + 1]);
    }
    for (int r = 0; r < SIDE; r += 4)
        for (int h = 0; h < 2; h++) {
            at[r + 2 * h] = (__m512)_mm512_unpacklo_pd((__m512d)turned[r + h], (__m512d)turned[r + h + 2]);
            at[r + 2 * h + 1] = (__m512)_mm512_unpackhi_pd((__m512d)turned[r + h], (__m512d)turned[r + h + 2]);
        }
    /* Now at[4 q + j] holds rows 4 q to 4 q + 3 of lanes j, j + 4, j + 8, j + 12, four each. */
    for (int j = 0; j < 4; j++) {
        const __m512 low = _mm512_shuffle_f32x4(at[j], at[4 + j], 0x88), high = _mm512_shuffle_f32x4(at[8 + j], at[12 + j], 0x88);
        const __m512 low2 = _mm512_shuffle_f32x4(at[j], at[4 + j], 0xDD), high2 = _mm512_shuffle_f32x4(at[8 + j], at[12 + j], 0xDD);
        turned[j] = _mm512_shuffle_f32x4(low, high, 0x88), turned[j + 4] = _mm512_shuffle_f32x4(low2, high2, 0x88);
        turned[j + 8] = _mm512_shuffle_f32x4(low, high, 0xDD), turned[j + 12] = _mm512_shuffle_f32x4(low2, high2, 0xDD);
    }
    for (int r = 0; r < SIDE; r++) at[r] = turned[r];
}

/* 16 tokens as the second operand: (tiles, steps, 16 pairs of columns, 16 tokens), pairs together, filled up with zeros. */
static void copy_tile(const Job *job, const bf16 *x, int64_t tile, bf16 *to) {
    const int64_t columns = job->w->columns, first = tile * SIDE, tokens = least(job->tokens - first, SIDE);
    for (int64_t step = 0; step < job->steps; step++) {
        const int64_t left = columns - step * PART;
        const __mmask32 there = left >= PART ? ~0u : left > 0 ? (1u << left) - 1 : 0;
        __m512 at[SIDE];
        for (int64_t token = 0; token < SIDE; token++) {
            const bf16 *from = x + (first + token) * columns + step * PART;
            at[token] = token < tokens ? (__m512)_mm512_maskz_loadu_epi16(there, from) : _mm512_setzero_ps();
        }
        turn(at);
        for (int pair = 0; pair < SIDE; pair++) _mm512_store_ps(to + (tile * job->steps + step) * TILE + pair * PART, at[pair]);
    }
}

/* Sums of 16 rows and 16 tokens, with their bias, to `out`: rounded, tokens outside. */
static void write_tile(const Job *job, const float *sums, int64_t row, int64_t rows, int64_t token, int64_t tokens) {
    __m512 at[SIDE], bias = _mm512_setzero_ps();
    for (int r = 0; r < SIDE; r++) at[r] = _mm512_load_ps(sums + r * SIDE);
    turn(at);
    if (job->w->bias) {
        float values[SIDE] = {0};
        for (int64_t r = 0; r < rows; r++) values[r] = bias_at(job->w, row + r);
        bias = _mm512_loadu_ps(values);
    }
    const __mmask16 kept = (1u << rows) - 1;
    for (int64_t which = 0; which < SIDE && which < tokens; which++) {
        const __m256i halves = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(at[which], bias));
        _mm256_mask_storeu_epi16(job->out + (token + which) * job->w->rows + row, kept, halves);
    }
}

/* Tiles 0 to 3 hold sums (rows, tokens), 4 and 5 the weight, 6 and 7 tokens; TWO: both halves of a pair of tokens. */
INLINE void multiply(const bf16 *values, const bf16 *low, const bf16 *high, int64_t steps, int64_t apart, int two) {
    ALL_IN_MEMORY(values);
    for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(4, values + step * TILE, 64);
        _tile_loadd(6, low + step * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, values + apart + step * TILE, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (!two) continue;
        _tile_loadd(7, high + step * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
}

static void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static void load_sums(const float *sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + SIDE * SIDE, 64);
    _tile_loadd(2, sums + 2 * SIDE * SIDE, 64);
    _tile_loadd(3, sums + 3 * SIDE * SIDE, 64);
}

static void store_sums(float *sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SIDE * SIDE, 64);
    _tile_stored(2, sums + 2 * SIDE * SIDE, 64);
    _tile_stored(3, sums + 3 * SIDE * SIDE, 64);
}

/* Rounded results of a pair of rows and a pair of tokens. */
static void write_pair(const Job *job, const float *sums, int64_t row, int64_t last, int64_t token) {
    for (int part = 0; part < 4; part++) {
        const int64_t r = row + part / 2 * SIDE, t = token + part % 2 * SIDE;
        if (r < last && t < job->tokens) write_tile(job, sums + part * SIDE * SIDE, r, least(last - r, SIDE), t, job->tokens - t);
    }
}

/* Rows [first, last), at most a pair, times at most a pair of tokens, whose sums stay in registers. Some columns are
 * decoded, a few rows at a time, between the products of the one before: they are done by another unit. */
INLINE void pair_times(const Job *job, int64_t first, int64_t last, bf16 *values, float *sums, int two) {
    const Weight *w = job->w;
    const int64_t parts = 16 / w->bits, tiles = w->width / PART, block = FEW_COLUMNS / (PART * parts);
    const int64_t apart = FEW_COLUMNS / PART * TILE, at_once = PAIR / (FEW_COLUMNS / PART);
    const bf16 *low = job->x;
    int64_t done = 0, steps = 0; /* of the block before */
    zero_sums();
    for (int64_t tile = 0; tile < tiles + block; tile += block) {
        bf16 *now = values + tile / block % 2 * 2 * apart;
        const bf16 *before = values + (tile / block + 1) % 2 * 2 * apart;
        for (int64_t step = 0; step < FEW_COLUMNS / PART; step++) {
            const int64_t row = step * at_once, at = row / SIDE * apart + row % SIDE * PART;
            if (tile < tiles && first + row < last)
                job->decode(w, first + row, least(at_once, last - first - row), tile, least(tile + block, tiles), job->tables,
                            now + at, apart);
            if (step < steps)
                multiply(before + step * TILE, low + (done + step) * TILE, low + (job->steps + done + step) * TILE, 1, apart, two);
        }
        done += steps, steps = (least(tile + block, tiles) - tile) * parts;
    }
    store_sums(sums);
    write_pair(job, sums, first, last, 0);
}

/* Rows [first, last) times all tokens: `values` holds the decoded block of all rows, `sums` all sums. */
static void tiles_rows(const Job *job, int64_t first, int64_t last, bf16 *values, float *sums) {
    if (last - first <= PAIR && job->tokens <= SIDE) return pair_times(job, first, last, values, sums, 0);
    if (last - first <= PAIR && job->tokens <= PAIR) return pair_times(job, first, last, values, sums, 1);
    const Weight *w = job->w;
    const int64_t parts = 16 / w->bits, tiles = w->width / PART, pairs = (last - first + PAIR - 1) / PAIR;
    const int64_t blocks = (tiles * parts * PART + BLOCK - 1) / BLOCK, block = (tiles + blocks - 1) / blocks;
    const int64_t apart = BLOCK / PART * TILE;
    for (int64_t tile = 0; tile < tiles; tile += block) {
        const int64_t until = least(tile + block, tiles), steps = (until - tile) * parts;
        job->decode(w, first, last - first, tile, until, job->tables, values, apart);
        for (int64_t token = 0; token < job->tokens; token += PAIR) {
            const bf16 *low = job->x + (token / SIDE * job->steps + tile * parts) * TILE, *high = low + job->steps * TILE;
            for (int64_t pair = 0; pair < pairs; pair++) {
                float *kept = sums + (token / PAIR * pairs + pair) * PAIR * PAIR;
                if (tile == 0) zero_sums();
                else load_sums(kept);
                if (job->tokens - token > SIDE) multiply(values + 2 * pair * apart, low, high, steps, apart, 1);
                else multiply(values + 2 * pair * apart, low, low, steps, apart, 0);
                store_sums(kept);
                if (until == tiles) write_pair(job, kept, first + pair * PAIR, last, token);
            }
        }
    }
}

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileShapes;

/* All tiles 16 rows of 64 bytes; what the library had set comes back afterwards. */
static void set_tiles(TileShapes *before) {
    TileShapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) shapes.bytes[tile] = 64, shapes.rows[tile] = SIDE;
    _tile_storeconfig(before);
    ALL_IN_MEMORY(&shapes);
    _tile_loadconfig(&shapes);
}

static void reset_tiles(const TileShapes *before) {
    ALL_IN_MEMORY(before);
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}
#endif

int bf16_roads(void) {
#ifdef HAVE_TILES
    return DOTS | (tiles_allowed() ? TILES : 0);
#else
    return DOTS;
#endif
}

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* Pairs of rows that one thread takes at a time: many share a reading of the tokens, but every thread wants some. */
static int64_t pairs_at_once(const Weight *w, int64_t tokens, int threads) {
    int64_t pairs = tokens <= 2 * PAIR ? 1 : 8;
    while (pairs > 1 && w->rows < 2 * threads * pairs * PAIR) pairs /= 2;
    return pairs;
}

/* Bytes of a call's memory, one part after the other; the last one is every thread's own. */
typedef struct {
    int64_t tables, x, values, sums;
} Memory;

static Memory memory_for(const Weight *w, int64_t tokens, int threads, int road) {
    const int64_t columns = w->width * (16 / w->bits), rows = pairs_at_once(w, tokens, threads) * PAIR;
    const int64_t some = ROUND_UP(least(tokens, AT_ONCE), PAIR);
    return (Memory){w->scale_bytes == 1 ? 2 * 256 * 16 : 0, 2 * some * columns,
                    2 * (road == TILES ? rows * BLOCK : SIDE * columns), road == TILES ? 4 * rows * some : 0};
}

/* Bytes that `bf16_linear` wants, on a border of 64. */
int64_t bf16_memory(const Weight *w, int64_t tokens, int threads, int road) {
    const Memory memory = memory_for(w, tokens, threads, road);
    return memory.tables + memory.x + threads * (memory.values + memory.sums);
}

/* out (tokens, rows) = x (tokens, columns) times the weight, all in BF16, by a road of `bf16_roads`.
 * Returns 0, or 1 where there is no instance for the weight. */
int bf16_linear(const Weight *w, const bf16 *x, int64_t tokens, bf16 *out, char *memory, int threads, int road) {
    const int bytes = w->bits < 8 && w->scale_bytes == 1;
    const Decode decode = decoder(w, bytes);
    if (!decode) return 1;
    const Memory parts = memory_for(w, tokens, threads, road);
    const int64_t steps = w->width / PART * (16 / w->bits);
    bf16 *ordered = (bf16 *)(memory + parts.tables);
    if (bytes) make_tables(w, (bf16 *)memory);
#pragma omp parallel num_threads(threads)
    {
        char *own = memory + parts.tables + parts.x + thread_number() * (parts.values + parts.sums);
#ifdef HAVE_TILES
        TileShapes before;
        if (road == TILES) set_tiles(&before);
#endif
        for (int64_t begin = 0; begin < tokens; begin += AT_ONCE) {
            const Job job = {w, decode, (bf16 *)memory, ordered, out + begin * w->rows, least(tokens - begin, AT_ONCE), steps};
            const bf16 *from = x + begin * w->columns;
            if (road == TILES) {
#ifdef HAVE_TILES
                const int64_t own_rows = pairs_at_once(w, tokens, threads) * PAIR;
#pragma omp for schedule(static)
                for (int64_t tile = 0; tile < (job.tokens + SIDE - 1) / SIDE; tile++) copy_tile(&job, from, tile, ordered);
#pragma omp for schedule(dynamic, 1)
                for (int64_t first = 0; first < w->rows; first += own_rows)
                    tiles_rows(&job, first, least(first + own_rows, w->rows), (bf16 *)own, (float *)(own + parts.values));
#endif
            } else {
#pragma omp for schedule(static)
                for (int64_t token = 0; token < job.tokens; token++) copy_token(&job, from, token, ordered);
#pragma omp for schedule(dynamic, 1)
                for (int64_t first = 0; first < w->rows; first += SIDE)
                    dots_rows(&job, first, least(first + SIDE, w->rows), (bf16 *)own);
            }
        }
#ifdef HAVE_TILES
        if (road == TILES) reset_tiles(&before);
#endif
    }
    return 0;
}
#endif
