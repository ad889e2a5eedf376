/* peers.h: who is in an arena, and who is alive: a lock on one's own byte of the control segment, nothing else. */
#ifndef SHMC_PEERS_H
#define SHMC_PEERS_H

#include "control.h"

enum { SHMC_OWNER = 0 };

/* Random non-zero name of this process; kept on a page that the kernel wipes in every child, so a forked child gets
 * another one whatever way it was forked. 0 and errno where the page can not be had. */
uint64_t shmc_process_token(void);

/* Take / give back / probe the lock of byte p through fd. The lock belongs to the open file description. */
bool shmc_peer_lock(int fd, unsigned p);
void shmc_peer_unlock(int fd, unsigned p);
bool shmc_peer_probe(int fresh_fd,
                     unsigned p); /* true: a live process has it. Never ask through one's own description */

/* One page mapped through `fd`, so that fd's locks live as long as this address space, the descriptor closed or not. */
enum shmc_status shmc_peer_anchor(int fd, void **lock_page);
void shmc_peer_drop_anchor(void *lock_page);

/* Whoever has byte p: make its record describe this process. The scrub comes first, readiness last. */
void shmc_peer_take_over(struct shmc_control *control, unsigned p, uint64_t token);

/* Take any free byte of 1..30 through lock_fd. PEERS_FULL. */
enum shmc_status shmc_peer_join(struct shmc_control *control, int lock_fd, uint64_t token, unsigned *index,
                                struct shmc_detail *detail);

/* The end of a membership by its own process, which still has the byte. */
void shmc_peer_leave(struct shmc_control *control, unsigned p);

/* Scrub every dead peer other than the owner, through a fresh descriptor; returns how many there were. */
unsigned shmc_peer_sweep(struct shmc_control *control, int fresh_fd);

/* Whether a process has joined as p, alive or not; `incarnation` as below. */
bool shmc_peer_joined(const struct shmc_control *control, unsigned p, uint32_t *incarnation);

/* Index of the joined process with that token; -1 where there is none. `incarnation` is what a grant is given against. */
int shmc_peer_find(const struct shmc_control *control, uint64_t token, uint32_t *incarnation);

#endif
