/* hash_short.c: XXH3-128 of up to 240 bytes. Four ranges of length, each with a formula of its own; scalar on every path. */
#include "hash_kernels.h"

const struct shmc_hash_secret shmc_hash_default_secret = {{
    UINT64_C(0xbe4ba423396cfeb8), UINT64_C(0x1cad21f72c81017c), UINT64_C(0xdb979083e96dd4de),
    UINT64_C(0x1f67b3b7a4a44072), UINT64_C(0x78e5c0cc4ee679cb), UINT64_C(0x2172ffcc7dd05a82),
    UINT64_C(0x8e2443f7744608b8), UINT64_C(0x4c263a81e69035e0), UINT64_C(0xcb00c391bb52283c),
    UINT64_C(0xa32e531b8b65d088), UINT64_C(0x4ef90da297486471), UINT64_C(0xd8acdea946ef1938),
    UINT64_C(0x3f349ce33f76faa8), UINT64_C(0x1d4f0bc7c7bbdcf9), UINT64_C(0x3159b4cd4be0518a),
    UINT64_C(0x647378d9c97e9fc8), UINT64_C(0xc3ebd33483acc5ea), UINT64_C(0xeb6313faffa081c5),
    UINT64_C(0x49daf0b751dd0d17), UINT64_C(0x9e68d429265516d3), UINT64_C(0xfca1477d58be162b),
    UINT64_C(0xce31d07ad1b8f88f), UINT64_C(0x280416958f3acb45), UINT64_C(0x7e404bbbcafbd7af),
}};

/* Words of the secret at a byte offset. */
static uint64_t secret64(size_t offset)
{
    return shmc_word64(shmc_hash_default_secret.words, offset);
}

/* The finishing step that XXH3 keeps from XXH64. */
static uint64_t avalanche_old(uint64_t x)
{
    x = (x ^ x >> 33) * SHMC_P64_2;
    x = (x ^ x >> 29) * SHMC_P64_3;
    return x ^ x >> 32;
}

static shmc_hash128 hash_empty(uint64_t seed)
{
    return (shmc_hash128){.low64 = avalanche_old(seed ^ secret64(64) ^ secret64(72)),
                          .high64 = avalanche_old(seed ^ secret64(80) ^ secret64(88))};
}

static shmc_hash128 hash_1_to_3(const unsigned char *source, size_t length, uint64_t seed)
{
    const uint64_t *words = shmc_hash_default_secret.words;
    uint32_t packed = (uint32_t)source[length / 2] << 24 | (uint32_t)source[0] << 16 | (uint32_t)length << 8 |
                      (uint32_t)source[length - 1];
    uint32_t reversed = __builtin_bswap32(packed);
    uint32_t turned = reversed << 13 | reversed >> 19;
    uint64_t key_low = (uint32_t)(words[0] ^ words[0] >> 32) + seed;
    uint64_t key_high = (uint32_t)(words[1] ^ words[1] >> 32) - seed;
    return (shmc_hash128){.low64 = avalanche_old(key_low ^ packed), .high64 = avalanche_old(key_high ^ turned)};
}

static shmc_hash128 hash_4_to_8(const unsigned char *source, size_t length, uint64_t seed)
{
    uint64_t spread = seed ^ (uint64_t)__builtin_bswap32((uint32_t)seed) << 32;
    uint64_t input = (uint64_t)shmc_word32(source, length - 4) << 32 | shmc_word32(source, 0);
    uint64_t keyed = input ^ ((secret64(16) ^ secret64(24)) + spread);
    shmc_u128 product = (shmc_u128)keyed * (SHMC_P64_1 + 4 * (uint64_t)length);
    uint64_t low = (uint64_t)product;
    uint64_t high = (uint64_t)(product >> 64) + (low << 1);
    low ^= high >> 3;
    low = (low ^ low >> 35) * SHMC_MIX_2;
    return (shmc_hash128){.low64 = low ^ low >> 28, .high64 = shmc_avalanche(high)};
}

static shmc_hash128 hash_9_to_16(const unsigned char *source, size_t length, uint64_t seed)
{
    uint64_t last = shmc_word64(source, length - 8);
    uint64_t both = shmc_word64(source, 0) ^ last ^ ((secret64(32) ^ secret64(40)) - seed);
    uint64_t keyed = last ^ ((secret64(48) ^ secret64(56)) + seed);
    shmc_u128 product = (shmc_u128)both * SHMC_P64_1;
    uint64_t low = (uint64_t)product + ((uint64_t)(length - 1) << 54);
    uint64_t high = (uint64_t)(product >> 64) + keyed + (keyed & UINT32_MAX) * (SHMC_P32_2 - 1);
    shmc_u128 second = (shmc_u128)(low ^ __builtin_bswap64(high)) * SHMC_P64_2;
    return (shmc_hash128){.low64 = shmc_avalanche((uint64_t)second),
                          .high64 = shmc_avalanche((uint64_t)(second >> 64) + high * SHMC_P64_2)};
}

struct pair {
    uint64_t first, second;
};

/* 16 bytes under 16 bytes of the secret. */
static inline uint64_t mix16(const unsigned char *chunk, size_t secret, uint64_t seed)
{
    return shmc_multiply_fold(shmc_word64(chunk, 0) ^ (secret64(secret) + seed),
                              shmc_word64(chunk, 8) ^ (secret64(secret + 8) - seed));
}

/* Two chunks, each into its own sum and, plainly added up, into the other one. */
static inline struct pair mix32(struct pair sums, const unsigned char *a, const unsigned char *b, size_t secret,
                                uint64_t seed)
{
    return (struct pair){
        .first = (sums.first + mix16(a, secret, seed)) ^ (shmc_word64(b, 0) + shmc_word64(b, 8)),
        .second = (sums.second + mix16(b, secret + 16, seed)) ^ (shmc_word64(a, 0) + shmc_word64(a, 8)),
    };
}

static shmc_hash128 finish_medium(struct pair sums, size_t length, uint64_t seed)
{
    uint64_t high = sums.first * SHMC_P64_1 + sums.second * SHMC_P64_4 + ((uint64_t)length - seed) * SHMC_P64_2;
    return (shmc_hash128){.low64 = shmc_avalanche(sums.first + sums.second), .high64 = 0 - shmc_avalanche(high)};
}

/* From both ends inwards has the chunks overlap in the middle; the innermost pair comes first. */
static shmc_hash128 hash_17_to_128(const unsigned char *source, size_t length, uint64_t seed)
{
    struct pair sums = {length * SHMC_P64_1, 0};
    for (size_t at = (length - 1) / 32 * 16;; at -= 16) {
        sums = mix32(sums, source + at, source + length - 16 - at, 2 * at, seed);
        if (at == 0) {
            return finish_medium(sums, length, seed);
        }
    }
}

static shmc_hash128 hash_129_to_240(const unsigned char *source, size_t length, uint64_t seed)
{
    struct pair sums = {length * SHMC_P64_1, 0};
    size_t at = 0;
    for (; at < 128; at += 32) {
        sums = mix32(sums, source + at, source + at + 16, at, seed);
    }
    sums.first = shmc_avalanche(sums.first);
    sums.second = shmc_avalanche(sums.second);
    for (; at + 32 <= length; at += 32) {
        sums = mix32(sums, source + at, source + at + 16, at - 128 + 3, seed);
    }
    sums = mix32(sums, source + length - 16, source + length - 32, 103, 0 - seed);
    return finish_medium(sums, length, seed);
}

shmc_hash128 shmc_hash_short(const void *source, size_t length_bytes, uint64_t seed)
{
    if (length_bytes > 128) {
        return hash_129_to_240(source, length_bytes, seed);
    }
    if (length_bytes > 16) {
        return hash_17_to_128(source, length_bytes, seed);
    }
    if (length_bytes > 8) {
        return hash_9_to_16(source, length_bytes, seed);
    }
    if (length_bytes > 3) {
        return hash_4_to_8(source, length_bytes, seed);
    }
    return length_bytes ? hash_1_to_3(source, length_bytes, seed) : hash_empty(seed);
}
