/* world.h: one arena in one process, for fuzzing: an owner, two readers, data segments, one end of the ring and one voter
 * each. What is mapped has pages without access on both sides, so that a step outside ends the program. */
#ifndef SHMC_FUZZ_WORLD_H
#define SHMC_FUZZ_WORLD_H

#include <stdio.h>
#include <stdlib.h>

#include "owner.h"
#include "ring.h"

enum {
    WORLD_SLOTS = 8,
    WORLD_READERS = 2,
    WORLD_SEGMENTS = 6,
    WORLD_SEGMENT_BYTES = 64 * 1024,
    WORLD_MAX_BYTES = WORLD_SEGMENTS * WORLD_SEGMENT_BYTES,
};

struct world_segment {
    uint32_t number; /* 0: not there */
    uint8_t *writable;
    const uint8_t *readable; /* as a reader maps it */
};

struct world {
    int control_fd;
    struct shmc_member owner_member, readers[WORLD_READERS];
    bool joined[WORLD_READERS];
    struct shmc_owner owner;
    uint32_t next_number;
    struct world_segment segments[WORLD_SEGMENTS]; /* by the owner's index */
    uint8_t taken[WORLD_SEGMENTS][WORLD_SEGMENT_BYTES / SHMC_BLOCK_ALIGN_BYTES];
    struct shmc_ring writer, reader_rings[WORLD_READERS];
    bool rings;
    struct shmc_fellows voters[1 + WORLD_READERS];
};

extern const uint64_t world_tokens[1 + WORLD_READERS];

#define CHECK(condition, what) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, (what)); \
            abort(); \
        } \
    } while (0)

void world_open(struct world *world);
void world_close(struct world *world);

/* A descriptor of its own of the control segment, as open(2) by name would give. */
int world_descriptor(const struct world *world);

bool world_join(struct world *world, unsigned reader);
void world_leave(struct world *world, unsigned reader);
void world_add_segment(struct world *world);
void world_retire_segment(struct world *world, unsigned index);

/* Rings and voters, from the head of now on; false where the arena's peers do not allow it (any more). */
bool world_begin_group(struct world *world);

#endif
