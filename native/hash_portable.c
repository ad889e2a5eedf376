/* hash_portable.c: the long hash with what every processor of the architecture has: SSE2 on x86-64, NEON on aarch64. */
#define PATH_KERNEL shmc_hash_kernel_portable
#define PATH_TARGET
#define VECTOR_BYTES 16
#define SWAP_LANES(v) ((vector){(v)[1], (v)[0]})

#if defined(__SSE2__)
#include <emmintrin.h>
#define MULTIPLY_LOW(a, b) ((vector)_mm_mul_epu32((__m128i)(a), (__m128i)(b)))
#define STREAM(aligned, v) _mm_stream_si128((__m128i *)(void *)(aligned), (__m128i)(v))
#else
#if defined(__ARM_NEON)
#include <arm_neon.h>
#define MULTIPLY_LOW(a, b) ((vector)vmull_u32(vmovn_u64((uint64x2_t)(a)), vmovn_u64((uint64x2_t)(b))))
#else
#define MULTIPLY_LOW(a, b) (((a) & UINT32_MAX) * ((b) & UINT32_MAX))
#endif
/* no streaming stores here: plain ones are right, if slower for what does not fit the cache */
#define STREAM(aligned, v) (*(vector_anywhere *)(aligned) = (vector_anywhere)(v))
#endif

#include "hash_long.h"
