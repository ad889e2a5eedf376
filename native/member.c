#include "member.h"

#include <errno.h>
#include <stdlib.h>

static enum shmc_status make_counts(struct shmc_member *member)
{
    uint32_t slot_count = member->control.slot_count;
    member->leases = calloc(slot_count, sizeof *member->leases);
    member->generations = calloc(slot_count, sizeof *member->generations);
    return member->leases != NULL && member->generations != NULL ? SHMC_OK : SHMC_NO_MEMORY;
}

enum shmc_status shmc_member_create(struct shmc_member *member, int map_fd, int lock_fd,
                                    const struct shmc_control_config *config)
{
    *member = (struct shmc_member){.index = SHMC_OWNER, .token = shmc_process_token()};
    enum shmc_status status = member->token != 0 ? SHMC_OK : SHMC_ERRNO;
    if (status == SHMC_OK) {
        status = shmc_control_create(map_fd, config, &member->control);
    }
    if (status == SHMC_OK) {
        status = make_counts(member);
    }
    if (status == SHMC_OK) {
        status = shmc_peer_anchor(lock_fd, &member->lock_page);
    }
    if (status == SHMC_OK) {
        shmc_peer_take_over(&member->control, SHMC_OWNER, member->token);
        shmc_control_ready(&member->control);
    } else {
        shmc_member_destroy(member);
    }
    return status;
}

enum shmc_status shmc_member_join(struct shmc_member *member, int map_fd, int lock_fd, uint64_t arena_id,
                                  struct shmc_detail *detail)
{
    *member = (struct shmc_member){.token = shmc_process_token()};
    enum shmc_status status = member->token != 0 ? SHMC_OK : SHMC_ERRNO;
    if (status == SHMC_OK) {
        status = shmc_control_open(map_fd, arena_id, &member->control, detail);
    }
    if (status == SHMC_OK && shmc_control_ended(&member->control)) {
        status = SHMC_ENDED;
    }
    if (status == SHMC_OK) {
        status = make_counts(member);
    }
    if (status == SHMC_OK) {
        status = shmc_peer_anchor(lock_fd, &member->lock_page);
    }
    if (status == SHMC_OK) {
        status = shmc_peer_join(&member->control, lock_fd, member->token, &member->index, detail);
    }
    if (status != SHMC_OK) {
        shmc_member_destroy(member);
    }
    return status;
}

void shmc_member_leave(struct shmc_member *member)
{
    if (member->index != SHMC_OWNER && member->control.header != NULL && !shmc_member_inherited(member)) {
        shmc_peer_leave(&member->control, member->index);
    }
    shmc_member_destroy(member);
}

void shmc_member_destroy(struct shmc_member *member)
{
    int saved = errno;
    /* in a forked child the page is not there: that address may be anybody's by now */
    if (!shmc_member_inherited(member)) {
        shmc_peer_drop_anchor(member->lock_page);
    }
    if (member->control.header != NULL) {
        shmc_control_close(&member->control);
    }
    free(member->leases);
    free(member->generations);
    *member = (struct shmc_member){0};
    errno = saved;
}

enum shmc_status shmc_member_attach(struct shmc_member *member, uint32_t slot, uint64_t generation,
                                    struct shmc_detail *detail)
{
    struct shmc_control *control = &member->control;
    if (shmc_member_inherited(member)) {
        return SHMC_INHERITED;
    }
    if (slot >= control->slot_count) {
        *detail = (struct shmc_detail){slot, control->slot_count};
        return SHMC_SLOT_RANGE;
    }
    if (shmc_control_ended(control)) {
        return SHMC_ENDED;
    }
    if (member->leases[slot] != 0) {
        /* Our hold is on another generation: the handle's is gone. To pin here would end in clearing our own hold. */
        if (member->generations[slot] != generation) {
            *detail = (struct shmc_detail){generation, member->generations[slot]};
            return SHMC_STALE;
        }
        shmc_slot_attach_again(control, member->index, slot);
        member->leases[slot]++;
        return SHMC_OK;
    }
    enum shmc_status status = shmc_slot_attach(control, member->index, slot, generation, detail);
    if (status == SHMC_OK) {
        member->leases[slot] = 1;
        member->generations[slot] = generation;
    }
    return status;
}

enum shmc_status shmc_member_check(const struct shmc_member *member, uint32_t slot, uint32_t segment,
                                   uint64_t offset_bytes, uint64_t size_bytes, struct shmc_block_view *view,
                                   struct shmc_detail *detail)
{
    struct shmc_record record; /* copied once, then checked: what a hostile peer changes later changes nothing here */
    shmc_snapshot(&record, &member->control.records[slot], sizeof record);
    *view = (struct shmc_block_view){
        .block_offset = record.offset_bytes,
        .block_bytes = record.size_bytes,
        .flags = record.flags,
        .hash_low = record.hash_low,
        .hash_high = record.hash_high,
    };
    uint32_t found = record.segment;
    if (found != segment) {
        *detail = (struct shmc_detail){segment, found};
        return SHMC_SEGMENT_MISMATCH;
    }
    uint64_t end, block_end;
    if (__builtin_add_overflow(offset_bytes, size_bytes, &end) ||
        __builtin_add_overflow(view->block_offset, view->block_bytes, &block_end) ||
        offset_bytes < view->block_offset || end > block_end) {
        *detail = (struct shmc_detail){offset_bytes + size_bytes, view->block_offset + view->block_bytes};
        return SHMC_BLOCK_RANGE;
    }
    return SHMC_OK;
}

void shmc_member_release(struct shmc_member *member, uint32_t slot)
{
    if (member->control.header == NULL || shmc_member_inherited(member) || member->leases[slot] == 0) {
        return;
    }
    if (--member->leases[slot] == 0) {
        shmc_slot_release(&member->control, member->index, slot);
    }
}
