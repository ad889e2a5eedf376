#include "control.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "segment.h"
#include "steps.h"

/* `known`: a private copy of the header's constant fields, or what they will be. */
static void lay_out(struct shmc_control *control, void *base, uint64_t bytes, const struct shmc_header *known)
{
    uint8_t *at = base;
    uint32_t slot_count = known->slot_count;
    *control = (struct shmc_control){
        .bytes = bytes,
        .arena_id = known->arena_id,
        .max_bytes = known->max_bytes,
        .nonce = {known->nonce[0], known->nonce[1]},
        .header = base,
        .peers = (void *)(at + SHMC_PEERS_OFFSET),
        .segments = (void *)(at + SHMC_SEGMENTS_OFFSET),
        .words = (void *)(at + SHMC_WORDS_OFFSET),
        .records = (void *)(at + shmc_layout_records_offset(slot_count)),
        .ring = (void *)(at + shmc_layout_ring_offset(slot_count)),
        .slot_count = slot_count,
    };
}

/* The fields before `state`, which never change once there is a magic: what may be copied, and is then believed. */
enum { CONSTANT_BYTES = offsetof(struct shmc_header, state) };

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
    return SHMC_OK;
}

enum shmc_status shmc_control_create(int fd, const struct shmc_control_config *config, struct shmc_control *control)
{
    uint64_t bytes = shmc_layout_control_bytes(config->slot_count);
    struct shmc_header known = {0};
    void *base = NULL;
    enum shmc_status status = fill_header(&known, config, bytes);
    if (status == SHMC_OK) {
        status = shmc_segment_reserve(fd, bytes);
    }
    if (status == SHMC_OK) {
        status = shmc_segment_map(fd, bytes, SHMC_MAP_WRITE, &base);
    }
    if (status == SHMC_OK) {
        lay_out(control, base, bytes, &known);
        memcpy(control->header, &known, CONSTANT_BYTES);
        SHMC_STEP(CONTROL_STATE_OPEN);
        shmc_relaxed_store(&control->header->state, SHMC_ARENA_OPEN);
    }
    return status;
}

void shmc_control_ready(struct shmc_control *control)
{
    /* pairs with the load in check_header: who sees the magic sees everything else */
    SHMC_STEP(CONTROL_MAGIC);
    shmc_release_store(&control->header->magic, SHMC_MAGIC);
}

/* Checks one page that may have been written by anybody, and still is: what is good is what was copied to `known`.
 * `file_bytes` is what fstat said. */
static enum shmc_status check_header(const struct shmc_header *shared, uint64_t file_bytes, uint64_t arena_id,
                                     struct shmc_header *known, struct shmc_detail *detail)
{
    /* pairs with the store in shmc_control_ready */
    SHMC_STEP(CONTROL_OPEN_MAGIC);
    uint64_t magic = shmc_acquire_load(&shared->magic);
    shmc_snapshot(known, shared, CONSTANT_BYTES);
    const struct shmc_header *header = known;
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
    uint32_t slot_count = header->slot_count;
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
    struct shmc_header known;
    status = check_header(base, file_bytes, arena_id, &known, detail);
    if (status != SHMC_OK) {
        shmc_segment_unmap(base, file_bytes);
        return status;
    }
    lay_out(control, base, file_bytes, &known);
    return SHMC_OK;
}

static enum shmc_status read_exactly(int fd, void *target, uint64_t bytes, struct shmc_detail *detail)
{
    for (uint64_t done = 0; done < bytes;) {
        ssize_t got = pread(fd, (uint8_t *)target + done, bytes - done, (off_t)done);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return SHMC_ERRNO;
        }
        if (got == 0) {
            *detail = (struct shmc_detail){done, bytes};
            return SHMC_SEGMENT_SHORT;
        }
        done += (uint64_t)got;
    }
    return SHMC_OK;
}

enum shmc_status shmc_control_copy(int fd, struct shmc_control *control, struct shmc_detail *detail)
{
    struct shmc_header header, known;
    uint64_t file_bytes;
    enum shmc_status status = shmc_segment_size(fd, &file_bytes);
    if (status == SHMC_OK && file_bytes == 0) {
        return SHMC_NOT_READY; /* created, not yet reserved */
    }
    if (status == SHMC_OK) {
        status = read_exactly(fd, &header, sizeof header, detail);
    }
    if (status == SHMC_OK) {
        status = check_header(&header, file_bytes, 0, &known, detail);
    }
    if (status != SHMC_OK) {
        return status;
    }
    uint64_t bytes = shmc_layout_ring_offset(header.slot_count); /* what messages say is nobody's business */
    void *base = malloc(bytes);
    if (base == NULL) {
        return SHMC_NO_MEMORY;
    }
    status = read_exactly(fd, base, bytes, detail);
    if (status != SHMC_OK) {
        free(base);
        return status;
    }
    memcpy(base, &header, sizeof header); /* the one that was checked, whatever it is by now */
    lay_out(control, base, bytes, &known);
    control->ring = NULL;
    return SHMC_OK;
}

void shmc_control_drop_copy(struct shmc_control *control)
{
    free(control->header);
    *control = (struct shmc_control){0};
}

uint32_t shmc_control_format(int fd)
{
    struct shmc_header header = {0};
    const size_t head = offsetof(struct shmc_header, record_bytes);
    SHMC_STEP(CONTROL_FORMAT);
    if (pread(fd, &header, head, 0) != (ssize_t)head) {
        return 0;
    }
    return shmc_relaxed_load(&header.magic) == SHMC_MAGIC ? header.format : 0;
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
