/* One step of plain SGD on float32 numbers: master += rate * gradient, and the weights of 16 bit that are rounded from
   it. vectors.h is put before this. The sum of squares of a block is its own, so that no total depends on threads. */
#define BLOCK 16384

typedef struct {
    float *master;
    const float *gradient;
    uint16_t *weights; /* 0: there are none */
    double *squares;   /* one for each block */
    int64_t size;
    float rate;
    int64_t next, other; /* first entry that no block has yet; entries of the weights that are not the master's */
} job_t;

static void step_block(const job_t *job, int64_t low, int64_t high, double *squares) {
    float *master = job->master;
    const float *gradient = job->gradient;
    uint16_t *weights = job->weights;
    vec rate = (vec){0} + job->rate, sum = {0};
    int64_t i = low;
    for (; i + WIDTH <= high; i += WIDTH) {
        vec before = load_vec_f32(master + i), after = before + rate * load_vec_f32(gradient + i);
        vec change = before - after;
        store_vec_f32(master + i, after);
        if (weights) store_vec_bf16(weights + i, after);
        sum += change * change;
    }
    double total = 0;
    for (int k = 0; k < WIDTH; k++) total += sum[k];
    for (; i < high; i++) {
        float before = master[i], after = before + job->rate * gradient[i], change = before - after;
        master[i] = after;
        if (weights) store_bf16(weights + i, after);
        total += (double)change * change;
    }
    *squares = total;
}

static int64_t other_block(const job_t *job, int64_t low, int64_t high) {
    int64_t found = 0, i = low;
    for (; i + WIDTH <= high; i += WIDTH) {
        uint16_t rounded[WIDTH];
        store_vec_bf16(rounded, load_vec_f32(job->master + i));
        found += __builtin_memcmp(rounded, job->weights + i, sizeof rounded) != 0;
    }
    for (; i < high; i++) {
        uint16_t rounded;
        store_bf16(&rounded, job->master[i]);
        found += rounded != job->weights[i];
    }
    return found;
}

static void work(void *data) {
    job_t *job = data;
    int64_t low, high;
    while (take_block(&job->next, BLOCK, job->size, &low, &high)) {
        if (job->gradient) step_block(job, low, high, job->squares + low / BLOCK);
        else if (other_block(job, low, high)) __atomic_store_n(&job->other, 1, __ATOMIC_RELAXED);
    }
}

/* With a gradient: the step. Without: whether any weight is not what the master is rounded to. */
int64_t eggroll_step(float *master, const float *gradient, uint16_t *weights, double *squares, int64_t size, float rate,
                     parallel_t *share) {
    job_t job = {master, gradient, weights, squares, size, rate, 0, 0};
    if (share) share(work, &job, 0, 0);
    else work(&job);
    return job.other;
}
