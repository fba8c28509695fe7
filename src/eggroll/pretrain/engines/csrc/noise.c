/* Noise: draws, and the noise of a chunk's pairs in blocks that the products read. */

/* Threefry-2x32, 20 rounds, as core/threefry.py: word i of a draw is the XOR of the two outputs. */
static void threefry_normals(uint32_t k0, uint32_t k1, const int8_t *normal_table, int8_t *out, int64_t count) {
  static const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t schedule[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
  for (int64_t first = 0; first < count; first += 64) {
    uint32_t x0[32], x1[32];
    for (int i = 0; i < 32; i++) x0[i] = k0, x1[i] = (uint32_t)(first / 2 + i) + k1;
    for (int group = 0; group < 5; group++) {
      for (int r = 0; r < 4; r++) {
        const int by = rotations[group & 1][r];
        for (int i = 0; i < 32; i++) {
          x0[i] += x1[i];
          x1[i] = ((x1[i] << by) | (x1[i] >> (32 - by))) ^ x0[i];
        }
      }
      for (int i = 0; i < 32; i++) {
        x0[i] += schedule[(group + 1) % 3];
        x1[i] += schedule[(group + 2) % 3] + (uint32_t)group + 1;
      }
    }
    int8_t made[64];
    for (int i = 0; i < 32; i++) {
      const uint32_t word = x0[i] ^ x1[i];
      made[2 * i] = normal_table[word & 0xFFFF];
      made[2 * i + 1] = normal_table[word >> 16];
    }
    memcpy(out + first, made, (size_t)(count - first < 64 ? count - first : 64));
  }
}

/* All normals of one draw, one after the other: where they are in the table, or made in `buffer`. */
INLINE const int8_t *draw(const Model *model, int64_t address, int64_t count, int8_t *buffer) {
  if (model->table) return model->table + address;
  threefry_normals((uint32_t)((uint64_t)address >> 32), (uint32_t)address, model->normal_table, buffer, count);
  return buffer;
}

static void copy_padded(int8_t *to, const int8_t *from, int64_t n) {
  memcpy(to, from, (size_t)n);
  memset(to + n, 0, (size_t)(PAD(n) - n));
}

/* The noise of the work's pairs: blocks (pairs, pair_bytes) and 128 times the sums of B (pairs, pair_sums). */
static void draw_pairs(const Model *model, const Work *work, int8_t *blocks, int32_t *sums, int8_t *buffer) {
  for (int64_t p = 0; p < work->pairs; p++) {
    int8_t *block = blocks + p * model->pair_bytes;
    for (int64_t j = 0; j < model->parameters; j++) {
      const int64_t in = model->draws[j][0], out = model->draws[j][1];
      const int64_t address = work->addresses[j * work->address_stride + p];
      const int8_t *from = draw(model, address, model->rank * (in + out), buffer);
      for (int64_t k = 0; k < model->rank; k++, from += in + out) {
        copy_padded(block + model->draws[j][2] + k * PAD(in), from, in);
        copy_padded(block + model->draws[j][3] + k * PAD(out), from + in, out);
      }
    }
    for (int64_t j = 0; j < 6 * model->layers + 1; j++) {
      const Matrix *matrix = model->matrices + j;
      const int8_t *b = block + model->draws[matrix->parameter][2];
      const int64_t n = PAD(matrix->inputs);
      for (int64_t k = 0; k < model->rank; k++)
        sums[p * model->pair_sums + matrix->sums + k] = 128 * sum_bytes(b + k * n, n);
    }
  }
}

/* The draws themselves, (count, length): for the tests, and to make the table, which is one draw. */
void eggroll_normals(const int64_t *keys, int64_t count, int64_t length, const int8_t *normal_table, int8_t *out) {
  for (int64_t i = 0; i < count; i++)
    threefry_normals((uint32_t)((uint64_t)keys[i] >> 32), (uint32_t)keys[i], normal_table, out + i * length, length);
}
