/* AVX2: numbers of 16 bits, because vpmaddubsw, which multiplies bytes, clips its sums to 16 bits. vpmaddwd multiplies
   16 pairs of them and adds neighbors, exactly and for all bytes: two of it (and two additions) do what one vpdpbusd
   of 256 bits does. Weights lie in memory with 16 bits, rows are expanded to them before a product. */

#if !AVX512
#define PANEL 16 /* outputs that are made together */
#define TILE 6   /* rows that are made together: 6 x 2 registers of sums, and four for operands */
#define ROWS 48  /* rows that are expanded together: with a panel of weights they stay in the cache */
#define EXPANDED_BYTES(inputs) (2 * ROWS * PAD(inputs))
#define LEFT_OFFSET 0               /* what the left operand of an update's product has been increased by */
#define DEPTH_BYTES (2 * DEPTH + 4) /* of the operands of an update's product, per row or column */

typedef __m256i Vector; /* LANES numbers of 16 bits */
#define LANES 16
#define V(operation) _mm256_##operation
#define ZERO _mm256_setzero_si256()

INLINE __m256i wide(const void *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); }
INLINE __m256i wide_u(const void *p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p)); }
INLINE __m256i wide32(const void *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE void store_bytes(void *p, __m256i x) { /* the low byte of each, as AVX-512's conversion */
  x = _mm256_and_si256(x, _mm256_set1_epi16(255));
  _mm_storeu_si128((__m128i *)p, _mm_packus_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
INLINE __m256i clip16(__m256i x) {
  return _mm256_max_epi16(_mm256_min_epi16(x, _mm256_set1_epi16(127)), _mm256_set1_epi16(-127));
}

INLINE int32_t sum_lanes(__m256i x) { /* of 32 bits */
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

static int32_t sum_bytes(const int8_t *x, int64_t n) { /* n padded */
  __m256i total = ZERO;
  for (int64_t j = 0; j < n; j += 16)
    total = _mm256_add_epi32(total, _mm256_madd_epi16(wide(x + j), _mm256_set1_epi16(1)));
  return sum_lanes(total);
}

INLINE int32_t dot(const uint8_t *x, const int8_t *b, int64_t n) { /* n padded */
  __m256i t0 = ZERO, t1 = ZERO;
  for (int64_t j = 0; j < n; j += 32) {
    t0 = _mm256_add_epi32(t0, _mm256_madd_epi16(wide_u(x + j), wide(b + j)));
    t1 = _mm256_add_epi32(t1, _mm256_madd_epi16(wide_u(x + j + 16), wide(b + j + 16)));
  }
  return sum_lanes(_mm256_add_epi32(t0, t1));
}

INLINE int64_t sum_magnitudes(const int8_t *x, int64_t n) { /* n padded; the sum is below 2^31 */
  __m256i total = ZERO;
  for (int64_t j = 0; j < n; j += 32) {
    const __m256i bytes = _mm256_abs_epi8(_mm256_loadu_si256((const __m256i *)(x + j)));
    total = _mm256_add_epi64(total, _mm256_sad_epu8(bytes, ZERO));
  }
  return sum_lanes(total);
}

/* x + 1 where rest >= by, both unsigned, else x. */
INLINE __m256i one_more_where(__m256i x, __m256i rest, __m256i by) {
  return _mm256_sub_epi16(x, _mm256_cmpeq_epi16(_mm256_max_epu16(rest, by), rest));
}

/* floor(total / divisor), clipped to int8's range with a margin: see avx512.c. */
INLINE __m256i floor_divide_avx2(__m256i total, int32_t divisor) {
  const __m256i bound = _mm256_set1_epi32(129 * divisor);
  total = _mm256_max_epi32(_mm256_min_epi32(total, bound), _mm256_sub_epi32(ZERO, bound));
  return _mm256_cvttps_epi32(
      _mm256_floor_ps(_mm256_div_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps((float)divisor))));
}

/* `rows` rows (a constant) from row r0 on, which lie at x, 16 outputs from `column` on. What does not change between
   rows is read before the first is written, because the compiler has to assume that writing might change it. */
INLINE void tile_avx2(const int rows, const Product *p, const int16_t *x, int64_t r0, int64_t column) {
  const Matrix *m = p->matrix;
  const int64_t pairs = (m->inputs + 3) / 4 * 2, stride = PAD(m->inputs);
  const __m256i *w = (const __m256i *)m->packed + column / PANEL * pairs * 2;
  const __m256i *start = (const __m256i *)(m->start + column);
  __m256i sums[TILE][2], kept[TILE][2];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
    sums[r][0] = _mm256_loadu_si256(start);
    sums[r][1] = _mm256_loadu_si256(start + 1);
  }
  for (int64_t k = 0; k < pairs; k++, w += 2) {
    const __m256i w0 = _mm256_loadu_si256(w), w1 = _mm256_loadu_si256(w + 1);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      int32_t two;
      memcpy(&two, x + r * stride + 2 * k, 4);
      const __m256i v = _mm256_set1_epi32(two);
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(v, w0));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(v, w1));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) kept[r][0] = sums[r][0], kept[r][1] = sums[r][1];
  const __m128i high = _mm_set1_epi8(127), low = _mm_set1_epi8(-127), flip = _mm_set1_epi8(p->unsigned_out ? -128 : 0);
  const __m128i noise_shift = _mm_cvtsi64_si128(p->noise_shift), shift = _mm_cvtsi64_si128(m->shift);
  const int64_t rank = p->rank, padded = PAD(m->outputs), out_stride = p->out_stride;
  const int32_t divisor = m->shift >= 0 ? 0 : (int32_t)m->divisor, *scales = p->scales + r0 * rank;
  const int8_t *const *a = p->a + r0;
  int8_t *out = p->out + r0 * out_stride + column;
#pragma GCC unroll 1
  for (int r = 0; r < rows; r++, scales += rank, out += out_stride) {
    __m256i total[2] = {kept[r][0], kept[r][1]};
    if (rank) {
      const int8_t *factors = a[r] + column;
      __m256i scale = _mm256_set1_epi32(scales[0]);
      __m256i t0 = _mm256_mullo_epi32(wide32(factors), scale), t1 = _mm256_mullo_epi32(wide32(factors + 8), scale);
      for (int64_t k = 1; k < rank; k++) {
        factors += padded, scale = _mm256_set1_epi32(scales[k]);
        t0 = _mm256_add_epi32(t0, _mm256_mullo_epi32(wide32(factors), scale));
        t1 = _mm256_add_epi32(t1, _mm256_mullo_epi32(wide32(factors + 8), scale));
      }
      total[0] = _mm256_add_epi32(total[0], _mm256_sra_epi32(t0, noise_shift));
      total[1] = _mm256_add_epi32(total[1], _mm256_sra_epi32(t1, noise_shift));
    }
    for (int c = 0; c < 2; c++)
      total[c] = divisor ? floor_divide_avx2(total[c], divisor) : _mm256_sra_epi32(total[c], shift);
    const __m256i ordered = _mm256_permute4x64_epi64(_mm256_packs_epi32(total[0], total[1]), 0xD8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    bytes = _mm_max_epi8(_mm_min_epi8(bytes, high), low);
    _mm_storeu_si128((__m128i *)out, _mm_xor_si128(bytes, flip));
  }
}

#define NOINLINE static __attribute__((noinline))
NOINLINE void tile6_avx2(const Product *p, const int16_t *x, int64_t r0, int64_t c) { tile_avx2(6, p, x, r0, c); }
NOINLINE void tile5_avx2(const Product *p, const int16_t *x, int64_t r0, int64_t c) { tile_avx2(5, p, x, r0, c); }
NOINLINE void tile4_avx2(const Product *p, const int16_t *x, int64_t r0, int64_t c) { tile_avx2(4, p, x, r0, c); }
NOINLINE void tile3_avx2(const Product *p, const int16_t *x, int64_t r0, int64_t c) { tile_avx2(3, p, x, r0, c); }
NOINLINE void tile2_avx2(const Product *p, const int16_t *x, int64_t r0, int64_t c) { tile_avx2(2, p, x, r0, c); }
NOINLINE void tile1_avx2(const Product *p, const int16_t *x, int64_t r0, int64_t c) { tile_avx2(1, p, x, r0, c); }

/* All columns up to the padded end, where the results of weights of zero are what padding has to be. */
static void multiply(const Product *p) {
  static void (*const tiles[])(const Product *, const int16_t *, int64_t, int64_t) = {
      0, tile1_avx2, tile2_avx2, tile3_avx2, tile4_avx2, tile5_avx2, tile6_avx2};
  const int64_t stride = PAD(p->matrix->inputs);
  int16_t *expanded = p->expanded;
  for (int64_t r0 = 0; r0 < p->rows; r0 += ROWS) {
    const int64_t rows = p->rows - r0 < ROWS ? p->rows - r0 : ROWS;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < stride; j += LANES)
        _mm256_storeu_si256((__m256i *)(expanded + r * stride + j), wide_u(p->in + (r0 + r) * p->in_stride + j));
    for (int64_t column = 0; column < PAD(p->matrix->outputs); column += PANEL)
      for (int64_t r = 0; r < rows; r += TILE)
        tiles[rows - r < TILE ? rows - r : TILE](p, expanded + r * stride, r0 + r, column);
  }
}

int64_t eggroll_packed_bytes(int64_t outputs, int64_t inputs) { return PAD(outputs) * ((inputs + 3) / 4) * 8; }

/* Weights (outputs, inputs) into [panel][inputs / 2][16 outputs][2 inputs] of 16 bits, and what sums start from. */
void eggroll_pack(const int8_t *weight, int64_t outputs, int64_t inputs, int8_t *packed, int32_t *start) {
  const int64_t padded_inputs = (inputs + 3) / 4 * 4;
  int16_t *to = (int16_t *)packed;
  for (int64_t panel = 0; panel < PAD(outputs); panel += PANEL)
    for (int64_t k = 0; k < padded_inputs; k += 2)
      for (int64_t o = panel; o < panel + PANEL; o++) {
        *to++ = o < outputs && k < inputs ? weight[o * inputs + k] : 0;
        *to++ = o < outputs && k + 1 < inputs ? weight[o * inputs + k + 1] : 0;
      }
  for (int64_t o = 0; o < PAD(outputs); o++) {
    int32_t total = 0;
    for (int64_t k = 0; o < outputs && k < inputs; k++) total += weight[o * inputs + k];
    start[o] = -128 * total;
  }
}

/* Four rows of bytes, (4, n), as quad `quad` of an operand: [panel of 16][rows / 2][16][2 rows], 16 bits; n is padded.
   Panels are 64 bytes longer than they need to be, so that they do not all begin in the same place of the cache. */
static void interleave(const int8_t *rows, int64_t n, int left, int64_t quad, void *block) {
  (void)left;
  int8_t *out = (int8_t *)block + quad * 128;
  for (int64_t i = 0; i < n; i += 16, out += 16 * DEPTH_BYTES)
    for (int pair = 0; pair < 2; pair++) {
      const __m128i a = _mm_loadu_si128((const __m128i *)(rows + 2 * pair * n + i));
      const __m128i b = _mm_loadu_si128((const __m128i *)(rows + (2 * pair + 1) * n + i));
      __m256i *to = (__m256i *)(out + 64 * pair);
      _mm256_storeu_si256(to, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)));
      _mm256_storeu_si256(to + 1, _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b)));
    }
}

/* z (rows, z_stride) += left^T right, for 4 rows, of which `rows` are there, and 16 columns, of which `columns` are. */
static void update_tile_avx2(const int8_t *left, const int8_t *right, int64_t pairs, int32_t *z, int64_t rows,
                             int64_t columns, int64_t z_stride) {
  __m256i sums[4][2];
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++) sums[r][0] = sums[r][1] = ZERO;
  for (int64_t k = 0; k < pairs; k++, left += 64, right += 64) {
    const __m256i w0 = _mm256_loadu_si256((const __m256i *)right);
    const __m256i w1 = _mm256_loadu_si256((const __m256i *)(right + 32));
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      int32_t two;
      memcpy(&two, left + 4 * r, 4);
      const __m256i v = _mm256_set1_epi32(two);
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(v, w0));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(v, w1));
    }
  }
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), count = _mm256_set1_epi32((int32_t)columns);
  const __m256i mask[2] = {_mm256_cmpgt_epi32(count, lane),
                           _mm256_cmpgt_epi32(count, _mm256_add_epi32(lane, _mm256_set1_epi32(8)))};
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++)
    for (int c = 0; c < 2 && r < rows; c++) {
      int32_t *to = z + r * z_stride + 8 * c;
      _mm256_maskstore_epi32(to, mask[c], _mm256_add_epi32(_mm256_maskload_epi32(to, mask[c]), sums[r][c]));
    }
}

static void add_block(const void *left, int64_t rows, int64_t left_size, const void *right, int64_t columns,
                      int64_t right_size, const int32_t *start, int64_t quads, int32_t *z) {
  (void)left_size, (void)right_size, (void)start;
  for (int64_t c = 0; c < columns; c += 16)
    for (int64_t r = 0; r < rows; r += 4)
      update_tile_avx2((const int8_t *)left + r / 16 * 16 * DEPTH_BYTES + r % 16 * 4,
                       (const int8_t *)right + c * DEPTH_BYTES, 2 * quads, z + r * columns + c, rows - r,
                       columns - c, columns);
}
#endif
