/* What must hold in every state, and what must be possible from every state in which nobody is in the middle of
 * something.
 *
 * G1 and the reuse part of G2 are looked at in every state and step. G3 and G4 are claims about what the survivors
 * can still do: wherever all are idle, they are made to do it on a copy of the state, with the protocol's own steps.
 */
#include "protocol.h"

#include <string.h>

/* Every live lease sees the bytes of its handle, at any time. */
static const char *check_content(const struct state *st)
{
    for (unsigned p = 0; p < PROCS; p++)
        for (unsigned slot = 0; slot < SLOTS; slot++) {
            unsigned gen = st->proc[p].lease[slot] & 7u;
            if (!gen || (p == OWNER && st->proc[p].next != IDLE))
                continue;
            unsigned origin = st->origin[gen - 1];
            if (st->payload[origin >> 4] != (origin & 7u))
                return "G1: a lease sees other bytes than its handle names";
        }
    return NULL;
}

static bool all_idle(const struct state *st)
{
    for (unsigned p = 0; p < PROCS; p++)
        if (is_alive(st, p) && st->proc[p].next != IDLE)
            return false;
    return true;
}

/* With everybody idle, a hold bit is set exactly where a lease is, and a clean byte has left nothing. */
static const char *check_bits(const struct state *st)
{
    for (unsigned slot = 0; slot < world.config->slots; slot++) {
        for (unsigned p = 0; p < PROCS; p++) {
            if (!has_joined(st, p))
                continue;
            bool held = st->word[slot] & HOLD(st->proc[p].byte);
            if (held && !st->proc[p].lease[slot])
                return "G4: a live process has a hold without a lease";
            if (!held && st->proc[p].lease[slot])
                return "G2: a live process has a lease without a hold";
        }
        for (unsigned byte = 1; byte < BYTES; byte++)
            if (st->lock[byte] == NO_LOCK && st->token[byte] == TOKEN_FREE &&
                (st->word[slot] & HOLD(byte) || (st->word[slot] & CLAIMS && st->took[slot] & 1u << byte)))
                return "G3: a byte was left clean, but not its bits";
    }
    return NULL;
}

static void run_to_idle(struct state *st, unsigned p)
{
    struct explore_edge edge = {0};
    while (st->proc[p].next != IDLE)
        advance(st, p, &edge);
}

/* A survivor sweeps every dead peer's byte. Returns false when there is no survivor. */
static bool sweep_all(struct state *st)
{
    struct explore_edge edge = {0};
    unsigned p = 0;
    while (p < PROCS && !has_joined(st, p))
        p++;
    for (unsigned byte = 1; byte < BYTES && p < PROCS; byte++)
        if (st->token[byte] != TOKEN_FREE && st->lock[byte] == NO_LOCK && takeover_begin(st, p, byte, SWEEP, &edge))
            run_to_idle(st, p);
    return p < PROCS;
}

/* Where every handle has arrived, nobody has died or left and all leases are dropped, no deadline is needed: the slot
 * is free, unless the trustee had to stand in for two handles on their way to one peer. */
static const char *check_prompt(const struct state *st)
{
    if (st->msgs[0] || st->deaths || st->leaves) /* sorted: the first is 0 only when all are */
        return NULL;
    for (unsigned slot = 0; slot < world.config->slots; slot++) {
        unsigned word = st->word[slot];
        if (word & CLAIMS && !(word & (ALL_HOLDS | TRUST)))
            return "G4: every handle has arrived, but the slot waits for a deadline";
    }
    return NULL;
}

/* After the sweeps no claim is left of the dead: no hold, and no grant that somebody set and stood by. A grant whose
 * setter died, or gave up because the target had changed, is left to the deadline: see README.md. */
static const char *check_swept(const struct state *st)
{
    for (unsigned slot = 0; slot < world.config->slots; slot++)
        for (unsigned byte = 0; byte < BYTES; byte++) {
            if (st->word[slot] & HOLD(byte) && st->lock[byte] == NO_LOCK && byte)
                return "G3: a hold of a dead process is left after the sweep";
            unsigned p = byte ? grantee_of(st, slot, byte) : 0;
            if (p && st->proc[p].byte != byte && st->word[slot] & GRANT(byte))
                return "G3: a grant to a dead incarnation is left after the sweep";
        }
    return NULL;
}

/* All handles that are still on their way are lost, all leases dropped, all deadlines pass, a group with grants that
 * have none is closed: the owner gets every slot. */
static const char *check_reclaimed(struct state *st)
{
    struct explore_edge edge = {0};
    memset(st->msgs, 0, sizeof st->msgs);
    for (unsigned p = 0; p < PROCS; p++)
        for (unsigned slot = 0; slot < world.config->slots; slot++)
            while (st->proc[p].lease[slot])
                release(st, p, slot, &edge);
    for (unsigned slot = 0; slot < world.config->slots; slot++) {
        for (unsigned deadlines = 0; deadlines < 2; deadlines++)
            revoke(st, slot, &edge);
        if (st->word[slot] & CLAIMS)
            return "G4: with everything lost and every deadline passed, a slot is not free";
    }
    return NULL;
}

const char *check_state(const void *state)
{
    const struct state *st = state;
    const char *broken = check_content(st);
    if (broken || !all_idle(st))
        return broken;
    broken = check_bits(st);
    if (!broken)
        broken = check_prompt(st);
    if (broken)
        return broken;
    struct state end = *st;
    if (sweep_all(&end))
        broken = check_swept(&end);
    if (!broken && is_alive(&end, OWNER))
        broken = check_reclaimed(&end);
    return broken;
}
