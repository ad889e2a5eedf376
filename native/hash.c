#include "hash.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "atomics.h"
#include "cpu.h"
#include "hash_kernels.h"

/* From how many bytes on to stream, measured with a reader on another core (Zen 3, 32 MiB last level).
 *
 * Where writer and reader share the last-level cache, plain stores win up to a quarter of it (writer and reader together
 * need 0.7 to 0.95 of the time) and lose from half of it on: source and target then no longer fit side by side. Where
 * they have one each, as on processors built from several dies, plain stores never win: taking each line back from the
 * reader's cache costs the writer 2 to 3 times the streaming copy, at any size. Blocks under 256 KiB are kept plain all
 * the same: their source is often still in the writer's own cache, where the copy runs at several times memory speed. */
enum { SHARED_CACHE_PART = 4, SPLIT_CACHE_STREAM_BYTES = 256 << 10, CACHE_BYTES_UNKNOWN = 32 << 20 };

static const char *const path_names[SHMC_HASH_PATH_COUNT] = {
    [SHMC_HASH_PORTABLE] = "portable", [SHMC_HASH_AVX2] = "avx2", [SHMC_HASH_AVX512] = "avx512"};

/* Written by shmc_hash_setup only, each by itself: whoever reads an old value beside a new one is still right. */
static shmc_atomic_u32 active_path = SHMC_HASH_PORTABLE;
static shmc_atomic_u64 stream_bytes = CACHE_BYTES_UNKNOWN / SHARED_CACHE_PART;

static const struct shmc_hash_kernel *kernel_of(enum shmc_hash_path path)
{
#if defined(__x86_64__)
    if (path == SHMC_HASH_AVX2) {
        return &shmc_hash_kernel_avx2;
    }
    if (path == SHMC_HASH_AVX512) {
        return &shmc_hash_kernel_avx512;
    }
#endif
    (void)path;
    return &shmc_hash_kernel_portable;
}

bool shmc_hash_path_supported(enum shmc_hash_path path)
{
    switch (path) {
    case SHMC_HASH_PORTABLE:
        return true;
    case SHMC_HASH_AVX2:
        return shmc_cpu_has_avx2();
    case SHMC_HASH_AVX512:
        return shmc_cpu_has_avx512f();
    default:
        return false;
    }
}

const char *shmc_hash_path_name(enum shmc_hash_path path)
{
    return (unsigned)path < SHMC_HASH_PATH_COUNT ? path_names[path] : NULL;
}

bool shmc_hash_path_find(const char *name, enum shmc_hash_path *path)
{
    for (int i = 0; i < SHMC_HASH_PATH_COUNT; i++) {
        if (strcmp(name, path_names[i]) == 0) {
            *path = (enum shmc_hash_path)i;
            return true;
        }
    }
    return false;
}

enum shmc_hash_path shmc_hash_path_active(void)
{
    return (enum shmc_hash_path)shmc_relaxed_load(&active_path);
}

size_t shmc_copy_stream_bytes(void)
{
    return (size_t)shmc_relaxed_load(&stream_bytes);
}

/* The names of the supported paths, for a message. */
static void list_paths(char *names, size_t names_bytes)
{
    size_t used = 0;
    for (int i = 0; i < SHMC_HASH_PATH_COUNT && used < names_bytes; i++) {
        if (shmc_hash_path_supported((enum shmc_hash_path)i)) {
            used += (size_t)snprintf(names + used, names_bytes - used, "%s%s", i ? ", " : "", path_names[i]);
        }
    }
}

static bool setup_path(char *message, size_t message_bytes)
{
    enum shmc_hash_path path = SHMC_HASH_PORTABLE;
    for (int i = 0; i < SHMC_HASH_PATH_COUNT; i++) {
        if (shmc_hash_path_supported((enum shmc_hash_path)i)) {
            path = (enum shmc_hash_path)i;
        }
    }
    shmc_relaxed_store(&active_path, (uint32_t)path);

    const char *wanted = getenv("SHMCAST_HASH_PATH");
    if (!wanted || !*wanted) {
        return true;
    }
    bool known = shmc_hash_path_find(wanted, &path);
    if (known && shmc_hash_path_supported(path)) {
        shmc_relaxed_store(&active_path, (uint32_t)path);
        return true;
    }
    char names[64];
    list_paths(names, sizeof names);
    snprintf(message, message_bytes, "choose a hash path: SHMCAST_HASH_PATH is '%.40s', %s; use one of %s, or unset it",
             wanted, known ? "which this processor does not have" : "which is no path", names);
    return false;
}

static bool setup_stream_bytes(char *message, size_t message_bytes)
{
    struct shmc_cpu_cache cache = shmc_cpu_last_cache();
    size_t from = (cache.bytes ? cache.bytes : CACHE_BYTES_UNKNOWN) / SHARED_CACHE_PART;
    shmc_relaxed_store(&stream_bytes, cache.bytes && !cache.shared_by_all ? SPLIT_CACHE_STREAM_BYTES : from);

    const char *wanted = getenv("SHMCAST_STREAM_BYTES");
    if (!wanted || !*wanted) {
        return true;
    }
    char *end;
    errno = 0;
    unsigned long long bytes = strtoull(wanted, &end, 10);
    if (*wanted >= '0' && *wanted <= '9' && !*end && !errno) {
        shmc_relaxed_store(&stream_bytes, bytes);
        return true;
    }
    snprintf(message, message_bytes, "choose stores: SHMCAST_STREAM_BYTES is '%.40s', which is no number of bytes",
             wanted);
    return false;
}

bool shmc_hash_setup(char *message, size_t message_bytes)
{
    /* both, whatever the first says: the defaults are to be in force */
    bool path_set = setup_path(message, message_bytes);
    bool stream_set = setup_stream_bytes(message, path_set ? message_bytes : 0);
    return path_set && stream_set;
}

static bool streams(enum shmc_hash_stores stores, size_t length_bytes)
{
    return stores == SHMC_STORES_STREAMING || (stores == SHMC_STORES_AUTO && length_bytes >= shmc_copy_stream_bytes());
}

/* One half of the result: the accumulators under 64 bytes of the secret. */
static uint64_t merge(const uint64_t *accumulators, const struct shmc_hash_secret *secret, size_t offset, uint64_t sum)
{
    for (size_t i = 0; i < SHMC_HASH_LANES; i += 2) {
        sum += shmc_multiply_fold(accumulators[i] ^ shmc_word64(secret->words, offset + 8 * i),
                                  accumulators[i + 1] ^ shmc_word64(secret->words, offset + 8 * i + 8));
    }
    return shmc_avalanche(sum);
}

static shmc_hash128 hash_long(shmc_hash_absorb *absorb, void *target, const void *source, size_t length, uint64_t seed)
{
    uint64_t accumulators[SHMC_HASH_LANES] = {SHMC_P32_3, SHMC_P64_1, SHMC_P64_2, SHMC_P64_3,
                                              SHMC_P64_4, SHMC_P32_2, SHMC_P64_5, SHMC_P32_1};
    struct shmc_hash_secret seeded;
    const struct shmc_hash_secret *secret = &shmc_hash_default_secret;
    if (seed) {
        for (size_t i = 0; i < sizeof seeded.words / sizeof *seeded.words; i++) {
            seeded.words[i] = secret->words[i] + (i % 2 ? 0 - seed : seed);
        }
        secret = &seeded;
    }
    absorb(accumulators, target, source, length, secret);
    return (shmc_hash128){
        .low64 = merge(accumulators, secret, 11, length * SHMC_P64_1),
        .high64 = merge(accumulators, secret, SHMC_HASH_SECRET_BYTES - 75, ~(length * SHMC_P64_2)),
    };
}

shmc_hash128 shmc_hash_bytes_with(enum shmc_hash_path path, const void *source, size_t length_bytes, uint64_t seed)
{
    if (length_bytes <= SHMC_HASH_SHORT_MAX) {
        return shmc_hash_short(source, length_bytes, seed);
    }
    return hash_long(kernel_of(path)->hash, NULL, source, length_bytes, seed);
}

shmc_hash128 shmc_hash_copy_with(enum shmc_hash_path path, enum shmc_hash_stores stores, void *target,
                                 const void *source, size_t length_bytes, uint64_t seed)
{
    if (length_bytes <= SHMC_HASH_SHORT_MAX) {
        if (length_bytes) {
            memcpy(target, source, length_bytes);
        }
        return shmc_hash_short(source, length_bytes, seed);
    }
    const struct shmc_hash_kernel *kernel = kernel_of(path);
    return hash_long(streams(stores, length_bytes) ? kernel->copy_streaming : kernel->copy_plain, target, source,
                     length_bytes, seed);
}

shmc_hash128 shmc_hash_bytes(const void *source, size_t length_bytes, uint64_t seed)
{
    return shmc_hash_bytes_with(shmc_hash_path_active(), source, length_bytes, seed);
}

shmc_hash128 shmc_hash_copy(void *target, const void *source, size_t length_bytes, uint64_t seed)
{
    return shmc_hash_copy_with(shmc_hash_path_active(), SHMC_STORES_AUTO, target, source, length_bytes, seed);
}

void shmc_copy_streaming(void *target, const void *source, size_t length_bytes)
{
    if (length_bytes) {
        kernel_of(shmc_hash_path_active())->stream(target, source, length_bytes);
    }
}

void shmc_copy_bytes(void *target, const void *source, size_t length_bytes)
{
    if (streams(SHMC_STORES_AUTO, length_bytes)) {
        shmc_copy_streaming(target, source, length_bytes);
    } else if (length_bytes) {
        memcpy(target, source, length_bytes);
    }
}
