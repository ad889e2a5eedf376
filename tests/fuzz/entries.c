/* Ring entries, byte by byte, as a peer may have written them: what a reader takes of them. The first byte says how many
 * entries there are; of each, the head that the input has, then bytes of the payload; hash, number and group are made right
 * where a bit of the entry's own first byte says so, or nothing but refusals would ever be seen. */
#include <string.h>

#include "hash.h"
#include "world.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { RIGHT_NUMBER = 1, RIGHT_GROUP = 2, RIGHT_OFFSET = 4, RIGHT_BYTES = 8, RIGHT_HASH = 16, HEAD_AFTER = 32 };

struct input {
    const uint8_t *at, *end;
};

static void take(struct input *input, void *target, size_t bytes)
{
    size_t left = (size_t)(input->end - input->at);
    memset(target, 0, bytes);
    memcpy(target, input->at, left < bytes ? left : bytes);
    input->at += left < bytes ? left : bytes;
}

static void write_entry(struct input *input, const struct shmc_ring *ring, struct shmc_ring_region *region)
{
    struct shmc_ring_entry *entry = &region->entries[ring->position % SHMC_RING_ENTRIES];
    uint8_t how;
    take(input, &how, 1);
    take(input, &entry->number, sizeof entry->number);
    take(input, &entry->group, sizeof entry->group);
    take(input, &entry->message_bytes, sizeof entry->message_bytes);
    take(input, &entry->offset_bytes, sizeof entry->offset_bytes);
    take(input, &entry->hash, sizeof entry->hash);
    take(input, &entry->bytes, sizeof entry->bytes);
    take(input, entry->payload, 32);
    if ((how & RIGHT_NUMBER) != 0) {
        entry->number = ring->position;
    }
    if ((how & RIGHT_GROUP) != 0) {
        entry->group = ring->group;
    }
    if ((how & RIGHT_OFFSET) != 0) {
        entry->offset_bytes = ring->within ? ring->done_bytes : 0;
        entry->message_bytes = ring->within ? ring->message_bytes : entry->message_bytes % (1 << 16);
    }
    if ((how & RIGHT_BYTES) != 0) {
        uint64_t left = entry->message_bytes - entry->offset_bytes;
        entry->bytes = left < SHMC_RING_PAYLOAD_BYTES ? (uint32_t)left : SHMC_RING_PAYLOAD_BYTES;
    }
    if ((how & RIGHT_HASH) != 0 && entry->bytes <= SHMC_RING_PAYLOAD_BYTES) {
        entry->hash = shmc_hash_bytes(entry->payload, entry->bytes, entry->message_bytes).low64;
    }
    uint64_t head = ring->position + 1;
    if ((how & HEAD_AFTER) != 0) {
        take(input, &head, sizeof head);
    }
    shmc_seq_store(&region->head, head);
}

/* As take_piece in module_ring.c, which has the message's bytes from Python. False: the message, or the ring, is given up. */
static bool receive(struct shmc_ring *ring, uint8_t **message)
{
    struct shmc_ring_piece piece;
    struct shmc_detail detail;
    bool ended = false, within = ring->within;
    if (shmc_ring_look(ring, &piece, &detail) != SHMC_OK) {
        return false;
    }
    CHECK(piece.bytes <= SHMC_RING_PAYLOAD_BYTES, "a piece is no longer than an entry");
    CHECK(piece.offset_bytes <= piece.message_bytes && piece.bytes <= piece.message_bytes - piece.offset_bytes,
          "a piece lies in its message");
    if (!within) {
        free(*message);
        /* exactly as many as it says: one byte more is an error that the sanitizer sees */
        *message = piece.message_bytes <= 1 << 24 ? malloc(piece.message_bytes != 0 ? piece.message_bytes : 1) : NULL;
        if (*message == NULL) {
            return false;
        }
    }
    return shmc_ring_take(ring, &piece, *message, &ended, &detail) == SHMC_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct world world;
    static bool open;
    char text[256];
    if (!open) {
        CHECK(shmc_hash_setup(text, sizeof text), "set the hash up");
        world_open(&world);
        open = true;
    }
    struct input input = {.at = data, .end = data + size};
    struct shmc_ring_region *region = world.owner_member.control.ring;
    struct shmc_ring *ring = &world.reader_rings[0];
    uint8_t *message = NULL;
    uint64_t start = 0;
    struct shmc_detail detail;
    take(&input, &start, 1);
    CHECK(shmc_ring_init(ring, &world.readers[0], world_tokens, 1 + WORLD_READERS,
                         start < 250 ? start : UINT64_MAX - (start - 250), &detail) == SHMC_OK,
          "begin to read");
    for (unsigned entries = 0; entries < 2 * SHMC_RING_ENTRIES && input.at < input.end; entries++) {
        write_entry(&input, ring, region);
        if (shmc_ring_has_more(ring) && !receive(ring, &message)) {
            break;
        }
    }
    free(message);
    return 0;
}
