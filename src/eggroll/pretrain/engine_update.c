/* The update: Z = (diag(F) A)^T B in int32, then a step of one where |Z| passes the threshold. */

#define DEPTH 256 /* pairs x rank that are summed in one go */

typedef struct {
  const Model *model;
  int64_t parameter, kind; /* 0: matrix, Z (outputs, inputs); 1: embedding, Z (inputs, outputs); 2: vector, Z (size,) */
  int64_t pairs;
  const int64_t *addresses; /* (pairs,) */
  const int8_t *fitness;    /* (pairs,) in sixteenths */
  int64_t sign_of_noise;    /* whether draws count as 16, 0 or -16 */
  int8_t *weights;
  int32_t *momentum;        /* NULL: none */
  int64_t limit, unit, shift;
  uint8_t *scratch;
} Update;

static void transform(int8_t *to, const int8_t *from, int64_t n, int64_t padded, int fitness, int sign_only) {
  if (sign_only)
    for (int64_t i = 0; i < n; i++) to[i] = (int8_t)(from[i] > 0 ? 16 : from[i] < 0 ? -16 : 0);
  else
    memcpy(to, from, (size_t)n);
  if (fitness != 16)
    for (int64_t i = 0; i < n; i++) to[i] = (int8_t)clip((fitness * to[i]) >> 4);
  memset(to + n, 0, (size_t)(padded - n));
}

/* Four rows of bytes, (4, n), into quads, (n, 4); n is padded. */
static void interleave(const int8_t *rows, int64_t n, int flip, int8_t *out) {
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
INLINE void update_tile(const int rows, const uint8_t *left, int64_t left_stride, const int8_t *right,
                        int64_t right_stride, const int32_t *start, int64_t quads, int32_t *z, int64_t z_stride,
                        int64_t columns) {
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

static void add_block(const uint8_t *left, int64_t rows, int64_t left_stride, const int8_t *right, int64_t columns,
                      int64_t right_stride, const int32_t *start, int64_t quads, int32_t *z) {
  for (int64_t c = 0; c < columns; c += PANEL)
    for (int64_t r = 0; r < rows;) {
      const int64_t n = rows - r;
      const uint8_t *l = left + 4 * r;
      int32_t *to = z + r * columns + c;
      if (n >= 6)
        update_tile(6, l, left_stride, right + 4 * c, right_stride, start + c, quads, to, columns, columns - c), r += 6;
      else if (n >= 2)
        update_tile(2, l, left_stride, right + 4 * c, right_stride, start + c, quads, to, columns, columns - c), r += 2;
      else
        update_tile(1, l, left_stride, right + 4 * c, right_stride, start + c, quads, to, columns, columns - c), r += 1;
    }
}

int64_t eggroll_update_scratch(const Update *u) {
  const int64_t in = u->model->draws[u->parameter][0], out = u->model->draws[u->parameter][1];
  return (PAD(in) + PAD(out)) * (DEPTH + 4 + 8) + u->model->rank * (in + out) + 4 * (u->kind == 2 ? in : in * out) + 1024;
}

/* A step of one where |z| >= limit (at least 1). Returns how many weights have moved. */
static int64_t move(int8_t *weights, const int32_t *z, int64_t count, int32_t limit) {
  int64_t moved = 0;
  for (int64_t i = 0; i < count; i++) {
    const int32_t old = weights[i], new = clip(old + (z[i] >= limit) - (z[i] <= -limit));
    moved += new != old;
    weights[i] = (int8_t)new;
  }
  return moved;
}

/* The same where |m| >= limit, with m = m - m / 2^shift + 256 z / unit, both to the nearest integer. The floor of the
   doubles' quotient is exact: numerators are below 2^41, and fractions at least 1 / (2 unit) from the next integer. */
static int64_t move_with_momentum(int8_t *weights, const int32_t *z, int32_t *momentum, int64_t count, int32_t limit,
                                  int64_t unit, int64_t shift) {
  const int32_t half = 1 << (shift - 1);
  const double by = 2.0 * (double)unit, one = (double)unit;
  int64_t moved = 0;
  for (int64_t i = 0; i < count; i++) {
    const int32_t normalised = (int32_t)__builtin_floor((512.0 * z[i] + one) / by);
    const int32_t sum = momentum[i] - ((momentum[i] + half) >> shift) + normalised;
    momentum[i] = sum;
    const int32_t old = weights[i], new = clip(old + (sum >= limit) - (sum <= -limit));
    moved += new != old;
    weights[i] = (int8_t)new;
  }
  return moved;
}

/* Z of one parameter, and its step. Returns how many weights have moved. */
int64_t eggroll_update(const Update *u) {
  const Model *model = u->model;
  const int64_t rank = model->rank, in = model->draws[u->parameter][0], out = model->draws[u->parameter][1];
  const int64_t rows = u->kind ? in : out, columns = u->kind ? out : in, count = u->pairs * rank;
  const int64_t left_size = PAD(rows), right_size = PAD(columns);
  uint8_t *next = (uint8_t *)PAD((uintptr_t)u->scratch);
  uint8_t *left = take(&next, left_size * DEPTH);
  int8_t *right = take(&next, right_size * DEPTH), *row = take(&next, 4 * left_size);
  int8_t *column = take(&next, 4 * right_size), *buffer = take(&next, rank * (in + out));
  int32_t *start = take(&next, 4 * right_size);
  const int64_t size = u->kind == 2 ? rows : rows * columns;
  int32_t *z = take(&next, 4 * size);
  memset(z, 0, (size_t)(4 * size));
  const int8_t *from = 0;
  for (int64_t k0 = 0; k0 < count; k0 += DEPTH) {
    const int64_t quads = ((count - k0 < DEPTH ? count - k0 : DEPTH) + 3) / 4;
    memset(start, 0, (size_t)(4 * right_size));
    for (int64_t quad = 0; quad < quads; quad++) {
      for (int64_t q = 0; q < 4; q++) {
        const int64_t k = k0 + 4 * quad + q, pair = k / rank;
        if (k >= count) {
          memset(row + q * left_size, 0, (size_t)left_size);
          memset(column + q * right_size, 0, (size_t)right_size);
          continue;
        }
        if (k % rank == 0 || from == 0) from = draw(model, u->addresses[pair], rank * (in + out), buffer);
        const int8_t *b = from + k % rank * (in + out), *a = b + in;
        /* The fitness goes to A, which of an embedding is on the right. */
        transform(row + q * left_size, u->kind ? b : a, rows, left_size, u->kind ? 16 : u->fitness[pair],
                  (int)u->sign_of_noise);
        transform(column + q * right_size, u->kind ? a : b, columns, right_size, u->kind ? u->fitness[pair] : 16,
                  (int)u->sign_of_noise);
        if (u->kind == 2)
          for (int64_t i = 0; i < rows; i++) z[i] += row[q * left_size + i] * column[q * right_size + i];
        else
          for (int64_t i = 0; i < right_size; i++) start[i] -= 128 * column[q * right_size + i];
      }
      if (u->kind == 2) continue;
      interleave(row, left_size, 1, (int8_t *)left + quad * 4 * left_size);
      interleave(column, right_size, 0, right + quad * 4 * right_size);
    }
    if (u->kind != 2)
      add_block(left, rows, 4 * left_size, right, columns, 4 * right_size, start, quads, z);
  }
  const int32_t limit = (int32_t)(u->limit < 1 ? 1 : u->limit > INT32_MAX ? INT32_MAX : u->limit);
  if (!u->momentum) return move(u->weights, z, size, limit);
  return move_with_momentum(u->weights, z, u->momentum, size, limit, u->unit, u->shift);
}
