/* Vectors of 16 floats, read from and written to float32 or bfloat16. Put before the sources that use it. */
#include <stdint.h>

typedef void parallel_t(void (*)(void *), void *, unsigned, unsigned);
typedef float vec __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
#define WIDTH 16
/* With AVX-512, bfloat16 becomes float32 in one instruction, zeros put between the halves, instead of gcc's four. */
#if defined(__AVX512BW__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define INTERLEAVE
#endif
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE float load_f32(const float *from) { return *from; }
INLINE void store_f32(float *to, float value) { *to = value; }
INLINE vec load_vec_f32(const float *from) { vec v; __builtin_memcpy(&v, from, sizeof v); return v; }
INLINE void store_vec_f32(float *to, vec v) { __builtin_memcpy(to, &v, sizeof v); }

INLINE float load_bf16(const uint16_t *from) {
    union { uint32_t u; float f; } v; v.u = (uint32_t)*from << 16;
    return v.f;
}
INLINE void store_bf16(uint16_t *to, float value) {
    union { uint32_t u; float f; } v; v.f = value;
    uint32_t rounded = (v.u + 0x7FFFu + ((v.u >> 16) & 1u)) >> 16;
    *to = (uint16_t)((v.u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
INLINE vec load_vec_bf16(const uint16_t *from) {
    halves h; __builtin_memcpy(&h, from, sizeof h);
#ifdef INTERLEAVE
    return (vec)__builtin_shufflevector((halves){0}, h, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                        25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
    return (vec)(__builtin_convertvector(h, words) << 16);
#endif
}
INLINE void store_vec_bf16(uint16_t *to, vec v) {
    words w = (words)v, rounded = (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;
    words is_nan = (words)((w & 0x7FFFFFFFu) > 0x7F800000u);
    halves h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7FC0u), halves);
    __builtin_memcpy(to, &h, sizeof h);
}
INLINE float sum_of(vec v) {
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += v[i];
    return sum;
}
/* The next block of entries for a thread; 0 once there is none. */
INLINE int take_block(int64_t *next, int64_t block, int64_t size, int64_t *low, int64_t *high) {
    *low = __atomic_fetch_add(next, block, __ATOMIC_RELAXED), *high = *low + block;
    if (*high > size) *high = size;
    return *low < size;
}
#define UNROLL _Pragma("GCC unroll 4")
