/* metrics.h: what each word of the metrics block counts. Part of the layout: the table gives the words, in this order.
 *
 * Who writes       Every peer adds to the same words, so a total is that of all ranks, wherever the work was done. A
 *                  row that ends in [owner] or [entry] is counted by that process alone. What a process counted stays
 *                  when it dies; a gauge then says what it last was.
 * Memory order     Relaxed, and that is enough: a word stands for itself, nothing is decided by it, and nobody
 *                  concludes from one word what another holds. Totals are exact because each addition is one read-modify-write.
 *                  The three words of one observation are three of them: who looks in between, or after a writer was
 *                  killed in between, finds the last one missing, and there is nothing to repair.
 * What is read     Numbers, never trusted: any peer can write anything here.
 * What may change  A row at the end is free: it was zero before. Any other change of the order raises SHMC_FORMAT. */
#ifndef SHMC_METRICS_H
#define SHMC_METRICS_H

#include "layout.h"

enum {
    SHMC_METRIC_BUCKETS = 28,
    SHMC_TIMES_SHIFT = 10, /* the first bucket of times: below 2^10 ns; the last: from 2^36 ns on, 69 s */
    SHMC_SIZES_SHIFT = 0,  /* the first bucket of sizes: 0; the last: from 2^26 on */
};

/* Observations of one kind of event. Bucket 0 has the values below 2^shift, bucket b those in [2^(shift+b-1),
 * 2^(shift+b)), the last one the rest. How many there were is the sum of the buckets. */
struct shmc_histogram {
    shmc_atomic_u64 sum, max, buckets[SHMC_METRIC_BUCKETS];
};

/* COUNTER  only grows                                     GAUGE  as it is now; one process sets it
 * PEAK     the largest value that was ever given          TIMES  histogram of ns          SIZES  histogram of counts */
typedef shmc_atomic_u64 shmc_words_COUNTER, shmc_words_GAUGE, shmc_words_PEAK;
typedef struct shmc_histogram shmc_words_TIMES, shmc_words_SIZES;

/* clang-format off */
#define SHMC_METRIC_TABLE(X)                                                                                          \
    /* the arena */                                                                                                   \
    X(reserved_bytes, GAUGE, "bytes of live data segments [owner]")                                                   \
    X(used_bytes, GAUGE, "bytes of blocks that the owner has not found free yet [owner]")                             \
    X(peak_used_bytes, PEAK, "most bytes that were ever in use at once [owner]")                                      \
    X(published, COUNTER, "blocks published, new handles of old bytes included [owner]")                              \
    X(published_bytes, COUNTER, "bytes of these blocks [owner]")                                                      \
    X(grown, COUNTER, "data segments added [owner]")                                                                  \
    X(revoked, COUNTER, "blocks whose claims were revoked past their deadline [owner]")                               \
    X(swept, COUNTER, "dead peers scrubbed")                                                                          \
    X(live_blocks, GAUGE, "published blocks that the owner has not found free yet [owner]")                           \
    X(peak_live_blocks, PEAK, "most published blocks that there ever were at once [owner]")                           \
    X(retired, COUNTER, "data segments given back to the host [owner]")                                               \
    X(publish_retries, COUNTER, "publications and reservations that found no room at first and tried again [owner]")  \
    X(publish_ns, TIMES, "ns of one publish or publish_many that copied, or of one seal, with waits for room [owner]")\
    /* encoding: what becomes of arrays */                                                                            \
    X(inline_full, COUNTER, "arrays that travelled in the message because the arena was full")                        \
    X(inline_full_bytes, COUNTER, "bytes of these arrays")                                                            \
    X(inline_small, COUNTER, "arrays that travelled in the message because they are below the size threshold")        \
    X(inline_small_bytes, COUNTER, "bytes of these arrays")                                                           \
    X(inline_unsupported, COUNTER, "arrays that travelled in the message because they can not be shared")             \
    X(passed_on, COUNTER, "arrays that lay in shared memory already and travelled without a copy")                    \
    X(out_full, COUNTER, "arrays to materialize in place that got private memory because the arena was full [entry]") \
    /* the group */                                                                                                   \
    X(messages, COUNTER, "messages sent to all ranks [entry]")                                                        \
    X(message_bytes, COUNTER, "bytes of these messages [entry]")                                                      \
    X(overflows, COUNTER, "messages that did not fit the channel's fixed size [entry]")                               \
    X(message_ns, TIMES, "ns of one message through the channel, on each rank; the others' include the wait for it")  \
    X(attach_ns, TIMES, "ns to attach and rebuild what one message brought, on each rank")                            \
    X(step_ns, TIMES, "ns of one step of a caster, on each rank")                                                     \
    /* requests */                                                                                                    \
    X(requests, COUNTER, "requests submitted [entry]")                                                                \
    X(outcomes_ok, COUNTER, "requests that ended with a value [entry]")                                               \
    X(outcomes_failed, COUNTER, "requests that ended with an error, those that ran out of time included [entry]")     \
    X(outcomes_timeout, COUNTER, "requests that ran out of time [entry]")                                             \
    X(outcomes_cancelled, COUNTER, "requests that ended cancelled [entry]")                                           \
    X(batch_requests, SIZES, "requests that ended in one message [entry]")                                            \
    X(pending, GAUGE, "requests submitted and not ended [entry]")                                                     \
    X(peak_pending, PEAK, "most requests that were ever pending at once [entry]")                                     \
    /* materialization */                                                                                             \
    X(materialize_ns, TIMES, "ns of one materialization, failed ones included [entry]")                               \
    X(materialized_bytes, COUNTER, "bytes of arrays that materialization gave, small ones left out [entry]")          \
    X(abandoned_workers, COUNTER, "worker threads given up because a materialization ran out of time, on each rank")  \
    X(inflight_bytes, GAUGE, "bytes of raw requests queued and of results not delivered [entry]")                     \
    X(peak_inflight_bytes, PEAK, "most bytes that were ever in flight at once [entry]")                               \
    X(backpressure_waits, COUNTER, "submissions that waited because a limit was reached [entry]")                     \
    X(backpressure_wait_ns, COUNTER, "ns that these submissions waited [entry]")                                      \
    X(backpressure_shed, COUNTER, "requests ended with an error because a limit was reached [entry]")                 \
    X(backpressure_raised, COUNTER, "submissions refused with an exception because a limit was reached [entry]")      \
    /* the arena again */                                                                                             \
    X(aliased, COUNTER, "of what was published: new handles of old bytes, without a copy [owner]")                    \
    /* how requests went */                                                                                           \
    X(mode_shm, COUNTER, "requests that were to go as handles of shared memory [entry]")                              \
    X(mode_object, COUNTER, "requests that were to go as pickles of what was materialized [entry]")                   \
    X(mode_raw, COUNTER, "requests that were to go raw, and to be materialized on every rank [entry]")                \
    X(mode_replicate, COUNTER, "requests that every rank was to materialize from what it was given itself [entry]")   \
    X(mode_switches, COUNTER, "how often requests were told to go another way from then on [entry]")                  \
    X(replicas_ns, TIMES, "ns of one materialization of a request that every rank materializes, on each rank")        \
    X(inline_bytes, GAUGE, "bytes of arrays of one request below which they travel in the message [entry]")       \
    X(inline_results, COUNTER, "results made for the message because their arrays are fewer bytes than that [entry]")\
    /* the cache */                                                                                                   \
    X(cache_hits, COUNTER, "requests answered by what an equal one had given before [entry]")                         \
    X(cache_misses, COUNTER, "requests with a key that nothing was known of [entry]")                                 \
    X(cache_joined, COUNTER, "requests that waited for an equal one instead of being materialized themselves [entry]")\
    X(cache_keyless, COUNTER, "requests of which no key could be made [entry]")                                       \
    X(cache_evicted, COUNTER, "results that the cache gave up for others, or because the arena needed the room [entry]")\
    X(cache_reused, COUNTER, "arrays that were in the cache already, and were not kept twice [entry]")                \
    X(cache_reused_bytes, COUNTER, "bytes of these arrays [entry]")                                                   \
    X(cache_bytes, GAUGE, "bytes of results that the cache keeps [entry]")                                            \
    X(peak_cache_bytes, PEAK, "most bytes that the cache ever kept [entry]")                                          \
    X(cache_entries, GAUGE, "results that the cache keeps [entry]")                                                   \
    X(peak_cache_entries, PEAK, "most results that the cache ever kept [entry]")                                      \
    /* worker processes */                                                                                            \
    X(workers_started, COUNTER, "worker processes started, in place of others included [entry]")                      \
    X(workers_lost, COUNTER, "worker processes that died, or were ended because a materialization ran out of time [entry]")
/* clang-format on */

/* The block as the table lays it out. */
struct shmc_metric_words {
#define SHMC_METRIC_FIELD(name, kind, text) shmc_words_##kind name;
    SHMC_METRIC_TABLE(SHMC_METRIC_FIELD)
#undef SHMC_METRIC_FIELD
};

enum { SHMC_METRIC_WORD_COUNT = sizeof(struct shmc_metric_words) / sizeof(uint64_t) };
_Static_assert(sizeof(struct shmc_metric_words) <= sizeof(((struct shmc_header *)0)->metrics),
               "metrics fit their block");
_Static_assert(offsetof(struct shmc_metric_words, swept) == 56, "the first words are where they always were");

enum shmc_metric {
#define SHMC_METRIC_ENUM(name, kind, text) SHMC_METRIC_##name,
    SHMC_METRIC_TABLE(SHMC_METRIC_ENUM)
#undef SHMC_METRIC_ENUM
        SHMC_METRIC_COUNT
};

enum shmc_metric_kind { SHMC_COUNTER, SHMC_GAUGE, SHMC_PEAK, SHMC_TIMES, SHMC_SIZES, SHMC_METRIC_KIND_COUNT };

struct shmc_metric_row {
    const char *name, *text;
    enum shmc_metric_kind kind;
    uint32_t first_word;
};
extern const struct shmc_metric_row shmc_metric_rows[SHMC_METRIC_COUNT];

/* `block` is the header's, or private memory of SHMC_METRIC_WORD_COUNT words. The kind of the metric must be the one
 * that the function is for; that is for the caller to see to. */
static inline void shmc_metric_add(shmc_atomic_u64 *block, enum shmc_metric metric, uint64_t more)
{
    shmc_relaxed_add(&block[shmc_metric_rows[metric].first_word], more);
}

static inline void shmc_metric_set(shmc_atomic_u64 *block, enum shmc_metric metric, uint64_t value)
{
    shmc_relaxed_store(&block[shmc_metric_rows[metric].first_word], value);
}

static inline uint64_t shmc_metric_get(const shmc_atomic_u64 *block, enum shmc_metric metric)
{
    return shmc_relaxed_load(&block[shmc_metric_rows[metric].first_word]);
}

void shmc_metric_peak(shmc_atomic_u64 *block, enum shmc_metric metric, uint64_t value);    /* PEAK */
void shmc_metric_observe(shmc_atomic_u64 *block, enum shmc_metric metric, uint64_t value); /* TIMES, SIZES */

/* The first value that is too large for bucket `bucket`, which is not the last. */
uint64_t shmc_metric_bucket_end(enum shmc_metric_kind kind, unsigned bucket);

#endif
