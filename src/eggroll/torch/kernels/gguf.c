/* Rows of GGUF blocks (Q8_0, Q4_0, Q4_1) to float32 or bfloat16, a row of the result for each number of a row.
   A block is 32 weights: scale (half), for Q4_1 an offset (half), then the codes. */
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

/* kind: 0 Q8_0, 1 Q4_0, 2 Q4_1. rows: which ones, or null for first .. first + count. */
static void some(number *out, const uint8_t *blocks, const int64_t *rows, int64_t first, int64_t start, int64_t stop,
                 int64_t groups, int64_t kind) {
    const int64_t header = kind == 2 ? 4 : 2, size = header + (kind ? 16 : 32);
    for (int64_t i = start; i < stop; i++) {
        const uint8_t *block = blocks + (rows ? rows[i] : first + i) * groups * size;
        number *to = out + i * groups * 32;
        for (int64_t g = 0; g < groups; g++, block += size, to += 32) {
            const float scale = half(block);
            const uint8_t *codes = block + header;
            if (kind == 0) {
                for (int j = 0; j < 32; j += 16) {
                    bytes code; /* shifted to 0..255 and back: GCC has no vectors for signed ones */
                    __builtin_memcpy(&code, codes + j, 16);
                    store(to + j, (FLOATS(code ^ 128) - 128.0f) * scale);
                }
                continue;
            }
            bytes both;
            __builtin_memcpy(&both, codes, 16);
            floats low = FLOATS(both & 15), high = FLOATS(both >> 4);
            if (kind == 1) {
                low = (low - 8.0f) * scale;
                high = (high - 8.0f) * scale;
            } else {
                const float offset = half(block + 2);
                low = low * scale + offset;
                high = high * scale + offset;
            }
            store(to, low);
            store(to + 16, high);
        }
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
