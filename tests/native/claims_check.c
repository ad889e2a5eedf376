/* Peers as threads over one control segment, and the claims on a few blocks: one owner that publishes, aliases, withdraws,
 * revokes and takes back, and readers that attach, hold, pass on and release, join and leave, or die with all they have,
 * which whoever comes by then scrubs. Whoever has a block looks whether the bytes are those that its generation was published
 * with; what has been promised for good must be there; in the end nothing is claimed any more. What threads share is what
 * processes share, and a thread sanitizer sees them: it is told of what the kernel's locks order, and of nothing else that
 * would lead from a reader back to the owner, so that only the slot's word does.
 * Usage: claims_check SEED STEPS; prints what is wrong and ends with 1, or one line and 0. Linked with --wrap=fcntl. */
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "owner.h"

enum {
    SEATS = 5, /* reader threads; one life after the other sits there */
    SLOTS = 8,
    SEGMENT = 1,
    SEGMENT_BYTES = 8192,
    WORDS_MAX = 128, /* of a block */
    CELLS = 8,       /* handles that a seat has room for; one that comes on top of another is lost, as messages are */
    HELD_MAX = 6,
    DEADLINE_NS = 200000,
};

enum { LASTING = 1, DEADLINE }; /* claims that only the owner ends, by withdrawing; or that end by themselves */

/* By generation; written before the generation is published. */
static struct known {
    shmc_atomic_u64 terms, origin; /* the generation that the bytes were written for */
    shmc_atomic_u64 place;         /* offset << 32 | bytes */
    shmc_atomic_u64 ended;         /* the owner is about to take back what it has promised */
} *known;

/* Where handles arrive: slot << 56 | life << 32 | generation. */
static struct {
    shmc_atomic_u64 life;
    shmc_atomic_u64 cells[CELLS];
} seats[SEATS];

#define EVENTS(X) X(attached) X(promised) X(stale) X(again) X(passed) X(left) X(died) X(swept) X(aliased) X(waited)
enum event {
#define EVENT(name) EVENT_##name,
    EVENTS(EVENT) EVENT_COUNT
#undef EVENT
};
static shmc_atomic_u64 counts[EVENT_COUNT];

static struct shmc_control control;
static uint8_t *data;
static int control_fd;
static uint64_t seed, steps;
static shmc_atomic_u64 lives, stop;

static void fail(const char *what, uint64_t slot, uint64_t generation, uint64_t number)
{
    printf("claims_check: %s: slot %llu, generation %llu, %llu\n", what, (unsigned long long)slot,
           (unsigned long long)generation, (unsigned long long)number);
    exit(1);
}

static uint64_t mix(uint64_t value)
{
    value = (value ^ value >> 31) * 0x9e3779b97f4a7c15u;
    value = (value ^ value >> 29) * 0xbf58476d1ce4e5b9u;
    return value ^ value >> 32;
}

static uint64_t draw(uint64_t *pace, uint64_t below)
{
    *pace = mix(*pace + 1);
    return (*pace >> 8) % below;
}

static void count(enum event event)
{
    shmc_relaxed_add(&counts[event], 1);
}

/* The token of a life; the owner's is that of the process. */
static uint64_t token_of(uint64_t life)
{
    return UINT64_C(0x5eed000000000000) + life;
}

/* ---- what the kernel orders: who gets the lock of a byte comes after who had it ------------------------------------------ */

static shmc_atomic_u64 turns[SHMC_PEER_COUNT];

int __real_fcntl(int fd, int command, ...);
int __wrap_fcntl(int fd, int command, ...);

int __wrap_fcntl(int fd, int command, ...)
{
    va_list arguments;
    va_start(arguments, command);
    struct flock *lock = va_arg(arguments, struct flock *);
    va_end(arguments);
    if (command == F_OFD_SETLK && lock->l_type == F_UNLCK) {
        shmc_seq_add(&turns[lock->l_start], 1);
    }
    int result = __real_fcntl(fd, command, lock);
    if (result == 0 && command == F_OFD_SETLK && lock->l_type == F_WRLCK) {
        shmc_seq_add(&turns[lock->l_start], 1);
    }
    return result;
}

/* A description of its own, as a process has. */
static int open_control(void)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", control_fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        fail("open the control segment", 0, 0, 0);
    }
    return fd;
}

/* ---- blocks -------------------------------------------------------------------------------------------------------------- */

/* By who holds it. */
static void look(const struct shmc_member *member, uint32_t slot, uint64_t generation)
{
    struct shmc_block_view view;
    struct shmc_detail detail;
    uint64_t place = shmc_relaxed_load(&known[generation].place), bytes = place & UINT32_MAX;
    uint64_t origin = shmc_relaxed_load(&known[generation].origin);
    if (shmc_relaxed_load(&control.records[slot].generation) != generation ||
        shmc_member_check(member, slot, SEGMENT, place >> 32, bytes, &view, &detail) != SHMC_OK ||
        view.block_bytes != bytes || view.hash_low != origin || view.hash_high != mix(origin)) {
        fail("another record under a hold", slot, generation, place);
    }
    const uint64_t *words = (const void *)(data + (place >> 32));
    for (uint64_t i = 0; i < bytes / sizeof *words; i++) {
        if (words[i] != mix(origin) + i) {
            fail("other bytes under a hold", slot, generation, i);
        }
    }
}

static void deliver(uint64_t *pace, unsigned seat, uint64_t life, uint32_t slot, uint64_t generation)
{
    /* a store alone: it takes no order from the reader that has emptied the cell */
    shmc_release_store(&seats[seat].cells[draw(pace, CELLS)], (uint64_t)slot << 56 | life << 32 | generation);
}

/* ---- a reader ------------------------------------------------------------------------------------------------------------ */

struct life {
    struct shmc_member member;
    unsigned seat;
    uint64_t number, pace;
    int lock_fd, sweep_fd;
    struct {
        uint32_t slot;
        uint64_t generation;
    } held[HELD_MAX];
    unsigned held_count;
};

static void release(struct life *life, unsigned i)
{
    look(&life->member, life->held[i].slot, life->held[i].generation);
    shmc_member_release(&life->member, life->held[i].slot);
    life->held[i] = life->held[--life->held_count];
}

static void release_any(struct life *life)
{
    if (life->held_count != 0) {
        release(life, (unsigned)draw(&life->pace, life->held_count));
    }
}

static void attach(struct life *life, uint32_t slot, uint64_t generation, bool promised)
{
    struct shmc_detail detail;
    bool again = slot < SLOTS && life->member.leases[slot] != 0;
    if (life->held_count == HELD_MAX) {
        release_any(life);
    }
    enum shmc_status status = shmc_member_attach(&life->member, slot, generation, &detail);
    if (status == SHMC_STALE && (!promised || shmc_seq_load(&known[generation].ended) != 0)) {
        count(EVENT_stale);
        return;
    }
    if (status != SHMC_OK) {
        fail("what was promised is not there", slot, generation, status);
    }
    look(&life->member, slot, generation);
    life->held[life->held_count].slot = slot;
    life->held[life->held_count++].generation = generation;
    count(again ? EVENT_again : EVENT_attached);
    shmc_relaxed_add(&counts[EVENT_promised], promised);
}

/* A handle that has come. One for an earlier life of this seat, or one that was never sent, could use up a promise that is
 * somebody else's, so these are tried only where promises end anyway. */
static void receive(struct life *life)
{
    uint64_t handle = shmc_seq_exchange(&seats[life->seat].cells[draw(&life->pace, CELLS)], 0);
    uint64_t generation = handle & UINT32_MAX;
    if (handle != 0) {
        bool ours = (handle >> 32 & 0xffffff) == life->number;
        bool lasting = shmc_relaxed_load(&known[generation].terms) == LASTING;
        if (ours || !lasting) {
            attach(life, (uint32_t)(handle >> 56), generation, ours && lasting);
        }
    }
}

static void guess(struct life *life)
{
    uint32_t slot = (uint32_t)draw(&life->pace, SLOTS);
    uint64_t generation = shmc_relaxed_load(&control.records[slot].generation);
    if (generation != 0 && shmc_relaxed_load(&known[generation].terms) == DEADLINE) {
        attach(life, slot, generation, false);
    }
}

static void pass_on(struct life *life, unsigned i)
{
    struct shmc_detail detail;
    bool joined;
    uint32_t slot = life->held[i].slot;
    uint64_t generation = life->held[i].generation;
    unsigned seat = (unsigned)draw(&life->pace, SEATS);
    uint64_t other = shmc_relaxed_load(&seats[seat].life);
    if (other == 0) {
        return;
    }
    enum shmc_status status = shmc_slot_pass_on(&control, slot, token_of(other), &joined, &detail);
    if (status == SHMC_OK && joined) {
        deliver(&life->pace, seat, other, slot, generation);
        count(EVENT_passed);
    } else if (status != SHMC_OK && status != SHMC_PEER_LOST) {
        fail("pass on", slot, generation, status);
    }
}

/* While others attach by the handles that they have of it: what they consume must not be what is promised here. */
static void hand_over(struct life *life)
{
    unsigned before = life->held_count;
    receive(life);
    if (life->held_count > before) {
        pass_on(life, before);
        pass_on(life, before);
        release(life, before);
    }
}

static void sweep(int fd)
{
    shmc_relaxed_add(&counts[EVENT_swept], shmc_peer_sweep(&control, fd));
}

static void begin_life(struct life *life)
{
    struct shmc_detail detail;
    life->number = shmc_seq_add(&lives, 1) + 1;
    life->lock_fd = open_control();
    life->held_count = 0;
    memset(life->member.leases, 0, SLOTS * sizeof *life->member.leases);
    if (life->number > 0xffffff ||
        shmc_peer_join(&control, life->lock_fd, token_of(life->number), &life->member.index, &detail) != SHMC_OK) {
        fail("join", 0, 0, life->number);
    }
    shmc_relaxed_store(&seats[life->seat].life, life->number);
}

/* A hold is set by its process alone, and taken by it alone. */
static void look_at_holds(const struct life *life)
{
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        uint64_t word = shmc_relaxed_load(&control.words[slot]);
        if (((word & SHMC_HOLD(life->member.index)) != 0) != (life->member.leases[slot] != 0)) {
            fail("a hold and no lease, or a lease and no hold", slot, life->member.generations[slot], word);
        }
    }
}

/* With what it holds. Who dies does nothing any more: the kernel drops its lock. */
static void end_life(struct life *life)
{
    look_at_holds(life);
    bool dies = draw(&life->pace, 3) == 0;
    if (!dies) {
        shmc_peer_leave(&control, life->member.index);
    }
    count(dies ? EVENT_died : EVENT_left);
    shmc_seq_add(&turns[life->member.index], 1);
    close(life->lock_fd);
}

static void act(struct life *life)
{
    switch (draw(&life->pace, 16)) {
    case 0:
    case 1:
        guess(life);
        break;
    case 2:
    case 3:
    case 4:
    case 5:
        release_any(life);
        break;
    case 6:
        if (life->held_count != 0) {
            pass_on(life, (unsigned)draw(&life->pace, life->held_count));
        }
        break;
    case 7:
        usleep((useconds_t)draw(&life->pace, 20));
        break;
    case 8:
    case 9:
    case 10:
        receive(life);
        break;
    default:
        hand_over(life);
    }
}

static void *read_all(void *argument)
{
    struct life life = {.seat = (unsigned)(size_t)argument, .sweep_fd = open_control()};
    uint32_t leases[SLOTS];
    uint64_t generations[SLOTS];
    life.pace = mix(seed + life.seat);
    life.member = (struct shmc_member){
        .control = control, .token = shmc_process_token(), .leases = leases, .generations = generations};
    while (shmc_relaxed_load(&stop) == 0) {
        begin_life(&life);
        for (uint64_t left = 1 + draw(&life.pace, 400); left != 0 && shmc_relaxed_load(&stop) == 0; left--) {
            act(&life);
        }
        end_life(&life);
        if (draw(&life.pace, 4) == 0) {
            sweep(life.sweep_fd);
        }
    }
    close(life.sweep_fd);
    return NULL;
}

/* ---- the owner ----------------------------------------------------------------------------------------------------------- */

static struct shmc_member owner_member;
static struct shmc_owner owner;
static uint64_t pace;
static struct {
    uint32_t slot;
    uint64_t generation;
} live[SLOTS];
static unsigned live_count;

/* Who gets a publication, and on what terms; `lives` of those that it is sent to, 0 for the others. */
struct offer {
    struct shmc_terms terms;
    uint64_t tokens[SEATS], lives[SEATS];
};

static void make_offer(struct offer *offer)
{
    uint64_t kind = draw(&pace, 4), most = 1 + draw(&pace, 3);
    uint32_t number = 0;
    unsigned first = (unsigned)draw(&pace, SEATS);
    *offer = (struct offer){.terms = {.timeout_ns = draw(&pace, 2) == 0 ? DEADLINE_NS : 0, .tokens = offer->tokens}};
    for (unsigned i = 0; i < SEATS && (kind == 3 || number < most); i++) {
        unsigned seat = (first + i) % SEATS;
        uint64_t life = shmc_relaxed_load(&seats[seat].life);
        if (life != 0) {
            offer->lives[seat] = life;
            offer->tokens[number++] = token_of(life);
        }
    }
    offer->terms.token_count = kind == 0 ? number : 0;
    offer->terms.anonymous = kind == 1 ? number : 0;
    offer->terms.keep = kind == 2;
    offer->terms.everyone = kind == 3;
}

static void note(const struct offer *offer, uint64_t generation, uint64_t origin, uint64_t place)
{
    struct known *entry = &known[generation];
    shmc_relaxed_store(&entry->origin, origin);
    shmc_relaxed_store(&entry->place, place);
    shmc_relaxed_store(&entry->terms, offer->terms.timeout_ns != 0 ? DEADLINE : LASTING);
}

/* A target that is lost is no failure; false: there is no room. */
static bool finish(enum shmc_status status, const struct offer *offer, const struct shmc_published *published)
{
    if (status == SHMC_OK) {
        live[live_count].slot = published->slot;
        live[live_count++].generation = published->generation;
        for (unsigned seat = 0; seat < SEATS; seat++) {
            if (offer->lives[seat] != 0) {
                deliver(&pace, seat, offer->lives[seat], published->slot, published->generation);
            }
        }
    } else if (status != SHMC_SLOTS_FULL && status != SHMC_PEER_LOST) {
        fail("publish", 0, owner.generation, status);
    }
    return status != SHMC_SLOTS_FULL;
}

static bool publish(void)
{
    struct offer offer;
    struct shmc_published published;
    struct shmc_detail detail;
    uint32_t block;
    void *target;
    uint64_t generation = owner.generation + 1, bytes = sizeof(uint64_t) * (1 + draw(&pace, WORDS_MAX));
    uint64_t hash[2] = {generation, mix(generation)};
    enum shmc_status status = shmc_owner_take(&owner, bytes, &block, &target, &detail);
    if (status != SHMC_OK) {
        return false;
    }
    uint64_t *words = target;
    for (uint64_t i = 0; i < bytes / sizeof *words; i++) {
        words[i] = mix(generation) + i;
    }
    make_offer(&offer);
    note(&offer, generation, generation, (uint64_t)((uint8_t *)target - data) << 32 | bytes);
    status = shmc_owner_publish(&owner, block, bytes, hash, &offer.terms, &published, &detail);
    if (status != SHMC_OK) {
        shmc_owner_drop(&owner, block);
    }
    return finish(status, &offer, &published);
}

static bool publish_again(void)
{
    struct offer offer;
    struct shmc_published published;
    struct shmc_detail detail;
    unsigned i = (unsigned)draw(&pace, live_count);
    const struct known *entry = &known[live[i].generation];
    make_offer(&offer);
    note(&offer, owner.generation + 1, shmc_relaxed_load(&entry->origin), shmc_relaxed_load(&entry->place));
    enum shmc_status status =
        shmc_owner_alias(&owner, live[i].slot, live[i].generation, &offer.terms, &published, &detail);
    if (status == SHMC_STALE) {
        live[i] = live[--live_count]; /* taken back by now */
        return true;
    }
    count(EVENT_aliased);
    return finish(status, &offer, &published);
}

/* Twice where a reader has passed it on: once for what the owner has promised, once for that. */
static void withdraw(unsigned i)
{
    shmc_seq_store(&known[live[i].generation].ended, 1);
    if (!shmc_owner_withdraw(&owner, live[i].slot, live[i].generation)) {
        live[i] = live[--live_count];
    }
}

static void look_at_own(void)
{
    struct shmc_detail detail;
    unsigned i = (unsigned)draw(&pace, live_count);
    uint32_t slot = live[i].slot;
    uint64_t generation = live[i].generation;
    if (shmc_relaxed_load(&known[generation].terms) != DEADLINE ||
        shmc_member_attach(&owner_member, slot, generation, &detail) != SHMC_OK) {
        return;
    }
    look(&owner_member, slot, generation);
    shmc_member_release(&owner_member, slot);
}

static void make_room(int sweep_fd)
{
    withdraw((unsigned)draw(&pace, live_count));
    if (draw(&pace, 4) == 0) {
        sweep(sweep_fd);
    }
    if (draw(&pace, 4) == 0) {
        shmc_owner_wait_freed(&control, 100000);
        count(EVENT_waited);
    }
    shmc_owner_reclaim(&owner, true);
}

static void own(int sweep_fd)
{
    for (uint64_t step = 0; step < steps; step++) {
        bool room = true;
        shmc_owner_reclaim(&owner, draw(&pace, 8) == 0);
        uint64_t what = draw(&pace, 16);
        if (live_count == SLOTS) {
            room = false;
        } else if (what < 10 || live_count == 0) {
            room = publish();
        } else if (what < 12) {
            room = publish_again();
        } else if (what < 14) {
            look_at_own();
        } else if (what < 15) {
            withdraw((unsigned)draw(&pace, live_count));
        } else {
            usleep((useconds_t)draw(&pace, 50));
        }
        if (!room && live_count != 0) {
            make_room(sweep_fd);
        }
    }
}

/* With all readers gone or dead. */
static void close_down(int sweep_fd)
{
    static const char *const names[] = {
#define EVENT(name) #name,
        EVENTS(EVENT)
#undef EVENT
    };
    sweep(sweep_fd);
    for (unsigned round = 0; round < 2 * SLOTS; round++) {
        for (unsigned i = live_count; i > 0; i--) {
            withdraw(i - 1);
        }
        shmc_owner_reclaim(&owner, true);
    }
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        uint64_t word = shmc_seq_load(&control.words[slot]);
        if ((word & SHMC_CLAIMS) != 0) {
            fail("a claim is left", slot, shmc_relaxed_load(&control.records[slot].generation), word);
        }
    }
    if (owner.used_bytes != 0 || owner.free_slot_count != SLOTS || owner.blocks.free_bytes != SEGMENT_BYTES) {
        fail("bytes are left", 0, owner.generation, owner.used_bytes);
    }
    for (unsigned event = 0; event < EVENT_COUNT && steps >= 5000; event++) {
        if (shmc_relaxed_load(&counts[event]) == 0) { /* else it would look good without having looked */
            printf("claims_check: none was %s in %llu steps\n", names[event], (unsigned long long)steps);
            exit(1);
        }
    }
}

int main(int argc, char **argv)
{
    const struct shmc_control_config config = {
        .arena_id = 1, .host = 1, .max_bytes = SEGMENT_BYTES, .slot_count = SLOTS};
    pthread_t threads[SEATS];
    struct shmc_detail detail;
    unsigned index;
    control_fd = memfd_create("claims_check", MFD_CLOEXEC);
    int data_fd = memfd_create("claims_check data", MFD_CLOEXEC), lock_fd = open_control(), sweep_fd = open_control();
    if (argc != 3 || data_fd < 0 || !shmc_peer_lock(lock_fd, SHMC_OWNER) ||
        shmc_member_create(&owner_member, control_fd, lock_fd, &config) != SHMC_OK ||
        shmc_owner_init(&owner, &owner_member) != SHMC_OK ||
        shmc_owner_prepare_segment(data_fd, SEGMENT_BYTES, &data) != SHMC_OK ||
        shmc_owner_add_segment(&owner, SEGMENT, data, SEGMENT_BYTES, &index, &detail) != SHMC_OK) {
        return 2;
    }
    control = owner_member.control;
    seed = strtoull(argv[1], NULL, 10);
    steps = strtoull(argv[2], NULL, 10);
    pace = mix(seed + SEATS);
    known = calloc(steps + 2, sizeof *known);
    for (size_t seat = 0; seat < SEATS; seat++) {
        if (known == NULL || pthread_create(&threads[seat], NULL, read_all, (void *)seat) != 0) {
            return 2;
        }
    }
    own(sweep_fd);
    shmc_relaxed_store(&stop, 1);
    for (unsigned seat = 0; seat < SEATS; seat++) {
        pthread_join(threads[seat], NULL);
    }
    close_down(sweep_fd);
    free(known);
    close(sweep_fd);
    close(lock_fd);
    puts("claims_check: ok");
    return 0;
}
