/* AVX-512 VNNI: vpdpbusd multiplies unsigned by signed bytes and adds the products of four to a sum. */

#if AVX512
#define PANEL 64 /* outputs that are made together */
#define TILE 6   /* rows that are made together: 6 x 4 registers of sums */
#define EXPANDED_BYTES(inputs) 0
#define LEFT_OFFSET 128   /* what the left operand of an update's product has been increased by */
#define DEPTH_BYTES DEPTH /* of the operands of an update's product, per row or column */

typedef __m512i Vector; /* LANES numbers of 16 bits */
#define LANES 32
#define V(operation) _mm512_##operation
#define ZERO _mm512_setzero_si512()

INLINE __m512i wide(const void *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
INLINE __m512i wide_u(const void *p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store_bytes(void *p, __m512i x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi16_epi8(x)); }
INLINE __m512i clip16(__m512i x) {
  return _mm512_max_epi16(_mm512_min_epi16(x, _mm512_set1_epi16(127)), _mm512_set1_epi16(-127));
}

static int32_t sum_bytes(const int8_t *x, int64_t n) { /* n padded */
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 64)
    total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), _mm512_loadu_si512(x + i));
  return _mm512_reduce_add_epi32(total);
}

INLINE int32_t dot(const uint8_t *x, const int8_t *b, int64_t n) { /* n padded */
  __m512i t0 = _mm512_setzero_si512(), t1 = t0;
  int64_t j = 0;
  for (; j + 128 <= n; j += 128) {
    t0 = _mm512_dpbusd_epi32(t0, _mm512_loadu_si512(x + j), _mm512_loadu_si512(b + j));
    t1 = _mm512_dpbusd_epi32(t1, _mm512_loadu_si512(x + j + 64), _mm512_loadu_si512(b + j + 64));
  }
  if (j < n) t0 = _mm512_dpbusd_epi32(t0, _mm512_loadu_si512(x + j), _mm512_loadu_si512(b + j));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(t0, t1));
}

INLINE int64_t sum_magnitudes(const int8_t *x, int64_t n) { /* n padded */
  __m512i total = _mm512_setzero_si512();
  for (int64_t j = 0; j < n; j += 64)
    total = _mm512_add_epi64(
        total, _mm512_sad_epu8(_mm512_abs_epi8(_mm512_loadu_si512(x + j)), _mm512_setzero_si512()));
  return _mm512_reduce_add_epi64(total);
}

/* x + 1 where rest >= by, both unsigned, else x. */
INLINE __m512i one_more_where(__m512i x, __m512i rest, __m512i by) {
  return _mm512_mask_add_epi16(x, _mm512_cmpge_epu16_mask(rest, by), x, _mm512_set1_epi16(1));
}

/* floor(total / divisor), clipped to int8's range with a margin. The quotient of floats is exact enough: after the
   clamp it is below 130, so a fraction, at least 1 / divisor > 2^-17, is larger than half its last place. */
INLINE __m512i floor_divide_avx512(__m512i total, int32_t divisor) {
  const __m512i bound = _mm512_set1_epi32(129 * divisor);
  total = _mm512_max_epi32(_mm512_min_epi32(total, bound), _mm512_sub_epi32(_mm512_setzero_si512(), bound));
  const __m512 quotient = _mm512_div_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps((float)divisor));
  return _mm512_cvt_roundps_epi32(quotient, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

/* `rows` rows (a constant) from row r0 on, 64 outputs from `column` on. */
INLINE void tile_avx512(const int rows, const Product *p, int64_t r0, int64_t column) {
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
      total = m->shift >= 0 ? _mm512_sra_epi32(total, shift) : floor_divide_avx512(total, (int32_t)m->divisor);
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_max_epi32(_mm512_min_epi32(total, high), low));
      _mm_storeu_si128((__m128i *)(p->out + (r0 + r) * p->out_stride + column + 16 * c), _mm_xor_si128(bytes, flip));
    }
  }
}

#define NOINLINE static __attribute__((noinline))
NOINLINE void tile6_avx512(const Product *p, int64_t r0, int64_t c) { tile_avx512(6, p, r0, c); }
NOINLINE void tile5_avx512(const Product *p, int64_t r0, int64_t c) { tile_avx512(5, p, r0, c); }
NOINLINE void tile4_avx512(const Product *p, int64_t r0, int64_t c) { tile_avx512(4, p, r0, c); }
NOINLINE void tile3_avx512(const Product *p, int64_t r0, int64_t c) { tile_avx512(3, p, r0, c); }
NOINLINE void tile2_avx512(const Product *p, int64_t r0, int64_t c) { tile_avx512(2, p, r0, c); }
NOINLINE void tile1_avx512(const Product *p, int64_t r0, int64_t c) { tile_avx512(1, p, r0, c); }

static void multiply(const Product *p) {
  static void (*const rest[TILE])(const Product *, int64_t, int64_t) = {
      0, tile1_avx512, tile2_avx512, tile3_avx512, tile4_avx512, tile5_avx512};
  for (int64_t column = 0; column < p->matrix->outputs; column += PANEL) {
    int64_t r = 0;
    for (; r + TILE <= p->rows; r += TILE) tile6_avx512(p, r, column);
    if (r < p->rows) rest[p->rows - r](p, r, column);
  }
}

int64_t eggroll_packed_bytes(int64_t outputs, int64_t inputs) { return PAD(outputs) * ((inputs + 3) / 4) * 4; }

/* Weights (outputs, inputs) into [panel][inputs / 4][64 outputs][4 inputs], and what sums start from. */
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

/* Four rows of bytes, (4, n), into quads, (n, 4); n is padded. */
static void interleave(const int8_t *rows, int64_t n, int flip, int64_t quad, void *block) {
  int8_t *out = (int8_t *)block + quad * 4 * n;
  const __m128i mask = _mm_set1_epi8(flip ? -128 : 0);
  for (int64_t i = 0; i < n; i += 16, out += 64) {
    __m128i x[4];
    for (int q = 0; q < 4; q++) x[q] = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(rows + q * n + i)), mask);
    const __m128i ab0 = _mm_unpacklo_epi8(x[0], x[1]), ab1 = _mm_unpackhi_epi8(x[0], x[1]);
    const __m128i cd0 = _mm_unpacklo_epi8(x[2], x[3]), cd1 = _mm_unpackhi_epi8(x[2], x[3]);
    _mm_storeu_si128((__m128i *)out, _mm_unpacklo_epi16(ab0, cd0));
    _mm_storeu_si128((__m128i *)(out + 16), _mm_unpackhi_epi16(ab0, cd0));
    _mm_storeu_si128((__m128i *)(out + 32), _mm_unpacklo_epi16(ab1, cd1));
    _mm_storeu_si128((__m128i *)(out + 48), _mm_unpackhi_epi16(ab1, cd1));
  }
}

/* z (rows, z_stride) += left^T right - 128 sum right, for `rows` rows (a constant) and 64 columns. */
INLINE void update_tile_avx512(const int rows, const uint8_t *left, int64_t left_stride, const int8_t *right,
                               int64_t right_stride, const int32_t *start, int64_t quads, int32_t *z,
                               int64_t z_stride, int64_t columns) {
  __m512i sums[TILE][4];
  __mmask16 mask[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const int64_t left_over = columns - 16 * c;
    mask[c] = (__mmask16)(left_over >= 16 ? 0xFFFF : left_over > 0 ? (1 << left_over) - 1 : 0);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
      sums[r][c] = _mm512_add_epi32(_mm512_maskz_loadu_epi32(mask[c], z + r * z_stride + 16 * c),
                                    _mm512_loadu_si512(start + 16 * c));
  }
  for (int64_t k = 0; k < quads; k++, left += left_stride, right += right_stride) {
    const __m512i w0 = _mm512_loadu_si512(right), w1 = _mm512_loadu_si512(right + 64);
    const __m512i w2 = _mm512_loadu_si512(right + 128), w3 = _mm512_loadu_si512(right + 192);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      int32_t four;
      memcpy(&four, left + 4 * r, 4);
      const __m512i v = _mm512_set1_epi32(four);
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], v, w0);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], v, w1);
      sums[r][2] = _mm512_dpbusd_epi32(sums[r][2], v, w2);
      sums[r][3] = _mm512_dpbusd_epi32(sums[r][3], v, w3);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) _mm512_mask_storeu_epi32(z + r * z_stride + 16 * c, mask[c], sums[r][c]);
  }
}

static void add_block(const void *left, int64_t rows, int64_t left_size, const void *right_block, int64_t columns,
                      int64_t right_size, const int32_t *start, int64_t quads, int32_t *z) {
  const int64_t left_stride = 4 * left_size, right_stride = 4 * right_size;
  const int8_t *right = right_block;
  for (int64_t c = 0; c < columns; c += PANEL)
    for (int64_t r = 0; r < rows;) {
      const int64_t n = rows - r;
      const uint8_t *l = (const uint8_t *)left + 4 * r;
      const int8_t *w = right + 4 * c;
      int32_t *to = z + r * columns + c;
      if (n >= 6)
        r += 6, update_tile_avx512(6, l, left_stride, w, right_stride, start + c, quads, to, columns, columns - c);
      else if (n >= 2)
        r += 2, update_tile_avx512(2, l, left_stride, w, right_stride, start + c, quads, to, columns, columns - c);
      else
        r += 1, update_tile_avx512(1, l, left_stride, w, right_stride, start + c, quads, to, columns, columns - c);
    }
}

#endif
