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
    /* How far ahead of the loads to ask for lines: the processor's own prefetch stops at each 4 KiB page, and its pages
     * are not neighbours. Measured best at 384 to 640 bytes; twice that is slower again. */
    AHEAD_BYTES = 512
};

enum mode { HASH_ONLY, COPY_PLAIN, COPY_STREAMING };

/* An address past the end is harmless here, but it is not to be computed as a pointer. */
PATH_INLINE void prefetch(const unsigned char *from)
{
    __builtin_prefetch((const void *)((uintptr_t)from + AHEAD_BYTES)); /* NOLINT: integer on purpose */
}

PATH_INLINE void absorb_stripe(vector *sums, const unsigned char *stripe, const unsigned char *secret)
{
    for (int i = 0; i < STRIPE_VECTORS; i++) {
        vector input = LOAD(stripe + i * VECTOR_BYTES);
        vector keyed = input ^ LOAD(secret + i * VECTOR_BYTES);
        sums[i] += SWAP_LANES(input) + MULTIPLY_LOW(keyed, keyed >> 32);
    }
}

PATH_INLINE void copy_stripe(unsigned char *target, const unsigned char *source, enum mode mode)
{
    for (int i = 0; i < STRIPE_VECTORS; i++) {
        vector input = LOAD(source + i * VECTOR_BYTES);
        if (mode == COPY_STREAMING)
            STREAM(target + i * VECTOR_BYTES, input);
        else
            *(vector_anywhere *)(target + i * VECTOR_BYTES) = (vector_anywhere)input;
    }
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
            prefetch(source);
            if (mode != HASH_ONLY)
                copy_stripe(target + lead, source + lead, mode);
            absorb_stripe(sums, source, secret + stripe * SHMC_HASH_SECRET_STEP);
            source += SHMC_HASH_STRIPE_BYTES;
            if (mode != HASH_ONLY)
                target += SHMC_HASH_STRIPE_BYTES;
        }
        scramble(sums, secret);
    }
}

/* What is left after the full blocks: 1 to 1024 bytes before `end`. */
PATH_INLINE void absorb_rest(vector *sums, const unsigned char *source, const unsigned char *end,
                             const unsigned char *secret)
{
    for (; end - source > SHMC_HASH_STRIPE_BYTES; source += SHMC_HASH_STRIPE_BYTES) {
        absorb_stripe(sums, source, secret);
        secret += SHMC_HASH_SECRET_STEP;
    }
}

PATH_INLINE void absorb(uint64_t *accumulators, void *target_start, const void *source_start, size_t length,
                        const struct shmc_hash_secret *secret_words, enum mode mode, size_t lead)
{
    unsigned char *target = target_start;
    const unsigned char *source = source_start, *end = source + length;
    const unsigned char *secret = (const unsigned char *)secret_words->words;
    vector sums[STRIPE_VECTORS];
    memcpy(sums, accumulators, sizeof sums);

    /* A block is copied along only if what it copies, `lead` bytes further on, is all there. */
    size_t blocks = (length - 1) / SHMC_HASH_BLOCK_BYTES, along = blocks;
    if (mode != HASH_ONLY) {
        memcpy(target, source, lead);
        along = (length - 1 - lead) / SHMC_HASH_BLOCK_BYTES;
        size_t done = lead + along * SHMC_HASH_BLOCK_BYTES;
        absorb_blocks(sums, target, source, along, secret, mode, lead);
        memcpy(target + done, source + done, length - done);
        source += along * SHMC_HASH_BLOCK_BYTES;
    }
    absorb_blocks(sums, NULL, source, mode == HASH_ONLY ? blocks : blocks - along, secret, HASH_ONLY, 0);
    source = end - ((length - 1) % SHMC_HASH_BLOCK_BYTES + 1);
    absorb_rest(sums, source, end, secret);
    absorb_stripe(sums, end - SHMC_HASH_STRIPE_BYTES, secret + SHMC_HASH_SECRET_LAST);
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
    if (lead_of(target) == 0)
        absorb(accumulators, target, source, length_bytes, secret, COPY_STREAMING, 0);
    else
        absorb(accumulators, target, source, length_bytes, secret, COPY_STREAMING, lead_of(target));
    shmc_fence_streaming_stores();
}

PATH_TARGET static void path_stream(void *target_start, const void *source_start, size_t length_bytes)
{
    unsigned char *target = target_start;
    const unsigned char *source = source_start;
    size_t done = lead_of(target) < length_bytes ? lead_of(target) : length_bytes;
    memcpy(target, source, done);
    for (; length_bytes - done >= SHMC_HASH_STRIPE_BYTES; done += SHMC_HASH_STRIPE_BYTES) {
        prefetch(source + done);
        copy_stripe(target + done, source + done, COPY_STREAMING);
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
