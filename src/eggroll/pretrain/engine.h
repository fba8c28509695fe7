/* The integer model on CPUs with AVX-512 VNNI: types and helpers. The arithmetic is that of oracle.py.

   Activations that go into a product are stored as unsigned bytes, value + 128, because vpdpbusd multiplies unsigned by
   signed bytes; 128 times the sum of an output's weights is taken off by what its sum starts from. Rows of activations
   are padded to 64 bytes with zeros, and stay zero there, because weights, factors and biases are.

   Rows are (time, member): row t * members + i is member i at step t of a block of steps. */

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__AVX512BW__) || !defined(__AVX512VNNI__) || !defined(__AVX512VL__)
#error "this machine has no AVX-512 VNNI"
#endif

#define PANEL 64 /* outputs that are made together */
#define TILE 6   /* rows that are made together: 6 x 4 registers of sums */
#define PAD(n) (((n) + 63) & ~(int64_t)63)
#define INLINE static inline __attribute__((always_inline))

/* One product. Weights lie as [panel][inputs / 4][64 outputs][4 inputs]; start is -128 times the sum of an output's. */
typedef struct {
  const int8_t *packed;
  const int32_t *start;
  int64_t inputs, outputs;
  int64_t divisor, shift; /* shift >= 0: the divisor is 2^shift */
  int64_t parameter;      /* its place in the order of parameters */
  int64_t sums;           /* the place of the sums of its B in a pair's sums */
} Matrix;

/* The model. matrices: Wf, Uf, Wh, Uh, up, down of each layer, then head. vectors: ln1, bf, bh, ln2 of each layer, then
   ln_out. Parameter 0 is the embedding. Rows of embedding and vectors are padded. */
typedef struct {
  int64_t vocab, hidden, layers, parameters;
  const Matrix *matrices;
  const int8_t *embedding, *vectors;
  const int64_t *vector_parameter;
  const int32_t *exp2, *log2;
  int64_t log2_count;
  int64_t rank, noise_shift;   /* rank 0: the model itself, without noise */
  int64_t pair_bytes, pair_sums;
  const int64_t (*draws)[4];   /* per parameter: inputs, outputs, places of B and of A in a pair's block */
  const int8_t *table;         /* NULL: draws come from the counter */
  const int8_t *normal_table;  /* (65536,) */
} Model;

/* Work: some members, each with a window of steps + 1 tokens (the last is a target only). */
typedef struct {
  int64_t members, pairs, steps, block; /* block: steps that a layer makes before the next layer does */
  const int32_t *pair, *sign, *window;  /* (members,): which of `pairs`, 1 or -1, which of the windows */
  const uint8_t *tokens;                /* (windows, token_stride) */
  int64_t token_stride;
  const int64_t *addresses; /* (parameters, address_stride): offsets into the table, or keys, hi << 32 | lo */
  int64_t address_stride;
  const int8_t *state_in; /* (windows, layers, hidden) or NULL */
  int8_t *state_out;      /* (members, layers, hidden) or NULL */
  int8_t *logits;         /* (members, steps, vocab) or NULL */
  int32_t *likelihood;    /* (members, steps) or NULL */
  int32_t *fitness;       /* (members,) or NULL */
  uint8_t *scratch;
} Work;

INLINE __m512i wide(const void *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
INLINE __m512i wide_u(const void *p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store_bytes(void *p, __m512i x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi16_epi8(x)); }
INLINE __m512i clip16(__m512i x) {
  return _mm512_max_epi16(_mm512_min_epi16(x, _mm512_set1_epi16(127)), _mm512_set1_epi16(-127));
}
INLINE int32_t clip(int32_t x) { return x > 127 ? 127 : x < -127 ? -127 : x; }
