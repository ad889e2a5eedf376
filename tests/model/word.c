/* The slot word, messages, and the promises that the specification keeps book of. No process reads a promise. */
#include "protocol.h"

#include <stdlib.h>
#include <string.h>

static const char REVOKED_EARLY[] = "G4: a passed-on grant was revoked before a full deadline";
static const char REUSED_LEASED[] = "G2: reused while a live process has a lease";
static const char REUSED_PROMISED[] = "G2: reused while a promised handle is on its way to a live process";

unsigned grantee_of(const struct state *st, unsigned slot, unsigned byte)
{
    return st->grantee[slot] >> 2 * (byte - 1) & 3u;
}

void grantee_set(struct state *st, unsigned slot, unsigned byte, unsigned p)
{
    unsigned shift = 2 * (byte - 1);
    st->grantee[slot] = (uint8_t)((st->grantee[slot] & ~(3u << shift)) | p << shift);
}

/* fetch_and: whoever clears a grant bit also ends what was known about it. */
void word_clear(struct state *st, unsigned slot, unsigned bits)
{
    st->word[slot] &= (uint8_t)~bits;
    for (unsigned byte = 1; byte < BYTES; byte++)
        if (bits & GRANT(byte))
            grantee_set(st, slot, byte, 0);
}

void messages_sort(struct state *st)
{
    for (unsigned i = 1; i < MESSAGES; i++)
        for (unsigned k = i; k > 0 && st->msgs[k - 1] < st->msgs[k]; k--) {
            uint8_t msg = st->msgs[k];
            st->msgs[k] = st->msgs[k - 1];
            st->msgs[k - 1] = msg;
        }
}

void message_send(struct state *st, unsigned slot, unsigned gen, unsigned target, unsigned kind)
{
    if (!is_alive(st, target))
        return;
    for (unsigned i = 0; i < MESSAGES; i++)
        if (!st->msgs[i]) {
            st->msgs[i] = MSG(gen, slot, target, kind);
            return;
        }
    fprintf(stderr, "configuration %s has more messages in flight than the model can hold\n", world.config->name);
    exit(2);
}

/* The i-th handle that may be promised: in flight, or in the hand of a process. NULL past the last. */
static uint8_t *handle_at(struct state *st, unsigned i)
{
    if (i < MESSAGES)
        return &st->msgs[i];
    return i < MESSAGES + PROCS ? &st->proc[i - MESSAGES].msg : NULL;
}

static void set_kind(uint8_t *msg, unsigned kind)
{
    *msg = (uint8_t)((*msg & 0x3F) | kind << 6);
}

static bool is_of(uint8_t msg, unsigned slot, unsigned gen)
{
    return msg && msg_slot(msg) == slot && msg_gen(msg) == gen;
}

/* A deadline begins: what is on its way now will have had a full one when it passes. */
void promises_restart(struct state *st, unsigned slot)
{
    uint8_t *msg;
    for (unsigned i = 0; (msg = handle_at(st, i)); i++)
        if (is_of(*msg, slot, st->gen[slot]) && msg_kind(*msg) == FRESH)
            set_kind(msg, PROMISED);
}

/* A deadline has passed and the owner takes the claims away. */
const char *promises_revoke(struct state *st, unsigned slot)
{
    const char *broken = NULL;
    uint8_t *msg;
    for (unsigned i = 0; (msg = handle_at(st, i)); i++) {
        if (!is_of(*msg, slot, st->gen[slot]))
            continue;
        if (msg_kind(*msg) == FRESH && is_alive(st, msg_target(*msg)))
            broken = REVOKED_EARLY;
        set_kind(msg, LATE);
    }
    return broken;
}

/* p counts as one of the n readers, also if it dies at once. When all n have come, nobody else is promised
 * anything. */
void promises_took(struct state *st, unsigned slot, unsigned p)
{
    uint8_t *msg;
    if (st->taken[slot] & 1u << p || st->taken[slot] < 0x10)
        return;
    st->taken[slot] = (uint8_t)((st->taken[slot] | 1u << p) - 0x10);
    if (st->taken[slot] >= 0x10)
        return;
    for (unsigned i = 0; (msg = handle_at(st, i)); i++)
        if (is_of(*msg, slot, st->gen[slot]) && msg_kind(*msg) == OF_ANON)
            set_kind(msg, LATE);
}

/* p is the peer on that byte, and stays. */
bool is_peer(const struct state *st, unsigned p, unsigned byte)
{
    return st->proc[p].byte == byte && st->proc[p].next < TAKE_TOKEN;
}

/* p leaves: nothing is promised to it any more. */
void promises_leave(struct state *st, unsigned p)
{
    uint8_t *msg;
    for (unsigned i = 0; (msg = handle_at(st, i)); i++)
        if (*msg && msg_target(*msg) == p)
            set_kind(msg, LATE);
}

/* p attached with a handle that nothing promised any more and consumed its grant: a peer has one grant a slot, not
 * one a handle, so a promised one on its way to p is promised no longer, unless the trustee stands in. */
void promises_used_by_late(struct state *st, unsigned slot, unsigned gen, unsigned p)
{
    uint8_t *msg;
    if (!has_joined(st, p) || !st->proc[p].byte || !(st->word[slot] & GRANT(st->proc[p].byte)) ||
        st->word[slot] & TRUST)
        return;
    for (unsigned i = 0; (msg = handle_at(st, i)); i++)
        if (is_of(*msg, slot, gen) && msg_target(*msg) == p && msg_kind(*msg) >= PROMISED)
            set_kind(msg, LATE);
}

static bool is_promised(uint8_t msg, const struct state *st)
{
    return msg && msg_kind(msg) != LATE && is_alive(st, msg_target(msg));
}

/* What the owner's decision to reuse a slot breaks; asked before the generation is written. */
const char *reuse_of_slot(const struct state *st, unsigned slot)
{
    const uint8_t *msg;
    for (unsigned p = 0; p < PROCS; p++)
        if (st->proc[p].lease[slot])
            return REUSED_LEASED;
    for (unsigned i = 0; (msg = handle_at((struct state *)st, i)); i++)
        if (is_promised(*msg, st) && msg_slot(*msg) == slot)
            return REUSED_PROMISED;
    return NULL;
}

/* The same for a block, which two slots may name; asked before the payload is written. */
const char *reuse_of_block(const struct state *st, unsigned block)
{
    const uint8_t *msg;
    for (unsigned p = 0; p < PROCS; p++)
        for (unsigned slot = 0; slot < SLOTS; slot++) {
            unsigned gen = st->proc[p].lease[slot] & 7u;
            if (gen && st->origin[gen - 1] >> 4 == block)
                return REUSED_LEASED;
        }
    for (unsigned i = 0; (msg = handle_at((struct state *)st, i)); i++)
        if (is_promised(*msg, st) && st->origin[msg_gen(*msg) - 1] >> 4 == block)
            return REUSED_PROMISED;
    return NULL;
}

/* SIGKILL: what was private is gone, locks drop, what was sent to it is lost. Shared words stay as they are. */
void process_end(struct state *st, unsigned p)
{
    /* An owner that dies before it has looked again leaves grants that nobody stands by, in an arena that ends. */
    if (st->proc[p].next >= PUB_EXCHANGE && st->proc[p].next <= PUB_CLEAR_2)
        st->grantee[msg_slot(st->proc[p].msg)] = 0;
    memset(&st->proc[p], 0, sizeof st->proc[p]);
    st->proc[p].byte = DEAD;
    for (unsigned byte = 0; byte < BYTES; byte++)
        if (st->lock[byte] == p)
            st->lock[byte] = NO_LOCK;
    for (unsigned i = 0; i < MESSAGES; i++)
        if (st->msgs[i] && msg_target(st->msgs[i]) == p)
            st->msgs[i] = 0;
}
