/* hash_kernels.h: what the parts of the hash share: constants, word access, and the loops that exist once per path.
 *
 * Included by hash*.c only; everybody else wants hash.h. Little-endian, as all of shmcast. */
#ifndef SHMC_HASH_KERNELS_H
#define SHMC_HASH_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "hash.h"

/* The algorithm's primes. */
#define SHMC_P32_1 UINT64_C(0x9E3779B1)
#define SHMC_P32_2 UINT64_C(0x85EBCA77)
#define SHMC_P32_3 UINT64_C(0xC2B2AE3D)
#define SHMC_P64_1 UINT64_C(0x9E3779B185EBCA87)
#define SHMC_P64_2 UINT64_C(0xC2B2AE3D27D4EB4F)
#define SHMC_P64_3 UINT64_C(0x165667B19E3779F9)
#define SHMC_P64_4 UINT64_C(0x85EBCA77C2B2AE63)
#define SHMC_P64_5 UINT64_C(0x27D4EB2F165667C5)
#define SHMC_MIX_1 UINT64_C(0x165667919E3779F9)
#define SHMC_MIX_2 UINT64_C(0x9FB21C651E98DF25)

enum {
    SHMC_HASH_SHORT_MAX = 240,   /* longer inputs take the path's loop */
    SHMC_HASH_LANES = 8,         /* 64-bit accumulators */
    SHMC_HASH_STRIPE_BYTES = 64, /* one word per accumulator */
    SHMC_HASH_SECRET_BYTES = 192,
    SHMC_HASH_SECRET_STEP = 8, /* how far the secret moves on from stripe to stripe */
    SHMC_HASH_BLOCK_STRIPES = (SHMC_HASH_SECRET_BYTES - SHMC_HASH_STRIPE_BYTES) / SHMC_HASH_SECRET_STEP,
    SHMC_HASH_BLOCK_BYTES = SHMC_HASH_BLOCK_STRIPES * SHMC_HASH_STRIPE_BYTES,
    /* where the secret is read for the scramble after a block, and for the input's last 64 bytes */
    SHMC_HASH_SECRET_SCRAMBLE = SHMC_HASH_SECRET_BYTES - SHMC_HASH_STRIPE_BYTES,
    SHMC_HASH_SECRET_LAST = SHMC_HASH_SECRET_BYTES - 71
};

/* The default secret as little-endian words (hash_short.c). */
struct shmc_hash_secret {
    uint64_t words[SHMC_HASH_SECRET_BYTES / 8];
};
extern const struct shmc_hash_secret shmc_hash_default_secret;

/* Takes `length_bytes` > SHMC_HASH_SHORT_MAX at `source` into the accumulators; the variants that copy write all of it
 * to `target` besides. */
typedef void shmc_hash_absorb(uint64_t accumulators[SHMC_HASH_LANES], void *target, const void *source,
                              size_t length_bytes, const struct shmc_hash_secret *secret);

struct shmc_hash_kernel {
    shmc_hash_absorb *hash; /* target unused */
    shmc_hash_absorb *copy_plain;
    shmc_hash_absorb *copy_streaming;
    void (*stream)(void *target, const void *source, size_t length_bytes); /* no hash, any length */
};
extern const struct shmc_hash_kernel shmc_hash_kernel_portable;
#if defined(__x86_64__)
extern const struct shmc_hash_kernel shmc_hash_kernel_avx2;
extern const struct shmc_hash_kernel shmc_hash_kernel_avx512;
#endif

/* At most SHMC_HASH_SHORT_MAX bytes (hash_short.c). */
shmc_hash128 shmc_hash_short(const void *source, size_t length_bytes, uint64_t seed);

static inline uint32_t shmc_word32(const void *from, size_t offset)
{
    uint32_t word;
    memcpy(&word, (const unsigned char *)from + offset, sizeof word);
    return word;
}

static inline uint64_t shmc_word64(const void *from, size_t offset)
{
    uint64_t word;
    memcpy(&word, (const unsigned char *)from + offset, sizeof word);
    return word;
}

__extension__ typedef unsigned __int128 shmc_u128;

/* Both halves of the 128-bit product in one word. */
static inline uint64_t shmc_multiply_fold(uint64_t a, uint64_t b)
{
    shmc_u128 product = (shmc_u128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t shmc_avalanche(uint64_t x)
{
    x = (x ^ x >> 37) * SHMC_MIX_1;
    return x ^ x >> 32;
}

#endif
