/* hash.h: XXH3-128 of bytes, alone or in the same pass as a copy, and copies without a hash.
 *
 * The algorithm is XXH3 with 128 bits of result by Yann Collet, as in the xxHash specification ("XXH3 algorithm
 * overview", github.com/Cyan4973/xxHash, doc/xxhash_spec.md) and the library since 0.8.0: default secret, 64-bit seed. Any
 * implementation of it gives the same value. It finds errors and equal contents; it is no defence against an adversary.
 *
 * The result is the same on every path; a path only says with which instructions it was computed. Any alignment of
 * source and target is right, a target on a multiple of 64 bytes is fastest. Source and target must not overlap.
 *
 * Stores: plain ones leave the copy in the cache, where readers on other cores find it; streaming (non-temporal) ones
 * do not read the target first and push nothing out of the cache, but readers then go to memory. AUTO streams from
 * shmc_copy_stream_bytes() on (hash.c says why there). Whatever streams has ended with a store fence when it returns. */
#ifndef SHMC_HASH_H
#define SHMC_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint64_t low64, high64; /* as one number: high64 << 64 | low64 */
} shmc_hash128;

/* In order of preference, the last supported one is the best. */
enum shmc_hash_path { SHMC_HASH_PORTABLE, SHMC_HASH_AVX2, SHMC_HASH_AVX512, SHMC_HASH_PATH_COUNT };
enum shmc_hash_stores { SHMC_STORES_AUTO, SHMC_STORES_PLAIN, SHMC_STORES_STREAMING };

/* Reads SHMCAST_HASH_PATH (portable, avx2 or avx512; default: the best that this processor has) and
 * SHMCAST_STREAM_BYTES (from how many bytes on to stream; default: see shmc_copy_stream_bytes). False with a sentence for
 * the user in `message` where a value can not be followed; the defaults are then in force. Call it once before all
 * else; until then the portable path is used. An empty value counts as not set. */
bool shmc_hash_setup(char *message, size_t message_bytes);

bool shmc_hash_path_supported(enum shmc_hash_path path);
const char *shmc_hash_path_name(enum shmc_hash_path path); /* as in SHMCAST_HASH_PATH; NULL if there is no such path */
bool shmc_hash_path_find(const char *name, enum shmc_hash_path *path);
enum shmc_hash_path shmc_hash_path_active(void);

/* From how many bytes on AUTO streams. */
size_t shmc_copy_stream_bytes(void);

shmc_hash128 shmc_hash_bytes(const void *source, size_t length_bytes, uint64_t seed);

/* Copy, and hash what was copied, in one pass over the source. */
shmc_hash128 shmc_hash_copy(void *target, const void *source, size_t length_bytes, uint64_t seed);

/* Copy without hash, same choice of stores. */
void shmc_copy_bytes(void *target, const void *source, size_t length_bytes);

/* For tests and benchmarks. `path` must be supported. */
shmc_hash128 shmc_hash_bytes_with(enum shmc_hash_path path, const void *source, size_t length_bytes, uint64_t seed);
shmc_hash128 shmc_hash_copy_with(enum shmc_hash_path path, enum shmc_hash_stores stores, void *target,
                                 const void *source, size_t length_bytes, uint64_t seed);
void shmc_copy_streaming(void *target, const void *source, size_t length_bytes);

#endif
