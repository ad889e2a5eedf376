#include "metrics.h"

const struct shmc_metric_row shmc_metric_rows[SHMC_METRIC_COUNT] = {
#define SHMC_METRIC_ROW(name, kind, text) \
    {#name, text, SHMC_##kind, offsetof(struct shmc_metric_words, name) / sizeof(uint64_t)},
    SHMC_METRIC_TABLE(SHMC_METRIC_ROW)
#undef SHMC_METRIC_ROW
};

/* Two who raise it at once: one of them loses the exchange, looks again, and tries again only if its value is still more. */
static void raise_to(shmc_atomic_u64 *word, uint64_t value)
{
    uint64_t found = shmc_relaxed_load(word);
    while (found < value && !shmc_relaxed_cas(word, &found, value)) {
    }
}

void shmc_metric_peak(shmc_atomic_u64 *block, enum shmc_metric metric, uint64_t value)
{
    raise_to(&block[shmc_metric_rows[metric].first_word], value);
}

static unsigned shift_of(enum shmc_metric_kind kind)
{
    return kind == SHMC_TIMES ? SHMC_TIMES_SHIFT : SHMC_SIZES_SHIFT;
}

void shmc_metric_observe(shmc_atomic_u64 *block, enum shmc_metric metric, uint64_t value)
{
    const struct shmc_metric_row *row = &shmc_metric_rows[metric];
    struct shmc_histogram *histogram = (struct shmc_histogram *)&block[row->first_word];
    uint64_t shifted = value >> shift_of(row->kind);
    unsigned bucket = shifted == 0 ? 0 : 64 - (unsigned)__builtin_clzll(shifted);
    raise_to(&histogram->max, value);
    shmc_relaxed_add(&histogram->sum, value);
    shmc_relaxed_add(&histogram->buckets[bucket < SHMC_METRIC_BUCKETS ? bucket : SHMC_METRIC_BUCKETS - 1], 1);
}

uint64_t shmc_metric_bucket_end(enum shmc_metric_kind kind, unsigned bucket)
{
    return UINT64_C(1) << (shift_of(kind) + bucket);
}
