#include "slots.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "peers.h"
#include "steps.h"

/* A hint to an owner that waits for space. Losing it costs the owner one bounded wait, no more. */
static void notice_release(struct shmc_control *control, uint64_t word_before, uint64_t cleared)
{
    struct shmc_header *header = control->header;
    /* pairs with the store in shmc_owner_wait_freed */
    SHMC_STEP(FREED_SEE);
    if ((word_before & ~cleared & SHMC_CLAIMS) == 0 && shmc_seq_load(&header->waiting) != 0) {
        SHMC_STEP(FREED_ADD);
        shmc_seq_add(&header->freed, 1);
        SHMC_STEP(FREED_WAKE);
        syscall(SYS_futex, &header->freed, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}

static void clear_bits(struct shmc_control *control, uint32_t slot, uint64_t bits)
{
    /* pairs with the owner's look for words without claims (reclaim in owner.c): our reads of the block come before */
    SHMC_STEP(CLEAR_BITS);
    uint64_t before = shmc_seq_and(&control->words[slot], ~bits);
    notice_release(control, before, bits);
}

/* ---- publish -------------------------------------------------------------------------------------------------- */

struct target {
    unsigned p;
    uint32_t incarnation;
};

static enum shmc_status find_targets(const struct shmc_control *control, const struct shmc_publication *publication,
                                     struct target *targets, uint32_t *count, struct shmc_detail *detail)
{
    *count = 0;
    for (unsigned p = SHMC_OWNER + 1; publication->everyone && p < SHMC_PEER_COUNT; p++) {
        uint32_t incarnation;
        if (shmc_peer_joined(control, p, &incarnation)) {
            targets[(*count)++] = (struct target){p, incarnation};
        }
    }
    for (uint32_t i = 0; i < publication->token_count; i++) {
        uint32_t incarnation;
        int p = shmc_peer_find(control, publication->tokens[i], &incarnation);
        if (p < 0) {
            *detail = (struct shmc_detail){publication->tokens[i], 0};
            return SHMC_PEER_LOST;
        }
        if (p != SHMC_OWNER && *count < SHMC_PEER_COUNT) { /* the owner needs no grant to its own block */
            targets[(*count)++] = (struct target){(unsigned)p, incarnation};
        }
    }
    return SHMC_OK;
}

enum shmc_status shmc_slot_publish(struct shmc_control *control, uint32_t slot,
                                   const struct shmc_publication *publication, uint64_t *granted,
                                   struct shmc_detail *detail)
{
    struct target targets[SHMC_PEER_COUNT];
    uint32_t count;
    enum shmc_status status = find_targets(control, publication, targets, &count, detail);
    if (status != SHMC_OK) {
        return status;
    }
    struct shmc_record *record = &control->records[slot];
    SHMC_STEP(PUBLISH_FIELDS);
    record->offset_bytes = publication->offset_bytes;
    record->size_bytes = publication->size_bytes;
    record->segment = publication->segment;
    record->flags = publication->flags;
    record->hash_low = publication->hash_low;
    record->hash_high = publication->hash_high;
    SHMC_STEP(PUBLISH_TOOK);
    shmc_relaxed_store(&record->took, (uint64_t)publication->anonymous << 32);
    SHMC_STEP(PUBLISH_GENERATION);
    shmc_relaxed_store(&record->generation, publication->generation);

    uint64_t grants = 0;
    for (uint32_t i = 0; i < count; i++) {
        grants |= SHMC_GRANT(targets[i].p);
    }
    uint64_t word =
        grants | (publication->anonymous != 0 ? SHMC_T : 0) | (publication->held ? SHMC_HOLD(SHMC_OWNER) : 0);
    SHMC_STEP(PUBLISH_FENCE);
    shmc_fence_streaming_stores();
    /* pairs with the compare-and-swap in pin: who sees a claim sees the record and the payload */
    SHMC_STEP(PUBLISH_EXCHANGE);
    shmc_seq_exchange(&control->words[slot], word);

    for (uint32_t i = 0; i < count; i++) {
        /* pairs with raise_incarnation: if it has not been raised by now, the scrub comes after our exchange */
        SHMC_STEP(PUBLISH_RECHECK);
        if (shmc_seq_load(&control->peers[targets[i].p].incarnation) != targets[i].incarnation) {
            clear_bits(control, slot, SHMC_GRANT(targets[i].p));
            grants &= ~SHMC_GRANT(targets[i].p);
        }
    }
    *granted = grants;
    return SHMC_OK;
}

/* ---- attach and release --------------------------------------------------------------------------------------- */

/* Set p's hold on a word that has claims; false where it has none. Such a hold may be on another block than the caller
 * wants: the owner counts it all the same, so nothing that it protects is reused. `seen` is the word that it was set on. */
static bool pin(shmc_atomic_u64 *word, unsigned p, uint64_t *seen)
{
    SHMC_STEP(ATTACH_PIN_SEE);
    *seen = shmc_seq_load(word);
    do {
        if ((*seen & SHMC_CLAIMS) == 0) {
            return false;
        }
        SHMC_STEP(ATTACH_PIN);
    } while (!shmc_seq_cas(word, seen, *seen | SHMC_HOLD(p))); /* pairs with the exchange in shmc_slot_publish */
    return true;
}

/* Take one of the n; true where none is left afterwards. */
static bool take_one(shmc_atomic_u64 *took, unsigned p)
{
    SHMC_STEP(ATTACH_TOOK_SEE);
    uint64_t now = shmc_seq_load(took);
    while ((now & SHMC_HOLD(p)) == 0 && SHMC_TOOK_LEFT(now) != 0) {
        uint64_t then = (now | SHMC_HOLD(p)) - SHMC_TOOK_ONE;
        SHMC_STEP(ATTACH_TOOK);
        if (shmc_seq_cas(took, &now, then)) { /* pairs with itself in other attachers, and with the scrub */
            now = then;
        }
    }
    return SHMC_TOOK_LEFT(now) == 0;
}

/* What this attach consumes: only what was there when the hold was set. A grant that comes later belongs to a handle that
 * is still under way. */
static void consume(struct shmc_control *control, unsigned p, uint32_t slot, uint64_t seen)
{
    uint64_t done = p != SHMC_OWNER ? seen & SHMC_GRANT(p) : 0; /* bit 32 is L: not the owner's to consume */
    if ((seen & SHMC_T) != 0 && take_one(&control->records[slot].took, p)) {
        done |= SHMC_T;
    }
    if (done != 0) {
        SHMC_STEP(ATTACH_CONSUME);
        shmc_seq_and(&control->words[slot], ~done); /* our hold stands, so this is never the last claim */
    }
}

enum shmc_status shmc_slot_attach(struct shmc_control *control, unsigned p, uint32_t slot, uint64_t generation,
                                  struct shmc_detail *detail)
{
    if (slot >= control->slot_count) {
        *detail = (struct shmc_detail){slot, control->slot_count};
        return SHMC_SLOT_RANGE;
    }
    shmc_atomic_u64 *at = &control->records[slot].generation;
    /* pairs with the store in shmc_slot_publish; the first look only spares others a pin that can not succeed */
    SHMC_STEP(ATTACH_LOOK);
    uint64_t found = shmc_acquire_load(at), seen;
    if (found == generation && pin(&control->words[slot], p, &seen)) {
        /* pairs with the store in shmc_slot_publish; while our hold stands it can not change any more */
        SHMC_STEP(ATTACH_LOOK_AGAIN);
        found = shmc_seq_load(at);
        if (found == generation) {
            consume(control, p, slot, seen);
            return SHMC_OK;
        }
        clear_bits(control, slot, SHMC_HOLD(p));
    }
    *detail = (struct shmc_detail){generation, found};
    return SHMC_STALE;
}

void shmc_slot_attach_again(struct shmc_control *control, unsigned p, uint32_t slot)
{
    SHMC_STEP(ATTACH_AGAIN);
    consume(control, p, slot, shmc_seq_load(&control->words[slot]));
}

void shmc_slot_release(struct shmc_control *control, unsigned p, uint32_t slot)
{
    clear_bits(control, slot, SHMC_HOLD(p));
}

enum shmc_status shmc_slot_keep(struct shmc_control *control, uint32_t slot, struct shmc_detail *detail)
{
    uint64_t seen;
    if (!pin(&control->words[slot], SHMC_OWNER, &seen)) {
        uint64_t generation = shmc_relaxed_load(&control->records[slot].generation);
        *detail = (struct shmc_detail){generation, generation};
        return SHMC_STALE;
    }
    return SHMC_OK;
}

/* ---- pass on -------------------------------------------------------------------------------------------------- */

static void add_grant(shmc_atomic_u64 *word, uint64_t grant)
{
    SHMC_STEP(PASS_SEE);
    uint64_t now = shmc_seq_load(word), then;
    do {
        /* Two in flight to one peer must not collapse into one bit, which the first attach would clear; and one of them
         * may be the anonymous one. */
        then = now | grant | SHMC_X | ((now & (grant | SHMC_T)) != 0 ? SHMC_L : 0);
        SHMC_STEP(PASS_GRANT);
    } while (!shmc_seq_cas(word, &now, then)); /* pairs with the compare-and-swap in shmc_slot_revoke */
}

enum shmc_status shmc_slot_pass_on(struct shmc_control *control, uint32_t slot, uint64_t token, bool *joined,
                                   struct shmc_detail *detail)
{
    uint32_t incarnation;
    int p = shmc_peer_find(control, token, &incarnation);
    *joined = p >= 0;
    /* without a bit of its own (not joined, or the owner itself) the target is protected by the owner's trusteeship */
    uint64_t grant = p > SHMC_OWNER ? SHMC_GRANT(p) : SHMC_L;
    add_grant(&control->words[slot], grant);
    /* pairs with raise_incarnation in peers.c */
    SHMC_STEP(PASS_RECHECK);
    if (p > SHMC_OWNER && shmc_seq_load(&control->peers[p].incarnation) != incarnation) {
        /* The grant stays: after a scrub the bit may be somebody else's promise to the next process with this byte. It
         * ends with the byte's next takeover or sweep, or with the deadline. */
        *detail = (struct shmc_detail){token, (unsigned)p};
        return SHMC_PEER_LOST;
    }
    return SHMC_OK;
}

/* ---- the owner's side ------------------------------------------------------------------------------------------ */

bool shmc_slot_revoke(struct shmc_control *control, uint32_t slot, uint64_t lasting)
{
    shmc_atomic_u64 *word = &control->words[slot];
    SHMC_STEP(REVOKE_SEE);
    uint64_t now = shmc_seq_load(word), then;
    do {
        /* Grants of peers that hold stay: their attach may still be about to consume them, and would then consume what
         * a pass-on promised after us. The block is held anyway. */
        uint64_t held = (now & SHMC_HOLDS) << 32 & SHMC_GRANTS;
        then = (now & SHMC_X) != 0 ? now & ~SHMC_X : now & (SHMC_HOLDS | lasting | held);
        SHMC_STEP(REVOKE);
    } while (!shmc_seq_cas(word, &now, then)); /* pairs with the compare-and-swap in add_grant */
    return (now & SHMC_X) == 0;
}

void shmc_slot_settle(struct shmc_control *control, uint32_t slot)
{
    SHMC_STEP(SETTLE_SEE);
    uint64_t word = shmc_seq_load(&control->words[slot]);
    SHMC_STEP(SETTLE_TOOK_SEE);
    if ((word & SHMC_T) != 0 && SHMC_TOOK_LEFT(shmc_seq_load(&control->records[slot].took)) == 0) {
        clear_bits(control, slot, SHMC_T);
    }
}

void shmc_slot_scrub(struct shmc_control *control, unsigned p)
{
    uint64_t bits = SHMC_HOLD(p) | (p != SHMC_OWNER ? SHMC_GRANT(p) : 0);
    for (uint32_t slot = 0; slot < control->slot_count; slot++) {
        shmc_atomic_u64 *took = &control->records[slot].took;
        SHMC_STEP(SCRUB_SEE);
        uint64_t word = shmc_seq_load(&control->words[slot]);
        if ((word & SHMC_CLAIMS) == 0) {
            continue; /* free: the next publication starts with a `took` of its own */
        }
        /* p may have died between taking the last one and dropping T. Only under its hold: without one, `took` could be
         * of this publication and T of the next. */
        SHMC_STEP(SCRUB_T_SEE);
        if ((word & SHMC_HOLD(p)) != 0 && (word & SHMC_T) != 0 && SHMC_TOOK_LEFT(shmc_seq_load(took)) == 0) {
            SHMC_STEP(SCRUB_T);
            shmc_seq_and(&control->words[slot], ~SHMC_T);
        }
        SHMC_STEP(SCRUB_TOOK_SEE);
        if ((shmc_seq_load(took) & SHMC_HOLD(p)) != 0) {
            SHMC_STEP(SCRUB_TOOK);
            shmc_seq_and(took, ~SHMC_HOLD(p)); /* pairs with take_one */
        }
        if ((word & bits) != 0) {
            clear_bits(control, slot, bits);
        }
    }
}

bool shmc_slot_claimed_by(const struct shmc_control *control, unsigned p)
{
    uint64_t bits = SHMC_HOLD(p) | SHMC_GRANT(p);
    for (uint32_t slot = 0; slot < control->slot_count; slot++) {
        SHMC_STEP(CLAIMED_SEE);
        if ((shmc_seq_load(&control->words[slot]) & bits) != 0) {
            return true;
        }
    }
    return false;
}
