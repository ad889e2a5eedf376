/* control.h: the control segment as a whole: creating, opening and checking it. */
#ifndef SHMC_CONTROL_H
#define SHMC_CONTROL_H

#include "layout.h"
#include "status.h"
#include "steps.h"

struct shmc_control {
    uint64_t bytes;
    uint64_t arena_id, max_bytes,
        nonce[2];               /* as in the header when it was checked: what it says later is not believed */
    struct shmc_header *header; /* also the base of the mapping */
    struct shmc_peer_record *peers;
    struct shmc_segment_record *segments;
    shmc_atomic_u64 *words;
    struct shmc_record *records;
    struct shmc_ring_region *ring;
    uint32_t slot_count;
};

struct shmc_control_config {
    uint64_t arena_id, host, max_bytes;
    uint32_t slot_count;
};

/* For the creator, who has locked byte 0: reserve, map, fill in the header; then, when all else is in place, the magic. */
enum shmc_status shmc_control_create(int fd, const struct shmc_control_config *config, struct shmc_control *control);
void shmc_control_ready(struct shmc_control *control);

/* For everybody else: map and check. NOT_READY, BAD_MAGIC, BAD_FORMAT, BAD_LAYOUT, SEGMENT_SHORT, WRONG_ARENA. Whether
 * the arena has ended is for the caller to ask. `arena_id` 0 accepts any. */
enum shmc_status shmc_control_open(int fd, uint64_t arena_id, struct shmc_control *control, struct shmc_detail *detail);

void shmc_control_close(struct shmc_control *control);

/* For who only looks, and may only read: a private copy of all but the ring, checked as `shmc_control_open` checks.
 * What others do to the file meanwhile, cutting it too, can not hurt who looks; words are copied one by one, so what is
 * being changed at that moment may be seen in part. */
enum shmc_status shmc_control_copy(int fd, struct shmc_control *control, struct shmc_detail *detail);
void shmc_control_drop_copy(struct shmc_control *control);

/* The format of what lies there, also of another build's; 0 where there is no header of ours (yet). For who only looks. */
uint32_t shmc_control_format(int fd);

static inline bool shmc_control_ended(const struct shmc_control *control)
{
    /* pairs with the store in shmc_control_end */
    SHMC_STEP(ENDED_SEE);
    return shmc_acquire_load(&control->header->state) != SHMC_ARENA_OPEN;
}

/* By the closing owner, or by who has taken its byte. */
void shmc_control_end(struct shmc_control *control);

/* The record of live data segment `number`, or NULL. */
struct shmc_segment_record *shmc_control_segment(const struct shmc_control *control, uint32_t number);

#endif
