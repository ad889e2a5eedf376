/* segment.h: where shared bytes live in this process: reserving, mapping, prefaulting, punching. Knows no protocol. */
#ifndef SHMC_SEGMENT_H
#define SHMC_SEGMENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "status.h"

enum shmc_access {
    SHMC_MAP_READ,        /* shared, PROT_READ: what readers see */
    SHMC_MAP_WRITE,       /* shared, read and write: the owner, and control segments */
    SHMC_MAP_PRIVATE_COW, /* private copy-on-write over the same pages: what tensors see */
};

/* Before the pages are reserved: have them in huge ones, as far as the kernel can and its memory has them (MADV_COLLAPSE,
 * Linux 6.1, whatever shmem_enabled says but for "deny"). Readers take a tenth of the page faults then, or less, hashing
 * waits for page tables no more, and prefaulting takes a tenth of the time. A hint; the file is as long as it needs. */
void shmc_segment_gather(int fd, void *writable_base, uint64_t size_bytes);

/* All pages of [0, size) exist afterwards, or ERRNO (ENOSPC) and none was added here. Never SIGBUS later (G6). */
enum shmc_status shmc_segment_reserve(int fd, uint64_t size_bytes);

/* Length of the file behind fd. */
enum shmc_status shmc_segment_size(int fd, uint64_t *size_bytes);

enum shmc_status shmc_segment_map(int fd, uint64_t size_bytes, enum shmc_access access, void **base);
void shmc_segment_unmap(void *base, uint64_t size_bytes);

/* Fill page tables ahead of use. A hint: what it can not do, page faults do later. */
void shmc_segment_populate(void *base, uint64_t size_bytes, bool for_writing);

/* Give the pages back to the host though others still map them; they read zeros from then on. */
enum shmc_status shmc_segment_punch(void *writable_base, uint64_t size_bytes);

/* Drop what this process wrote into [base, base + size) of a private mapping, so that the shared pages show again.
 * Page-aligned. Only written pages are touched where the kernel can list them (PAGEMAP_SCAN, Linux 6.7). */
enum shmc_status shmc_segment_forget_private(void *base, uint64_t size_bytes);

/* Whether this process has written into [base, base + size) of a private mapping whose shared twin is `shared`. */
bool shmc_segment_private_written(void *base, const void *shared, uint64_t size_bytes);

/* One block of a segment, mapped by a process that may write it and nothing else: between two pages that nobody may touch. */
struct shmc_window {
    uint8_t *space; /* address space, guard pages included */
    uint64_t space_bytes;
    uint8_t *base; /* the block, and the rest of its last page */
    uint64_t length_bytes;
};

/* offset_bytes: of a page; the block has its pages to itself. Children do not get it. SEGMENT_SHORT, ERRNO. */
enum shmc_status shmc_window_open(int fd, uint64_t offset_bytes, uint64_t size_bytes, struct shmc_window *window,
                                  struct shmc_detail *detail);

/* The block is out of reach from here on, also of threads that write at this moment: private memory is in its place, so
 * that who has kept an array does no harm, to itself or others. ERRNO: it is not. */
enum shmc_status shmc_window_close(const struct shmc_window *window);
void shmc_window_unmap(const struct shmc_window *window);

static inline uint64_t shmc_round_up(uint64_t value, uint64_t power_of_two)
{
    return (value + power_of_two - 1) & ~(power_of_two - 1);
}

#endif
