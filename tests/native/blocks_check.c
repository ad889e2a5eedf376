/* Random takes and drops against a byte map: no overlap, the alignment asked for, everything joined again at the end.
 * Usage: blocks_check SEED ROUNDS; prints what is wrong and ends with 1, or one line and 0. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "blocks.h"
#include "layout.h"

enum { SEGMENTS = 3, UNITS = 4096, LIVE = 512 };

static uint64_t state;
static uint8_t taken[SEGMENTS][UNITS];
static struct {
    uint32_t block;
    uint64_t size_bytes;
} live[LIVE];
static unsigned live_count;

static uint64_t random_below(uint64_t bound)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % bound;
}

static void fail(const char *what)
{
    printf("blocks_check: %s\n", what);
    exit(1);
}

static void mark(const struct shmc_extent *extent, uint64_t size_bytes, uint8_t from, uint8_t to)
{
    uint64_t first = extent->offset_bytes / SHMC_BLOCK_ALIGN_BYTES, count = size_bytes / SHMC_BLOCK_ALIGN_BYTES;
    if (first + count > UNITS) {
        fail("an extent ends behind its segment");
    }
    for (uint64_t i = first; i < first + count; i++) {
        if (taken[extent->segment][i] != from) {
            fail(from ? "an extent was freed twice" : "two extents overlap");
        }
        taken[extent->segment][i] = to;
    }
}

static uint64_t free_units(void)
{
    uint64_t count = 0;
    for (unsigned s = 0; s < SEGMENTS; s++) {
        for (unsigned i = 0; i < UNITS; i++) {
            count += taken[s][i] == 0;
        }
    }
    return count;
}

/* The truth about whether an aligned run of that length is free somewhere. */
static bool has_room(uint64_t units, uint64_t align_units)
{
    for (unsigned s = 0; s < SEGMENTS; s++) {
        for (uint64_t first = 0; first + units <= UNITS; first += align_units) {
            uint64_t run = 0;
            while (run < units && taken[s][first + run] == 0) {
                run++;
            }
            if (run == units) {
                return true;
            }
        }
    }
    return false;
}

static void take(struct shmc_blocks *blocks)
{
    bool large = random_below(4) == 0;
    uint64_t align = large ? SHMC_PAGE_BYTES : SHMC_BLOCK_ALIGN_BYTES;
    uint64_t size = (1 + random_below(large ? 20 : 40)) * align;
    uint32_t block;
    enum shmc_status status = shmc_blocks_take(blocks, size, align, &block);
    if (status == SHMC_NO_SPACE) {
        if (has_room(size / SHMC_BLOCK_ALIGN_BYTES, align / SHMC_BLOCK_ALIGN_BYTES)) {
            fail("no space, though there is");
        }
        return;
    }
    if (status != SHMC_OK || blocks->extents[block].size_bytes != size ||
        blocks->extents[block].offset_bytes % align != 0) {
        fail("an extent is not what was asked for");
    }
    mark(&blocks->extents[block], size, 0, 1);
    live[live_count].block = block;
    live[live_count++].size_bytes = size;
}

static void drop(struct shmc_blocks *blocks)
{
    unsigned i = (unsigned)random_below(live_count);
    struct shmc_extent *extent = &blocks->extents[live[i].block];
    if (random_below(8) == 0) {
        extent->references++;
        if (shmc_blocks_drop(blocks, live[i].block) != 0) {
            fail("an extent went with the first of two references");
        }
    }
    mark(extent, live[i].size_bytes, 1, 0);
    if (shmc_blocks_drop(blocks, live[i].block) != live[i].size_bytes) {
        fail("an extent was not freed with its last reference");
    }
    live[i] = live[--live_count];
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        return 2;
    }
    state = strtoull(argv[1], NULL, 0) | 1;
    struct shmc_blocks blocks;
    shmc_blocks_init(&blocks);
    for (unsigned s = 0; s < SEGMENTS; s++) {
        shmc_blocks_add_segment(&blocks, s, (uint64_t)UNITS * SHMC_BLOCK_ALIGN_BYTES);
    }
    for (long round = strtol(argv[2], NULL, 0); round > 0; round--) {
        bool more = random_below(1000) < 400 + 200 * ((unsigned long)round / 4096 % 2); /* fill up and drain in turn */
        if (live_count == 0 || (more && live_count < LIVE)) {
            take(&blocks);
        } else {
            drop(&blocks);
        }
        if (round % 64 == 0 && blocks.free_bytes != free_units() * SHMC_BLOCK_ALIGN_BYTES) {
            fail("free_bytes is wrong");
        }
    }
    if (live_count != 0 && shmc_blocks_remove_segment(&blocks, blocks.extents[live[0].block].segment)) {
        fail("a segment was removed under a block");
    }
    while (live_count != 0) {
        drop(&blocks);
    }
    if (shmc_blocks_largest_free(&blocks) != (uint64_t)UNITS * SHMC_BLOCK_ALIGN_BYTES) {
        fail("free neighbours were not joined");
    }
    for (unsigned s = 0; s < SEGMENTS; s++) {
        if (!shmc_blocks_remove_segment(&blocks, s)) {
            fail("an empty segment was not removed");
        }
    }
    if (blocks.free_bytes != 0 || blocks.first_map != 0) {
        fail("something is left");
    }
    shmc_blocks_destroy(&blocks);
    printf("blocks_check: ok\n");
    return 0;
}
