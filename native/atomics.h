/* atomics.h: every memory ordering that shmcast uses, behind a few names. Nobody else includes <stdatomic.h>.
 *
 * Slot words and incarnations are sequentially consistent: the protocol was checked under sequential consistency, and
 * its publish/join handshake is a store-load pattern (grant then read incarnation, against raise incarnation then
 * scrub) that nothing weaker orders. So is a bell: condition then sleepers, against sleepers then condition.
 * Everything else is release/acquire; what only people read is relaxed.
 * On x86 a sequentially consistent load is a plain load, so the strong choice costs nothing where it is frequent.
 *
 * A call site names its partner: "pairs with ... in ...". */
#ifndef SHMC_ATOMICS_H
#define SHMC_ATOMICS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef _Atomic uint32_t shmc_atomic_u32;
typedef _Atomic uint64_t shmc_atomic_u64;
_Static_assert(sizeof(shmc_atomic_u32) == 4 && sizeof(shmc_atomic_u64) == 8, "atomics have no hidden lock");
_Static_assert(ATOMIC_INT_LOCK_FREE == 2 && ATOMIC_LLONG_LOCK_FREE == 2, "shared atomics must be lock-free");

/* sequentially consistent */
#define shmc_seq_load(p) atomic_load_explicit((p), memory_order_seq_cst)
#define shmc_seq_store(p, v) atomic_store_explicit((p), (v), memory_order_seq_cst)
#define shmc_seq_exchange(p, v) atomic_exchange_explicit((p), (v), memory_order_seq_cst)
#define shmc_seq_add(p, v) atomic_fetch_add_explicit((p), (v), memory_order_seq_cst)
#define shmc_seq_and(p, v) atomic_fetch_and_explicit((p), (v), memory_order_seq_cst)
#define shmc_seq_or(p, v) atomic_fetch_or_explicit((p), (v), memory_order_seq_cst)
static inline bool shmc_seq_cas(shmc_atomic_u64 *word, uint64_t *expected, uint64_t desired)
{
    return atomic_compare_exchange_strong_explicit(word, expected, desired, memory_order_seq_cst, memory_order_seq_cst);
}

/* one side writes, the other reads what was written before */
#define shmc_acquire_load(p) atomic_load_explicit((p), memory_order_acquire)
#define shmc_release_store(p, v) atomic_store_explicit((p), (v), memory_order_release)

/* for counters that nobody decides by, and for the owner's scan, which decides by a second, stronger look */
#define shmc_relaxed_load(p) atomic_load_explicit((p), memory_order_relaxed)
#define shmc_relaxed_store(p, v) atomic_store_explicit((p), (v), memory_order_relaxed)
#define shmc_relaxed_add(p, v) ((void)atomic_fetch_add_explicit((p), (v), memory_order_relaxed))
static inline bool shmc_relaxed_cas(shmc_atomic_u64 *word, uint64_t *expected, uint64_t desired)
{
    return atomic_compare_exchange_weak_explicit(word, expected, desired, memory_order_relaxed, memory_order_relaxed);
}

/* A copy of `bytes` (a multiple of 8) that others may be writing, every word read once: what is checked afterwards is the
 * copy. After a plain copy a compiler may read the original again, which by then says something else. */
typedef uint64_t __attribute__((may_alias)) shmc_any_word;
static inline void shmc_snapshot(void *copy, const void *shared, size_t bytes)
{
    for (size_t i = 0; i < bytes / sizeof(uint64_t); i++) {
        ((shmc_any_word *)copy)[i] = __atomic_load_n((const shmc_any_word *)shared + i, __ATOMIC_RELAXED);
    }
}

/* Orders streaming (non-temporal) stores before the exchange that publishes them: locked instructions do not. */
static inline void shmc_fence_streaming_stores(void)
{
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#else
    atomic_thread_fence(memory_order_seq_cst);
#endif
}

#endif
