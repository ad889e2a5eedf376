/* Join, sweep and leave: one routine that ends an incarnation of a byte.
 *
 * Order: not ready, incarnation raised, scrub, then ready (join) or clean (sweep, leave). Not ready comes before the
 * raise so that nobody can read the new incarnation together with the old peer's token; the raise comes before the
 * scrub so that whoever set a grant that the scrub did not see finds out when it reads the incarnation again.
 */
#include "protocol.h"

/* Registers: target = byte | why << 2 | slot << 4; flags = what the look at the word saw. */
enum { SAW_BITS = 1 };

static unsigned byte_of(const struct proc *me)
{
    return me->target & 3u;
}
static unsigned why_of(const struct proc *me)
{
    return me->target >> 2 & 3u;
}
static unsigned slot_of(const struct proc *me)
{
    return me->target >> 4;
}

static const uint8_t law[] = {TAKE_TOKEN, TAKE_INC, TAKE_SEE, TAKE_FREE, TAKE_UNLOCK, IDLE};
static const uint8_t inc_last[] = {TAKE_TOKEN, TAKE_SEE, TAKE_INC, TAKE_FREE, TAKE_UNLOCK, IDLE};
static const uint8_t still_ready[] = {TAKE_INC, TAKE_SEE, TAKE_FREE, TAKE_UNLOCK, IDLE};
static const uint8_t no_inc[] = {TAKE_TOKEN, TAKE_SEE, TAKE_FREE, TAKE_UNLOCK, IDLE};
static const uint8_t scrub_last[] = {TAKE_TOKEN, TAKE_INC, TAKE_UNLOCK, TAKE_SEE, IDLE};

static const uint8_t *order_of(const struct proc *me)
{
    if (world.bug == INC_AFTER_SCRUB)
        return inc_last;
    if (world.bug == READY_DURING_SCRUB)
        return still_ready;
    if (world.bug == LEAVE_KEEPS_INC && why_of(me) == LEAVE)
        return no_inc;
    return world.bug == SCRUB_AFTER_UNLOCK && why_of(me) == SWEEP ? scrub_last : law;
}

static void finish(struct state *st, unsigned p)
{
    struct proc *me = &st->proc[p];
    if (why_of(me) == JOIN)
        me->byte = (uint8_t)byte_of(me);
    if (why_of(me) == LEAVE)
        me->byte = NO_BYTE;
    me->next = IDLE;
    me->target = 0;
}

static void go_on(struct state *st, unsigned p, unsigned done)
{
    struct proc *me = &st->proc[p];
    const uint8_t *order = order_of(me);
    if (done != IDLE) {
        while (*order != done)
            order++;
        order++;
    }
    me->next = *order;
    if (me->next == TAKE_FREE && why_of(me) == JOIN)
        me->next = TAKE_READY;
    if (me->next == IDLE)
        finish(st, p);
}

/* Takes the byte's lock; it is free only when nobody lives there. Leaving, one has it already. */
bool takeover_begin(struct state *st, unsigned p, unsigned byte, enum takeover why, struct explore_edge *edge)
{
    struct proc *me = &st->proc[p];
    edge->action = why == JOIN ? JOIN_LOCK : why == SWEEP ? SWEEP_LOCK : LEAVE_BEGIN;
    edge->detail = (uint8_t)byte;
    if (why != LEAVE && st->lock[byte] != NO_LOCK && !(why == SWEEP && world.bug == SWEEP_WITHOUT_LOCK))
        return false;
    if (why == LEAVE) {
        st->leaves++;
        promises_leave(st, p);
    } else if (world.bug != SWEEP_WITHOUT_LOCK || why == JOIN)
        st->lock[byte] = (uint8_t)p;
    me->target = (uint8_t)(byte | (unsigned)why << 2);
    go_on(st, p, IDLE);
    return true;
}

/* The next slot, or what comes after the scrub. */
static void next_slot(struct state *st, unsigned p)
{
    struct proc *me = &st->proc[p];
    me->flags = 0;
    if (slot_of(me) + 1 < world.config->slots) {
        me->target = (uint8_t)(me->target + 0x10);
        me->next = TAKE_SEE;
        return;
    }
    me->target &= 0x0F;
    go_on(st, p, TAKE_SEE);
}

/* T is dropped only under the dead peer's own hold: it pins the generation, so took and T are of one publication. */
static void scrub_step(struct state *st, unsigned p)
{
    struct proc *me = &st->proc[p];
    unsigned byte = byte_of(me), slot = slot_of(me), word = st->word[slot];
    bool pinned = word & HOLD(byte) || world.bug == EMPTY_T_UNPINNED;
    switch (me->next) {
    case TAKE_SEE:
        me->flags = word & (HOLD(byte) | GRANT(byte)) ? SAW_BITS : 0;
        me->next = pinned && word & ANON ? TAKE_TOOK_SEE : TAKE_MARK;
        if (!(word & CLAIMS))
            next_slot(st, p); /* free: the next publication starts with a took of its own */
        break;
    case TAKE_TOOK_SEE:
        me->next = st->took[slot] < 0x10 ? TAKE_T : TAKE_MARK;
        break;
    case TAKE_T:
        word_clear(st, slot, ANON);
        me->next = TAKE_MARK;
        break;
    case TAKE_MARK:
        st->took[slot] &= (uint8_t)~(1u << byte);
        me->next = TAKE_WORD;
        if (!(me->flags & SAW_BITS))
            next_slot(st, p);
        break;
    default: /* TAKE_WORD */
        word_clear(st, slot, HOLD(byte) | (byte && world.bug != SCRUB_SKIPS_GRANTS ? GRANT(byte) : 0));
        next_slot(st, p);
    }
}

void takeover_step(struct state *st, unsigned p, struct explore_edge *edge)
{
    struct proc *me = &st->proc[p];
    unsigned byte = byte_of(me), step = me->next;
    edge->slot = (uint8_t)slot_of(me);
    edge->detail = (uint8_t)byte;
    switch (step) {
    case TAKE_TOKEN:
        st->token[byte] = world.bug == SCRUB_LOOKS_CLEAN ? TOKEN_FREE : TOKEN_SCRUBBING;
        break;
    case TAKE_INC:
        st->inc[byte]++;
        break;
    case TAKE_READY:
        st->token[byte] = (uint8_t)p;
        finish(st, p);
        return;
    case TAKE_FREE:
        st->token[byte] = TOKEN_FREE;
        go_on(st, p, TAKE_FREE);
        return;
    case TAKE_UNLOCK:
        st->lock[byte] = NO_LOCK;
        break;
    default:
        scrub_step(st, p);
        return;
    }
    go_on(st, p, step);
}
