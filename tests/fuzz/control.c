/* A program of operations on an arena, and between any two of them a peer that writes whatever it likes wherever it can.
 * Checked: nothing is read or written outside of a mapping; what the owner writes to lies in its own segments and in no
 * block that it has not taken back; every loop ends. One input byte is an operation, those after it are its arguments.
 * With SHMCAST_FUZZ_PEER in the environment a thread writes all the time as well, which finds what is read twice; what it
 * finds does not follow from the input alone. */
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "hash.h"
#include "metrics.h"
#include "world.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct program {
    const uint8_t *at, *end;
    struct world *world;
    struct shmc_published published[16];
    uint32_t published_count;
    uint32_t leases[WORLD_READERS][WORLD_SLOTS];
    uint32_t reserved; /* a block that is being written in place; SHMC_NO_BLOCK: none */
    uint64_t reserved_bytes;
};

static uint64_t next(struct program *program, unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes && program->at < program->end; i++) {
        value |= (uint64_t)*program->at++ << 8 * i;
    }
    return value;
}

/* ---- the peer that writes what it likes ------------------------------------------------------------------------------ */

static void scribble(struct program *program)
{
    static const struct {
        uint32_t offset, stride, count;
    } areas[] = {
        {0, 8, SHMC_PEERS_OFFSET / 8},
        {SHMC_PEERS_OFFSET, 8, 8 * 32}, /* the first peers, the finder's fields included */
        {SHMC_SEGMENTS_OFFSET, 8, 4 * WORLD_SEGMENTS},
        {SHMC_WORDS_OFFSET, 8, WORLD_SLOTS},
        {SHMC_WORDS_OFFSET + 8 * WORLD_SLOTS, 8, 8 * WORLD_SLOTS}, /* records */
        {0, 8, UINT32_MAX},
    };
    struct shmc_control *control = &program->world->owner_member.control;
    uint64_t which = next(program, 1), index = next(program, 2), value = next(program, 8);
    uint64_t offset;
    if (which % 8 < 6) {
        offset = areas[which % 8].offset + index % areas[which % 8].count * areas[which % 8].stride;
    } else { /* heads of ring entries */
        offset = shmc_layout_ring_offset(WORLD_SLOTS) + SHMC_PAGE_BYTES * (index / 8 % 65) + index % 8 * 8;
    }
    if (offset + 8 <= control->bytes) {
        uint8_t *at = (uint8_t *)control->header + offset;
        uint64_t before;
        memcpy(&before, at, 8);
        value = (which & 0x80) != 0   ? before ^ (UINT64_C(1) << value % 64)
                : (which & 0x40) != 0 ? before + value
                                      : value;
        memcpy(at, &value, 8);
    }
}

struct peer {
    pthread_t thread;
    struct shmc_control *control;
    uint64_t seed;
    shmc_atomic_u32 stop;
};

static void *scribble_all_the_time(void *of)
{
    struct peer *peer = of;
    shmc_atomic_u64 *words = (void *)peer->control->header;
    uint64_t draw = peer->seed | 1;
    while (shmc_relaxed_load(&peer->stop) == 0) {
        draw ^= draw << 13, draw ^= draw >> 7, draw ^= draw << 17;
        /* three of four go where the layout is small: header, records, words */
        uint64_t bytes = draw % 4 != 0 ? shmc_layout_ring_offset(WORLD_SLOTS) : peer->control->bytes;
        shmc_atomic_u64 *word = &words[(draw >> 8) % (bytes / 8)];
        uint64_t value = shmc_relaxed_load(word);
        shmc_relaxed_store(word, draw % 3 == 0 ? draw * 0x9e3779b97f4a7c15u : draw % 3 == 1 ? draw % 64 : value ^ 1);
    }
    return NULL;
}

/* ---- the owner ------------------------------------------------------------------------------------------------------ */

static void mark(struct program *program, const uint8_t *target, uint64_t bytes)
{
    struct world *world = program->world;
    for (unsigned i = 0; i < WORLD_SEGMENTS; i++) {
        const uint8_t *base = world->segments[i].writable;
        if (base != NULL && target >= base && target < base + WORLD_SEGMENT_BYTES) {
            CHECK(bytes <= (uint64_t)(base + WORLD_SEGMENT_BYTES - target), "a block ends inside of its segment");
            return;
        }
    }
    CHECK(false, "a block begins inside of a segment");
}

/* No two blocks that are in use share a byte, whatever shared memory says of them. */
static void check_blocks(struct program *program)
{
    struct world *world = program->world;
    const struct shmc_blocks *blocks = &world->owner.blocks;
    memset(world->taken, 0, sizeof world->taken);
    for (uint32_t i = 0; i < blocks->extent_count; i++) {
        const struct shmc_extent *extent = &blocks->extents[i];
        for (uint64_t at = 0; extent->references != 0 && at < extent->size_bytes; at += SHMC_BLOCK_ALIGN_BYTES) {
            uint8_t *taken = &world->taken[extent->segment][(extent->offset_bytes + at) / SHMC_BLOCK_ALIGN_BYTES];
            CHECK(*taken == 0, "two blocks share bytes");
            *taken = 1;
        }
    }
}

static void publish(struct program *program)
{
    struct shmc_owner *owner = &program->world->owner;
    struct shmc_detail detail;
    struct shmc_published published;
    static const uint8_t source[WORLD_SEGMENT_BYTES];
    uint64_t tokens[3];
    uint64_t size_bytes = next(program, 2) * 2, how = next(program, 1);
    void *target;
    uint32_t block;
    struct shmc_terms terms = {
        .tokens = tokens, .anonymous = how & 3, .keep = (how & 4) != 0, .timeout_ns = (how & 8) != 0 ? 1 : 0};
    for (unsigned i = 0; i < 3; i++) {
        if ((how & (16u << i)) != 0) {
            tokens[terms.token_count++] = world_tokens[i];
        }
    }
    shmc_owner_reclaim(owner, (how & 128) != 0);
    size_bytes = size_bytes < sizeof source ? size_bytes : sizeof source;
    if (shmc_owner_take(owner, size_bytes, &block, &target, &detail) != SHMC_OK) {
        return;
    }
    mark(program, target, size_bytes);
    shmc_hash128 hash = shmc_hash_copy(target, source, size_bytes, 0);
    check_blocks(program);
    if (shmc_owner_publish(owner, block, size_bytes, &hash.low64, &terms, &published, &detail) != SHMC_OK) {
        shmc_owner_drop(owner, block);
        return;
    }
    program->published[program->published_count++ % 16] = published;
}

static struct shmc_published *pick(struct program *program)
{
    uint64_t index = next(program, 1);
    return program->published_count == 0
               ? NULL
               : &program->published[index % (program->published_count < 16 ? program->published_count : 16)];
}

static void end_or_alias(struct program *program)
{
    struct shmc_owner *owner = &program->world->owner;
    const struct shmc_published *of = pick(program);
    struct shmc_published published;
    struct shmc_detail detail;
    uint64_t how = next(program, 1);
    if (of == NULL) {
        return;
    }
    struct shmc_terms terms = {.tokens = world_tokens, .token_count = how >> 4 & 3, .anonymous = how >> 2 & 3};
    if (how % 4 == 0) {
        shmc_owner_release(owner, of->slot, of->generation);
    } else if (how % 4 == 1) {
        shmc_owner_withdraw(owner, of->slot, of->generation);
    } else if (shmc_owner_alias(owner, of->slot, of->generation, &terms, &published, &detail) == SHMC_OK) {
        CHECK(published.offset_bytes < WORLD_SEGMENT_BYTES, "an alias begins in its segment");
        CHECK(owner->slots[published.slot].size_bytes <=
                  owner->blocks.extents[owner->slots[published.slot].block].size_bytes,
              "an alias ends in its block");
        program->published[program->published_count++ % 16] = published;
    }
}

/* A block that is written in place while everything else goes on. */
static void reserve_or_seal(struct program *program)
{
    struct shmc_owner *owner = &program->world->owner;
    struct shmc_detail detail;
    struct shmc_terms terms = {.anonymous = 1};
    struct shmc_published published;
    void *target;
    if (program->reserved != SHMC_NO_BLOCK) {
        if (shmc_owner_publish(owner, program->reserved, program->reserved_bytes, NULL, &terms, &published, &detail) !=
            SHMC_OK) {
            shmc_owner_drop(owner, program->reserved);
        }
        program->reserved = SHMC_NO_BLOCK;
    } else {
        program->reserved_bytes = next(program, 2);
        if (shmc_owner_take(owner, program->reserved_bytes, &program->reserved, &target, &detail) != SHMC_OK) {
            program->reserved = SHMC_NO_BLOCK;
            return;
        }
        mark(program, target, program->reserved_bytes);
        memset(target, 1, program->reserved_bytes);
        check_blocks(program);
    }
}

/* ---- readers ---------------------------------------------------------------------------------------------------------- */

static void read_block(struct program *program, const struct shmc_member *member, uint32_t slot, uint32_t number,
                       uint64_t offset, uint64_t bytes)
{
    struct shmc_block_view view;
    struct shmc_detail detail;
    if (shmc_member_check(member, slot, number, offset, bytes, &view, &detail) != SHMC_OK) {
        return;
    }
    for (unsigned i = 0; i < WORLD_SEGMENTS; i++) {
        const struct world_segment *segment = &program->world->segments[i];
        /* as check_block in module_member.c does it, which knows only now how long the segment is */
        if (segment->number == number && number != 0 && view.block_offset + view.block_bytes <= WORLD_SEGMENT_BYTES) {
            (void)shmc_hash_bytes(segment->readable + offset, bytes, 0);
            (void)shmc_hash_bytes(segment->readable + view.block_offset, view.block_bytes, 0);
        }
    }
}

static void attach(struct program *program)
{
    struct world *world = program->world;
    unsigned who = (unsigned)next(program, 1) % (WORLD_READERS + 1);
    struct shmc_member *member = who == WORLD_READERS ? &world->owner_member : &world->readers[who];
    const struct shmc_published *of = pick(program);
    struct shmc_detail detail;
    uint64_t how = next(program, 1), bytes = next(program, 2);
    struct shmc_published named = of != NULL ? *of : (struct shmc_published){.slot = 1, .generation = 1, .segment = 1};
    if ((how & 1) != 0) { /* a handle that somebody has made up */
        named.slot = (uint32_t)next(program, 4);
        named.generation = next(program, 1);
        named.segment = (uint32_t)next(program, 1);
        named.offset_bytes = next(program, 8);
        bytes = next(program, 8);
    }
    if (who < WORLD_READERS && !world->joined[who]) {
        return;
    }
    if (shmc_member_attach(member, named.slot, named.generation, &detail) != SHMC_OK) {
        return;
    }
    CHECK(named.slot < WORLD_SLOTS, "an attach is to a slot that is there");
    read_block(program, member, named.slot, named.segment, named.offset_bytes, bytes);
    if ((how & 2) != 0) {
        bool joined;
        (void)shmc_slot_pass_on(&member->control, named.slot, world_tokens[how >> 2 & 1], &joined, &detail);
    }
    if (who == WORLD_READERS || (how & 4) != 0) {
        shmc_member_release(member, named.slot);
    } else {
        program->leases[who][named.slot]++;
    }
}

static void release(struct program *program)
{
    unsigned who = (unsigned)next(program, 1) % WORLD_READERS, slot = (unsigned)next(program, 1) % WORLD_SLOTS;
    if (program->world->joined[who] && program->leases[who][slot] != 0) {
        program->leases[who][slot]--;
        shmc_member_release(&program->world->readers[who], slot);
    }
}

static void join_or_leave(struct program *program)
{
    uint64_t how = next(program, 1);
    unsigned who = how % WORLD_READERS;
    if (program->world->joined[who]) {
        world_leave(program->world, who);
        memset(program->leases[who], 0, sizeof program->leases[who]);
    } else {
        (void)world_join(program->world, who);
    }
    if ((how & 2) != 0) {
        (void)world_begin_group(program->world);
    }
}

/* ---- the ring and the agreement ------------------------------------------------------------------------------------------ */

static void send_and_receive(struct program *program)
{
    struct world *world = program->world;
    static uint8_t message[8 * SHMC_RING_PAYLOAD_BYTES];
    struct shmc_detail detail;
    struct shmc_ring_piece piece;
    uint64_t bytes = next(program, 2) % sizeof message, how = next(program, 1), done = 0;
    bool ended = false;
    if (!world->rings) {
        return;
    }
    if ((how & 1) != 0) {
        (void)shmc_ring_put(&world->writer, message, bytes, &done, &ended, &detail);
        CHECK(done <= bytes, "no more is written than there is");
    }
    (void)shmc_ring_wait(&world->writer, 0);
    unsigned who = how >> 1 & 1;
    struct shmc_ring *ring = &world->reader_rings[who];
    for (unsigned i = 0; world->joined[who] && i < (how >> 2) && shmc_ring_has_more(ring); i++) {
        if (shmc_ring_look(ring, &piece, &detail) != SHMC_OK || piece.message_bytes > 1 << 20) {
            break;
        }
        uint8_t *target = malloc(piece.message_bytes + 1);
        CHECK(target != NULL, "memory for a message");
        (void)shmc_ring_take(ring, &piece, target, &ended, &detail);
        free(target);
    }
    (void)shmc_ring_wait(ring, 0);
}

static void vote(struct program *program)
{
    struct world *world = program->world;
    uint64_t how = next(program, 1), word = next(program, 1), mask = next(program, 1);
    bool interrupted;
    if (!world->rings) {
        return;
    }
    struct shmc_fellows *voter = &world->voters[how % (1 + WORLD_READERS)];
    if ((how & 4) != 0) {
        (void)shmc_fellows_record(voter, word | ((how & 8) != 0 ? SHMC_WORD_ENDED : 0), mask);
    }
    struct shmc_ballot ballot;
    shmc_ballot_init(&ballot, voter, word & ~UINT64_C(1));
    (void)shmc_ballot_look(&ballot);
    (void)shmc_ballot_wait(&ballot, 0, &interrupted);
    for (uint32_t rank = 0; rank <= WORLD_READERS; rank++) {
        uint64_t found, failed;
        shmc_fellows_words(voter, rank, &found, &failed);
        (void)shmc_fellows_has(voter, rank, word);
    }
    if ((how & 16) != 0) {
        (void)shmc_fellows_give_up(voter, word);
    }
    (void)shmc_fellows_given_up(voter);
}

/* ---- from outside ------------------------------------------------------------------------------------------------------ */

static void look_from_outside(struct program *program)
{
    struct shmc_control control;
    struct shmc_detail detail;
    int fd = world_descriptor(program->world);
    uint64_t how = next(program, 1);
    if ((how & 2) != 0) { /* two fields that go with each other, which chance would not write */
        struct shmc_header *header = program->world->owner_member.control.header;
        header->slot_count = (uint32_t)next(program, 4);
        header->control_bytes = shmc_layout_control_bytes(header->slot_count);
    }
    if (shmc_control_open(fd, how % 2 * 7, &control, &detail) == SHMC_OK) {
        uint64_t claimed = 0;
        for (uint32_t slot = 0; slot < control.slot_count; slot++) {
            claimed += shmc_seq_load(&control.words[slot]) != 0 ? control.records[slot].size_bytes : 0;
        }
        (void)shmc_control_segment(&control, (uint32_t)claimed);
        (void)shmc_control_ended(&control);
        for (unsigned i = 0; i < SHMC_METRIC_COUNT; i++) {
            (void)shmc_metric_get(control.header->metrics, (enum shmc_metric)i);
        }
        shmc_control_close(&control);
    }
    close(fd);
}

static void sweep(struct program *program)
{
    int fd = world_descriptor(program->world);
    (void)shmc_peer_sweep(&program->world->owner_member.control, fd);
    close(fd);
    (void)shmc_owner_wait_freed(&program->world->owner_member.control, next(program, 1) % 2);
    shmc_metric_observe(program->world->owner_member.control.header->metrics, SHMC_METRIC_materialize_ns,
                        next(program, 8));
}

static void grow_or_shrink(struct program *program)
{
    uint64_t how = next(program, 1);
    if (how % 2 == 0) {
        world_add_segment(program->world);
    } else {
        world_retire_segment(program->world, (unsigned)how / 2);
    }
}

typedef void (*operation)(struct program *program);

static const operation operations[] = {
    scribble, publish, attach,          release,       send_and_receive,  vote,           end_or_alias, scribble,
    sweep,    publish, reserve_or_seal, join_or_leave, look_from_outside, grow_or_shrink, attach,       scribble,
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct world world;
    static bool ready;
    char message[256];
    if (!ready) {
        CHECK(shmc_hash_setup(message, sizeof message), "set the hash up");
        ready = true;
    }
    struct program program = {.at = data, .end = data + size, .world = &world, .reserved = SHMC_NO_BLOCK};
    world_open(&world);
    struct peer peer = {.control = &world.owner_member.control, .seed = shmc_hash_bytes(data, size, 0).low64};
    bool has_peer = getenv("SHMCAST_FUZZ_PEER") != NULL;
    CHECK(!has_peer || pthread_create(&peer.thread, NULL, scribble_all_the_time, &peer) == 0, "start a thread");
    for (unsigned steps = 0; steps < 64 && program.at < program.end; steps++) {
        operations[next(&program, 1) % (sizeof operations / sizeof *operations)](&program);
    }
    shmc_owner_reclaim(&world.owner, true);
    check_blocks(&program);
    shmc_relaxed_store(&peer.stop, 1);
    if (has_peer) {
        pthread_join(peer.thread, NULL);
    }
    world_close(&world);
    return 0;
}
