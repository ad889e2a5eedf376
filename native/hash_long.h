/* hash_long.h: the loop over inputs of more than 240 bytes, written once for every vector width.
 *
 * No include guard: hash_<path>.c defines what follows and includes this once, so that paths can not drift apart.
 *   PATH_KERNEL                the struct shmc_hash_kernel to define
 *   PATH_TARGET                attribute that allows the instructions, on every function; empty for the baseline
 *   VECTOR_BYTES               16, 32 or 64
 *   MULTIPLY_LOW(a, b)         per 64-bit lane, product of the lower 32-bit halves
 *   SWAP_LANES(v)              exchanges lanes 0 and 1, 2 and 3, ...
 *   STREAM(aligned, v)         non-temporal store to a multiple of VECTOR_BYTES
 *
 * A stripe is 64 bytes of input and meets 64 bytes of the secret, 8 bytes further on each time. 16 stripes make a block,
 * after which the accumulators are scrambled. The last block, full or not, is not scrambled, and the input's last 64
 * bytes are taken as one more stripe, whatever it overlaps.
 *
 * Aligned streaming stores to an unaligned target: the copy runs `lead` bytes (0..63) ahead of the hash, which reads
 * from the same lines a moment earlier or later, so it costs loads from the first cache level, not memory traffic. */
#include "atomics.h"
#include "hash_kernels.h"

typedef uint64_t vector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t vector_anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));

#define PATH_INLINE PATH_TARGET static inline __attribute__((always_inline))
#define LOAD(from) ((vector) * (const vector_anywhere *)(from))

enum {
    STRIPE_VECTORS = SHMC_HASH_STRIPE_BYTES / VECTOR_BYTES,
    /* How far ahead of the loads to ask for lines. The processor's own prefetch stops at the end of each 4 KiB page and
     * sees no further than its window of instructions, which the hash fills. Measured (Zen 3, source in memory): with the
     * hash 1.5 to 2 KiB are best, 512 bytes and 4 KiB cost 5 to 8 %; a bare copy is best with 512. */
    AHEAD_HASH_BYTES = 2048,
    AHEAD_COPY_BYTES = 512
};

enum mode { HASH_ONLY, COPY_PLAIN, COPY_STREAMING };

/* An address past the end is harmless to ask for, but must not be computed as a pointer. */
PATH_INLINE void prefetch(const unsigned char *from, size_t ahead)
{
    __builtin_prefetch((const void *)((uintptr_t)from + ahead));
}

PATH_INLINE void load_stripe(vector *input, const unsigned char *source)
{
    for (int i = 0; i < STRIPE_VECTORS; i++) {
        input[i] = LOAD(source + i * VECTOR_BYTES);
    }
}

PATH_INLINE void store_stripe(unsigned char *target, const vector *input, enum mode mode)
{
    for (int i = 0; i < STRIPE_VECTORS; i++) {
        if (mode == COPY_STREAMING) {
            STREAM(target + i * VECTOR_BYTES, input[i]);
        } else {
            *(vector_anywhere *)(target + i * VECTOR_BYTES) = (vector_anywhere)input[i];
        }
    }
}

PATH_INLINE void absorb_stripe(vector *sums, const vector *input, const unsigned char *secret)
{
    for (int i = 0; i < STRIPE_VECTORS; i++) {
        vector keyed = input[i] ^ LOAD(secret + i * VECTOR_BYTES);
        sums[i] += SWAP_LANES(input[i]) + MULTIPLY_LOW(keyed, keyed >> 32);
    }
}

/* One stripe of a full block. Loaded once where hash and copy go together: the compiler could not know that the store
 * leaves the source as it is. */
PATH_INLINE void take_stripe(vector *sums, unsigned char *target, const unsigned char *source,
                             const unsigned char *secret, enum mode mode, size_t lead)
{
    vector input[STRIPE_VECTORS], ahead[STRIPE_VECTORS];
    prefetch(source, AHEAD_HASH_BYTES);
    load_stripe(input, source);
    if (mode != HASH_ONLY && lead == 0) {
        store_stripe(target, input, mode);
    }
    if (mode != HASH_ONLY && lead != 0) {
        load_stripe(ahead, source + lead);
        store_stripe(target + lead, ahead, mode);
    }
    absorb_stripe(sums, input, secret);
}

/* x * prime in each lane, the prime having 32 bits. */
PATH_INLINE void scramble(vector *sums, const unsigned char *secret)
{
    const vector prime = (vector){0} + SHMC_P32_1;
    for (int i = 0; i < STRIPE_VECTORS; i++) {
        vector x = sums[i] ^ sums[i] >> 47 ^ LOAD(secret + SHMC_HASH_SECRET_SCRAMBLE + i * VECTOR_BYTES);
        sums[i] = MULTIPLY_LOW(x, prime) + (MULTIPLY_LOW(x >> 32, prime) << 32);
    }
}

/* `count` full blocks; the copy runs `lead` bytes ahead. */
PATH_INLINE void absorb_blocks(vector *sums, unsigned char *target, const unsigned char *source, size_t count,
                               const unsigned char *secret, enum mode mode, size_t lead)
{
    for (; count > 0; count--) {
        for (int stripe = 0; stripe < SHMC_HASH_BLOCK_STRIPES; stripe++) {
            take_stripe(sums, target, source, secret + stripe * SHMC_HASH_SECRET_STEP, mode, lead);
            source += SHMC_HASH_STRIPE_BYTES;
            if (mode != HASH_ONLY) {
                target += SHMC_HASH_STRIPE_BYTES;
            }
        }
        scramble(sums, secret);
    }
}

/* What is left after the full blocks, 1 to 1024 bytes before `end`, and the last stripe. */
PATH_INLINE void absorb_rest(vector *sums, const unsigned char *source, const unsigned char *end,
                             const unsigned char *secret)
{
    vector input[STRIPE_VECTORS];
    const unsigned char *moving = secret;
    for (; end - source > SHMC_HASH_STRIPE_BYTES; source += SHMC_HASH_STRIPE_BYTES) {
        load_stripe(input, source);
        absorb_stripe(sums, input, moving);
        moving += SHMC_HASH_SECRET_STEP;
    }
    load_stripe(input, end - SHMC_HASH_STRIPE_BYTES);
    absorb_stripe(sums, input, secret + SHMC_HASH_SECRET_LAST);
}

PATH_INLINE void absorb(uint64_t *accumulators, void *target_start, const void *source_start, size_t length,
                        const struct shmc_hash_secret *secret_words, enum mode mode, size_t lead)
{
    unsigned char *target = target_start;
    const unsigned char *source = source_start, *end = source + length;
    const unsigned char *secret = (const unsigned char *)secret_words->words;
    vector sums[STRIPE_VECTORS];
    memcpy(sums, accumulators, sizeof sums);

    /* A block is copied along with its hash only if what it copies, `lead` bytes further on, is all there. */
    size_t blocks = (length - 1) / SHMC_HASH_BLOCK_BYTES, along = 0;
    if (mode != HASH_ONLY) {
        along = (length - 1 - lead) / SHMC_HASH_BLOCK_BYTES;
        size_t done = lead + along * SHMC_HASH_BLOCK_BYTES;
        memcpy(target, source, lead);
        absorb_blocks(sums, target, source, along, secret, mode, lead);
        memcpy(target + done, source + done, length - done);
        source += along * SHMC_HASH_BLOCK_BYTES;
    }
    if (mode == HASH_ONLY || lead != 0) {
        absorb_blocks(sums, NULL, source, blocks - along, secret, HASH_ONLY, 0);
    }
    absorb_rest(sums, end - ((length - 1) % SHMC_HASH_BLOCK_BYTES + 1), end, secret);
    memcpy(accumulators, sums, sizeof sums);
}

static inline size_t lead_of(const void *target)
{
    return -(uintptr_t)target % SHMC_HASH_STRIPE_BYTES;
}

PATH_TARGET static void path_hash(uint64_t *accumulators, void *target, const void *source, size_t length_bytes,
                                  const struct shmc_hash_secret *secret)
{
    (void)target;
    absorb(accumulators, NULL, source, length_bytes, secret, HASH_ONLY, 0);
}

PATH_TARGET static void path_copy_plain(uint64_t *accumulators, void *target, const void *source, size_t length_bytes,
                                        const struct shmc_hash_secret *secret)
{
    absorb(accumulators, target, source, length_bytes, secret, COPY_PLAIN, 0);
}

PATH_TARGET static void path_copy_streaming(uint64_t *accumulators, void *target, const void *source,
                                            size_t length_bytes, const struct shmc_hash_secret *secret)
{
    /* spelled out for 0, so that the usual case loads each vector once */
    if (lead_of(target) == 0) {
        absorb(accumulators, target, source, length_bytes, secret, COPY_STREAMING, 0);
    } else {
        absorb(accumulators, target, source, length_bytes, secret, COPY_STREAMING, lead_of(target));
    }
    shmc_fence_streaming_stores();
}

PATH_TARGET static void path_stream(void *target_start, const void *source_start, size_t length_bytes)
{
    unsigned char *target = target_start;
    const unsigned char *source = source_start;
    size_t done = lead_of(target) < length_bytes ? lead_of(target) : length_bytes;
    memcpy(target, source, done);
    for (; length_bytes - done >= SHMC_HASH_STRIPE_BYTES; done += SHMC_HASH_STRIPE_BYTES) {
        vector input[STRIPE_VECTORS];
        prefetch(source + done, AHEAD_COPY_BYTES);
        load_stripe(input, source + done);
        store_stripe(target + done, input, COPY_STREAMING);
    }
    memcpy(target + done, source + done, length_bytes - done);
    shmc_fence_streaming_stores();
}

const struct shmc_hash_kernel PATH_KERNEL = {
    .hash = path_hash,
    .copy_plain = path_copy_plain,
    .copy_streaming = path_copy_streaming,
    .stream = path_stream,
};
