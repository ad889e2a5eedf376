/* hash_avx512.c: the long hash with 64-byte vectors: one a stripe. AVX-512F is all that it needs. */
#if defined(__x86_64__)
#include <immintrin.h>

#define PATH_KERNEL shmc_hash_kernel_avx512
#define PATH_TARGET __attribute__((target("avx512f")))
#define VECTOR_BYTES 64
#define MULTIPLY_LOW(a, b) ((vector)_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))
#define SWAP_LANES(v) ((vector)_mm512_shuffle_epi32((__m512i)(v), (_MM_PERM_ENUM)_MM_SHUFFLE(1, 0, 3, 2)))
#define STREAM(aligned, v) _mm512_stream_si512((__m512i *)(void *)(aligned), (__m512i)(v))

#include "hash_long.h"
#else
typedef int shmc_hash_avx512_absent; /* a translation unit may not be empty */
#endif
