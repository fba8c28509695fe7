/* Products of int8 rows with shared weights, divided, clipped, and with the members' low-rank terms added. */

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
      scales[r * model->rank + k] = work->sign[i] * (dot(x, b, n) - of_b[k]);
    }
  }
}

/* Rows times a matrix, to measure the machine's rate with. */
void eggroll_multiply(const Matrix *matrix, const uint8_t *in, int8_t *out, int64_t rows) {
  uint8_t expanded[EXPANDED_BYTES(matrix->inputs) + 1];
  const Product p = {matrix, in, out, PAD(matrix->inputs), PAD(matrix->outputs), rows, 0, 0, 0, 0, 0, expanded};
  multiply(&p);
}
