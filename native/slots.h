/* slots.h: the claims on published blocks. Each function is one arrow, or one pair of arrows, of layout.h's diagram. */
#ifndef SHMC_SLOTS_H
#define SHMC_SLOTS_H

#include "control.h"

/* What a publication says about itself; the owner fills it in while the slot has no claim. */
struct shmc_publication {
    uint64_t generation;
    uint64_t offset_bytes, size_bytes;
    uint64_t hash_low, hash_high;
    uint32_t segment;
    uint32_t flags;         /* enum shmc_record_flag */
    uint32_t anonymous;     /* readers=n: T is set and `took` counts down from n; 0: no T */
    bool held;              /* the owner holds from the start */
    const uint64_t *tokens; /* processes that get a grant each */
    uint32_t token_count;
    bool everyone; /* and to everybody who has joined by now, but the owner; in place of tokens */
};

/* [owner] FREE -> CLAIMED. PEER_LOST where a target has not joined: nothing is published. A target that dies in between
 * loses its grant and nobody else loses anything. `granted` is the grant bits that were set. */
enum shmc_status shmc_slot_publish(struct shmc_control *control, uint32_t slot,
                                   const struct shmc_publication *publication, uint64_t *granted,
                                   struct shmc_detail *detail);

/* [peer p] Pin, then validate. STALE or SLOT_RANGE leave the word as it was. The caller has no hold on the slot yet. */
enum shmc_status shmc_slot_attach(struct shmc_control *control, unsigned p, uint32_t slot, uint64_t generation,
                                  struct shmc_detail *detail);

/* [holder p] The process has the block already and attaches another handle of it: that consumes claims as well. */
void shmc_slot_attach_again(struct shmc_control *control, unsigned p, uint32_t slot);

/* [holder p] The end of the last lease in this process. */
void shmc_slot_release(struct shmc_control *control, unsigned p, uint32_t slot);

/* [owner] Hold a slot that has claims already. STALE where it has none. */
enum shmc_status shmc_slot_keep(struct shmc_control *control, uint32_t slot, struct shmc_detail *detail);

/* [holder] Grant to the process of `token`. PEER_LOST where it dies meanwhile; *joined is false where it has not joined
 * and the owner was made trustee instead. A grant is one bit per peer and slot, not per handle: a handle that is not
 * promised any more (an old copy, one beyond the n readers) may consume it, and the handle that was passed on is then good
 * only while somebody holds the block. */
enum shmc_status shmc_slot_pass_on(struct shmc_control *control, uint32_t slot, uint64_t token, bool *joined,
                                   struct shmc_detail *detail);

/* [owner] Past the deadline: take unclaimed grants, T and L away, `lasting` bits excepted. Returns false where a pass-on
 * has touched the word since: X is cleared and the deadline starts again. */
bool shmc_slot_revoke(struct shmc_control *control, uint32_t slot, uint64_t lasting);

/* [owner] Drop T where all n have been taken (the last one died before it could). */
void shmc_slot_settle(struct shmc_control *control, uint32_t slot);

/* [who has the byte of p] Clear the bits of p everywhere. */
void shmc_slot_scrub(struct shmc_control *control, unsigned p);
bool shmc_slot_claimed_by(const struct shmc_control *control, unsigned p);

#endif
