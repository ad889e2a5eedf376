#include "ring.h"

#include <string.h>

#include "hash.h"
#include "steps.h"

enum {
    PUBLISH_ENTRIES = 8, /* of a long message, before readers are told: they wake up to more than one */
    NOTIFY_ENTRIES = 16, /* read, before a writer that sleeps is told: it finds room for more than one */
};

uint64_t shmc_ring_head(const struct shmc_control *control)
{
    SHMC_STEP(RING_HEAD_SEE);
    return shmc_seq_load(&control->ring->head);
}

static struct shmc_control *control_of(const struct shmc_ring *ring)
{
    return &ring->fellows.member->control;
}

static bool is_writer(const struct shmc_ring *ring)
{
    return ring->fellows.member->index == SHMC_OWNER;
}

enum shmc_status shmc_ring_init(struct shmc_ring *ring, struct shmc_member *member, const uint64_t *tokens,
                                uint32_t count, uint64_t start, struct shmc_detail *detail)
{
    *ring = (struct shmc_ring){.position = start, .room_end = start};
    ring->group = shmc_hash_bytes(tokens, count * sizeof *tokens, start).low64;
    if (member->index == SHMC_OWNER) {
        enum shmc_status status = shmc_fellows_init(&ring->fellows, member, tokens, count, detail);
        if (status == SHMC_OK && shmc_ring_head(&member->control) != start) {
            *detail = (struct shmc_detail){start, shmc_ring_head(&member->control)};
            status = SHMC_RING_START;
        }
        return status;
    }
    /* A reader needs nobody but itself: another one may have read everything, and left, before we come this far. */
    ring->fellows = (struct shmc_fellows){.member = member, .spin_ns = shmc_bell_spin_ns(count)};
    if (shmc_member_inherited(member)) {
        return SHMC_INHERITED;
    }
    /* pairs with the load in find_room: from here on the writer counts on us; it may wait for that already */
    SHMC_STEP(RING_JOIN);
    shmc_seq_store(&member->control.peers[member->index].ring_read, start);
    shmc_bell_ring(&member->control.header->read);
    return SHMC_OK;
}

/* ---- the writer ------------------------------------------------------------------------------------------------------ */

/* Up to which entry there is room, by what the readers say; a count that can not be is taken for the nearest that can.
 * *missing: a rank that is in the way and not there. */
static uint64_t find_room(const struct shmc_ring *ring, uint32_t *missing)
{
    uint64_t end = ring->position + SHMC_RING_ENTRIES;
    *missing = ring->fellows.count;
    for (uint32_t rank = 0; rank < ring->fellows.count; rank++) {
        if (rank == ring->fellows.own) {
            continue;
        }
        const struct shmc_peer_record *record = &control_of(ring)->peers[ring->fellows.ranks[rank].p];
        /* pairs with the store in shmc_ring_take: the reader has copied what we are about to overwrite */
        SHMC_STEP(RING_ROOM_SEE);
        uint64_t behind = ring->position - shmc_seq_load(&record->ring_read);
        if (behind > SHMC_RING_ENTRIES) {
            behind = behind > UINT64_MAX / 2 ? 0 : SHMC_RING_ENTRIES;
        }
        uint64_t room = SHMC_RING_ENTRIES - behind;
        if (room == 0 && !shmc_fellows_joined(&ring->fellows, rank)) {
            *missing = rank;
        }
        end = ring->position + room < end ? ring->position + room : end;
    }
    return end;
}

static void fill(struct shmc_ring *ring, const uint8_t *message, uint64_t message_bytes, uint64_t offset_bytes,
                 uint32_t bytes)
{
    struct shmc_ring_entry *entry = &control_of(ring)->ring->entries[ring->position % SHMC_RING_ENTRIES];
    SHMC_STEP(RING_FILL);
    entry->number = ring->position;
    entry->group = ring->group;
    entry->message_bytes = message_bytes;
    entry->offset_bytes = offset_bytes;
    entry->bytes = bytes;
    entry->hash = shmc_hash_copy(entry->payload, message + offset_bytes, bytes, message_bytes).low64;
}

enum shmc_status shmc_ring_put(struct shmc_ring *ring, const uint8_t *message, uint64_t message_bytes,
                               uint64_t *done_bytes, bool *ended, struct shmc_detail *detail)
{
    struct shmc_header *header = control_of(ring)->header;
    struct shmc_ring_region *region = control_of(ring)->ring;
    for (*ended = false; !*ended;) {
        if (ring->position == ring->room_end) {
            uint32_t missing;
            ring->room_end = find_room(ring, &missing);
            if (ring->position == ring->room_end && missing < ring->fellows.count) {
                *detail = (struct shmc_detail){missing, ring->fellows.ranks[missing].p};
                return SHMC_READER_LOST;
            }
            if (ring->position == ring->room_end) {
                break;
            }
        }
        uint64_t left = message_bytes - *done_bytes;
        uint32_t bytes = left < SHMC_RING_PAYLOAD_BYTES ? (uint32_t)left : SHMC_RING_PAYLOAD_BYTES;
        fill(ring, message, message_bytes, *done_bytes, bytes);
        ring->position++;
        *done_bytes += bytes;
        *ended = *done_bytes == message_bytes;
        if (*ended || ring->position == ring->room_end || ring->position % PUBLISH_ENTRIES == 0) {
            /* pairs with the loads in shmc_ring_has_more: who sees the head sees the entries below it */
            SHMC_STEP(RING_HEAD);
            shmc_seq_store(&region->head, ring->position);
            shmc_bell_ring(&header->sent);
        }
    }
    return SHMC_OK;
}

/* ---- a reader --------------------------------------------------------------------------------------------------------- */

bool shmc_ring_has_more(const struct shmc_ring *ring)
{
    /* pairs with the store in shmc_ring_put */
    SHMC_STEP(RING_MORE_SEE);
    uint64_t head = shmc_seq_load(&control_of(ring)->ring->head);
    return head - ring->position - 1 <
           UINT64_MAX / 2; /* head > position, also where somebody has written anything there */
}

enum shmc_status shmc_ring_look(const struct shmc_ring *ring, struct shmc_ring_piece *piece, struct shmc_detail *detail)
{
    const struct shmc_ring_entry *entry = &control_of(ring)->ring->entries[ring->position % SHMC_RING_ENTRIES];
    struct shmc_ring_entry head; /* copied once, then checked; without the payload */
    shmc_snapshot(&head, entry, offsetof(struct shmc_ring_entry, payload));
    if (head.number != ring->position) {
        *detail = (struct shmc_detail){head.number, ring->position};
        return SHMC_RING_NUMBER;
    }
    if (head.group != ring->group) {
        *detail = (struct shmc_detail){head.group, ring->group};
        return SHMC_RING_GROUP;
    }
    uint64_t offset = ring->within ? ring->done_bytes : 0;
    if (head.offset_bytes != offset) {
        *detail = (struct shmc_detail){head.offset_bytes, offset};
        return SHMC_RING_OFFSET;
    }
    if (ring->within && head.message_bytes != ring->message_bytes) {
        *detail = (struct shmc_detail){head.message_bytes, ring->message_bytes};
        return SHMC_RING_MESSAGE;
    }
    /* offset <= message_bytes: 0 at first, then what was checked here before */
    uint64_t left = head.message_bytes - offset;
    uint64_t bytes = left < SHMC_RING_PAYLOAD_BYTES ? left : SHMC_RING_PAYLOAD_BYTES;
    if (head.bytes != bytes) {
        *detail = (struct shmc_detail){head.bytes, bytes};
        return SHMC_RING_BYTES;
    }
    *piece = (struct shmc_ring_piece){.payload = entry->payload,
                                      .message_bytes = head.message_bytes,
                                      .offset_bytes = offset,
                                      .hash = head.hash,
                                      .bytes = head.bytes};
    if (left > bytes && offset == 0) {
        /* before somebody reserves as many bytes as it says */
        uint64_t found = shmc_hash_bytes(piece->payload, piece->bytes, piece->message_bytes).low64;
        if (found != piece->hash) {
            *detail = (struct shmc_detail){found, piece->hash};
            return SHMC_RING_HASH;
        }
    }
    return SHMC_OK;
}

enum shmc_status shmc_ring_take(struct shmc_ring *ring, const struct shmc_ring_piece *piece, uint8_t *message,
                                bool *ended, struct shmc_detail *detail)
{
    struct shmc_control *control = control_of(ring);
    uint64_t found =
        shmc_hash_copy(message + piece->offset_bytes, piece->payload, piece->bytes, piece->message_bytes).low64;
    if (found != piece->hash) {
        *detail = (struct shmc_detail){found, piece->hash};
        return SHMC_RING_HASH;
    }
    ring->position++;
    ring->message_bytes = piece->message_bytes;
    ring->done_bytes = piece->offset_bytes + piece->bytes;
    *ended = ring->done_bytes == ring->message_bytes;
    ring->within = !*ended;
    shmc_atomic_u64 *read = &control->peers[ring->fellows.member->index].ring_read;
    /* Pairs with the load in find_room. Not every entry is worth waking the writer for: it sleeps only where we, or another
     * reader, have a whole ring to read, and then some of it or all is read soon. */
    SHMC_STEP(RING_READ);
    shmc_seq_store(read, ring->position);
    if (ring->position % NOTIFY_ENTRIES == 0 || !shmc_ring_has_more(ring)) {
        shmc_bell_ring(&control->header->read);
    }
    return SHMC_OK;
}

/* ---- both ---------------------------------------------------------------------------------------------------------------- */

static bool has_entry(void *of)
{
    return shmc_ring_has_more(of);
}

static bool has_room(void *of)
{
    uint32_t missing;
    const struct shmc_ring *ring = of;
    return find_room(ring, &missing) != ring->position || missing < ring->fellows.count;
}

enum shmc_waited shmc_ring_wait(const struct shmc_ring *ring, uint64_t deadline_ns)
{
    struct shmc_header *header = control_of(ring)->header;
    struct shmc_ring copy = *ring; /* ours while others run */
    unsigned p = ring->fellows.member->index;
    return is_writer(ring) ? shmc_bell_wait(&header->read, p, has_room, &copy, deadline_ns, copy.fellows.spin_ns)
                           : shmc_bell_wait(&header->sent, p, has_entry, &copy, deadline_ns, copy.fellows.spin_ns);
}
