/* Noise: drawing into blocks of pairs, and the update of the weights from it. */

/* Threefry-2x32, 20 rounds, as core/threefry.py: word i of the key's draw is the XOR of the two outputs. */
static void threefry_normals(uint32_t k0, uint32_t k1, const int8_t *normal_table, int8_t *out, int64_t count) {
  static const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t schedule[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
  for (int64_t first = 0; first < count; first += 32) {
    uint32_t x0[16], x1[16];
    for (int i = 0; i < 16; i++) x0[i] = k0, x1[i] = (uint32_t)(first / 2 + i) + k1;
    for (int group = 0; group < 5; group++) {
      for (int r = 0; r < 4; r++) {
        const int by = rotations[group & 1][r];
        for (int i = 0; i < 16; i++) {
          x0[i] += x1[i];
          x1[i] = ((x1[i] << by) | (x1[i] >> (32 - by))) ^ x0[i];
        }
      }
      for (int i = 0; i < 16; i++) {
        x0[i] += schedule[(group + 1) % 3];
        x1[i] += schedule[(group + 2) % 3] + (uint32_t)group + 1;
      }
    }
    int8_t made[32];
    for (int i = 0; i < 16; i++) {
      const uint32_t word = x0[i] ^ x1[i];
      made[2 * i] = normal_table[word & 0xFFFF];
      made[2 * i + 1] = normal_table[word >> 16];
    }
    memcpy(out + first, made, (size_t)(count - first < 32 ? count - first : 32));
  }
}

/* All normals of one draw, one after the other. `buffer` is used where they are not in the table. */
INLINE const int8_t *draw(const Model *model, int64_t address, int64_t count, int8_t *buffer) {
  if (model->table) return model->table + address;
  threefry_normals((uint32_t)((uint64_t)address >> 32), (uint32_t)address, model->normal_table, buffer, count);
  return buffer;
}

static int32_t sum_bytes(const int8_t *x, int64_t n) {
  int32_t total = 0;
  for (int64_t i = 0; i < n; i++) total += x[i];
  return total;
}

/* Copy a draw's B and A to their places, padded with zeros. */
static void place(const Model *model, const int8_t *from, int64_t inputs, int64_t outputs, int8_t *b, int8_t *a) {
  for (int64_t k = 0; k < model->rank; k++, from += inputs + outputs) {
    memcpy(b + k * PAD(inputs), from, (size_t)inputs);
    memset(b + k * PAD(inputs) + inputs, 0, (size_t)(PAD(inputs) - inputs));
    memcpy(a + k * PAD(outputs), from + inputs, (size_t)outputs);
    memset(a + k * PAD(outputs) + outputs, 0, (size_t)(PAD(outputs) - outputs));
  }
}

/* The noise of the work's pairs: blocks (pairs, pair_bytes), sums of B (pairs, pair_sums). */
static void draw_pairs(const Model *model, const Work *work, int8_t *blocks, int32_t *sums, int8_t *buffer) {
  for (int64_t p = 0; p < work->pairs; p++) {
    int8_t *block = blocks + p * model->pair_bytes;
    const int64_t *address = work->addresses + p;
    for (int64_t j = 0; j < model->parameters; j++) {
      const int64_t in = model->draw_lengths[2 * j], out = model->draw_lengths[2 * j + 1];
      const int8_t *from = draw(model, address[j * work->address_stride], model->rank * (in + out), buffer);
      place(model, from, in, out, block + model->draw_lengths[2 * model->parameters + 2 * j],
            block + model->draw_lengths[2 * model->parameters + 2 * j + 1]);
    }
    for (int64_t j = 0; j < 6 * model->layers + 1; j++) {
      const Matrix *matrix = model->matrices + j;
      for (int64_t k = 0; k < model->rank; k++)
        sums[p * model->pair_sums + matrix->sums + k] =
            128 * sum_bytes(block + matrix->b + k * PAD(matrix->inputs), matrix->inputs);
    }
  }
}
