/* What a peer that died leaves claimed is ended by the owner or by a sweeper: takeover.c has the steps for slots; here it
 * matters for the marks, without which a segment is given back, and for the scrubber's own death. */
#include "arena.h"

static uint8_t *next_of(struct state *st, unsigned p)
{
    return p == OWNER ? &st->next : &st->sweeper[p - SWEEPER_1].next;
}

static bool has_left_something(const struct state *st)
{
    bool marked = (st->mark[0] | st->mark[1]) & PINNED;
    return st->peer_ready || st->word || (marked && arena_world.bug != SCRUB_FORGETS_MARKS);
}

/* The reader's byte is free, and it was ready or has claims left. */
bool scrub_begin(struct state *st, unsigned p, struct explore_edge *edge)
{
    if (is_alive(st, READER) || st->peer_lock != NOBODY || st->ready == NO_FILE || !has_left_something(st))
        return false;
    edge->action = SCRUB_LOCK;
    st->peer_lock = (uint8_t)p;
    *next_of(st, p) = SCRUB_READY;
    return true;
}

void scrub_step(struct state *st, unsigned p, struct explore_edge *edge)
{
    uint8_t *next = next_of(st, p);
    edge->action = *next;
    switch (*next) {
    case SCRUB_READY:
        st->peer_ready = 0;
        *next = SCRUB_WORD;
        break;
    case SCRUB_WORD:
        st->word = 0;
        *next = SCRUB_MARK;
        break;
    case SCRUB_MARK:
        for (unsigned place = 0; place < PLACES; place++)
            st->mark[place] &= (uint8_t)~PINNED;
        *next = SCRUB_UNLOCK;
        break;
    default: /* SCRUB_UNLOCK */
        st->peer_lock = NOBODY;
        *next = IDLE;
    }
}
