#include "world.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "segment.h"

const uint64_t world_tokens[1 + WORLD_READERS] = {0x1111, 0x2222, 0x3333};

/* ---- guarded mappings: the linker gives us every mmap and munmap of native/ ---------------------------------------------- */

void *__real_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *address, size_t bytes);
void *__wrap_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset);
int __wrap_munmap(void *address, size_t bytes);

static size_t whole_pages(size_t bytes)
{
    return (bytes + SHMC_PAGE_BYTES - 1) & ~(size_t)(SHMC_PAGE_BYTES - 1);
}

void *__wrap_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    size_t pages = whole_pages(bytes);
    uint8_t *room = __real_mmap(address, pages + 2 * SHMC_PAGE_BYTES, PROT_NONE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) {
        return room;
    }
    void *mapped = __real_mmap(room + SHMC_PAGE_BYTES, bytes, protection, flags | MAP_FIXED, fd, offset);
    if (mapped == MAP_FAILED) {
        __real_munmap(room, pages + 2 * SHMC_PAGE_BYTES);
    }
    return mapped;
}

int __wrap_munmap(void *address, size_t bytes)
{
    return __real_munmap((uint8_t *)address - SHMC_PAGE_BYTES, whole_pages(bytes) + 2 * SHMC_PAGE_BYTES);
}

/* ---- descriptors ------------------------------------------------------------------------------------------------------- */

static int new_file(const char *name)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    CHECK(fd >= 0, "memfd_create");
    return fd;
}

int world_descriptor(const struct world *world)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", world->control_fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0, "open the control segment once more");
    return fd;
}

/* ---- the arena ----------------------------------------------------------------------------------------------------------- */

/* Members of one process have one token; each gets a name of its own here, as processes have. */
static void name_peer(struct world *world, const struct shmc_member *member, unsigned who)
{
    shmc_relaxed_store(&world->owner_member.control.peers[member->index].token, world_tokens[who]);
}

void world_open(struct world *world)
{
    struct shmc_control_config config = {
        .arena_id = 7, .host = 9, .max_bytes = WORLD_MAX_BYTES, .slot_count = WORLD_SLOTS};
    memset(world, 0, sizeof *world);
    world->control_fd = new_file("control");
    int lock_fd = world_descriptor(world);
    CHECK(shmc_peer_lock(lock_fd, SHMC_OWNER), "take the owner's byte");
    CHECK(shmc_member_create(&world->owner_member, world->control_fd, lock_fd, &config) == SHMC_OK, "create");
    close(lock_fd);
    CHECK(shmc_owner_init(&world->owner, &world->owner_member) == SHMC_OK, "make the owner");
    name_peer(world, &world->owner_member, 0);
    world_add_segment(world);
    for (unsigned reader = 0; reader < WORLD_READERS; reader++) {
        CHECK(world_join(world, reader), "join");
    }
    CHECK(world_begin_group(world), "begin a group");
}

bool world_join(struct world *world, unsigned reader)
{
    struct shmc_detail detail;
    if (world->joined[reader]) {
        return true;
    }
    int lock_fd = world_descriptor(world);
    enum shmc_status status = shmc_member_join(&world->readers[reader], world->control_fd, lock_fd, 7, &detail);
    close(lock_fd);
    world->joined[reader] = status == SHMC_OK;
    if (world->joined[reader]) {
        name_peer(world, &world->readers[reader], 1 + reader);
    }
    return world->joined[reader];
}

void world_leave(struct world *world, unsigned reader)
{
    if (world->joined[reader]) {
        shmc_member_leave(&world->readers[reader]);
        world->joined[reader] = world->rings = false;
    }
}

void world_add_segment(struct world *world)
{
    uint8_t *base = NULL;
    void *readable = NULL;
    unsigned index;
    struct shmc_detail detail;
    if (world->next_number - 0u >= 1000 || world->owner.reserved_bytes >= WORLD_MAX_BYTES) {
        return;
    }
    int fd = new_file("data");
    CHECK(shmc_owner_prepare_segment(fd, WORLD_SEGMENT_BYTES, &base) == SHMC_OK, "prepare a segment");
    CHECK(shmc_segment_map(fd, WORLD_SEGMENT_BYTES, SHMC_MAP_READ, &readable) == SHMC_OK, "map for reading");
    close(fd);
    CHECK(shmc_owner_add_segment(&world->owner, world->next_number + 1, base, WORLD_SEGMENT_BYTES, &index, &detail) ==
                  SHMC_OK &&
              index < WORLD_SEGMENTS,
          "add a segment");
    world->next_number++;
    world->segments[index] =
        (struct world_segment){.number = world->next_number, .writable = base, .readable = readable};
}

static void unmap_segment(struct world_segment *segment)
{
    if (segment->number != 0) {
        shmc_segment_unmap(segment->writable, WORLD_SEGMENT_BYTES);
        shmc_segment_unmap((void *)(uintptr_t)segment->readable, WORLD_SEGMENT_BYTES);
        *segment = (struct world_segment){0};
    }
}

void world_retire_segment(struct world *world, unsigned index)
{
    unsigned found;
    bool done;
    struct world_segment *segment = &world->segments[index % WORLD_SEGMENTS];
    if (segment->number != 0 && shmc_owner_retire_segment(&world->owner, segment->number, &found, &done) == SHMC_OK &&
        done) {
        CHECK(&world->segments[found] == segment, "the segment that was retired is the one that was named");
        unmap_segment(segment);
    }
}

bool world_begin_group(struct world *world)
{
    struct shmc_detail detail;
    uint64_t start = shmc_ring_head(&world->owner_member.control);
    uint64_t group = shmc_fellows_begin(&world->owner_member);
    enum { RANKS = 1 + WORLD_READERS };
    bool good = shmc_ring_init(&world->writer, &world->owner_member, world_tokens, RANKS, start, &detail) == SHMC_OK;
    for (unsigned rank = 0; good && rank < RANKS; rank++) {
        struct shmc_member *member = rank == 0 ? &world->owner_member : &world->readers[rank - 1];
        good = (rank == 0 || world->joined[rank - 1]) &&
               (rank == 0 || shmc_ring_init(&world->reader_rings[rank - 1], member, world_tokens, RANKS, start,
                                            &detail) == SHMC_OK) &&
               shmc_fellows_reset(member) == SHMC_OK &&
               shmc_fellows_init(&world->voters[rank], member, world_tokens, RANKS, &detail) == SHMC_OK;
        world->voters[rank].group = group;
    }
    world->rings = good;
    return good;
}

void world_close(struct world *world)
{
    for (unsigned reader = 0; reader < WORLD_READERS; reader++) {
        world_leave(world, reader);
    }
    for (unsigned i = 0; i < WORLD_SEGMENTS; i++) {
        unmap_segment(&world->segments[i]);
    }
    shmc_owner_destroy(&world->owner);
    shmc_member_destroy(&world->owner_member);
    close(world->control_fd);
}
