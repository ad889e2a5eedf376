/* hash_avx2.c: the long hash with 32-byte vectors. */
#if defined(__x86_64__)
#include <immintrin.h>

#define PATH_KERNEL shmc_hash_kernel_avx2
#define PATH_TARGET __attribute__((target("avx2")))
#define VECTOR_BYTES 32
#define MULTIPLY_LOW(a, b) ((vector)_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#define SWAP_LANES(v) ((vector)_mm256_shuffle_epi32((__m256i)(v), _MM_SHUFFLE(1, 0, 3, 2)))
#define STREAM(aligned, v) _mm256_stream_si256((__m256i *)(void *)(aligned), (__m256i)(v))

#include "hash_long.h"
#else
typedef int shmc_hash_avx2_absent; /* a translation unit may not be empty */
#endif
