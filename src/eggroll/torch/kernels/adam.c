/* A step of Adam without weight decay on float32 numbers, in two passes around PyTorch's own square root, whose rounding
   is not the exact one. Sums of a product are rounded once where PyTorch's are, so nothing else may be contracted.
   vectors.h is put before this. */
#define BLOCK 16384

typedef struct {
    float *first, *second; /* the two moments */
    const float *gradient; /* of what is to grow */
    const float *root;     /* of the second moment; 0 in the first pass */
    float *master;
    uint16_t *weights; /* 0: there are none */
    double *squares;   /* of the change, one for each block */
    int64_t size;
    float new_first, old_second, new_second, correction, eps, rate;
    int64_t next; /* entry that no block has yet */
} job_t;

/* The moments are those of the negative gradient, as PyTorch's are where it maximizes. */
static void moments(const job_t *job, int64_t low, int64_t high) {
    float *first = job->first, *second = job->second;
    const float *gradient = job->gradient;
    float w1 = job->new_first, b2 = job->old_second, w2 = job->new_second;
    for (int64_t i = low; i < high; i++) {
        float g = -gradient[i];
        first[i] = __builtin_fmaf(w1, g - first[i], first[i]);
        second[i] = __builtin_fmaf(w2 * g, g, second[i] * b2);
    }
}

static void step(const job_t *job, int64_t low, int64_t high, double *squares) {
    float *master = job->master;
    vec sum = {0};
    int64_t i = low;
    for (; i + WIDTH <= high; i += WIDTH) {
        vec denominator = load_vec_f32(job->root + i) / job->correction + job->eps;
        vec before = load_vec_f32(master + i), after = before + job->rate * load_vec_f32(job->first + i) / denominator;
        vec change = before - after;
        store_vec_f32(master + i, after);
        if (job->weights) store_vec_bf16(job->weights + i, after);
        sum += change * change;
    }
    double total = 0;
    for (int k = 0; k < WIDTH; k++) total += sum[k];
    for (; i < high; i++) {
        float denominator = job->root[i] / job->correction + job->eps;
        float before = master[i], after = before + job->rate * job->first[i] / denominator, change = before - after;
        master[i] = after;
        if (job->weights) store_bf16(job->weights + i, after);
        total += (double)change * change;
    }
    *squares = total;
}

static void work(void *data) {
    job_t *job = data;
    int64_t low, high;
    while (take_block(&job->next, BLOCK, job->size, &low, &high)) {
        if (job->root) step(job, low, high, job->squares + low / BLOCK);
        else moments(job, low, high);
    }
}

/* Without root: the moments. With it: the step. */
void eggroll_adam(float *first, float *second, const float *gradient, const float *root, float *master,
                  uint16_t *weights, double *squares, int64_t size, float new_first, float old_second, float new_second,
                  float correction, float eps, float rate, parallel_t *share) {
    job_t job = {first, second, gradient, root, master, weights, squares, size, new_first, old_second, new_second,
                 correction, eps, rate, 0};
    if (share) share(work, &job, 0, 0);
    else work(&job);
}
