/* What every holder does: attach, release, pass on. Reader, newcomer and owner run the same steps. */
#include "protocol.h"

/* Registers of an attach: msg = the handle; flags = what the pin saw. */
enum { SAW_ANON = 1, SAW_GRANT = 2, NOBODY_LEFT = 4, WAS_LATE = 8 };

static const uint8_t law[] = {ATT_LOOK, ATT_PIN, ATT_LOOK_AGAIN, ATT_TOOK, ATT_T, ATT_GRANT, IDLE};
static const uint8_t grant_first[] = {ATT_LOOK, ATT_GRANT, ATT_PIN, ATT_LOOK_AGAIN, ATT_TOOK, ATT_T, IDLE};
static const uint8_t anon_first[] = {ATT_LOOK, ATT_TOOK, ATT_T, ATT_PIN, ATT_LOOK_AGAIN, ATT_GRANT, IDLE};

static bool is_needed(const struct proc *me, unsigned step)
{
    switch (step) {
    case ATT_LOOK_AGAIN:
        return world.bug != NO_SECOND_LOOK;
    case ATT_TOOK:
        return me->flags & SAW_ANON;
    case ATT_T:
        return me->flags & NOBODY_LEFT;
    case ATT_GRANT:
        return me->byte &&
               (me->flags & SAW_GRANT || world.bug == UNSEEN_GRANT_CONSUMED || world.bug == GRANT_BEFORE_HOLD);
    default:
        return true;
    }
}

static void forget(struct proc *me)
{
    me->next = me->msg = me->flags = me->target = me->inc = 0;
}

static void stale(struct proc *me, struct explore_edge *edge)
{
    if (msg_kind(me->msg) != LATE)
        edge->broken = "G2: a promised handle was refused as stale";
    forget(me);
}

/* The lease is given out. From its beginning on the specification asks that the payload is what the handle named. */
static void got(struct state *st, unsigned p)
{
    struct proc *me = &st->proc[p];
    unsigned slot = msg_slot(me->msg), gen = msg_gen(me->msg);
    if (!me->lease[slot])
        me->lease[slot] = (uint8_t)(gen | 1u << 4);
    if (world.config->reattach && !(me->flags & WAS_LATE))
        me->memo = MSG(gen, slot, p, LATE);
    forget(me);
}

/* What is consumed later is decided by the one word that was read with the hold set, or that set it. What comes after
 * it is for another handle. */
static void decide(struct proc *me, unsigned seen)
{
    if (msg_kind(me->msg) == LATE)
        me->flags |= WAS_LATE;
    if (seen & ANON && world.bug != T_BEFORE_HOLD)
        me->flags |= SAW_ANON;
    if (me->byte && seen & GRANT(me->byte))
        me->flags |= SAW_GRANT;
}

static void go_on(struct state *st, unsigned p, unsigned done)
{
    struct proc *me = &st->proc[p];
    const uint8_t *order = world.bug == GRANT_BEFORE_HOLD ? grant_first : world.bug == T_BEFORE_HOLD ? anon_first : law;
    while (*order != done)
        order++;
    do
        order++;
    while (!is_needed(me, *order));
    me->next = *order;
    if (me->next == IDLE)
        got(st, p);
}

/* In a process that holds the slot already: count, then consume as after a pin. */
static void attach_local(struct state *st, unsigned p, struct explore_edge *edge)
{
    struct proc *me = &st->proc[p];
    unsigned slot = msg_slot(me->msg), gen = msg_gen(me->msg);
    edge->action = ATT_LOCAL;
    me->lease[slot] = (uint8_t)(me->lease[slot] + 0x10);
    if (gen != (me->lease[slot] & 7u))
        edge->broken = "G1: a lease on other bytes than the handle names";
    decide(me, st->word[slot] & (world.bug == LOCAL_SKIPS_TOOK ? ~ANON : ~0u));
    me->msg = MSG(gen, slot, p, LATE); /* the hold is there: it needs no promise any more */
    go_on(st, p, ATT_LOOK_AGAIN);
}

void attach_begin(struct state *st, unsigned p, uint8_t msg, struct explore_edge *edge)
{
    struct proc *me = &st->proc[p];
    unsigned slot = msg_slot(msg), gen = msg_gen(msg), held = me->lease[slot] & 7u;
    edge->slot = (uint8_t)slot;
    edge->detail = (uint8_t)gen;
    me->msg = msg;
    me->flags = 0;
    if (held && (same_gen(held, gen) || world.bug == LOCAL_GEN_IGNORED)) {
        attach_local(st, p, edge);
        return;
    }
    if (held && world.bug != LOCAL_GEN_UNCHECKED) {
        edge->action = ATT_LOCAL_STALE;
        stale(me, edge);
        return;
    }
    edge->action = ATT_LOOK;
    if (world.bug == T_BEFORE_HOLD && st->word[slot] & ANON)
        me->flags |= SAW_ANON;
    /* The first look only saves a pin that would fail: that bug relies on it for correctness and leaves it out. */
    if (!same_gen(st->gen[slot], gen) && world.bug != LOCAL_GEN_UNCHECKED)
        stale(me, edge);
    else
        go_on(st, p, ATT_LOOK);
}

static void pin(struct state *st, unsigned p, struct explore_edge *edge)
{
    struct proc *me = &st->proc[p];
    unsigned slot = msg_slot(me->msg), seen = st->word[slot];
    if (!(seen & CLAIMS)) {
        stale(me, edge);
        return;
    }
    decide(me, seen);
    st->word[slot] |= (uint8_t)HOLD(me->byte);
    go_on(st, p, ATT_PIN);
}

static void mark_took(struct state *st, unsigned p)
{
    struct proc *me = &st->proc[p];
    unsigned slot = msg_slot(me->msg), mine = 1u << me->byte;
    bool counted = st->took[slot] & mine && world.bug != TOOK_TWICE;
    if (!counted && st->took[slot] >= 0x10) {
        st->took[slot] = (uint8_t)((st->took[slot] | mine) - 0x10);
        promises_took(st, slot, p);
    }
    if (st->took[slot] < 0x10)
        me->flags |= NOBODY_LEFT;
}

void attach_step(struct state *st, unsigned p, struct explore_edge *edge)
{
    struct proc *me = &st->proc[p];
    unsigned slot = msg_slot(me->msg), gen = msg_gen(me->msg), step = me->next;
    edge->slot = (uint8_t)slot;
    edge->detail = (uint8_t)gen;
    switch (step) {
    case ATT_PIN:
        pin(st, p, edge);
        return;
    case ATT_LOOK_AGAIN:
        if (!same_gen(st->gen[slot], gen) && world.bug == STALE_KEEPS_HOLD) {
            stale(me, edge);
            return;
        }
        if (!same_gen(st->gen[slot], gen)) {
            me->next = ATT_UNPIN;
            return;
        }
        me->msg = MSG(gen, slot, p, LATE); /* pinned and validated: it needs no promise any more */
        break;
    case ATT_UNPIN:
        word_clear(st, slot, HOLD(me->byte));
        stale(me, edge);
        return;
    case ATT_TOOK:
        mark_took(st, p);
        break;
    case ATT_T:
        word_clear(st, slot, ANON);
        break;
    case ATT_GRANT:
        if (me->flags & WAS_LATE)
            promises_used_by_late(st, slot, gen, p);
        word_clear(st, slot, GRANT(me->byte));
        break;
    }
    go_on(st, p, step);
}

/* The local record goes first; nobody else can see the order. */
void release(struct state *st, unsigned p, unsigned slot, struct explore_edge *edge)
{
    struct proc *me = &st->proc[p];
    edge->slot = (uint8_t)slot;
    edge->detail = me->lease[slot] & 7u;
    me->lease[slot] = (uint8_t)(me->lease[slot] - 0x10);
    edge->action = me->lease[slot] >= 0x10 ? RELEASE_COUNT : RELEASE_LAST;
    if (edge->action == RELEASE_COUNT)
        return;
    me->lease[slot] = 0;
    word_clear(st, slot, HOLD(me->byte));
}

/* Registers of a pass-on: msg = handle, its target, and what is promised once the grant is set; target = byte; inc =
 * what was read of it. */
static void pass_send(struct state *st, unsigned p)
{
    struct proc *me = &st->proc[p];
    unsigned slot = msg_slot(me->msg), target = msg_target(me->msg), kind = msg_kind(me->msg);
    if (me->target && st->word[slot] & GRANT(me->target))
        grantee_set(st, slot, me->target, target);
    if (me->target && !is_peer(st, target, me->target))
        kind = LATE;
    message_send(st, slot, msg_gen(me->msg), target, kind);
    forget(me);
}

/* p passes its lease on to the process `target`; a process without a grant bit is reached through the trustee. */
bool pass_begin(struct state *st, unsigned p, unsigned slot, unsigned target, struct explore_edge *edge)
{
    struct proc *me = &st->proc[p];
    unsigned byte = known_byte(st, target);
    if (byte == NO_BYTE && !is_alive(st, target))
        return false;
    st->passes++;
    me->msg = MSG(me->lease[slot] & 7u, slot, target, LATE);
    edge->slot = (uint8_t)slot;
    edge->detail = (uint8_t)target;
    if (!byte || byte == NO_BYTE) {
        edge->action = PASS_TRUST;
        me->msg = MSG(me->lease[slot] & 7u, slot, target, FRESH);
        st->word[slot] |= (uint8_t)(TOUCHED | (world.bug == NO_L_FOR_NEWCOMER ? 0 : TRUST));
        pass_send(st, p);
        return true;
    }
    me->target = (uint8_t)byte;
    if (world.bug == TOKEN_BEFORE_INC) {
        edge->action = PASS_TOKEN;
        if (st->token[byte] != target)
            forget(me);
        else
            me->next = PASS_INC;
        return true;
    }
    edge->action = PASS_INC;
    me->inc = st->inc[byte];
    me->next = PASS_TOKEN;
    return true;
}

/* One CAS. The trustee joins in where p's one bit could be consumed by another handle that is on its way to it. */
static void pass_grant(struct state *st, struct proc *me)
{
    unsigned slot = msg_slot(me->msg), seen = st->word[slot];
    bool two = (seen & GRANT(me->target) && world.bug != NO_L_FOR_TWO) || (seen & ANON && world.bug != NO_L_BESIDE_T);
    st->word[slot] |= (uint8_t)(GRANT(me->target) | TOUCHED | (two ? TRUST : 0));
    me->msg = MSG(msg_gen(me->msg), slot, msg_target(me->msg), FRESH);
}

void pass_step(struct state *st, unsigned p, struct explore_edge *edge)
{
    struct proc *me = &st->proc[p];
    unsigned step = me->next, slot = msg_slot(me->msg);
    bool grant_last = world.bug == GRANT_AFTER_RECHECK;
    edge->slot = (uint8_t)slot;
    edge->detail = (uint8_t)msg_target(me->msg);
    switch (step) {
    case PASS_INC:
        me->inc = st->inc[me->target];
        me->next = PASS_GRANT;
        break;
    case PASS_TOKEN:
        me->next = grant_last ? PASS_RECHECK : PASS_GRANT;
        if (st->token[me->target] != msg_target(me->msg))
            forget(me);
        break;
    case PASS_GRANT:
        pass_grant(st, me);
        me->next = PASS_RECHECK;
        if (grant_last)
            pass_send(st, p);
        break;
    case PASS_RECHECK:
        if (me->inc != st->inc[me->target]) {
            /* The grant stays: the bit may by now be another's promise to the byte's next peer. */
            if (world.bug == LOST_PASS_CLEARS)
                me->next = PASS_CLEAR;
            else
                forget(me);
        } else if (grant_last)
            me->next = PASS_GRANT;
        else
            pass_send(st, p);
        break;
    case PASS_CLEAR:
        word_clear(st, slot, GRANT(me->target));
        forget(me);
        break;
    }
}
