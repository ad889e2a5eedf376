/* ring.h: messages of the owner to all other ranks of a group, through the control segment (layout.h, THE RING).
 * Not thread-safe but for shmc_ring_wait, which touches nothing private; the caller serialises (module.c by the GIL). */
#ifndef SHMC_RING_H
#define SHMC_RING_H

#include "agree.h"

struct shmc_ring {
    struct shmc_fellows fellows; /* on the owner; a reader's has nobody in it */
    uint64_t group;
    uint64_t position; /* entries written, or done with */
    uint64_t room_end; /* writer: the readers were done with what lies in the way of entries below this one */
    /* the message that we are in the middle of */
    uint64_t message_bytes, done_bytes;
    bool within;
};

/* What a reader has copied of an entry, and checked. */
struct shmc_ring_piece {
    const uint8_t *payload; /* in shared memory */
    uint64_t message_bytes, offset_bytes, hash;
    uint32_t bytes;
};

/* `start`: head when the group began. The owner of the arena writes, the others read. INHERITED; on the owner
 * PEER_LOST, RING_START. */
enum shmc_status shmc_ring_init(struct shmc_ring *ring, struct shmc_member *member, const uint64_t *tokens,
                                uint32_t count, uint64_t start, struct shmc_detail *detail);

uint64_t shmc_ring_head(const struct shmc_control *control);

/* ---- the writer */

/* Write of the message, from *done_bytes on, as much as there is room for. *ended: all of it is in. PEER_LOST: there is
 * none, and a reader that is not there any more will make none. */
enum shmc_status shmc_ring_put(struct shmc_ring *ring, const uint8_t *message, uint64_t message_bytes,
                               uint64_t *done_bytes, bool *ended, struct shmc_detail *detail);

/* ---- a reader */

/* Whether there is an entry that we have not read. */
bool shmc_ring_has_more(const struct shmc_ring *ring);

/* The next entry, if it is what it has to be. RING_... */
enum shmc_status shmc_ring_look(const struct shmc_ring *ring, struct shmc_ring_piece *piece,
                                struct shmc_detail *detail);

/* Its bytes, to where they belong in the message; gives the entry back. RING_HASH. *ended: that was the last piece. */
enum shmc_status shmc_ring_take(struct shmc_ring *ring, const struct shmc_ring_piece *piece, uint8_t *message,
                                bool *ended, struct shmc_detail *detail);

/* ---- both */

/* Wait for room, or for an entry. MET also where a reader has left, which makes the next put fail. */
enum shmc_waited shmc_ring_wait(const struct shmc_ring *ring, uint64_t deadline_ns);

#endif
