/* Ranks as threads over one control segment: messages of random sizes through the ring, agreement on most of them, now
 * and then one who gives up. What threads share is what processes share, and a thread sanitizer sees them.
 * Usage: ring_check SEED STEPS; prints what is wrong and ends with 1, or one line and 0. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "clock.h"
#include "ring.h"

enum { RANKS = 4, MESSAGE_BYTES_MAX = 3 * SHMC_RING_PAYLOAD_BYTES * SHMC_RING_ENTRIES };

static struct shmc_control control;
static uint64_t seed, steps;
static const uint64_t tokens[RANKS] = {11, 22, 33, 44};

static void fail(const char *what, uint64_t step, uint64_t number)
{
    printf("ring_check: %s, step %llu, %llu\n", what, (unsigned long long)step, (unsigned long long)number);
    exit(1);
}

static uint64_t mix(uint64_t value)
{
    value = (value ^ value >> 31) * 0x9e3779b97f4a7c15u;
    value = (value ^ value >> 29) * 0xbf58476d1ce4e5b9u;
    return value ^ value >> 32;
}

/* The same on all ranks. */
static uint64_t size_of(uint64_t step)
{
    uint64_t draw = mix(seed + step);
    return mix(draw) % (draw % 50 == 0 ? MESSAGE_BYTES_MAX : draw % 5 == 0 ? 3 * SHMC_RING_PAYLOAD_BYTES : 300);
}

static bool is_agreed_on(uint64_t step)
{
    return mix(seed ^ step) % 4 != 0;
}

static uint64_t mask_of(uint64_t step, unsigned rank)
{
    uint64_t draw = mix(seed + step * RANKS + rank);
    return draw % 3 == 0 ? draw : 0;
}

/* A rank's own pace. */
static void dawdle(uint64_t *state)
{
    *state = mix(*state + 1);
    if (*state % 16 == 0) {
        usleep((useconds_t)(*state / 16 % 100));
    }
}

static uint64_t deadline(void)
{
    return shmc_clock_deadline(UINT64_C(30) * 1000000000u); /* nobody is that slow */
}

static void wait_for_more(struct shmc_ring *ring, uint64_t step)
{
    uint64_t end = deadline();
    (void)shmc_ring_wait(ring, end);
    if (shmc_clock_ns() >= end) { /* also where it has come true: then nobody has said so */
        fail("nobody has woken this end of the ring", step, ring->fellows.member->index);
    }
}

static void send(struct shmc_ring *ring, uint8_t *message, uint64_t step)
{
    struct shmc_detail detail;
    uint64_t size = size_of(step), done = 0;
    memset(message, (int)(step & 0xff), size);
    for (bool ended = false; !ended;) {
        enum shmc_status status = shmc_ring_put(ring, message, size, &done, &ended, &detail);
        if (status != SHMC_OK) {
            fail("put", step, status);
        }
        if (!ended) {
            wait_for_more(ring, step);
        }
    }
}

static void receive(struct shmc_ring *ring, uint8_t *message, uint64_t step)
{
    struct shmc_detail detail;
    struct shmc_ring_piece piece;
    for (bool ended = false; !ended;) {
        if (!shmc_ring_has_more(ring)) {
            wait_for_more(ring, step);
            continue;
        }
        enum shmc_status status = shmc_ring_look(ring, &piece, &detail);
        if (status == SHMC_OK && piece.message_bytes != size_of(step)) {
            fail("another message came", step, piece.message_bytes);
        }
        if (status == SHMC_OK) {
            status = shmc_ring_take(ring, &piece, message, &ended, &detail);
        }
        if (status != SHMC_OK) {
            fail("take", step, status);
        }
    }
    for (uint64_t i = 0; i < size_of(step); i++) {
        if (message[i] != (step & 0xff)) {
            fail("another byte came", step, i);
        }
    }
}

static void agree(struct shmc_fellows *fellows, uint64_t step, unsigned rank)
{
    struct shmc_ballot ballot;
    uint64_t parts = 0, ranks = 0;
    /* of what nobody asks for, noise */
    shmc_fellows_record(fellows, 2 * step, is_agreed_on(step) ? mask_of(step, rank) : ~step);
    if (!is_agreed_on(step)) {
        return;
    }
    shmc_ballot_init(&ballot, fellows, 2 * step);
    enum shmc_agreement state = shmc_ballot_look(&ballot);
    for (bool interrupted = false; state == SHMC_AGREE_PENDING;) {
        uint64_t end = deadline();
        state = shmc_ballot_wait(&ballot, end, &interrupted);
        if (shmc_clock_ns() >= end) {
            fail("nobody has woken this rank", step, rank);
        }
    }
    for (unsigned r = 0; r < RANKS; r++) {
        parts |= mask_of(step, r);
        ranks |= mask_of(step, r) != 0 ? UINT64_C(1) << r : 0;
    }
    if (state != SHMC_AGREE_REACHED || ballot.parts != parts || ballot.ranks != ranks) {
        fail("another agreement", step, ballot.parts);
    }
    if (shmc_fellows_give_up(fellows, 2 * step)) {
        fail("what was agreed on is given up", step, rank);
    }
}

static void *run(void *argument)
{
    unsigned rank = (unsigned)(size_t)argument;
    struct shmc_member member = {.control = control, .index = rank, .token = shmc_process_token()};
    struct shmc_fellows fellows;
    struct shmc_ring ring;
    struct shmc_detail detail;
    uint64_t pace = mix(seed * RANKS + rank);
    uint8_t *message = malloc(MESSAGE_BYTES_MAX);
    if (message == NULL || shmc_fellows_init(&fellows, &member, tokens, RANKS, &detail) != SHMC_OK ||
        shmc_ring_init(&ring, &member, tokens, RANKS, 0, &detail) != SHMC_OK) {
        fail("begin", 0, rank);
    }
    for (uint64_t step = 1; step <= steps; step++) {
        dawdle(&pace);
        if (rank == 0) {
            send(&ring, message, step);
        } else {
            receive(&ring, message, step);
        }
        dawdle(&pace);
        agree(&fellows, step, rank);
    }
    free(message);
    return NULL;
}

int main(int argc, char **argv)
{
    const struct shmc_control_config config = {.arena_id = 1, .host = 1, .max_bytes = 1, .slot_count = 16};
    pthread_t threads[RANKS];
    int fd = memfd_create("ring_check", MFD_CLOEXEC);
    /* once before the threads: in the module it is the GIL that keeps two from making it */
    if (argc != 3 || fd < 0 || shmc_process_token() == 0 || shmc_control_create(fd, &config, &control) != SHMC_OK) {
        return 2;
    }
    seed = strtoull(argv[1], NULL, 10);
    steps = strtoull(argv[2], NULL, 10);
    for (unsigned p = 0; p < RANKS; p++) {
        shmc_peer_take_over(&control, p, tokens[p]);
    }
    for (size_t p = 0; p < RANKS; p++) {
        if (pthread_create(&threads[p], NULL, run, (void *)p) != 0) {
            return 2;
        }
    }
    for (unsigned p = 0; p < RANKS; p++) {
        pthread_join(threads[p], NULL);
    }
    shmc_control_close(&control);
    close(fd);
    puts("ring_check: ok");
    return 0;
}
