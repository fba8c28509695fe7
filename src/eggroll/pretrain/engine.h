/* The integer model on CPUs with AVX-512 VNNI: types and helpers. The arithmetic is that of oracle.py.

   Activations that go into a product are stored as unsigned bytes, value + 128, because vpdpbusd multiplies unsigned by
   signed bytes; 128 times the sum of the weights of an output is taken off by what its sum starts from. Rows of
   activations are padded to 64 bytes, and weights are zero there.

   Rows are (time, member): row t * members + i is member i at step t of a block of steps. */

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PANEL 64 /* outputs that are made together */
#define TILE 6   /* rows that are made together */
#define PAD(n) (((n) + 63) & ~(int64_t)63)
#define INLINE static inline __attribute__((always_inline))

/* One product. Weights lie as [panel][inputs / 4][64 outputs][4 inputs]. In a pair's block of noise, B (rank, padded
   inputs) begins at b and A (rank, padded outputs) at a; `sums` counts the B before it, whose sums are stored. */
typedef struct {
  const int8_t *packed;
  const int32_t *start;
  int64_t inputs, outputs;
  int64_t divisor, shift; /* shift >= 0: the divisor is 2^shift */
  int64_t a, b, sums;
  int64_t parameter; /* its place in the order of parameters */
} Matrix;

/* The model. matrices: Wf, Uf, Wh, Uh, up, down of each layer, then head. vectors: ln1, bf, bh, ln2 of each layer, then
   ln_out. The embedding's A and B have places like a matrix's, and so have the vectors' (B and A of `hidden` each). */
typedef struct {
  int64_t vocab, hidden, layers, parameters;
  const Matrix *matrices;
  const int8_t *embedding;
  const int8_t *vectors;
  const int64_t *vector_a, *vector_b, *vector_parameter;
  int64_t embedding_a, embedding_b;
  const int32_t *exp2, *log2;
  int64_t log2_count;
  /* noise; rank 0 is the model itself */
  int64_t rank, noise_shift, pair_bytes, pair_sums;
  const int8_t *table;          /* NULL: from the counter */
  const int8_t *normal_table;   /* (65536,) */
  const int64_t *draw_lengths;  /* per parameter: inputs, outputs */
} Model;

/* Work: some members, each with a window of steps + 1 tokens (the last is only a target). */
typedef struct {
  int64_t members, pairs, steps, block;
  const int32_t *pair;      /* (members,) which of `pairs` */
  const int32_t *sign;      /* (members,) 1 or -1 */
  const uint8_t *tokens;    /* (windows, token_stride) */
  const int32_t *window;    /* (members,) */
  int64_t token_stride;
  const int64_t *addresses; /* (parameters, address_stride): offsets into the table, or keys, hi << 32 | lo */
  int64_t address_stride;
  const int8_t *state_in;   /* (windows, layers, hidden) or NULL */
  int8_t *state_out;        /* (members, layers, hidden) or NULL */
  int8_t *logits;           /* (members, steps, vocab) or NULL */
  int32_t *likelihood;      /* (members, steps) or NULL */
  int32_t *fitness;         /* (members,) or NULL */
  uint8_t *scratch;
} Work;

INLINE __m512i wide(const void *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
INLINE __m512i wide_u(const void *p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store_bytes(void *p, __m512i x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi16_epi8(x)); }
INLINE __m512i clip16(__m512i x) {
  return _mm512_max_epi16(_mm512_min_epi16(x, _mm512_set1_epi16(127)), _mm512_set1_epi16(-127));
}
