/* The integer model on CPUs with AVX2 or AVX-512 VNNI: types and helpers. The arithmetic is that of oracle.py. What
   depends on the instructions is in avx512.c or avx2.c.

   Activations that go into a product are stored as unsigned bytes, value + 128, because vpdpbusd multiplies unsigned by
   signed bytes; 128 times the sum of an output's weights is taken off by what its sum starts from. Rows of activations
   are padded to 64 bytes with zeros, and stay zero there, because weights, factors and biases are.

   Rows are (time, member): row t * members + i is member i at step t of a block of steps. */

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define AVX512 1
#elif defined(__AVX2__)
#define AVX512 0
#else
#error "this machine has neither AVX2 nor AVX-512 VNNI"
#endif

#define DEPTH 256 /* pairs x rank that an update sums in one go */
#define PAD(n) (((n) + 63) & ~(int64_t)63)
#define INLINE static inline __attribute__((always_inline))

/* One product. Weights lie as eggroll_pack makes them; start is -128 times the sum of an output's. */
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

/* Rows times a matrix. */
typedef struct {
  const Matrix *matrix;
  const uint8_t *in; /* (rows, in_stride), value + 128 */
  int8_t *out;       /* (rows, out_stride) */
  int64_t in_stride, out_stride, rows;
  int unsigned_out;             /* whether 128 is added to the results */
  int64_t rank, noise_shift;    /* rank 0: no low-rank term */
  const int8_t *const *a;       /* (rows,) A of the row's member */
  const int32_t *scales;        /* (rows, rank) */
  void *expanded;               /* EXPANDED_BYTES(inputs) to write into */
} Product;

INLINE int32_t clip(int32_t x) { return x > 127 ? 127 : x < -127 ? -127 : x; }
