#include "control.h"

#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "segment.h"
#include "steps.h"

static void lay_out(struct shmc_control *control, void *base, uint64_t bytes, uint32_t slot_count)
{
    uint8_t *at = base;
    *control = (struct shmc_control){
        .bytes = bytes,
        .header = base,
        .peers = (void *)(at + SHMC_PEERS_OFFSET),
        .segments = (void *)(at + SHMC_SEGMENTS_OFFSET),
        .words = (void *)(at + SHMC_WORDS_OFFSET),
        .records = (void *)(at + shmc_layout_records_offset(slot_count)),
        .ring = (void *)(at + shmc_layout_ring_offset(slot_count)),
        .slot_count = slot_count,
    };
}

static enum shmc_status fill_header(struct shmc_header *header, const struct shmc_control_config *config,
                                    uint64_t bytes)
{
    struct timespec now;
    SHMC_STEP(CONTROL_CLOCK);
    if (clock_gettime(CLOCK_REALTIME, &now) != 0 ||
        getrandom(header->nonce, sizeof header->nonce, 0) != (ssize_t)sizeof header->nonce) {
        return SHMC_ERRNO;
    }
    header->format = SHMC_FORMAT;
    header->record_bytes = sizeof(struct shmc_record);
    header->control_bytes = bytes;
    header->arena_id = config->arena_id;
    header->host = config->host;
    header->created_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    header->max_bytes = config->max_bytes;
    header->slot_count = config->slot_count;
    header->peer_count = SHMC_PEER_COUNT;
    header->segment_count = SHMC_SEGMENT_COUNT;
    SHMC_STEP(CONTROL_STATE_OPEN);
    shmc_relaxed_store(&header->state, SHMC_ARENA_OPEN);
    return SHMC_OK;
}

enum shmc_status shmc_control_create(int fd, const struct shmc_control_config *config, struct shmc_control *control)
{
    uint64_t bytes = shmc_layout_control_bytes(config->slot_count);
    void *base = NULL;
    enum shmc_status status = shmc_segment_reserve(fd, bytes);
    if (status == SHMC_OK) {
        status = shmc_segment_map(fd, bytes, SHMC_MAP_WRITE, &base);
    }
    if (status == SHMC_OK) {
        lay_out(control, base, bytes, config->slot_count);
        status = fill_header(control->header, config, bytes);
    }
    if (status != SHMC_OK && base != NULL) {
        shmc_segment_unmap(base, bytes);
        *control = (struct shmc_control){0};
    }
    return status;
}

void shmc_control_ready(struct shmc_control *control)
{
    /* pairs with the load in check_header: who sees the magic sees everything else */
    SHMC_STEP(CONTROL_MAGIC);
    shmc_release_store(&control->header->magic, SHMC_MAGIC);
}

/* Checks one page that may have been written by anybody. `file_bytes` is what fstat said. */
static enum shmc_status check_header(const struct shmc_header *header, uint64_t file_bytes, uint64_t arena_id,
                                     struct shmc_detail *detail)
{
    /* pairs with the store in shmc_control_ready */
    SHMC_STEP(CONTROL_OPEN_MAGIC);
    uint64_t magic = shmc_acquire_load(&header->magic);
    if (magic == 0) {
        return SHMC_NOT_READY;
    }
    if (magic != SHMC_MAGIC) {
        *detail = (struct shmc_detail){magic, SHMC_MAGIC};
        return SHMC_BAD_MAGIC;
    }
    if (header->format != SHMC_FORMAT) {
        *detail = (struct shmc_detail){header->format, SHMC_FORMAT};
        return SHMC_BAD_FORMAT;
    }
    uint32_t slot_count = header->slot_count; /* read once: a hostile writer may change it under us */
    if (slot_count == 0 || slot_count > SHMC_SLOT_COUNT_MAX) {
        *detail = (struct shmc_detail){slot_count, SHMC_SLOT_COUNT_MAX};
        return SHMC_BAD_LAYOUT;
    }
    const uint64_t fields[][2] = {
        {header->record_bytes, sizeof(struct shmc_record)},
        {header->control_bytes, shmc_layout_control_bytes(slot_count)},
        {header->peer_count, SHMC_PEER_COUNT},
        {header->segment_count, SHMC_SEGMENT_COUNT},
    };
    for (unsigned i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        if (fields[i][0] != fields[i][1]) {
            *detail = (struct shmc_detail){fields[i][0], fields[i][1]};
            return SHMC_BAD_LAYOUT;
        }
    }
    if (file_bytes < fields[1][1]) {
        *detail = (struct shmc_detail){file_bytes, fields[1][1]};
        return SHMC_SEGMENT_SHORT;
    }
    if (arena_id != 0 && header->arena_id != arena_id) {
        *detail = (struct shmc_detail){header->arena_id, arena_id};
        return SHMC_WRONG_ARENA;
    }
    return SHMC_OK;
}

enum shmc_status shmc_control_open(int fd, uint64_t arena_id, struct shmc_control *control, struct shmc_detail *detail)
{
    uint64_t file_bytes;
    enum shmc_status status = shmc_segment_size(fd, &file_bytes);
    if (status != SHMC_OK) {
        return status;
    }
    if (file_bytes == 0) {
        return SHMC_NOT_READY; /* created, not yet reserved */
    }
    if (file_bytes < SHMC_WORDS_OFFSET) {
        *detail = (struct shmc_detail){file_bytes, SHMC_WORDS_OFFSET};
        return SHMC_SEGMENT_SHORT;
    }
    void *base;
    status = shmc_segment_map(fd, file_bytes, SHMC_MAP_WRITE, &base);
    if (status != SHMC_OK) {
        return status;
    }
    struct shmc_header *header = base;
    status = check_header(header, file_bytes, arena_id, detail);
    uint32_t slot_count = header->slot_count;
    /* the count is used only where it fits the mapping, whatever the header says by now */
    if (status == SHMC_OK && (slot_count > SHMC_SLOT_COUNT_MAX || shmc_layout_control_bytes(slot_count) > file_bytes)) {
        *detail = (struct shmc_detail){slot_count, SHMC_SLOT_COUNT_MAX};
        status = SHMC_BAD_LAYOUT;
    }
    if (status != SHMC_OK) {
        shmc_segment_unmap(base, file_bytes);
        return status;
    }
    lay_out(control, base, file_bytes, slot_count);
    return SHMC_OK;
}

void shmc_control_close(struct shmc_control *control)
{
    shmc_segment_unmap(control->header, control->bytes);
    *control = (struct shmc_control){0};
}

void shmc_control_end(struct shmc_control *control)
{
    /* pairs with the load in shmc_control_ended: who attaches after this is told */
    SHMC_STEP(CONTROL_END);
    shmc_release_store(&control->header->state, SHMC_ARENA_ENDED);
}

struct shmc_segment_record *shmc_control_segment(const struct shmc_control *control, uint32_t number)
{
    for (unsigned i = 0; number != 0 && i < SHMC_SEGMENT_COUNT; i++) {
        /* pairs with the store of the number in shmc_owner_add_segment */
        SHMC_STEP(CONTROL_FIND_SEGMENT);
        if (shmc_acquire_load(&control->segments[i].number) == number) {
            return &control->segments[i];
        }
    }
    return NULL;
}
