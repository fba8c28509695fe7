/* The update: Z = (diag(F) A)^T B in int32, then a step of one where |Z| passes the threshold. */

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

int64_t eggroll_update_scratch(const Update *u) {
  const int64_t in = u->model->draws[u->parameter][0], out = u->model->draws[u->parameter][1];
  return (PAD(in) + PAD(out)) * (DEPTH_BYTES + 4 + 8) + u->model->rank * (in + out) +
         4 * (u->kind == 2 ? in : in * out) + 1024;
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
    const int32_t normalized = (int32_t)__builtin_floor((512.0 * z[i] + one) / by);
    const int32_t sum = momentum[i] - ((momentum[i] + half) >> shift) + normalized;
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
  void *left = take(&next, left_size * DEPTH_BYTES), *right = take(&next, right_size * DEPTH_BYTES);
  int8_t *row = take(&next, 4 * left_size), *column = take(&next, 4 * right_size);
  int8_t *buffer = take(&next, rank * (in + out));
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
          for (int64_t i = 0; i < right_size; i++) start[i] -= LEFT_OFFSET * column[q * right_size + i];
      }
      if (u->kind == 2) continue;
      interleave(row, left_size, 1, quad, left);
      interleave(column, right_size, 0, quad, right);
    }
    if (u->kind != 2)
      add_block(left, rows, left_size, right, columns, right_size, start, quads, z);
  }
  const int32_t limit = (int32_t)(u->limit < 1 ? 1 : u->limit > INT32_MAX ? INT32_MAX : u->limit);
  if (!u->momentum) return move(u->weights, z, size, limit);
  return move_with_momentum(u->weights, z, u->momentum, size, limit, u->unit, u->shift);
}
