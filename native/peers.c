#include "peers.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include "bell.h"
#include "slots.h"
#include "steps.h"

/* ---- this process --------------------------------------------------------------------------------------------- */

uint64_t shmc_process_token(void)
{
    static uint64_t *page; /* inherited by children, its contents are not */
    if (page == NULL) {
        SHMC_STEP(TOKEN_MAP);
        void *mapped = mmap(NULL, SHMC_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) {
            return 0;
        }
        SHMC_STEP(TOKEN_WIPE);
        if (madvise(mapped, SHMC_PAGE_BYTES, MADV_WIPEONFORK) != 0) {
            SHMC_STEP(TOKEN_UNMAP);
            munmap(mapped, SHMC_PAGE_BYTES);
            return 0;
        }
        page = mapped;
    }
    while (*page == 0) {
        SHMC_STEP(TOKEN_RANDOM);
        if (getrandom(page, sizeof *page, 0) != (ssize_t)sizeof *page && errno != EINTR) {
            return 0;
        }
    }
    return *page;
}

/* ---- locks ---------------------------------------------------------------------------------------------------- */

static bool lock_operation(int fd, int command, short type, unsigned p, short *found)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)p, .l_len = 1};
    int result;
    do {
        result = fcntl(fd, command, &lock);
    } while (result != 0 && errno == EINTR);
    if (found != NULL) {
        *found = lock.l_type;
    }
    return result == 0;
}

bool shmc_peer_lock(int fd, unsigned p)
{
    SHMC_STEP(PEER_LOCK);
    return lock_operation(fd, F_OFD_SETLK, F_WRLCK, p, NULL);
}

void shmc_peer_unlock(int fd, unsigned p)
{
    SHMC_STEP(PEER_UNLOCK);
    (void)lock_operation(fd, F_OFD_SETLK, F_UNLCK, p, NULL);
}

bool shmc_peer_probe(int fresh_fd, unsigned p)
{
    SHMC_STEP(PEER_PROBE);
    short found = F_WRLCK; /* what can not be asked counts as alive: never free what may be in use */
    return !lock_operation(fresh_fd, F_OFD_GETLK, F_WRLCK, p, &found) || found != F_UNLCK;
}

enum shmc_status shmc_peer_anchor(int fd, void **lock_page)
{
    SHMC_STEP(ANCHOR_MAP);
    void *page = mmap(NULL, SHMC_PAGE_BYTES, PROT_READ, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED) {
        return SHMC_ERRNO;
    }
    /* a forked child that inherited this would keep the lock of a dead parent */
    SHMC_STEP(ANCHOR_DONTFORK);
    if (madvise(page, SHMC_PAGE_BYTES, MADV_DONTFORK) != 0) {
        int failure = errno;
        SHMC_STEP(ANCHOR_UNDO);
        munmap(page, SHMC_PAGE_BYTES);
        errno = failure;
        return SHMC_ERRNO;
    }
    *lock_page = page;
    return SHMC_OK;
}

void shmc_peer_drop_anchor(void *lock_page)
{
    if (lock_page != NULL) {
        SHMC_STEP(ANCHOR_DROP);
        munmap(lock_page, SHMC_PAGE_BYTES);
    }
}

/* ---- records -------------------------------------------------------------------------------------------------- */

/* What `ls` shows. Nothing is decided by it, so whatever can not be read is left out. */
static void describe_process(struct shmc_peer_record *record)
{
    record->pid = (uint32_t)getpid();
    record->start_ticks = 0;
    char text[1024] = {0};
    FILE *file = fopen("/proc/self/stat", "re");
    if (file != NULL) {
        size_t length = fread(text, 1, sizeof text - 1, file);
        text[length] = '\0';
        /* the command may hold spaces and brackets, so count fields from the last one: start time is the 20th after */
        const char *at = strrchr(text, ')');
        for (int field = 2; at != NULL && field < 22; field++) {
            at = strchr(at + 1, ' ');
        }
        unsigned long long ticks;
        if (at != NULL && sscanf(at, "%llu", &ticks) == 1) {
            record->start_ticks = ticks;
        }
        fclose(file);
    }
    memset(record->command, 0, sizeof record->command);
    file = fopen("/proc/self/cmdline", "re");
    if (file != NULL) {
        size_t length = fread(record->command, 1, sizeof record->command - 1, file);
        for (size_t i = 0; i + 1 < length; i++) {
            if (record->command[i] == '\0') {
                record->command[i] = ' ';
            }
        }
        fclose(file);
    }
}

/* Raised before the scrub: whoever sets a bit for p reads it on both sides of doing so, and a grant that the scrub came
 * too early for is then taken back by whoever gave it. */
static uint32_t raise_incarnation(struct shmc_control *control, unsigned p)
{
    /* pairs with both loads in shmc_slot_publish and in shmc_slot_pass_on */
    SHMC_STEP(TAKE_INCARNATION);
    return shmc_seq_add(&control->peers[p].incarnation, 1) + 1;
}

/* Whatever p has claimed: blocks, segments whose pages it had registered with a GPU driver, places at the bells. */
static void scrub(struct shmc_control *control, unsigned p)
{
    shmc_slot_scrub(control, p);
    for (unsigned i = 0; i < SHMC_SEGMENT_COUNT; i++) {
        shmc_atomic_u64 *mark = &control->segments[i].mark;
        SHMC_STEP(SCRUB_MARK_SEE);
        if ((shmc_seq_load(mark) & SHMC_HOLD(p)) != 0) {
            SHMC_STEP(SCRUB_MARK);
            shmc_seq_and(mark, ~SHMC_HOLD(p)); /* pairs with the compare-and-swap in shmc_owner_retire_segment */
        }
    }
    shmc_bell_forget(&control->header->sent, p);
    shmc_bell_forget(&control->header->read, p);
    shmc_bell_forget(&control->header->agreed, p);
}

/* After the incarnation was raised. Released, so that who finds a word reset finds the new incarnation as well: pairs
 * with the loads in look_at. */
static void reset_words(struct shmc_peer_record *record)
{
    SHMC_STEP(TAKE_WORD_STEP);
    shmc_release_store(&record->step, 0);
    SHMC_STEP(TAKE_WORD_FAILED);
    shmc_release_store(&record->failed_step, 0);
    SHMC_STEP(TAKE_WORD_MASK);
    shmc_release_store(&record->mask, 0);
    SHMC_STEP(TAKE_RING_READ);
    shmc_release_store(&record->ring_read, 0);
}

void shmc_peer_take_over(struct shmc_control *control, unsigned p, uint64_t token)
{
    struct shmc_peer_record *record = &control->peers[p];
    /* not ready from here on: `ready` still has the number before this one, or 0 */
    uint32_t incarnation = raise_incarnation(control, p);
    scrub(control, p);
    SHMC_STEP(TAKE_DESCRIBE);
    describe_process(record);
    reset_words(record);
    SHMC_STEP(TAKE_TOKEN);
    shmc_relaxed_store(&record->token, token);
    /* pairs with the load in shmc_peer_find */
    SHMC_STEP(TAKE_READY);
    shmc_release_store(&record->ready, incarnation);
}

enum shmc_status shmc_peer_join(struct shmc_control *control, int lock_fd, uint64_t token, unsigned *index,
                                struct shmc_detail *detail)
{
    for (unsigned p = 1; p < SHMC_PEER_COUNT; p++) {
        if (shmc_peer_lock(lock_fd, p)) {
            shmc_peer_take_over(control, p, token);
            *index = p;
            return SHMC_OK;
        }
    }
    *detail = (struct shmc_detail){SHMC_PEER_COUNT, SHMC_PEER_COUNT};
    return SHMC_PEERS_FULL;
}

void shmc_peer_leave(struct shmc_control *control, unsigned p)
{
    /* pairs with the load in shmc_peer_find: no grant is given to us by name from here on */
    SHMC_STEP(LEAVE_NOT_READY);
    shmc_release_store(&control->peers[p].ready, 0);
    raise_incarnation(control, p);
    scrub(control, p);
}

/* Whether a scrub of p is not done: one that was killed midway has made the byte not ready, and its marks come last. */
static bool has_left(const struct shmc_control *control, unsigned p)
{
    SHMC_STEP(SWEEP_SEE);
    if (shmc_acquire_load(&control->peers[p].ready) != 0 || shmc_slot_claimed_by(control, p)) {
        return true;
    }
    for (unsigned i = 0; i < SHMC_SEGMENT_COUNT; i++) {
        SHMC_STEP(SWEEP_MARK_SEE);
        if ((shmc_seq_load(&control->segments[i].mark) & SHMC_HOLD(p)) != 0) {
            return true;
        }
    }
    return false;
}

unsigned shmc_peer_sweep(struct shmc_control *control, int fresh_fd)
{
    unsigned swept = 0;
    for (unsigned p = 1; p < SHMC_PEER_COUNT; p++) {
        SHMC_STEP(SWEEP_INCARNATION);
        uint32_t incarnation = shmc_seq_load(&control->peers[p].incarnation);
        if (incarnation == 0 || !shmc_peer_lock(fresh_fd, p)) {
            continue; /* never used, or alive */
        }
        if (has_left(control, p)) {
            shmc_peer_leave(control, p);
            swept++;
        }
        shmc_peer_unlock(fresh_fd, p);
    }
    return swept;
}

bool shmc_peer_joined(const struct shmc_control *control, unsigned p, uint32_t *incarnation)
{
    const struct shmc_peer_record *record = &control->peers[p];
    SHMC_STEP(FIND_INCARNATION);
    *incarnation = shmc_seq_load(&record->incarnation);
    /* pairs with the store in shmc_peer_take_over: the record belongs to this incarnation */
    SHMC_STEP(FIND_TOKEN);
    return *incarnation != 0 && shmc_acquire_load(&record->ready) == *incarnation;
}

int shmc_peer_find(const struct shmc_control *control, uint64_t token, uint32_t *incarnation)
{
    for (int p = 0; p < SHMC_PEER_COUNT; p++) {
        const struct shmc_peer_record *record = &control->peers[p];
        SHMC_STEP(FIND_INCARNATION);
        uint32_t now = shmc_seq_load(&record->incarnation);
        /* pairs with the store in shmc_peer_take_over: token and record belong to this incarnation */
        SHMC_STEP(FIND_TOKEN);
        if (now != 0 && shmc_acquire_load(&record->ready) == now && shmc_relaxed_load(&record->token) == token) {
            *incarnation = now;
            return p;
        }
    }
    return -1;
}
