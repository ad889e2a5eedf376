/* Included before everything else (cc -include): now and then a thread stops for a moment before an access that orders
 * things between processes, so that windows of nanoseconds are met. */
#ifndef JITTER_H
#define JITTER_H

#include <unistd.h>

#include "atomics.h"

static inline void jitter(void)
{
    static _Thread_local uint32_t state;
    state = (state == 0 ? (uint32_t)(uintptr_t)&state : state) * 1103515245u + 12345u;
    if ((state >> 16) % 64 == 0) {
        usleep((state >> 24) % 64);
    }
}

#undef shmc_seq_load
#undef shmc_seq_store
#undef shmc_seq_exchange
#undef shmc_seq_add
#undef shmc_seq_and
#undef shmc_seq_or
#undef shmc_acquire_load
#undef shmc_release_store
#define shmc_seq_load(p) (jitter(), atomic_load_explicit((p), memory_order_seq_cst))
#define shmc_seq_store(p, v) (jitter(), atomic_store_explicit((p), (v), memory_order_seq_cst))
#define shmc_seq_exchange(p, v) (jitter(), atomic_exchange_explicit((p), (v), memory_order_seq_cst))
#define shmc_seq_add(p, v) (jitter(), atomic_fetch_add_explicit((p), (v), memory_order_seq_cst))
#define shmc_seq_and(p, v) (jitter(), atomic_fetch_and_explicit((p), (v), memory_order_seq_cst))
#define shmc_seq_or(p, v) (jitter(), atomic_fetch_or_explicit((p), (v), memory_order_seq_cst))
#define shmc_acquire_load(p) (jitter(), atomic_load_explicit((p), memory_order_acquire))
#define shmc_release_store(p, v) (jitter(), atomic_store_explicit((p), (v), memory_order_release))

#endif
