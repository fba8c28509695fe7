/* The low-rank term of a product on CPUs: out = start + bias + s a^T, with s = x b, member by member.

   A job is `rows` rows, `per_member` of them for each member. Row r of the result starts from out itself, or from row
   r % per_member of `base` where the base product is the same for all members. Its s (`rank` numbers) is
     - x b, or
     - read from `scales`, (per_member, P, rank): x b where x is the same for all members, or
     - gathered: column ids[r] of the member's b.
   Factors are rank-major, a (P, rank, m) and b (P, rank, n), so that vectors run along m and n. x b is made
   for 4, 2 and 1 columns at a time, four rows at once, so that few variants have to be compiled and sums stay in
   registers. Sums are made in float32 and rounded once. The rank is at most MAX_RANK. */
typedef struct {
    void *out;
    const void *base, *x, *a, *b, *scales, *bias;
    const int64_t *ids;
    int64_t rows, per_member, n, m, rank, bias_step, step, next;
} job_t;

#define MAX_RANK @MAX_RANK@

#define TERM(NAME, TYPE) \
    /* s[r][first + k] = x b of `count` rows for `rank` columns of b. */ \
    INLINE void NAME##_dots(float s[4][MAX_RANK], int64_t first, const TYPE *x, const TYPE *b, int64_t n, \
                            const int count, const int rank) { \
        vec sums[4][4] = {{{0}}}; \
        int64_t i = 0; \
        for (; i + WIDTH <= n; i += WIDTH) { \
            vec rows[4]; \
            UNROLL for (int r = 0; r < count; r++) rows[r] = load_vec_##NAME(x + r * n + i); \
            UNROLL for (int k = 0; k < rank; k++) { \
                vec column = load_vec_##NAME(b + (first + k) * n + i); \
                UNROLL for (int r = 0; r < count; r++) sums[r][k] += rows[r] * column; \
            } \
        } \
        UNROLL for (int r = 0; r < count; r++) \
            UNROLL for (int k = 0; k < rank; k++) { \
                float sum = sum_of(sums[r][k]); \
                for (int64_t j = i; j < n; j++) \
                    sum += load_##NAME(x + r * n + j) * load_##NAME(b + (first + k) * n + j); \
                s[r][first + k] = sum; \
            } \
    } \
    /* out = start + bias + s a^T for `count` rows. */ \
    INLINE void NAME##_add(TYPE *out, const TYPE *start, const TYPE *bias, const TYPE *a, float s[4][MAX_RANK], \
                           int64_t m, const int count, const int64_t rank) { \
        int64_t j = 0; \
        for (; j + WIDTH <= m; j += WIDTH) { \
            vec rows[4], shift = {0}; \
            if (bias) shift = load_vec_##NAME(bias + j); \
            UNROLL for (int r = 0; r < count; r++) rows[r] = load_vec_##NAME(start + r * m + j) + shift; \
            for (int64_t k = 0; k < rank; k++) { \
                vec column = load_vec_##NAME(a + k * m + j); \
                UNROLL for (int r = 0; r < count; r++) rows[r] += s[r][k] * column; \
            } \
            UNROLL for (int r = 0; r < count; r++) store_vec_##NAME(out + r * m + j, rows[r]); \
        } \
        for (; j < m; j++) { \
            float shift = bias ? load_##NAME(bias + j) : 0; \
            for (int r = 0; r < count; r++) { \
                float sum = load_##NAME(start + r * m + j) + shift; \
                for (int64_t k = 0; k < rank; k++) sum += s[r][k] * load_##NAME(a + k * m + j); \
                store_##NAME(out + r * m + j, sum); \
            } \
        } \
    } \
    /* `count` rows of one member. */ \
    INLINE void NAME##_rows(const job_t *job, int64_t row, const int count) { \
        const int64_t n = job->n, m = job->m, rank = job->rank; \
        const int64_t member = row / job->per_member, own = row - member * job->per_member; \
        TYPE *out = (TYPE *)job->out + row * m; \
        const TYPE *start = job->base ? (const TYPE *)job->base + own * m : out; \
        const TYPE *bias = job->bias ? (const TYPE *)job->bias + member * job->bias_step : 0; \
        const TYPE *a = (const TYPE *)job->a + member * rank * m, *b = (const TYPE *)job->b + member * rank * n; \
        float s[4][MAX_RANK]; \
        if (job->scales) { \
            const int64_t stride = job->rows / job->per_member * rank; \
            const TYPE *scales = (const TYPE *)job->scales + own * stride + member * rank; \
            for (int r = 0; r < count; r++) \
                for (int64_t k = 0; k < rank; k++) s[r][k] = load_##NAME(scales + r * stride + k); \
        } else if (job->ids) { \
            for (int r = 0; r < count; r++) \
                for (int64_t k = 0; k < rank; k++) s[r][k] = load_##NAME(b + k * n + job->ids[row + r]); \
        } else { \
            const TYPE *x = (const TYPE *)job->x + row * n; \
            int64_t k = 0; \
            for (; k + 4 <= rank; k += 4) NAME##_dots(s, k, x, b, n, count, 4); \
            if (k + 2 <= rank) { NAME##_dots(s, k, x, b, n, count, 2); k += 2; } \
            if (k < rank) NAME##_dots(s, k, x, b, n, count, 1); \
        } \
        if (rank == 1) NAME##_add(out, start, bias, a, s, m, count, 1); \
        else NAME##_add(out, start, bias, a, s, m, count, rank); \
    } \
    static void NAME##_work(void *data) { \
        job_t *job = data; \
        for (;;) { \
            int64_t row = __atomic_fetch_add(&job->next, job->step, __ATOMIC_RELAXED), end = row + job->step; \
            if (row >= job->rows) return; \
            if (end > job->rows) end = job->rows; \
            while (row < end) { \
                int64_t last = (row / job->per_member + 1) * job->per_member; \
                if (last > end) last = end; \
                for (; row + 4 <= last; row += 4) NAME##_rows(job, row, 4); \
                for (; row < last; row++) NAME##_rows(job, row, 1); \
            } \
        } \
    } \
    void eggroll_##NAME(void *out, const void *base, const void *x, const void *a, const void *b, const void *scales, \
                        const void *bias, const int64_t *ids, int64_t rows, int64_t per_member, int64_t n, int64_t m, \
                        int64_t rank, int64_t bias_step, int64_t parts, parallel_t *share) { \
        job_t job = {out, base, x, a, b, scales, bias, ids, rows, per_member, n, m, rank, bias_step, \
                     (rows + parts - 1) / parts, 0}; \
        if (parts > 1) share(NAME##_work, &job, 0, 0); \
        else NAME##_work(&job); \
    }

#ifdef BF16
TERM(bf16, uint16_t)
#else
TERM(f32, float)
#endif
