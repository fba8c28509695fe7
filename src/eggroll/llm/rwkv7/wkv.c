/* The recurrence of RWKV-7 in one pass over the tokens, for each row and head:
     S <- S diag(w) + (S a) b^T + v k^T,   y = S r
   r, w, k, v, a, b and y are (rows, length, heads, n), the state is (rows, heads, n, n), values by keys, and is
   updated in place. A head's state (16 KB for n = 64) stays in the first cache while its tokens are read. */
#include <stdint.h>

typedef void parallel_t(void (*)(void *), void *, unsigned, unsigned);
typedef struct {
    const float *r, *w, *k, *v, *a, *b;
    float *state, *y;
    int64_t rows, length, heads, n, step, next;
} job_t;

#define INLINE static inline __attribute__((always_inline))

INLINE void head(const job_t *job, int64_t index, const int64_t n) {
    const int64_t row = index / job->heads, stride = job->heads * n;
    const int64_t start = row * job->length * stride + (index % job->heads) * n;
    float *state = job->state + index * n * n;
    for (int64_t t = 0; t < job->length; t++) {
        const int64_t at = start + t * stride;
        const float *r = job->r + at, *w = job->w + at, *k = job->k + at, *v = job->v + at, *a = job->a + at,
                    *b = job->b + at;
        float *y = job->y + at;
        for (int64_t i = 0; i < n; i++) {
            float *s = state + i * n, applied = 0, out = 0;
            const float value = v[i];
            for (int64_t j = 0; j < n; j++) applied += s[j] * a[j];
            for (int64_t j = 0; j < n; j++) {
                const float next = s[j] * w[j] + applied * b[j] + value * k[j];
                s[j] = next;
                out += next * r[j];
            }
            y[i] = out;
        }
    }
}

static void work(void *data) {
    job_t *job = data;
    const int64_t all = job->rows * job->heads;
    for (;;) {
        int64_t index = __atomic_fetch_add(&job->next, job->step, __ATOMIC_RELAXED), end = index + job->step;
        if (index >= all) return;
        if (end > all) end = all;
        for (; index < end; index++) {
            if (job->n == 64) head(job, index, 64);
            else head(job, index, job->n);
        }
    }
}

void eggroll_wkv7(const float *r, const float *w, const float *k, const float *v, const float *a, const float *b,
                  float *state, float *y, int64_t rows, int64_t length, int64_t heads, int64_t n, int64_t parts,
                  parallel_t *share) {
    job_t job = {r, w, k, v, a, b, state, y, rows, length, heads, n, (rows * heads + parts - 1) / parts, 0};
    if (parts > 1) share(work, &job, 0, 0);
    else work(&job);
}
