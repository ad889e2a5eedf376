/* bell.h: sleeping until another process has made something true. layout.h says why nothing gets lost (A BELL). */
#ifndef SHMC_BELL_H
#define SHMC_BELL_H

#include "layout.h"

/* What a sleeper waits for. Looks with shmc_seq_load: pairs with the store before shmc_bell_ring. */
typedef bool (*shmc_condition)(void *of);

enum shmc_waited {
    SHMC_WAIT_MET,
    SHMC_WAIT_RUNG, /* somebody has rung, but it is not so (yet) */
    SHMC_WAIT_TIMEOUT,
    SHMC_WAIT_SIGNAL, /* a signal was delivered: the caller lets its handler run */
};

/* Peer p sleeps once, unless it need not, until the bell is rung; at most until the clock says `deadline_ns`.
 * `spin_ns`: for how long to look without sleeping first. */
enum shmc_waited shmc_bell_wait(struct shmc_bell *bell, unsigned p, shmc_condition met, void *of, uint64_t deadline_ns,
                                uint64_t spin_ns);

/* After the condition was made true by a sequentially consistent store. No system call where nobody sleeps. */
void shmc_bell_ring(struct shmc_bell *bell);

/* Peer p does not sleep here (any more), whatever its bit says. */
void shmc_bell_forget(struct shmc_bell *bell, unsigned p);

/* For how long a wait among `processes` processes may spin: 0 where there are more of them than processors, for then
 * the one that is waited for may need ours. */
uint64_t shmc_bell_spin_ns(unsigned processes);

#endif
