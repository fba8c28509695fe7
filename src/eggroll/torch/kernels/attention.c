/* Attention of one query position on CPUs: out = softmax(scale q k^T) v, row by row, in one pass over keys and values.

   q and out are (rows, heads, group, d) and (rows, heads, group, dv): `group` query heads share a head of keys and values.
   k and v are (rows, heads, length, d or dv), their last axis dense, the others with strides (in numbers, not bytes).
   mask has a byte for each row and position (mask_row = 0: the same for all rows); 0 hides a position; NULL hides none.
   A row that sees nothing gets zeros.

   Scores, weights and sums are float32, also for bfloat16, and the result is rounded once. Positions are taken BLOCK at
   a time, with the largest score so far subtracted (online softmax, arXiv 1805.02867), up to 4 query heads at once, so
   that a key or value is read once for these. d and dv are multiples of WIDTH, at most MAX_D. */
#define MAX_D @MAX_D@
#define BLOCK 64
#define NONE (-__builtin_inff())

typedef struct {
    void *out;
    const void *q, *k, *v;
    const uint8_t *mask;
    int64_t rows, heads, group, length, d, dv;
    int64_t k_row, k_head, k_step, v_row, v_head, v_step, mask_row;
    float scale;
    int64_t step, next;
} job_t;

typedef int32_t ints __attribute__((vector_size(64)));

/* 2^y for y <= 0, relative error below 3e-7; 0 from -126 down. y's nearest whole number goes to the exponent. */
INLINE vec exp2_vec(vec y) {
    ints small = (ints)(y < (vec){0} - 126.0f);
    vec inside = (vec)(((ints)y & ~small) | ((ints)((vec){0} - 126.0f) & small));
    ints whole = __builtin_convertvector(inside - 0.5f, ints);
    vec f = inside - __builtin_convertvector(whole, vec);
    vec p = f * 1.5252734e-5f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 0.24022651f;
    p = p * f + 0.69314718f;
    p = p * f + 1.0f;
    return (vec)((ints)(p * (vec)((whole + 127) << 23)) & ~small);
}

#define ATTENTION(NAME, TYPE) \
    INLINE void NAME##_mix(vec *acc, const float *p, const TYPE *v, int64_t v_step, int64_t n, int64_t all, \
                           const int queries, const int width) { \
        vec sums[4][4]; \
        UNROLL for (int g = 0; g < queries; g++) \
            UNROLL for (int c = 0; c < width; c++) sums[g][c] = acc[g * all + c]; \
        for (int64_t l = 0; l < n; l++) { \
            vec values[4]; \
            UNROLL for (int c = 0; c < width; c++) values[c] = load_vec_##NAME(v + l * v_step + c * WIDTH); \
            UNROLL for (int g = 0; g < queries; g++) \
                UNROLL for (int c = 0; c < width; c++) sums[g][c] += p[g * BLOCK + l] * values[c]; \
        } \
        UNROLL for (int g = 0; g < queries; g++) \
            UNROLL for (int c = 0; c < width; c++) acc[g * all + c] = sums[g][c]; \
    } \
    /* `queries` query heads of one row, from `first` on. */ \
    INLINE void NAME##_heads(const job_t *job, int64_t row, int64_t head, int64_t first, const int queries) { \
        const int64_t d = job->d / WIDTH, dv = job->dv / WIDTH, length = job->length; \
        const int64_t at = (row * job->heads + head) * job->group + first; \
        const TYPE *q = (const TYPE *)job->q + at * job->d; \
        const TYPE *keys = (const TYPE *)job->k + row * job->k_row + head * job->k_head; \
        const TYPE *values = (const TYPE *)job->v + row * job->v_row + head * job->v_head; \
        const uint8_t *mask = job->mask ? job->mask + row * job->mask_row : 0; \
        TYPE *out = (TYPE *)job->out + at * job->dv; \
        vec query[4 * (MAX_D / WIDTH)], acc[4 * (MAX_D / WIDTH)]; \
        float largest[4], total[4], scores[4 * BLOCK]; \
        for (int64_t i = 0; i < queries * d; i++) query[i] = load_vec_##NAME(q + i * WIDTH) * job->scale; \
        for (int64_t i = 0; i < queries * dv; i++) acc[i] = (vec){0}; \
        for (int g = 0; g < queries; g++) { largest[g] = NONE; total[g] = 0; } \
        for (int64_t start = 0; start < length; start += BLOCK) { \
            const int64_t n = length - start < BLOCK ? length - start : BLOCK; \
            int64_t low = 0, high = n; /* what is hidden at the ends is not read */ \
            if (mask) { \
                while (low < high && !mask[start + low]) low++; \
                while (low < high && !mask[start + high - 1]) high--; \
            } \
            if (low == high) continue; \
            for (int i = 0; i < queries * BLOCK; i++) scores[i] = NONE; \
            for (int64_t l = low; l < high; l++) { \
                if (mask && !mask[start + l]) continue; \
                const TYPE *key = keys + (start + l) * job->k_step; \
                vec sums[4] = {{0}}; \
                for (int64_t c = 0; c < d; c++) { \
                    vec part = load_vec_##NAME(key + c * WIDTH); \
                    UNROLL for (int g = 0; g < queries; g++) sums[g] += query[g * d + c] * part; \
                } \
                UNROLL for (int g = 0; g < queries; g++) scores[g * BLOCK + l] = sum_of(sums[g]); \
            } \
            UNROLL for (int g = 0; g < queries; g++) { \
                float *own = scores + g * BLOCK, most = largest[g]; \
                for (int64_t l = low; l < high; l++) most = own[l] > most ? own[l] : most; \
                vec before = exp2_vec((vec){0} + (largest[g] - most)), sum = {0}; \
                for (int i = 0; i < BLOCK; i += WIDTH) { \
                    vec weight = exp2_vec(load_vec_f32(own + i) - most); \
                    store_vec_f32(own + i, weight); \
                    sum += weight; \
                } \
                total[g] = total[g] * before[0] + sum_of(sum); \
                largest[g] = most; \
                for (int64_t c = 0; c < dv; c++) acc[g * dv + c] *= before; \
            } \
            const TYPE *value = values + (start + low) * job->v_step; \
            int64_t c = 0; \
            for (; c + 4 <= dv; c += 4) \
                NAME##_mix(acc + c, scores + low, value + c * WIDTH, job->v_step, high - low, dv, queries, 4); \
            for (; c < dv; c++) \
                NAME##_mix(acc + c, scores + low, value + c * WIDTH, job->v_step, high - low, dv, queries, 1); \
        } \
        for (int g = 0; g < queries; g++) \
            for (int64_t c = 0; c < dv; c++) \
                store_vec_##NAME(out + g * job->dv + c * WIDTH, total[g] > 0 ? acc[g * dv + c] / total[g] : acc[g * dv + c]); \
    } \
    static void NAME##_work(void *data) { \
        job_t *job = data; \
        const int64_t jobs = job->rows * job->heads; \
        for (;;) { \
            int64_t i = __atomic_fetch_add(&job->next, job->step, __ATOMIC_RELAXED), end = i + job->step; \
            if (i >= jobs) return; \
            if (end > jobs) end = jobs; \
            for (; i < end; i++) { \
                const int64_t row = i / job->heads, head = i % job->heads; \
                int64_t g = 0; \
                for (; g + 4 <= job->group; g += 4) NAME##_heads(job, row, head, g, 4); \
                if (job->group - g == 3) NAME##_heads(job, row, head, g, 3); \
                else if (job->group - g == 2) NAME##_heads(job, row, head, g, 2); \
                else if (job->group - g == 1) NAME##_heads(job, row, head, g, 1); \
            } \
        } \
    } \
    /* sizes: rows, heads, group, length, d, dv, then the strides of k, of v and of the mask. */ \
    void eggroll_attention_##NAME(void *out, const void *q, const void *k, const void *v, const uint8_t *mask, \
                                  const int64_t *sizes, float scale, int64_t parts, parallel_t *share) { \
        job_t job = {out, q, k, v, mask, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], \
                     sizes[8], sizes[9], sizes[10], sizes[11], sizes[12], scale * 1.44269504f, \
                     (sizes[0] * sizes[1] + parts - 1) / parts, 0}; \
        if (parts > 1) share(NAME##_work, &job, 0, 0); \
        else NAME##_work(&job); \
    }

#ifdef BF16
ATTENTION(bf16, uint16_t)
#else
ATTENTION(f32, float)
#endif
