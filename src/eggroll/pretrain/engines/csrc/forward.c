/* The model over windows of tokens, for a chunk of members. */

enum { WF, UF, WH, UH, UP, DOWN, MATRICES };
enum { LN1, BF, BH, LN2, VECTORS };
#define MLP_ROWS 96 /* rows whose MLP is made together: its hidden layer then stays in the cache */

/* Where everything of a chunk lies. R rows of a block of steps, M members. */
typedef struct {
  int8_t *blocks, *buffer; /* noise of the pairs; one draw */
  int32_t *sums;           /* of B */
  int8_t *vectors;         /* (4L + 1, M or 1, D): biases and norm weights of every member */
  int64_t vector_stride;   /* between members */
  int8_t *x, *fin, *hin, *prod;
  uint8_t *u, *mid, *state, *gate, *kept;
  int8_t *logits;
  int32_t *scales;
  const int8_t **a;
  void *expanded; /* rows of a product, if it reads them in another form */
} Places;

INLINE void *take(uint8_t **at, int64_t bytes) {
  uint8_t *place = *at;
  *at += PAD(bytes);
  return place;
}

static int64_t layout(const Model *m, const Work *w, Places *at) {
  const int64_t d = PAD(m->hidden), members = w->members, rows = members * w->block, rank = m->rank;
  int64_t longest = 0;
  for (int64_t j = 0; j < m->parameters; j++) {
    const int64_t length = m->draws[j][0] + m->draws[j][1];
    longest = length > longest ? length : longest;
  }
  uint8_t *next = (uint8_t *)PAD((uintptr_t)w->scratch), *first = next;
  at->blocks = take(&next, rank ? w->pairs * m->pair_bytes : 0);
  at->sums = take(&next, 4 * w->pairs * m->pair_sums);
  at->buffer = take(&next, longest * rank);
  at->vectors = take(&next, (4 * m->layers + 1) * (rank ? members : 1) * d);
  at->vector_stride = rank ? d : 0;
  at->x = take(&next, rows * d);
  at->u = take(&next, rows * d);
  at->fin = take(&next, rows * d);
  at->hin = take(&next, rows * d);
  at->prod = take(&next, (members > MLP_ROWS ? members : MLP_ROWS) * d);
  at->mid = take(&next, MLP_ROWS * PAD(4 * m->hidden));
  at->state = take(&next, m->layers * members * d);
  at->gate = take(&next, members * d);
  at->kept = take(&next, members * d);
  at->logits = take(&next, rows * PAD(m->vocab));
  at->scales = take(&next, 4 * rows * rank);
  at->a = take(&next, (int64_t)sizeof(void *) * rows);
  at->expanded = take(&next, EXPANDED_BYTES(4 * m->hidden));
  return next - first + 64;
}

/* The biases and norm weights of every member: I8(v + ((sum_r sign a b) >> shift)). */
static void perturb_vectors(const Model *m, const Work *w, Places *at) {
  const int64_t d = PAD(m->hidden), count = 4 * m->layers + 1;
  if (!m->rank) {
    memcpy(at->vectors, m->vectors, (size_t)(count * d));
    return;
  }
  for (int64_t v = 0; v < count; v++) {
    const int8_t *base = m->vectors + v * d;
    const int64_t *draws = m->draws[m->vector_parameter[v]];
    for (int64_t i = 0; i < w->members; i++) {
      const int8_t *block = at->blocks + w->pair[i] * m->pair_bytes;
      int8_t *out = at->vectors + (v * w->members + i) * d;
      for (int64_t j = 0; j < d; j++) {
        int32_t total = 0;
        for (int64_t k = 0; k < m->rank; k++) total += block[draws[2] + k * d + j] * block[draws[3] + k * d + j];
        out[j] = (int8_t)clip(base[j] + ((w->sign[i] * total) >> m->noise_shift));
      }
    }
  }
}

INLINE const int8_t *vector_of(const Model *m, const Work *w, const Places *at, int64_t layer, int which) {
  return at->vectors + (layer * VECTORS + which) * (m->rank ? w->members : 1) * PAD(m->hidden);
}

/* Rows from `row` of the block on, times a matrix. */
static void product(const Model *m, const Work *w, Places *at, int64_t matrix, const uint8_t *in, int64_t in_stride,
                    int8_t *out, int64_t out_stride, int64_t row, int64_t rows, int unsigned_out) {
  Product p = {m->matrices + matrix, in, out, in_stride, out_stride, rows, unsigned_out, m->rank, m->noise_shift, at->a,
               at->scales, at->expanded};
  if (m->rank) scale_rows(m, w, at->blocks, at->sums, &p, row % w->members, at->scales, at->a);
  multiply(&p);
}

static void embed(const Model *m, const Work *w, Places *at, int64_t t0, int64_t steps) {
  const int64_t d = PAD(m->hidden), *draws = m->draws[0];
  for (int64_t t = 0; t < steps; t++)
    for (int64_t i = 0; i < w->members; i++) {
      const int64_t token = w->tokens[w->window[i] * w->token_stride + t0 + t];
      const int8_t *base = m->embedding + token * d;
      int8_t *x = at->x + (t * w->members + i) * d;
      if (!m->rank) {
        memcpy(x, base, (size_t)d);
        continue;
      }
      const int8_t *block = at->blocks + w->pair[i] * m->pair_bytes;
      for (int64_t j = 0; j < d; j += 64) {
        int32_t total[64] = {0};
        for (int64_t k = 0; k < m->rank; k++) {
          const int32_t scale = w->sign[i] * block[draws[2] + k * PAD(draws[0]) + token];
          const int8_t *a = block + draws[3] + k * d + j;
          for (int64_t n = 0; n < 64; n++) total[n] += scale * a[n];
        }
        for (int64_t n = 0; n < 64; n++) x[j + n] = (int8_t)clip(base[j + n] + (total[n] >> m->noise_shift));
      }
    }
}

/* u = LN(x, weight) + 128. The floor of a quotient by d of what has been clamped to -128 d .. 128 d and made positive
   by adding 128 d is found with a reciprocal that is at most one too small; what has been added makes it a byte. */
static void layer_norm(const Model *m, const Work *w, const Places *at, const int8_t *weights, int64_t rows) {
  const int64_t d = PAD(m->hidden);
  for (int64_t r = 0, i = 0; r < rows; r++, i = i + 1 == w->members ? 0 : i + 1) {
    const int8_t *x = at->x + r * d, *weight = weights + i * at->vector_stride;
    uint8_t *u = at->u + r * d;
    const int64_t mean = sum_magnitudes(x, d) / m->hidden;
    const int size = mean < 1 ? 1 : (int)mean;
    const Vector by = V(set1_epi16)((short)size), most = V(set1_epi16)((short)(128 * size));
    const Vector least = V(sub_epi16)(ZERO, most);
    const Vector reciprocal = V(set1_epi16)((short)(size == 1 ? 65535 : 65536 / size));
    const Vector one = V(set1_epi16)(1), top = V(set1_epi16)(255);
    for (int64_t j = 0; j < d; j += LANES) {
      Vector n = V(mullo_epi16)(wide(x + j), wide(weight + j));
      n = V(add_epi16)(V(max_epi16)(V(min_epi16)(n, most), least), most);
      Vector q = V(mulhi_epu16)(n, reciprocal);
      const Vector rest = V(sub_epi16)(n, V(mullo_epi16)(q, by));
      q = one_more_where(q, rest, by);
      store_bytes(u + j, V(max_epi16)(V(min_epi16)(q, top), one));
    }
  }
}

/* gate = f + 127, kept = ((gate s) >> 8) + 128, of the members at one step; (g s) >> 8 is (128 g 2 s) >> 16. */
static void close_gate(const Model *m, const Work *w, const Places *at, const int8_t *fin, const uint8_t *state,
                       const int8_t *bias) {
  const int64_t d = PAD(m->hidden);
  const Vector offset = V(set1_epi16)(128), limit = V(set1_epi16)(127);
  for (int64_t i = 0; i < w->members; i++)
    for (int64_t j = 0; j < d; j += LANES) {
      const int64_t at_j = i * d + j;
      Vector f = V(add_epi16)(wide(at->prod + at_j), wide(fin + at_j));
      f = clip16(V(add_epi16)(f, wide(bias + i * at->vector_stride + j)));
      const Vector g = V(add_epi16)(f, limit), s = V(sub_epi16)(wide_u(state + at_j), offset);
      const Vector kept = V(mulhi_epi16)(V(slli_epi16)(g, 7), V(slli_epi16)(s, 1));
      store_bytes(at->gate + at_j, g);
      store_bytes(at->kept + at_j, V(add_epi16)(kept, offset));
    }
}

/* s = s + ((gate (h' - s)) >> 8), x = I8(x + s). */
static void new_state(const Model *m, const Work *w, const Places *at, const int8_t *hin, uint8_t *state,
                      const int8_t *bias, int8_t *x) {
  const int64_t d = PAD(m->hidden);
  const Vector offset = V(set1_epi16)(128);
  for (int64_t i = 0; i < w->members; i++)
    for (int64_t j = 0; j < d; j += LANES) {
      const int64_t at_j = i * d + j;
      Vector h = V(add_epi16)(wide(at->prod + at_j), wide(hin + at_j));
      h = clip16(V(add_epi16)(h, wide(bias + i * at->vector_stride + j)));
      Vector s = V(sub_epi16)(wide_u(state + at_j), offset);
      const Vector g = V(slli_epi16)(wide_u(at->gate + at_j), 7);
      s = V(add_epi16)(s, V(mulhi_epi16)(g, V(slli_epi16)(V(sub_epi16)(h, s), 1)));
      store_bytes(state + at_j, V(add_epi16)(s, offset));
      store_bytes(x + at_j, clip16(V(add_epi16)(wide(x + at_j), s)));
    }
}

static void mlp(const Model *m, const Work *w, Places *at, int64_t layer, int64_t rows) {
  const int64_t d = PAD(m->hidden), h = PAD(4 * m->hidden), up = layer * MATRICES + UP;
  for (int64_t r = 0; r < rows; r += MLP_ROWS) {
    const int64_t count = rows - r < MLP_ROWS ? rows - r : MLP_ROWS;
    product(m, w, at, up, at->u + r * d, d, (int8_t *)at->mid, h, r, count, 1);
    product(m, w, at, up + 1, at->mid, h, at->prod, d, r, count, 0);
    for (int64_t j = 0; j < count * d; j += LANES)
      store_bytes(at->x + r * d + j, clip16(V(add_epi16)(wide(at->x + r * d + j), wide(at->prod + j))));
  }
}

static void layer_steps(const Model *m, const Work *w, Places *at, int64_t layer, int64_t t0, int64_t steps) {
  const int64_t d = PAD(m->hidden), step = w->members * d, first = layer * MATRICES, rows = steps * w->members;
  uint8_t *state = at->state + layer * step;
  layer_norm(m, w, at, vector_of(m, w, at, layer, LN1), rows);
  product(m, w, at, first + WF, at->u, d, at->fin, d, 0, rows, 0);
  product(m, w, at, first + WH, at->u, d, at->hin, d, 0, rows, 0);
  for (int64_t t = 0; t < steps; t++) {
    for (int64_t i = 0; i < w->members; i++)
      if (w->tokens[w->window[i] * w->token_stride + t0 + t] == 0) memset(state + i * d, 128, (size_t)d);
    product(m, w, at, first + UF, state, d, at->prod, d, 0, w->members, 0);
    close_gate(m, w, at, at->fin + t * step, state, vector_of(m, w, at, layer, BF));
    product(m, w, at, first + UH, at->kept, d, at->prod, d, 0, w->members, 0);
    new_state(m, w, at, at->hin + t * step, state, vector_of(m, w, at, layer, BH), at->x + t * step);
  }
  layer_norm(m, w, at, vector_of(m, w, at, layer, LN2), rows);
  mlp(m, w, at, layer, rows);
}

/* y[target] + 128 - log2 sum 2^(y + 128) in sixteenths of a bit; the log2 is a count of thresholds that are passed. */
static int32_t log_likelihood(const Model *m, const int8_t *logits, int64_t target) {
  int32_t total = 0;
  for (int64_t j = 0; j < m->vocab; j++) total += m->exp2[logits[j] + 128];
  int64_t bits = 16 * (27 - __builtin_clz((unsigned)total)); /* 16 log2(2^k / 16), 2^k <= total */
  while (bits < m->log2_count && m->log2[bits] <= total) bits++;
  return logits[target] + 128 - (int32_t)bits;
}

static void score(const Model *m, const Work *w, Places *at, int64_t t0, int64_t steps) {
  const int64_t v = PAD(m->vocab), d = PAD(m->hidden), rows = steps * w->members;
  layer_norm(m, w, at, vector_of(m, w, at, m->layers, LN1), rows);
  product(m, w, at, m->layers * MATRICES, at->u, d, at->logits, v, 0, rows, 0);
  for (int64_t t = 0; t < steps; t++)
    for (int64_t i = 0; i < w->members; i++) {
      const int8_t *logits = at->logits + (t * w->members + i) * v;
      if (w->logits) memcpy(w->logits + (i * w->steps + t0 + t) * m->vocab, logits, (size_t)m->vocab);
      if (!w->likelihood && !w->fitness) continue;
      const int64_t target = w->tokens[w->window[i] * w->token_stride + t0 + t + 1];
      const int32_t found = log_likelihood(m, logits, target);
      if (w->likelihood) w->likelihood[i * w->steps + t0 + t] = found;
      if (w->fitness) w->fitness[i] += found;
    }
}

int64_t eggroll_scratch(const Model *model, const Work *work) {
  Places at;
  return layout(model, work, &at);
}

void eggroll_evaluate(const Model *m, const Work *w) {
  Places at;
  layout(m, w, &at);
  const int64_t d = PAD(m->hidden);
  if (m->rank) draw_pairs(m, w, at.blocks, at.sums, at.buffer);
  perturb_vectors(m, w, &at);
  for (int64_t l = 0; l < m->layers; l++)
    for (int64_t i = 0; i < w->members; i++) {
      uint8_t *state = at.state + (l * w->members + i) * d;
      memset(state, 128, (size_t)d);
      if (w->state_in) {
        const int8_t *from = w->state_in + (w->window[i] * m->layers + l) * m->hidden;
        for (int64_t j = 0; j < m->hidden; j++) state[j] = (uint8_t)(from[j] + 128);
      }
    }
  if (w->fitness) memset(w->fitness, 0, (size_t)(4 * w->members));
  for (int64_t t = 0; t < w->steps; t += w->block) {
    const int64_t steps = w->steps - t < w->block ? w->steps - t : w->block;
    embed(m, w, &at, t, steps);
    for (int64_t l = 0; l < m->layers; l++) layer_steps(m, w, &at, l, t, steps);
    if (w->logits || w->likelihood || w->fitness) score(m, w, &at, t, steps);
  }
  if (w->state_out)
    for (int64_t l = 0; l < m->layers; l++)
      for (int64_t i = 0; i < w->members; i++) {
        const uint8_t *state = at.state + (l * w->members + i) * d;
        int8_t *to = w->state_out + (i * m->layers + l) * m->hidden;
        for (int64_t j = 0; j < m->hidden; j++) to[j] = (int8_t)(state[j] - 128);
      }
}
