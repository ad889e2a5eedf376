#include "segment.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "layout.h"
#include "steps.h"

#ifndef MADV_POPULATE_READ /* Linux 5.14; older headers */
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE /* Linux 6.1 */
#define MADV_COLLAPSE 25
#endif

/* What one entry of a page table maps where it maps no table. The size differs on some machines; then nothing is gained. */
enum { HUGE_BYTES = 2 << 20 };

void shmc_segment_gather(int fd, void *writable_base, uint64_t size_bytes)
{
    int saved = errno;
    uint64_t whole = size_bytes - size_bytes % HUGE_BYTES;
    /* The kernel makes huge pages of what is there already, and one page in each is enough. */
    for (uint64_t end = HUGE_BYTES; end <= whole; end += HUGE_BYTES) {
        SHMC_STEP(SEGMENT_SEED);
        if (fallocate(fd, 0, (off_t)(end - SHMC_PAGE_BYTES), SHMC_PAGE_BYTES) != 0) {
            whole = end - HUGE_BYTES;
        }
    }
    SHMC_STEP(SEGMENT_GATHER);
    (void)madvise(writable_base, whole, MADV_COLLAPSE);
    errno = saved;
}

enum shmc_status shmc_segment_reserve(int fd, uint64_t size_bytes)
{
    int failure;
    do {
        SHMC_STEP(SEGMENT_RESERVE);
        failure = posix_fallocate(fd, 0, (off_t)size_bytes);
    } while (failure == EINTR);
    if (failure != 0) {
        errno = failure; /* posix_fallocate returns the error instead of setting errno */
        return SHMC_ERRNO;
    }
    return SHMC_OK;
}

enum shmc_status shmc_segment_size(int fd, uint64_t *size_bytes)
{
    struct stat file;
    SHMC_STEP(SEGMENT_SIZE);
    if (fstat(fd, &file) != 0) {
        return SHMC_ERRNO;
    }
    *size_bytes = (uint64_t)file.st_size;
    return SHMC_OK;
}

/* Address space for a mapping that huge pages fit into: addresses and offsets in the file differ by whole ones. NULL: none
 * is needed, or to be had, and the kernel chooses. */
static void *huge_space(uint64_t size_bytes)
{
    if (size_bytes < HUGE_BYTES) {
        return NULL;
    }
    uint64_t taken = shmc_round_up(size_bytes, SHMC_PAGE_BYTES) + HUGE_BYTES;
    void *space = mmap(NULL, taken, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) {
        return NULL;
    }
    uint64_t before = shmc_round_up((uint64_t)(uintptr_t)space, HUGE_BYTES) - (uint64_t)(uintptr_t)space;
    uint8_t *start = (uint8_t *)space + before;
    if (before != 0) {
        munmap(space, before);
    }
    munmap(start + taken - HUGE_BYTES, HUGE_BYTES - before);
    return start;
}

enum shmc_status shmc_segment_map(int fd, uint64_t size_bytes, enum shmc_access access, void **base)
{
    int protection = access == SHMC_MAP_READ ? PROT_READ : PROT_READ | PROT_WRITE;
    /* NORESERVE: a private mapping of a whole segment is a view, hardly ever written; strict overcommit would count it */
    int flags = access == SHMC_MAP_PRIVATE_COW ? MAP_PRIVATE | MAP_NORESERVE : MAP_SHARED;
    void *space = huge_space(size_bytes);
    SHMC_STEP(SEGMENT_MAP);
    void *mapped = mmap(space, size_bytes, protection, space != NULL ? flags | MAP_FIXED : flags, fd, 0);
    if (mapped == MAP_FAILED) {
        int failure = errno;
        if (space != NULL) {
            munmap(space, size_bytes);
        }
        errno = failure;
        return SHMC_ERRNO;
    }
    *base = mapped;
    return SHMC_OK;
}

void shmc_segment_unmap(void *base, uint64_t size_bytes)
{
    if (base != NULL) {
        SHMC_STEP(SEGMENT_UNMAP);
        munmap(base, size_bytes);
    }
}

void shmc_segment_populate(void *base, uint64_t size_bytes, bool for_writing)
{
    int saved = errno;
    SHMC_STEP(SEGMENT_POPULATE);
    (void)madvise(base, size_bytes, for_writing ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
    errno = saved;
}

enum shmc_status shmc_segment_punch(void *writable_base, uint64_t size_bytes)
{
    SHMC_STEP(SEGMENT_PUNCH);
    return madvise(writable_base, size_bytes, MADV_REMOVE) == 0 ? SHMC_OK : SHMC_ERRNO;
}

/* ---- windows: one block for one worker ------------------------------------------------------------------------- */

enum shmc_status shmc_window_open(int fd, uint64_t offset_bytes, uint64_t size_bytes, struct shmc_window *window,
                                  struct shmc_detail *detail)
{
    uint64_t file_bytes, length = shmc_round_up(size_bytes, SHMC_PAGE_BYTES);
    enum shmc_status status = shmc_segment_size(fd, &file_bytes);
    if (status != SHMC_OK) {
        return status;
    }
    if (offset_bytes > file_bytes || size_bytes > file_bytes - offset_bytes) { /* SIGBUS otherwise */
        *detail = (struct shmc_detail){file_bytes, offset_bytes + size_bytes};
        return SHMC_SEGMENT_SHORT;
    }
    /* huge pages fit in where addresses and offsets in the file differ by whole ones */
    uint64_t slack = length >= HUGE_BYTES ? HUGE_BYTES : 0, taken = length + 2 * SHMC_PAGE_BYTES + slack;
    void *space = mmap(NULL, taken, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) {
        return SHMC_ERRNO;
    }
    uint8_t *base = (uint8_t *)space + SHMC_PAGE_BYTES;
    base += slack != 0 ? (offset_bytes - (uint64_t)(uintptr_t)base) % HUGE_BYTES : 0;
    void *mapped = mmap(base, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, (off_t)offset_bytes);
    if (mapped == MAP_FAILED || madvise(base, length, MADV_DONTFORK) != 0) {
        int failure = errno;
        munmap(space, taken);
        errno = failure;
        return SHMC_ERRNO;
    }
    shmc_segment_populate(base, length, true);
    *window = (struct shmc_window){space, taken, base, length};
    return SHMC_OK;
}

enum shmc_status shmc_window_close(const struct shmc_window *window)
{
    void *mapped = mmap(window->base, window->length_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return mapped == MAP_FAILED ? SHMC_ERRNO : SHMC_OK;
}

void shmc_window_unmap(const struct shmc_window *window)
{
    munmap(window->space, window->space_bytes);
}

/* ---- what was written into a private mapping ------------------------------------------------------------------ */

/* The kernel's interface, declared here because the headers of older distributions lack it (include/uapi/linux/fs.h). */
struct scan_region {
    uint64_t start, end, categories;
};
struct scan_request {
    uint64_t size, flags, start, end, walk_end, regions, region_count, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN_PAGES _IOWR('f', 16, struct scan_request)
#define SCAN_IS_FILE (UINT64_C(1) << 2)
#define SCAN_IS_PRESENT (UINT64_C(1) << 3)
#define SCAN_IS_SWAPPED (UINT64_C(1) << 4)

enum { SCAN_REGIONS = 64 };

/* Lists up to SCAN_REGIONS runs of pages in [start, end) that are this process's own: mapped, and not the file's.
 * Returns their number and where the walk ended, or -1 where the kernel can not tell. */
static long scan_written(int pagemap, uint64_t start, uint64_t end, struct scan_region *regions, uint64_t *walked_to)
{
    struct scan_request request = {
        .size = sizeof request,
        .start = start,
        .end = end,
        .regions = (uint64_t)(uintptr_t)regions,
        .region_count = SCAN_REGIONS,
        .category_inverted = SCAN_IS_FILE,
        .category_mask = SCAN_IS_FILE,
        .category_anyof_mask = SCAN_IS_PRESENT | SCAN_IS_SWAPPED,
        .return_mask = SCAN_IS_FILE,
    };
    SHMC_STEP(PRIVATE_SCAN);
    long found = ioctl(pagemap, SCAN_PAGES, &request);
    *walked_to = request.walk_end;
    return found;
}

static int open_pagemap(void)
{
    SHMC_STEP(PRIVATE_OPEN);
    return open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
}

enum shmc_status shmc_segment_forget_private(void *base, uint64_t size_bytes)
{
    uint64_t at = (uint64_t)(uintptr_t)base, end = at + size_bytes;
    struct scan_region regions[SCAN_REGIONS];
    enum shmc_status status = SHMC_OK;
    int saved = errno, pagemap = open_pagemap();
    while (at < end) {
        uint64_t walked_to = end;
        long found = pagemap >= 0 ? scan_written(pagemap, at, end, regions, &walked_to) : -1;
        if (found < 0 || walked_to <= at) { /* can not tell: drop all, shared pages come back by soft faults */
            found = 1;
            regions[0] = (struct scan_region){.start = at, .end = end};
            walked_to = end;
        }
        for (long i = 0; i < found; i++) {
            void *start = (void *)(uintptr_t)regions[i].start;
            SHMC_STEP(PRIVATE_DROP);
            if (madvise(start, regions[i].end - regions[i].start, MADV_DONTNEED) != 0) {
                status = SHMC_ERRNO;
                goto done;
            }
        }
        at = walked_to;
    }
done:
    if (pagemap >= 0) {
        int failure = errno;
        SHMC_STEP(PRIVATE_CLOSE);
        close(pagemap);
        errno = failure;
    }
    if (status == SHMC_OK) {
        errno = saved;
    }
    return status;
}

bool shmc_segment_private_written(void *base, const void *shared, uint64_t size_bytes)
{
    struct scan_region regions[SCAN_REGIONS];
    uint64_t start = (uint64_t)(uintptr_t)base, walked_to;
    int saved = errno, pagemap = open_pagemap();
    long found = pagemap >= 0 ? scan_written(pagemap, start, start + size_bytes, regions, &walked_to) : -1;
    if (pagemap >= 0) {
        close(pagemap);
    }
    errno = saved;
    return found >= 0 ? found > 0 : memcmp(base, shared, size_bytes) != 0;
}
