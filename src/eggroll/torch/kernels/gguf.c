/* Rows of GGUF blocks to float32 or bfloat16, a row of the result for each number of a row. Layouts are ggml's
   (ggml-common.h); each operation is rounded as in gguf's NumPy code, so the numbers are the same bits. */
#include <stdint.h>

#if defined(__F16C__)
#include <immintrin.h>
static inline float half(const uint8_t *p) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, 2);
    return _cvtsh_ss(bits);
}
#else
static inline float half(const uint8_t *p) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, 2);
    uint32_t sign = (uint32_t)(bits >> 15) << 31, exponent = (bits >> 10) & 31, fraction = bits & 1023, word;
    float value;
    if (exponent == 0) {
        value = (float)fraction * 0x1p-24f;
        __builtin_memcpy(&word, &value, 4);
        word |= sign;
    } else {
        word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (fraction << 13);
    }
    __builtin_memcpy(&value, &word, 4);
    return value;
}
#endif

/* Sixteen numbers at a time, in the vectors of GCC and Clang, which become the machine's. */
typedef uint8_t bytes __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef float floats __attribute__((vector_size(64)));
/* by way of 32 bits, as GCC makes single numbers of the direct way */
#define FLOATS(codes) __builtin_convertvector(__builtin_convertvector(codes, ints), floats)

#ifdef BF16
typedef uint16_t number;
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
static inline void store(number *to, floats values) {
    const words bits = (words)values;
    const halves cut = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves);
    __builtin_memcpy(to, &cut, sizeof cut);
}
#define NAME eggroll_gguf_bf16
#else
typedef float number;
static inline void store(number *to, floats values) { __builtin_memcpy(to, &values, sizeof values); }
#define NAME eggroll_gguf_f32
#endif

static inline floats low_codes(const uint8_t *p, uint8_t shift, uint8_t mask) {
    bytes code;
    __builtin_memcpy(&code, p, 16);
    return FLOATS((code >> shift) & mask);
}

/* Sixteen codes of `mask` << `shift` in p, with bit `bit` (or more, by `top`) of those in h above them. */
static inline floats joined(const uint8_t *p, uint8_t shift, const uint8_t *h, uint8_t bit, uint8_t top,
                            uint8_t place) {
    bytes code, high;
    __builtin_memcpy(&code, p, 16);
    __builtin_memcpy(&high, h, 16);
    return FLOATS(((code >> shift) & 15) | (((high >> bit) & top) << place));
}

/* Blocks of 32: scale (half), in Q4_1 and Q5_1 an offset (half), in Q5 the fifth bits in 4 bytes, then the codes. */
static inline void q8_0(number *to, const uint8_t *block) {
    const float scale = half(block);
    for (int j = 0; j < 32; j += 16) {
        bytes code; /* shifted to 0..255 and back: GCC has no vectors for signed ones */
        __builtin_memcpy(&code, block + 2 + j, 16);
        store(to + j, (FLOATS(code ^ 128) - 128.0f) * scale);
    }
}

static inline void q4_0(number *to, const uint8_t *block) {
    const float scale = half(block);
    for (int j = 0; j < 2; j++) store(to + 16 * j, (low_codes(block + 2, 4 * j, 15) - 8.0f) * scale);
}

static inline void q4_1(number *to, const uint8_t *block) {
    const float scale = half(block), offset = half(block + 2);
    for (int j = 0; j < 2; j++) store(to + 16 * j, low_codes(block + 4, 4 * j, 15) * scale + offset);
}

static inline void q5(number *to, const uint8_t *block, int offset) {
    const float scale = half(block), add = offset ? half(block + 2) : 0.0f;
    const uint8_t *fifth = block + (offset ? 4 : 2);
    uint32_t bits;
    __builtin_memcpy(&bits, fifth, 4);
    uint8_t high[32];
    for (int j = 0; j < 32; j++) high[j] = (bits >> j) & 1;
    for (int j = 0; j < 2; j++) {
        const floats code = joined(fifth + 4, 4 * j, high + 16 * j, 0, 1, 4);
        store(to + 16 * j, offset ? code * scale + add : (code - 16.0f) * scale);
    }
}

/* Blocks of 256, in groups of 16 or 32 with a scale (and an offset) of a few bits each, times those of the block. */
static inline void q2_k(number *to, const uint8_t *block) { /* 16 scales and offsets of 4 bits, codes, d, dmin */
    const float scale = half(block + 80), offset = half(block + 82);
    for (int g = 0; g < 16; g++) {
        const uint8_t *codes = block + 16 + 32 * (g / 8) + 16 * (g % 2);
        const float d = scale * (float)(block[g] & 15), m = offset * (float)(block[g] >> 4);
        store(to + 16 * g, low_codes(codes, 2 * (g / 2 % 4), 3) * d - m);
    }
}

static inline void q3_k(number *to, const uint8_t *block) { /* third bits, codes of 2 bits, scales of 6 bits, d */
    const float scale = half(block + 108);
    const uint8_t *scales = block + 96;
    for (int g = 0; g < 16; g++) {
        const int low = (g < 8 ? scales[g] : scales[g - 8] >> 4) & 15, high = (scales[8 + g % 4] >> (2 * (g / 4))) & 3;
        const float d = scale * (float)((low | high << 4) - 32);
        bytes code, third;
        __builtin_memcpy(&code, block + 32 + 32 * (g / 8) + 16 * (g % 2), 16);
        __builtin_memcpy(&third, block + 16 * (g % 2), 16);
        const uint8_t two = 2 * (g / 2 % 4), one = g / 2;
        code = ((code >> two) & 3) | (((third >> one) & 1) << 2);
        store(to + 16 * g, (FLOATS(code) - 4.0f) * d);
    }
}

/* d, dmin, scales and offsets of 6 bits in 12 bytes, in Q5_K the fifth bits, then the codes */
static inline void q45_k(number *to, const uint8_t *block, int five) {
    const float scale = half(block), offset = half(block + 2);
    const uint8_t *s = block + 4, *fifth = block + 16, *codes = block + (five ? 48 : 16);
    for (int g = 0; g < 8; g++) {
        const int k = g % 4, sc = g < 4 ? s[k] & 63 : (s[8 + k] & 15) | ((s[k] >> 2) & 48),
                  mn = g < 4 ? s[4 + k] & 63 : (s[8 + k] >> 4) | ((s[4 + k] >> 2) & 48);
        const float d = scale * (float)sc, m = offset * (float)mn;
        for (int j = 0; j < 32; j += 16) {
            const uint8_t *from = codes + 32 * (g / 2) + j;
            const floats code = five ? joined(from, 4 * (g % 2), fifth + j, g, 1, 4) : low_codes(from, 4 * (g % 2), 15);
            store(to + 32 * g + j, code * d - m);
        }
    }
}

static inline void q6_k(number *to, const uint8_t *block) { /* lower 4 bits, upper 2 bits, 16 scales (int8), d */
    const float scale = half(block + 208);
    for (int g = 0; g < 16; g++) {
        const int upper = g / 8, part = g / 2 % 4, j = 16 * (g % 2);
        const uint8_t *low = block + 64 * upper + 32 * (part % 2) + j, *high = block + 128 + 32 * upper + j;
        const float d = scale * (float)(int8_t)block[192 + g];
        store(to + 16 * g, (joined(low, 4 * (part / 2), high, 2 * part, 3, 4) - 32.0f) * d);
    }
}

#define ROWS(weights, size, expand)                                                                    \
    for (int64_t i = start; i < stop; i++) {                                                           \
        const uint8_t *block = blocks + (rows ? rows[i] : first + i) * groups * (size);                \
        number *to = out + i * groups * (weights);                                                     \
        for (int64_t g = 0; g < groups; g++, block += (size), to += (weights)) expand;                 \
    }                                                                                                  \
    return;

/* kind: as in gguf_c.py. rows: which ones, or null for first .. first + count. groups: blocks of a row. */
static void some(number *out, const uint8_t *blocks, const int64_t *rows, int64_t first, int64_t start, int64_t stop,
                 int64_t groups, int64_t kind) {
    switch (kind) {
        case 0: ROWS(32, 34, q8_0(to, block))
        case 1: ROWS(32, 18, q4_0(to, block))
        case 2: ROWS(32, 20, q4_1(to, block))
        case 3: ROWS(32, 22, q5(to, block, 0))
        case 4: ROWS(32, 24, q5(to, block, 1))
        case 5: ROWS(256, 84, q2_k(to, block))
        case 6: ROWS(256, 110, q3_k(to, block))
        case 7: ROWS(256, 144, q45_k(to, block, 0))
        case 8: ROWS(256, 176, q45_k(to, block, 1))
        case 9: ROWS(256, 210, q6_k(to, block))
    }
}

struct job {
    number *out;
    const uint8_t *blocks;
    const int64_t *rows;
    int64_t first, count, groups, kind, parts;
    int64_t next;
};

static void work(void *data) {
    struct job *job = data;
    for (;;) {
        const int64_t part = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (part >= job->parts) return;
        some(job->out, job->blocks, job->rows, job->first, part * job->count / job->parts,
             (part + 1) * job->count / job->parts, job->groups, job->kind);
    }
}

typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

void NAME(number *out, const uint8_t *blocks, const int64_t *rows, int64_t first, int64_t count, int64_t groups,
          int64_t kind, int64_t parts, parallel run) {
    struct job job = {out, blocks, rows, first, count, groups, kind, parts, 0};
    if (parts > 1 && run) run(work, &job, 0, 0);
    else work(&job);
}
