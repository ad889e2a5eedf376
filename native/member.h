/* member.h: this process in one arena. Several leases of one block are one hold: they are counted here, privately.
 * Not thread-safe; the caller serialises (module.c by the GIL). */
#ifndef SHMC_MEMBER_H
#define SHMC_MEMBER_H

#include "control.h"
#include "peers.h"
#include "slots.h"

struct shmc_member {
    struct shmc_control control;
    void *lock_page;
    unsigned index;        /* peer; SHMC_OWNER in the process that created the arena */
    uint64_t token;        /* of the process that joined; a forked child has another */
    uint32_t *leases;      /* per slot: leases in this process */
    uint64_t *generations; /* per slot: of the block that they are on, where there are any */
};

/* What a reader learns about a block that it holds; checked against the handle and the arena's bounds. */
struct shmc_block_view {
    uint64_t block_offset, block_bytes;
    uint32_t flags;
    uint64_t hash_low, hash_high;
};

/* `lock_fd` has byte 0 already. The fds may be closed afterwards. */
enum shmc_status shmc_member_create(struct shmc_member *member, int map_fd, int lock_fd,
                                    const struct shmc_control_config *config);

/* ENDED, PEERS_FULL, and what shmc_control_open says. */
enum shmc_status shmc_member_join(struct shmc_member *member, int map_fd, int lock_fd, uint64_t arena_id,
                                  struct shmc_detail *detail);

/* Unmap; our lock goes with it. A member that leaves scrubs itself first; what is only dropped looks like a death. */
void shmc_member_leave(struct shmc_member *member);
void shmc_member_destroy(struct shmc_member *member);

static inline bool shmc_member_inherited(const struct shmc_member *member)
{
    return member->token != shmc_process_token();
}

/* Take one more lease on (slot, generation). STALE, ENDED, SLOT_RANGE, INHERITED. */
enum shmc_status shmc_member_attach(struct shmc_member *member, uint32_t slot, uint64_t generation,
                                    struct shmc_detail *detail);

/* Whether `offset`, `size` of `segment` lie in the block that is held. SEGMENT_MISMATCH, BLOCK_RANGE. */
enum shmc_status shmc_member_check(const struct shmc_member *member, uint32_t slot, uint32_t segment,
                                   uint64_t offset_bytes, uint64_t size_bytes, struct shmc_block_view *view,
                                   struct shmc_detail *detail);

/* Give one lease back; the hold goes with the last one. Nothing in a forked child. */
void shmc_member_release(struct shmc_member *member, uint32_t slot);

#endif
