/* owner.h: the publisher's side of an arena: data segments, blocks, slots and deadlines, all private memory.
 * Not thread-safe, with two exceptions that touch no shared state of the owner: shmc_owner_prepare_segment, and the
 * copy between shmc_owner_take and shmc_owner_publish. The caller serialises the rest (module.c by the GIL). */
#ifndef SHMC_OWNER_H
#define SHMC_OWNER_H

#include "blocks.h"
#include "member.h"

enum { SHMC_OWN_PAGES_BYTES = 16384 }; /* blocks from here on have their pages to themselves */

struct shmc_data_segment {
    uint32_t number; /* n in the name; 0: this place is unused */
    uint64_t size_bytes, used_bytes;
    uint64_t idle_since_ns; /* CLOCK_MONOTONIC; meaningful while used_bytes is 0 */
    uint8_t *base;          /* shared, writable; mapped by the caller */
};

/* What only the owner knows of a slot in use. */
struct shmc_slot_private {
    uint32_t block; /* SHMC_NO_BLOCK: the slot is not in use */
    bool kept;      /* one of the member's leases on it is the arena's own */
    uint32_t flags; /* what the record said when it was published, here and below */
    uint64_t generation, size_bytes, hash_low, hash_high;
    uint64_t deadline_ns; /* CLOCK_MONOTONIC; unclaimed grants may be revoked past it; UINT64_MAX: never */
    uint64_t timeout_ns;  /* to start the deadline again after a pass-on */
    uint64_t lasting;     /* claims that no deadline ends */
};

struct shmc_owner {
    struct shmc_member *member; /* outlives the owner */
    struct shmc_blocks blocks;
    struct shmc_data_segment segments[SHMC_SEGMENT_COUNT];
    struct shmc_slot_private *slots;
    uint32_t *free_slots;                /* a stack: low slots first, so that scans are short */
    uint32_t free_slot_count, slots_end; /* no slot from slots_end on was ever in use */
    uint64_t generation;
    uint64_t reserved_bytes, used_bytes, peak_used_bytes;
    bool ended;
};

/* How a block is to be published. */
struct shmc_terms {
    const uint64_t *tokens;
    uint32_t token_count;
    bool everyone;      /* in place of tokens: whoever has joined */
    uint32_t anonymous; /* readers=n */
    bool keep;
    uint64_t timeout_ns; /* 0: unclaimed grants last */
};

struct shmc_published {
    uint64_t generation, offset_bytes, hash_low, hash_high;
    uint32_t slot, segment;
    bool hashed;
};

enum shmc_status shmc_owner_init(struct shmc_owner *owner, struct shmc_member *member);
void shmc_owner_destroy(struct shmc_owner *owner);

/* Reserve, map and prefault; then make it known. Between the two the caller may have let others run. The mapping is the
 * caller's, to be unmapped once the segment is retired and nobody writes there any more; *index is its place. */
enum shmc_status shmc_owner_prepare_segment(int fd, uint64_t size_bytes, uint8_t **base);
enum shmc_status shmc_owner_add_segment(struct shmc_owner *owner, uint32_t number, uint8_t *base, uint64_t size_bytes,
                                        unsigned *index, struct shmc_detail *detail);

/* Take an empty and unpinned segment out of service and punch it; *done is false where it is neither. */
enum shmc_status shmc_owner_retire_segment(struct shmc_owner *owner, uint32_t number, unsigned *index, bool *done);

/* Take back what has no claims any more; returns bytes. `revoke`: end claims past their deadline first. */
uint64_t shmc_owner_reclaim(struct shmc_owner *owner, bool revoke);

/* A block to write to, not published yet. NO_SPACE, CLOSED, INHERITED. `drop` gives it back unpublished. */
enum shmc_status shmc_owner_take(struct shmc_owner *owner, uint64_t size_bytes, uint32_t *block, void **target,
                                 struct shmc_detail *detail);
void shmc_owner_drop(struct shmc_owner *owner, uint32_t block);

/* Publish a block that was taken (its reference goes over to the slot). On failure the block is still the caller's. */
enum shmc_status shmc_owner_publish(struct shmc_owner *owner, uint32_t block, uint64_t size_bytes, const uint64_t *hash,
                                    const struct shmc_terms *terms, struct shmc_published *published,
                                    struct shmc_detail *detail);

/* Publish the bytes of a live block once more. STALE. */
enum shmc_status shmc_owner_alias(struct shmc_owner *owner, uint32_t slot, uint64_t generation,
                                  const struct shmc_terms *terms, struct shmc_published *published,
                                  struct shmc_detail *detail);

/* End the arena's own hold; false where there is none. */
/* Whether anybody has a claim on the block. */
bool shmc_owner_is_live(struct shmc_owner *owner, uint32_t slot, uint64_t generation);

/* Tokens of those who have taken one of `anonymous`, SHMC_PEER_COUNT at most; 0 where the block is gone. */
uint32_t shmc_owner_takers(struct shmc_owner *owner, uint32_t slot, uint64_t generation, uint64_t *tokens);

bool shmc_owner_release(struct shmc_owner *owner, uint32_t slot, uint64_t generation);

/* End what the owner has promised and nobody has made use of yet, the arena's own hold included; false where the block is
 * gone. What a reader has passed on since then stays until a deadline. */
bool shmc_owner_withdraw(struct shmc_owner *owner, uint32_t slot, uint64_t generation);

/* Wait until a release was noticed or the time is up; bounded whatever notices get lost. Reads nothing private. */
bool shmc_owner_wait_freed(struct shmc_control *control, uint64_t timeout_ns);

#endif
