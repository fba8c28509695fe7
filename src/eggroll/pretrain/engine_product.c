/* Products of int8 rows with shared weights, divided, clipped, and with the members' low-rank terms added. */

typedef struct {
  const Matrix *matrix;
  const uint8_t *in; /* (rows, in_stride), value + 128 */
  int8_t *out;       /* (rows, out_stride) */
  int64_t in_stride, out_stride, rows;
  int unsigned_out;             /* whether 128 is added to the results */
  int64_t rank, noise_shift;    /* rank 0: no low-rank term */
  const int8_t *const *a;       /* (rows,) A of the row's member */
  const int32_t *scales;        /* (rows, rank) */
} Product;

/* floor(total / divisor), clipped to int8's range with a margin. The quotient of floats is exact enough: after the
   clamp it is below 130, so a fraction, at least 1 / divisor > 2^-17, is larger than half its last place. */
INLINE __m512i floor_divide(__m512i total, int32_t divisor) {
  const __m512i bound = _mm512_set1_epi32(129 * divisor);
  total = _mm512_max_epi32(_mm512_min_epi32(total, bound), _mm512_sub_epi32(_mm512_setzero_si512(), bound));
  const __m512 quotient = _mm512_div_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps((float)divisor));
  return _mm512_cvt_roundps_epi32(quotient, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

/* `rows` rows (a constant) from row r0 on, 64 outputs from `column` on. */
INLINE void tile(const int rows, const Product *p, int64_t r0, int64_t column) {
  const Matrix *m = p->matrix;
  const int64_t quads = (m->inputs + 3) / 4, stride = p->in_stride, padded = PAD(m->outputs);
  const int8_t *w = m->packed + column * quads * 4;
  const uint8_t *x = p->in + r0 * stride;
  __m512i sums[TILE][4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const __m512i start = _mm512_loadu_si512(m->start + column + 16 * c);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) sums[r][c] = start;
  }
  for (int64_t k = 0; k < quads; k++, w += 256) {
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
    const __m512i w2 = _mm512_loadu_si512(w + 128), w3 = _mm512_loadu_si512(w + 192);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      int32_t four;
      memcpy(&four, x + r * stride + 4 * k, 4);
      const __m512i v = _mm512_set1_epi32(four);
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], v, w0);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], v, w1);
      sums[r][2] = _mm512_dpbusd_epi32(sums[r][2], v, w2);
      sums[r][3] = _mm512_dpbusd_epi32(sums[r][3], v, w3);
    }
  }
  const __m512i high = _mm512_set1_epi32(127), low = _mm512_set1_epi32(-127);
  const __m128i noise_shift = _mm_cvtsi64_si128(p->noise_shift), shift = _mm_cvtsi64_si128(m->shift);
  const __m128i flip = _mm_set1_epi8(p->unsigned_out ? -128 : 0);
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      __m512i total = sums[r][c];
      if (p->rank) {
        const int8_t *a = p->a[r0 + r] + column + 16 * c;
        const int32_t *scales = p->scales + (r0 + r) * p->rank;
        __m512i term = _mm512_setzero_si512();
        for (int64_t k = 0; k < p->rank; k++) {
          const __m512i factor = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(a + k * padded)));
          term = _mm512_add_epi32(term, _mm512_mullo_epi32(factor, _mm512_set1_epi32(scales[k])));
        }
        total = _mm512_add_epi32(total, _mm512_sra_epi32(term, noise_shift));
      }
      total = m->shift >= 0 ? _mm512_sra_epi32(total, shift) : floor_divide(total, (int32_t)m->divisor);
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_max_epi32(_mm512_min_epi32(total, high), low));
      _mm_storeu_si128((__m128i *)(p->out + (r0 + r) * p->out_stride + column + 16 * c), _mm_xor_si128(bytes, flip));
    }
  }
}

static __attribute__((noinline)) void tile6(const Product *p, int64_t r0, int64_t c) { tile(6, p, r0, c); }
static __attribute__((noinline)) void tile5(const Product *p, int64_t r0, int64_t c) { tile(5, p, r0, c); }
static __attribute__((noinline)) void tile4(const Product *p, int64_t r0, int64_t c) { tile(4, p, r0, c); }
static __attribute__((noinline)) void tile3(const Product *p, int64_t r0, int64_t c) { tile(3, p, r0, c); }
static __attribute__((noinline)) void tile2(const Product *p, int64_t r0, int64_t c) { tile(2, p, r0, c); }
static __attribute__((noinline)) void tile1(const Product *p, int64_t r0, int64_t c) { tile(1, p, r0, c); }

static void multiply(const Product *p) {
  static void (*const rest[TILE])(const Product *, int64_t, int64_t) = {0, tile1, tile2, tile3, tile4, tile5};
  for (int64_t column = 0; column < p->matrix->outputs; column += PANEL) {
    int64_t r = 0;
    for (; r + TILE <= p->rows; r += TILE) tile6(p, r, column);
    if (r < p->rows) rest[p->rows - r](p, r, column);
  }
}

/* sign (x . B), for each row and rank, and where A of the row's member is. The first row is member `first`. */
static void scale_rows(const Model *model, const Work *work, const int8_t *blocks, const int32_t *sums,
                       const Product *p, int64_t first, int32_t *scales, const int8_t **a) {
  const Matrix *m = p->matrix;
  const int64_t n = PAD(m->inputs), place_b = model->draws[m->parameter][2], place_a = model->draws[m->parameter][3];
  for (int64_t r = 0, i = first; r < p->rows; r++, i = i + 1 == work->members ? 0 : i + 1) {
    const int8_t *block = blocks + work->pair[i] * model->pair_bytes;
    const int32_t *of_b = sums + work->pair[i] * model->pair_sums + m->sums;
    const uint8_t *x = p->in + r * p->in_stride;
    a[r] = block + place_a;
    for (int64_t k = 0; k < model->rank; k++) {
      const int8_t *b = block + place_b + k * n;
      __m512i t0 = _mm512_setzero_si512(), t1 = t0;
      int64_t j = 0;
      for (; j + 128 <= n; j += 128) {
        t0 = _mm512_dpbusd_epi32(t0, _mm512_loadu_si512(x + j), _mm512_loadu_si512(b + j));
        t1 = _mm512_dpbusd_epi32(t1, _mm512_loadu_si512(x + j + 64), _mm512_loadu_si512(b + j + 64));
      }
      if (j < n) t0 = _mm512_dpbusd_epi32(t0, _mm512_loadu_si512(x + j), _mm512_loadu_si512(b + j));
      scales[r * model->rank + k] = work->sign[i] * (_mm512_reduce_add_epi32(_mm512_add_epi32(t0, t1)) - of_b[k]);
    }
  }
}

/* Weights (outputs, inputs) into panels, and what sums start from. */
void eggroll_pack(const int8_t *weight, int64_t outputs, int64_t inputs, int8_t *packed, int32_t *start) {
  const int64_t quads = (inputs + 3) / 4;
  for (int64_t o = 0; o < PAD(outputs); o++) {
    int8_t *to = packed + (o / PANEL) * quads * 4 * PANEL + (o % PANEL) * 4;
    const int8_t *row = weight + o * inputs;
    int32_t total = 0;
    if (o >= outputs) {
      for (int64_t k = 0; k < quads; k++) memset(to + k * 4 * PANEL, 0, 4);
    } else {
      for (int64_t k = 0; k < inputs / 4; k++) memcpy(to + k * 4 * PANEL, row + 4 * k, 4);
      if (inputs % 4) {
        memset(to + (quads - 1) * 4 * PANEL, 0, 4);
        memcpy(to + (quads - 1) * 4 * PANEL, row + inputs / 4 * 4, (size_t)(inputs % 4));
      }
      for (int64_t k = 0; k < inputs; k++) total += row[k];
    }
    start[o] = -128 * total;
  }
}

/* Rows times a matrix, to measure the machine's rate with. */
void eggroll_multiply(const Matrix *matrix, const uint8_t *in, int8_t *out, int64_t rows) {
  const Product p = {matrix, in, out, PAD(matrix->inputs), PAD(matrix->outputs), rows, 0, 0, 0, 0, 0};
  multiply(&p);
}
