#include "owner.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "metrics.h"
#include "segment.h"
#include "steps.h"

/* ---- metrics ------------------------------------------------------------------------------------------------------ */

static shmc_atomic_u64 *metrics_of(const struct shmc_owner *owner)
{
    return owner->member->control.header->metrics;
}

static void count_used(struct shmc_owner *owner, uint64_t more, uint64_t less)
{
    owner->used_bytes += more - less;
    if (owner->used_bytes > owner->peak_used_bytes) {
        owner->peak_used_bytes = owner->used_bytes;
        shmc_metric_peak(metrics_of(owner), SHMC_METRIC_peak_used_bytes, owner->peak_used_bytes);
    }
    shmc_metric_set(metrics_of(owner), SHMC_METRIC_used_bytes, owner->used_bytes);
}

static uint64_t live_blocks(const struct shmc_owner *owner)
{
    return owner->member->control.slot_count - owner->free_slot_count;
}

/* ---- life ------------------------------------------------------------------------------------------------------- */

enum shmc_status shmc_owner_init(struct shmc_owner *owner, struct shmc_member *member)
{
    uint32_t slot_count = member->control.slot_count;
    *owner = (struct shmc_owner){.member = member};
    shmc_blocks_init(&owner->blocks);
    owner->slots = malloc(slot_count * sizeof *owner->slots);
    owner->free_slots = malloc(slot_count * sizeof *owner->free_slots);
    if (owner->slots == NULL || owner->free_slots == NULL) {
        shmc_owner_destroy(owner);
        return SHMC_NO_MEMORY;
    }
    for (uint32_t slot = 0; slot < slot_count; slot++) {
        owner->slots[slot] = (struct shmc_slot_private){.block = SHMC_NO_BLOCK};
        owner->free_slots[slot] = slot_count - 1 - slot;
    }
    owner->free_slot_count = slot_count;
    return SHMC_OK;
}

void shmc_owner_destroy(struct shmc_owner *owner)
{
    shmc_blocks_destroy(&owner->blocks);
    free(owner->slots);
    free(owner->free_slots);
    *owner = (struct shmc_owner){.ended = true};
}

static enum shmc_status usable(const struct shmc_owner *owner)
{
    if (owner->ended) {
        return SHMC_CLOSED;
    }
    return shmc_member_inherited(owner->member) ? SHMC_INHERITED : SHMC_OK;
}

/* ---- data segments ------------------------------------------------------------------------------------------------ */

enum shmc_status shmc_owner_prepare_segment(int fd, uint64_t size_bytes, uint8_t **base)
{
    void *mapped;
    enum shmc_status status = shmc_segment_map(fd, size_bytes, SHMC_MAP_WRITE, &mapped);
    if (status != SHMC_OK) {
        return status;
    }
    shmc_segment_gather(fd, mapped, size_bytes);
    status = shmc_segment_reserve(fd, size_bytes);
    if (status == SHMC_OK) {
        shmc_segment_populate(mapped, size_bytes, true);
        *base = mapped;
    } else {
        int failure = errno;
        shmc_segment_unmap(mapped, size_bytes);
        errno = failure;
    }
    return status;
}

enum shmc_status shmc_owner_add_segment(struct shmc_owner *owner, uint32_t number, uint8_t *base, uint64_t size_bytes,
                                        unsigned *index, struct shmc_detail *detail)
{
    enum shmc_status status = usable(owner);
    if (status != SHMC_OK) {
        return status;
    }
    unsigned i = 0;
    while (i < SHMC_SEGMENT_COUNT && owner->segments[i].number != 0) {
        i++;
    }
    if (i == SHMC_SEGMENT_COUNT) {
        *detail = (struct shmc_detail){i, SHMC_SEGMENT_COUNT};
        return SHMC_SEGMENTS_FULL;
    }
    status = shmc_blocks_add_segment(&owner->blocks, i, size_bytes);
    if (status != SHMC_OK) {
        return status;
    }
    owner->segments[i] = (struct shmc_data_segment){
        .number = number, .size_bytes = size_bytes, .base = base, .idle_since_ns = shmc_clock_ns()};
    struct shmc_segment_record *record = &owner->member->control.segments[i];
    record->size_bytes = size_bytes;
    SHMC_STEP(GROW_MARK);
    shmc_relaxed_store(&record->mark, 0);
    /* pairs with the load in shmc_control_segment */
    SHMC_STEP(GROW_NUMBER);
    shmc_release_store(&record->number, number);
    owner->reserved_bytes += size_bytes;
    shmc_metric_set(metrics_of(owner), SHMC_METRIC_reserved_bytes, owner->reserved_bytes);
    shmc_metric_add(metrics_of(owner), SHMC_METRIC_grown, 1);
    *index = i;
    return SHMC_OK;
}

enum shmc_status shmc_owner_retire_segment(struct shmc_owner *owner, uint32_t number, unsigned *index, bool *done)
{
    *done = false;
    enum shmc_status status = usable(owner);
    unsigned i = 0;
    while (i < SHMC_SEGMENT_COUNT && owner->segments[i].number != number) {
        i++;
    }
    if (status != SHMC_OK || number == 0 || i == SHMC_SEGMENT_COUNT || owner->segments[i].used_bytes != 0) {
        return status;
    }
    struct shmc_data_segment *segment = &owner->segments[i];
    struct shmc_segment_record *record = &owner->member->control.segments[i];
    uint64_t unmarked = 0;
    /* pairs with a peer that marks pages as pinned: only one of the two finds the mark 0 */
    SHMC_STEP(RETIRE_MARK);
    if (!shmc_seq_cas(&record->mark, &unmarked, SHMC_SEGMENT_RETIRED) ||
        !shmc_blocks_remove_segment(&owner->blocks, i)) {
        return SHMC_OK;
    }
    /* readers map it still: without the punch, unlinking would give nothing back */
    (void)shmc_segment_punch(segment->base, segment->size_bytes); /* where it fails, the last reader to unmap does it */
    owner->reserved_bytes -= segment->size_bytes;
    shmc_metric_set(metrics_of(owner), SHMC_METRIC_reserved_bytes, owner->reserved_bytes);
    shmc_metric_add(metrics_of(owner), SHMC_METRIC_retired, 1);
    *segment = (struct shmc_data_segment){0};
    SHMC_STEP(RETIRE_NUMBER);
    shmc_release_store(&record->number, 0); /* pairs with the load in shmc_control_segment */
    *index = i;
    *done = true;
    return SHMC_OK;
}

/* ---- blocks without a claim --------------------------------------------------------------------------------------- */

static uint64_t drop_block(struct shmc_owner *owner, uint32_t block)
{
    struct shmc_data_segment *segment = &owner->segments[owner->blocks.extents[block].segment];
    uint64_t freed = shmc_blocks_drop(&owner->blocks, block);
    segment->used_bytes -= freed;
    if (freed != 0 && segment->used_bytes == 0) {
        segment->idle_since_ns = shmc_clock_ns();
    }
    count_used(owner, 0, freed);
    return freed;
}

static uint64_t forget_slot(struct shmc_owner *owner, uint32_t slot)
{
    uint64_t freed = drop_block(owner, owner->slots[slot].block);
    owner->slots[slot].block = SHMC_NO_BLOCK;
    owner->free_slots[owner->free_slot_count++] = slot;
    shmc_metric_set(metrics_of(owner), SHMC_METRIC_live_blocks, live_blocks(owner));
    return freed;
}

/* Claims that nobody made use of in time end here, in private time, and only when the space is wanted. */
static void revoke_late(struct shmc_owner *owner, uint32_t slot, uint64_t now_ns)
{
    struct shmc_slot_private *private = &owner->slots[slot];
    shmc_slot_settle(&owner->member->control, slot);
    if (private->deadline_ns == UINT64_MAX) {
        /* what was promised for good stays; what a reader has passed on since gets a deadline from now on */
        SHMC_STEP(REVOKE_X_SEE);
        if ((shmc_relaxed_load(&owner->member->control.words[slot]) & SHMC_X) == 0) {
            return;
        }
    } else if (now_ns < private->deadline_ns) {
        return;
    }
    if (shmc_slot_revoke(&owner->member->control, slot, private->lasting)) {
        shmc_metric_add(metrics_of(owner), SHMC_METRIC_revoked, 1);
    }
    private->deadline_ns = shmc_clock_deadline(private->timeout_ns);
}

uint64_t shmc_owner_reclaim(struct shmc_owner *owner, bool revoke)
{
    uint64_t freed = 0;
    if (usable(owner) != SHMC_OK) {
        return 0;
    }
    uint64_t now_ns = revoke ? shmc_clock_ns() : 0;
    shmc_atomic_u64 *words = owner->member->control.words;
    for (uint32_t slot = 0; slot < owner->slots_end; slot++) {
        if (revoke && owner->slots[slot].block != SHMC_NO_BLOCK) {
            revoke_late(owner, slot, now_ns);
        }
        /* Relaxed first, as nearly every slot in use has claims; then the look that pairs with clear_bits in slots.c:
         * the last reader's accesses to the block come before ours. What this process holds itself it knows better than
         * a word that anybody may have written. */
        SHMC_STEP(RECLAIM_SEE);
        if ((shmc_relaxed_load(&words[slot]) & SHMC_CLAIMS) == 0 && owner->slots[slot].block != SHMC_NO_BLOCK &&
            owner->member->leases[slot] == 0 && (shmc_seq_load(&words[slot]) & SHMC_CLAIMS) == 0) {
            freed += forget_slot(owner, slot);
        }
    }
    while (owner->slots_end > 0 && owner->slots[owner->slots_end - 1].block == SHMC_NO_BLOCK) {
        owner->slots_end--;
    }
    return freed;
}

/* ---- publish ------------------------------------------------------------------------------------------------------ */

enum shmc_status shmc_owner_take(struct shmc_owner *owner, uint64_t size_bytes, uint32_t *block, void **target,
                                 struct shmc_detail *detail)
{
    enum shmc_status status = usable(owner);
    if (status != SHMC_OK) {
        return status;
    }
    *detail = (struct shmc_detail){size_bytes, owner->used_bytes};
    if (size_bytes > owner->member->control.max_bytes) {
        return SHMC_NO_SPACE;
    }
    uint64_t grain = size_bytes >= SHMC_OWN_PAGES_BYTES ? SHMC_PAGE_BYTES : SHMC_BLOCK_ALIGN_BYTES;
    uint64_t taken = shmc_round_up(size_bytes == 0 ? 1 : size_bytes, grain);
    status = shmc_blocks_take(&owner->blocks, taken, grain, block);
    if (status == SHMC_OK) {
        const struct shmc_extent *extent = &owner->blocks.extents[*block];
        owner->segments[extent->segment].used_bytes += taken;
        count_used(owner, taken, 0);
        *target = owner->segments[extent->segment].base + extent->offset_bytes;
    }
    return status;
}

void shmc_owner_drop(struct shmc_owner *owner, uint32_t block)
{
    if (usable(owner) == SHMC_OK) {
        drop_block(owner, block);
    }
}

/* Write down in private memory what was just published. */
static void remember(struct shmc_owner *owner, uint32_t slot, uint32_t block, uint64_t granted,
                     const struct shmc_publication *publication, const struct shmc_terms *terms)
{
    bool lasts = terms->timeout_ns == 0;
    uint64_t default_ns = UINT64_C(60) * 1000000000u; /* for what readers pass on of a publication without deadline */
    owner->slots[slot] = (struct shmc_slot_private){
        .block = block,
        .kept = terms->keep,
        .flags = publication->flags,
        .generation = publication->generation,
        .size_bytes = publication->size_bytes,
        .hash_low = publication->hash_low,
        .hash_high = publication->hash_high,
        .deadline_ns = lasts ? UINT64_MAX : shmc_clock_deadline(terms->timeout_ns),
        .timeout_ns = lasts ? default_ns : terms->timeout_ns,
        .lasting = lasts ? granted | (terms->anonymous != 0 ? SHMC_T : 0) : 0,
    };
    if (slot >= owner->slots_end) {
        owner->slots_end = slot + 1;
    }
    if (terms->keep) {
        owner->member->leases[slot] = 1;
        owner->member->generations[slot] = owner->generation;
    }
}

/* The way into CLAIMED, for new blocks and for aliases. Takes over one reference on the block. */
static enum shmc_status publish_slot(struct shmc_owner *owner, uint32_t block, struct shmc_publication *publication,
                                     const struct shmc_terms *terms, struct shmc_published *published,
                                     struct shmc_detail *detail)
{
    enum shmc_status status = usable(owner);
    uint32_t slot_count = owner->member->control.slot_count;
    if (status != SHMC_OK) {
        return status;
    }
    if (owner->free_slot_count == 0) {
        *detail = (struct shmc_detail){slot_count, slot_count};
        return SHMC_SLOTS_FULL;
    }
    uint32_t slot = owner->free_slots[owner->free_slot_count - 1];
    uint64_t granted;
    publication->generation = owner->generation + 1;
    publication->anonymous = terms->anonymous;
    publication->held = terms->keep;
    publication->tokens = terms->tokens;
    publication->token_count = terms->token_count;
    publication->everyone = terms->everyone;
    status = shmc_slot_publish(&owner->member->control, slot, publication, &granted, detail);
    if (status != SHMC_OK) {
        return status;
    }
    owner->free_slot_count--;
    owner->generation++;
    remember(owner, slot, block, granted, publication, terms);
    shmc_atomic_u64 *metrics = metrics_of(owner);
    shmc_metric_add(metrics, SHMC_METRIC_published, 1);
    shmc_metric_add(metrics, SHMC_METRIC_published_bytes, publication->size_bytes);
    shmc_metric_set(metrics, SHMC_METRIC_live_blocks, live_blocks(owner));
    shmc_metric_peak(metrics, SHMC_METRIC_peak_live_blocks, live_blocks(owner));
    *published = (struct shmc_published){
        .generation = owner->generation,
        .offset_bytes = publication->offset_bytes,
        .hash_low = publication->hash_low,
        .hash_high = publication->hash_high,
        .slot = slot,
        .segment = publication->segment,
        .hashed = (publication->flags & SHMC_RECORD_HASHED) != 0,
    };
    return SHMC_OK;
}

enum shmc_status shmc_owner_publish(struct shmc_owner *owner, uint32_t block, uint64_t size_bytes, const uint64_t *hash,
                                    const struct shmc_terms *terms, struct shmc_published *published,
                                    struct shmc_detail *detail)
{
    const struct shmc_extent *extent = &owner->blocks.extents[block];
    struct shmc_publication publication = {
        .offset_bytes = extent->offset_bytes,
        .size_bytes = size_bytes,
        .segment = owner->segments[extent->segment].number,
        .flags = (hash != NULL ? SHMC_RECORD_HASHED : 0u) |
                 (size_bytes >= SHMC_OWN_PAGES_BYTES ? SHMC_RECORD_OWN_PAGES : 0u),
        .hash_low = hash != NULL ? hash[0] : 0,
        .hash_high = hash != NULL ? hash[1] : 0,
    };
    return publish_slot(owner, block, &publication, terms, published, detail);
}

static struct shmc_slot_private *find_slot(struct shmc_owner *owner, uint32_t slot, uint64_t generation)
{
    if (usable(owner) != SHMC_OK || slot >= owner->member->control.slot_count ||
        owner->slots[slot].block == SHMC_NO_BLOCK || owner->slots[slot].generation != generation) {
        return NULL;
    }
    return &owner->slots[slot];
}

enum shmc_status shmc_owner_alias(struct shmc_owner *owner, uint32_t slot, uint64_t generation,
                                  const struct shmc_terms *terms, struct shmc_published *published,
                                  struct shmc_detail *detail)
{
    enum shmc_status status = usable(owner);
    const struct shmc_slot_private *private = find_slot(owner, slot, generation);
    if (status != SHMC_OK || private == NULL) {
        *detail = (struct shmc_detail){generation, owner->generation};
        return status != SHMC_OK ? status : SHMC_STALE;
    }
    /* Not taken back by us yet, so the bytes are what they were, claims or no claims. All of it from private memory: the
     * record in shared memory may say anything by now. */
    const struct shmc_extent *extent = &owner->blocks.extents[private->block];
    struct shmc_publication publication = {
        .offset_bytes = extent->offset_bytes,
        .size_bytes = private->size_bytes,
        .segment = owner->segments[extent->segment].number,
        .flags = private->flags,
        .hash_low = private->hash_low,
        .hash_high = private->hash_high,
    };
    status = publish_slot(owner, private->block, &publication, terms, published, detail);
    if (status == SHMC_OK) {
        owner->blocks.extents[owner->slots[published->slot].block].references++;
        shmc_metric_add(metrics_of(owner), SHMC_METRIC_aliased, 1);
    }
    return status;
}

bool shmc_owner_is_live(struct shmc_owner *owner, uint32_t slot, uint64_t generation)
{
    shmc_owner_reclaim(owner, false);
    return find_slot(owner, slot, generation) != NULL;
}

uint32_t shmc_owner_takers(struct shmc_owner *owner, uint32_t slot, uint64_t generation, uint64_t *tokens)
{
    const struct shmc_control *control = &owner->member->control;
    uint32_t count = 0;
    if (find_slot(owner, slot, generation) == NULL) {
        return 0;
    }
    uint64_t took = shmc_seq_load(&control->records[slot].took); /* pairs with take_one */
    for (unsigned p = 0; p < SHMC_PEER_COUNT; p++) {
        const struct shmc_peer_record *record = &control->peers[p];
        /* pairs with the store in shmc_peer_take_over: who has left has taken its mark along */
        if ((took & SHMC_HOLD(p)) != 0 && shmc_acquire_load(&record->ready) != 0) {
            tokens[count++] = shmc_relaxed_load(&record->token);
        }
    }
    return count;
}

bool shmc_owner_release(struct shmc_owner *owner, uint32_t slot, uint64_t generation)
{
    struct shmc_slot_private *private = find_slot(owner, slot, generation);
    if (private == NULL || !private->kept) {
        return false;
    }
    private->kept = false;
    shmc_member_release(owner->member, slot);
    return true;
}

bool shmc_owner_withdraw(struct shmc_owner *owner, uint32_t slot, uint64_t generation)
{
    struct shmc_slot_private *private = find_slot(owner, slot, generation);
    if (private == NULL) {
        return false;
    }
    private->lasting = 0;
    if (!shmc_slot_revoke(&owner->member->control, slot, 0)) {
        /* a reader has passed it on: that promise is not ours to break before a deadline of its own */
        private->deadline_ns = shmc_clock_deadline(private->timeout_ns);
    }
    shmc_owner_release(owner, slot, generation);
    return true;
}

/* ---- waiting for space --------------------------------------------------------------------------------------------- */

bool shmc_owner_wait_freed(struct shmc_control *control, uint64_t timeout_ns)
{
    struct shmc_header *header = control->header;
    SHMC_STEP(WAIT_FREED_SEE);
    uint32_t before = shmc_seq_load(&header->freed);
    /* pairs with the load in notice_release; a release before it is not noticed, which is why callers bound the wait */
    SHMC_STEP(WAIT_FREED_WAITING);
    shmc_seq_exchange(&header->waiting, 1);
    struct timespec timeout = {.tv_sec = (time_t)(timeout_ns / 1000000000u),
                               .tv_nsec = (long)(timeout_ns % 1000000000u)};
    SHMC_STEP(WAIT_FREED_SLEEP);
    syscall(SYS_futex, &header->freed, FUTEX_WAIT, before, &timeout, NULL, 0);
    SHMC_STEP(WAIT_FREED_DONE);
    shmc_seq_exchange(&header->waiting, 0);
    SHMC_STEP(WAIT_FREED_SEE_AGAIN);
    return shmc_seq_load(&header->freed) != before;
}
