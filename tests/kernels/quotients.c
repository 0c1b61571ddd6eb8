/* Run by test_quotients.py: quotients as kernels/fake_quantize/rounding makes them, against IEEE division, counted.
 * Signs and exponents change nothing, so dividends and divisors are significands. */

#include <math.h>
#include <stdint.h>

static inline int differs(float a, float b, int corrections) {
    float inverse = 1.0f / b, q = a * inverse;
    for (int i = 0; i < corrections; i++)
        q = fmaf(fmaf(-b, q, a), inverse, q);
    return q != a / b;
}

/* Pairs of dividends of `bits` bits, and of divisors 1 + i / 2^23 for every `step`th i, whose quotients differ. */
int64_t wrong(int bits, int corrections, int step) {
    int64_t count = 0;
    int dividends = 1 << (bits - 1);
#pragma omp parallel for reduction(+ : count)
    for (int i = 0; i < 1 << 23; i += step) {
        int here = 0;
        for (int j = 0; j < dividends; j++)
            here += differs(1.0f + (float)j / (float)dividends, 1.0f + (float)i * 0x1p-23f, corrections);
        count += here;
    }
    return count;
}

/* All 24-bit a and b of the same binade with a 2^shift = b m + r: m, odd and of 25 bits, stands for the number halfway
 * between two quotients, from which a / b is r / (b 2^shift) away. The shift is 24 where a >= b and else 25. `pairs`
 * becomes how many there are. */
int64_t wrong_near_halves(int corrections, int r, int64_t *pairs) {
    int64_t count = 0, found = 0;
#pragma omp parallel for reduction(+ : count, found)
    for (int64_t b = 1 << 23; b < 1 << 24; b++) {
        int twos = __builtin_ctzll((uint64_t)b);
        if (r & ((1 << twos) - 1))
            continue;
        uint32_t odd = (uint32_t)(b >> twos), inverse = odd;  /* modulo 2^32, by Newton: three bits, six, twelve ... */
        for (int i = 0; i < 4; i++)
            inverse *= 2u - odd * inverse;
        for (int shift = 24; shift <= 25; shift++) {
            uint32_t modulus = 1u << (shift - twos), first = -(uint32_t)(r / (1 << twos)) * inverse & (modulus - 1);
            int64_t m = first + ((1 << 24) - (int64_t)first + modulus - 1) / modulus * modulus;
            for (; m < 1 << 25; m += modulus) {
                int64_t product = b * m + r, a = product >> shift;
                if (!(m & 1) || product & ((1 << shift) - 1) || a >> 23 != 1 || (a < b) != (shift == 25))
                    continue;
                found++;
                count += differs((float)a, (float)b, corrections);
            }
        }
    }
    *pairs = found;
    return count;
}
