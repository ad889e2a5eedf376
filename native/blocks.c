#include "blocks.h"

#include <stdlib.h>
#include <string.h>

#include "layout.h"

struct class {
    unsigned first, second;
};

/* The class whose extents are between this size and the next class's. */
static struct class class_of(uint64_t size_bytes)
{
    uint64_t units = size_bytes >> SHMC_BLOCK_UNIT_BITS;
    if (units < SHMC_BLOCK_SECOND) { /* row 0 holds the small sizes one by one */
        return (struct class){0, (unsigned)units};
    }
    unsigned top = 63u - (unsigned)__builtin_clzll(units);
    return (struct class){top - SHMC_BLOCK_SECOND_BITS + 1,
                          (unsigned)(units >> (top - SHMC_BLOCK_SECOND_BITS)) & (SHMC_BLOCK_SECOND - 1)};
}

/* The first class all of whose extents are at least this size. */
static struct class class_that_fits(uint64_t size_bytes)
{
    uint64_t units = size_bytes >> SHMC_BLOCK_UNIT_BITS;
    if (units >= SHMC_BLOCK_SECOND) {
        unsigned top = 63u - (unsigned)__builtin_clzll(units);
        size_bytes += ((UINT64_C(1) << (top - SHMC_BLOCK_SECOND_BITS)) - 1) << SHMC_BLOCK_UNIT_BITS;
    }
    return class_of(size_bytes);
}

/* ---- nodes ---------------------------------------------------------------------------------------------------- */

static enum shmc_status more_nodes(struct shmc_blocks *blocks)
{
    uint32_t count = blocks->extent_count == 0 ? 256 : blocks->extent_count * 2;
    struct shmc_extent *extents = realloc(blocks->extents, count * sizeof *extents);
    if (extents == NULL) {
        return SHMC_NO_MEMORY;
    }
    for (uint32_t i = blocks->extent_count; i < count; i++) {
        extents[i] = (struct shmc_extent){.next = i + 1 < count ? i + 1 : SHMC_NO_BLOCK};
    }
    blocks->unused = blocks->extent_count; /* only called when the list is empty */
    blocks->extents = extents;
    blocks->extent_count = count;
    return SHMC_OK;
}

static enum shmc_status new_node(struct shmc_blocks *blocks, uint32_t *node)
{
    if (blocks->unused == SHMC_NO_BLOCK) {
        enum shmc_status status = more_nodes(blocks);
        if (status != SHMC_OK) {
            return status;
        }
    }
    *node = blocks->unused;
    blocks->unused = blocks->extents[*node].next;
    return SHMC_OK;
}

static void forget_node(struct shmc_blocks *blocks, uint32_t node)
{
    blocks->extents[node] = (struct shmc_extent){.next = blocks->unused};
    blocks->unused = node;
}

/* ---- free lists ----------------------------------------------------------------------------------------------- */

static void list(struct shmc_blocks *blocks, uint32_t node)
{
    struct shmc_extent *extent = &blocks->extents[node];
    struct class class = class_of(extent->size_bytes);
    uint32_t head = blocks->heads[class.first][class.second];
    extent->references = 0;
    extent->previous = SHMC_NO_BLOCK;
    extent->next = head;
    if (head != SHMC_NO_BLOCK) {
        blocks->extents[head].previous = node;
    }
    blocks->heads[class.first][class.second] = node;
    blocks->second_map[class.first] |= 1u << class.second;
    blocks->first_map |= UINT64_C(1) << class.first;
    blocks->free_bytes += extent->size_bytes;
}

static void unlist(struct shmc_blocks *blocks, uint32_t node)
{
    struct shmc_extent *extent = &blocks->extents[node];
    struct class class = class_of(extent->size_bytes);
    if (extent->next != SHMC_NO_BLOCK) {
        blocks->extents[extent->next].previous = extent->previous;
    }
    if (extent->previous != SHMC_NO_BLOCK) {
        blocks->extents[extent->previous].next = extent->next;
    } else {
        blocks->heads[class.first][class.second] = extent->next;
        if (extent->next == SHMC_NO_BLOCK) {
            blocks->second_map[class.first] &= ~(1u << class.second);
            if (blocks->second_map[class.first] == 0) {
                blocks->first_map &= ~(UINT64_C(1) << class.first);
            }
        }
    }
    blocks->free_bytes -= extent->size_bytes;
}

/* Moves on to the next class, this one included, that has a free extent; false where there is none. */
static bool next_class(const struct shmc_blocks *blocks, struct class *class)
{
    if (class->first >= SHMC_BLOCK_FIRST) {
        return false;
    }
    uint32_t row = class->second < SHMC_BLOCK_SECOND ? blocks->second_map[class->first] & (~0u << class->second) : 0;
    if (row == 0) {
        uint64_t rows = blocks->first_map & (~UINT64_C(0) << class->first << 1);
        if (rows == 0) {
            return false;
        }
        class->first = (unsigned)__builtin_ctzll(rows);
        row = blocks->second_map[class->first];
    }
    class->second = (unsigned)__builtin_ctz(row);
    return true;
}

/* ---- segments ------------------------------------------------------------------------------------------------- */

void shmc_blocks_init(struct shmc_blocks *blocks)
{
    *blocks = (struct shmc_blocks){.unused = SHMC_NO_BLOCK};
    memset(blocks->heads, 0xff, sizeof blocks->heads); /* SHMC_NO_BLOCK */
}

void shmc_blocks_destroy(struct shmc_blocks *blocks)
{
    free(blocks->extents);
    shmc_blocks_init(blocks);
}

enum shmc_status shmc_blocks_add_segment(struct shmc_blocks *blocks, uint32_t segment, uint64_t size_bytes)
{
    uint32_t node;
    enum shmc_status status = new_node(blocks, &node);
    if (status != SHMC_OK) {
        return status;
    }
    blocks->extents[node] = (struct shmc_extent){
        .size_bytes = size_bytes, .segment = segment, .before = SHMC_NO_BLOCK, .after = SHMC_NO_BLOCK};
    list(blocks, node);
    return SHMC_OK;
}

bool shmc_blocks_remove_segment(struct shmc_blocks *blocks, uint32_t segment)
{
    struct class class = {0, 0};
    while (next_class(blocks, &class)) {
        for (uint32_t node = blocks->heads[class.first][class.second]; node != SHMC_NO_BLOCK;
             node = blocks->extents[node].next) {
            const struct shmc_extent *extent = &blocks->extents[node];
            if (extent->segment == segment && extent->before == SHMC_NO_BLOCK && extent->after == SHMC_NO_BLOCK) {
                unlist(blocks, node);
                forget_node(blocks, node);
                return true;
            }
        }
        class.second++;
    }
    return false;
}

/* ---- take and drop -------------------------------------------------------------------------------------------- */

static bool fits(const struct shmc_extent *extent, uint64_t size_bytes, uint64_t align_bytes)
{
    uint64_t skipped = -extent->offset_bytes & (align_bytes - 1);
    return extent->size_bytes >= skipped && extent->size_bytes - skipped >= size_bytes;
}

static uint32_t find(const struct shmc_blocks *blocks, uint64_t size_bytes, uint64_t align_bytes)
{
    struct class class = class_that_fits(size_bytes + align_bytes - SHMC_BLOCK_ALIGN_BYTES);
    if (next_class(blocks, &class)) {
        return blocks->heads[class.first][class.second];
    }
    /* last resort: an extent of a lower class can still fit, exactly or because it is aligned already */
    class = class_of(size_bytes);
    while (next_class(blocks, &class)) {
        for (uint32_t node = blocks->heads[class.first][class.second]; node != SHMC_NO_BLOCK;
             node = blocks->extents[node].next) {
            if (fits(&blocks->extents[node], size_bytes, align_bytes)) {
                return node;
            }
        }
        class.second++;
    }
    return SHMC_NO_BLOCK;
}

/* Cut `node` after `size_bytes`; the rest becomes a free extent behind it. `rest` is a node that is not in use. */
static void split(struct shmc_blocks *blocks, uint32_t node, uint64_t size_bytes, uint32_t rest)
{
    struct shmc_extent *extent = &blocks->extents[node];
    blocks->extents[rest] = (struct shmc_extent){
        .offset_bytes = extent->offset_bytes + size_bytes,
        .size_bytes = extent->size_bytes - size_bytes,
        .segment = extent->segment,
        .before = node,
        .after = extent->after,
    };
    if (extent->after != SHMC_NO_BLOCK) {
        blocks->extents[extent->after].before = rest;
    }
    extent->after = rest;
    extent->size_bytes = size_bytes;
}

enum shmc_status shmc_blocks_take(struct shmc_blocks *blocks, uint64_t size_bytes, uint64_t align_bytes,
                                  uint32_t *block)
{
    uint32_t node = find(blocks, size_bytes, align_bytes), front, back;
    if (node == SHMC_NO_BLOCK) {
        return SHMC_NO_SPACE;
    }
    /* both nodes before anything changes, so that running out of private memory changes nothing */
    enum shmc_status status = new_node(blocks, &front);
    if (status != SHMC_OK) {
        return status;
    }
    status = new_node(blocks, &back);
    if (status != SHMC_OK) {
        forget_node(blocks, front);
        return status;
    }
    unlist(blocks, node);
    uint64_t skipped = -blocks->extents[node].offset_bytes & (align_bytes - 1);
    if (skipped != 0) {
        split(blocks, node, skipped, front);
        list(blocks, node);
        node = front;
    } else {
        forget_node(blocks, front);
    }
    if (blocks->extents[node].size_bytes > size_bytes) {
        split(blocks, node, size_bytes, back);
        list(blocks, back);
    } else {
        forget_node(blocks, back);
    }
    blocks->extents[node].references = 1;
    *block = node;
    return SHMC_OK;
}

/* Give `node` what the free extent `next`, right behind it, has. */
static void absorb(struct shmc_blocks *blocks, uint32_t node, uint32_t next)
{
    struct shmc_extent *extent = &blocks->extents[node];
    extent->size_bytes += blocks->extents[next].size_bytes;
    extent->after = blocks->extents[next].after;
    if (extent->after != SHMC_NO_BLOCK) {
        blocks->extents[extent->after].before = node;
    }
    forget_node(blocks, next);
}

uint64_t shmc_blocks_drop(struct shmc_blocks *blocks, uint32_t block)
{
    struct shmc_extent *extents = blocks->extents;
    if (--extents[block].references != 0) {
        return 0;
    }
    uint64_t freed = extents[block].size_bytes;
    uint32_t after = extents[block].after, before = extents[block].before;
    if (after != SHMC_NO_BLOCK && extents[after].references == 0) {
        unlist(blocks, after);
        absorb(blocks, block, after);
    }
    if (before != SHMC_NO_BLOCK && extents[before].references == 0) {
        unlist(blocks, before);
        absorb(blocks, before, block);
        block = before;
    }
    list(blocks, block);
    return freed;
}

uint64_t shmc_blocks_largest_free(const struct shmc_blocks *blocks)
{
    if (blocks->first_map == 0) {
        return 0;
    }
    unsigned first = 63u - (unsigned)__builtin_clzll(blocks->first_map);
    unsigned second = 31u - (unsigned)__builtin_clz(blocks->second_map[first]);
    uint64_t largest = 0;
    for (uint32_t node = blocks->heads[first][second]; node != SHMC_NO_BLOCK; node = blocks->extents[node].next) {
        if (blocks->extents[node].size_bytes > largest) {
            largest = blocks->extents[node].size_bytes;
        }
    }
    return largest;
}
