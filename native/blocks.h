/* blocks.h: which bytes of the data segments are free. Private memory of the owner; nothing here is shared.
 *
 * Two-level segregated fit (Masmano, Ripoll, Crespo, Real: "TLSF: a new dynamic memory allocator for real-time systems",
 * ECRTS 2004), with the bookkeeping in nodes beside the memory instead of headers inside it, over several segments at
 * once. Constant time but for the last resort, which looks at every extent of a size class before it says no. */
#ifndef SHMC_BLOCKS_H
#define SHMC_BLOCKS_H

#include <stdbool.h>
#include <stdint.h>

#include "status.h"

#define SHMC_NO_BLOCK UINT32_MAX

enum {
    SHMC_BLOCK_UNIT_BITS = 6,   /* sizes and offsets are multiples of 64 bytes */
    SHMC_BLOCK_SECOND_BITS = 4, /* 16 classes between two powers of two: at most 1/16 of a block is searched past */
    SHMC_BLOCK_FIRST = 42,      /* powers of two of units: far beyond any memory */
    SHMC_BLOCK_SECOND = 1 << SHMC_BLOCK_SECOND_BITS,
};

/* A run of bytes in one data segment, free or taken. */
struct shmc_extent {
    uint64_t offset_bytes, size_bytes;
    uint32_t segment;        /* index of the caller's, not the number in the name */
    uint32_t before, after;  /* neighbours in the segment, by address; SHMC_NO_BLOCK at its ends */
    uint32_t next, previous; /* in the free list of its class, or in the list of unused nodes */
    uint32_t references;     /* 0: free; otherwise how many publications and reservations name it */
};

struct shmc_blocks {
    struct shmc_extent *extents;
    uint32_t extent_count, unused; /* `unused`: head of the list of nodes without an extent */
    uint64_t free_bytes;
    uint64_t first_map;                                  /* bit f: some class of row f has a free extent */
    uint32_t second_map[SHMC_BLOCK_FIRST];               /* bit s: class (f, s) has */
    uint32_t heads[SHMC_BLOCK_FIRST][SHMC_BLOCK_SECOND]; /* free lists, most recently freed first: warm in the cache */
};

void shmc_blocks_init(struct shmc_blocks *blocks);
void shmc_blocks_destroy(struct shmc_blocks *blocks);

/* size_bytes: a multiple of 64. */
enum shmc_status shmc_blocks_add_segment(struct shmc_blocks *blocks, uint32_t segment, uint64_t size_bytes);

/* False where some of the segment is taken. */
bool shmc_blocks_remove_segment(struct shmc_blocks *blocks, uint32_t segment);

/* One extent of at least size_bytes at a multiple of align_bytes (a power of two), with one reference. NO_SPACE. */
enum shmc_status shmc_blocks_take(struct shmc_blocks *blocks, uint64_t size_bytes, uint64_t align_bytes,
                                  uint32_t *block);

/* Drop one reference; with the last one the extent is free and joins its free neighbours. Returns bytes freed. */
uint64_t shmc_blocks_drop(struct shmc_blocks *blocks, uint32_t block);

uint64_t shmc_blocks_largest_free(const struct shmc_blocks *blocks);

#endif
