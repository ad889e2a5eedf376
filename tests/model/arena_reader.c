/* What a reader does: join, attach, map, release; and pin the pages of a segment that it has mapped. */
#include "arena.h"

#include <string.h>

static void set_mapped(struct state *st, unsigned number, unsigned file_plus)
{
    unsigned shift = 2 * (number - 1);
    st->reader.mapped = (uint8_t)((st->reader.mapped & ~(3u << shift)) | file_plus << shift);
}

static unsigned number_of(const struct state *st, unsigned gen)
{
    return st->origin[gen - 1] >> 4;
}

static void done(struct state *st)
{
    st->reader.next = IDLE;
    st->reader.gen = st->reader.began_marked = st->reader.opened = st->reader.file = 0;
}

/* The answer is ArenaGoneError. */
static void gone(struct state *st, struct explore_edge *edge)
{
    if (!st->ended)
        edge->broken = "A7: attach says that an arena is gone that nobody has marked";
    done(st);
}

static void got(struct state *st, unsigned file_plus, struct explore_edge *edge)
{
    if (st->reader.began_marked)
        edge->broken = "A7: attach succeeds in an arena that was marked as ended before";
    unsigned gen = st->reader.gen;
    st->reader.leased = (uint8_t)file_plus;
    done(st);
    st->reader.gen = (uint8_t)gen;
}

/* A membership that is no good any more is made again, once; that is when the answer is found. Its mappings and pins go
 * with it. */
static void join_again(struct state *st)
{
    st->reader.joined = st->reader.mapped = st->reader.pinned = st->peer_ready = 0;
    st->peer_lock = NOBODY;
    for (unsigned place = 0; place < PLACES; place++)
        st->mark[place] &= (uint8_t)~PINNED;
    st->reader.next = JOIN_OPEN;
}

static void look_at_state(struct state *st)
{
    bool ended = st->ended && arena_world.bug != ATTACH_SKIPS_STATE;
    if (ended)
        join_again(st);
    else
        st->reader.next = ATTACH_PIN;
}

bool reader_attach(struct state *st, struct explore_edge *edge)
{
    if (!st->reader.handle || st->reader.leased)
        return false;
    st->reader.gen = st->reader.handle;
    st->reader.handle = 0;
    st->reader.began_marked = st->ended;
    st->reader.next = st->reader.joined ? ATTACH_STATE : JOIN_OPEN;
    reader_step(st, edge);
    return true;
}

void reader_release(struct state *st, struct explore_edge *edge)
{
    edge->action = RELEASE;
    st->word &= (uint8_t)~HOLD;
    st->reader.leased = st->reader.gen = 0;
}

static void join_step(struct state *st, struct explore_edge *edge)
{
    switch (st->reader.next) {
    case JOIN_OPEN:
        st->reader.file = st->control_name;
        st->reader.next = JOIN_OPEN_LOCK;
        if (st->control_name == NO_FILE)
            gone(st, edge);
        break;
    case JOIN_OPEN_LOCK:
        st->reader.next = st->control_name == st->reader.file ? JOIN_MAGIC : JOIN_OPEN;
        break;
    case JOIN_MAGIC:
        if (st->ready != st->reader.file)
            edge->broken = "A6: the arena of a handle has no magic";
        st->reader.next = JOIN_STATE;
        break;
    case JOIN_STATE:
        st->reader.next = JOIN_LOCK;
        if (st->ended)
            gone(st, edge);
        break;
    default: /* JOIN_LOCK */
        st->reader.joined = st->peer_ready = 1;
        st->peer_lock = READER;
        st->reader.file = 0;
        st->reader.next = ATTACH_STATE;
    }
}

/* One step of what the slot model has in five: the hold is set only on claims of this generation. */
static void take_hold(struct state *st, struct explore_edge *edge)
{
    unsigned number = number_of(st, st->reader.gen);
    if (st->gen != st->reader.gen || !st->word) {
        done(st);
        return;
    }
    st->word = HOLD;
    if (mapped_file(st, number))
        got(st, mapped_file(st, number), edge);
    else
        st->reader.next = ATTACH_OPEN;
}

static void forget_retired(struct state *st)
{
    for (unsigned number = 1; number <= FILES; number++)
        if (st->number[0] != number && st->number[1] != number)
            set_mapped(st, number, 0);
}

static void map_opened(struct state *st, struct explore_edge *edge)
{
    unsigned file = st->reader.opened;
    if (!(st->pages[file] & RESERVED))
        edge->broken = "A6: a segment is mapped that has no length yet";
    set_mapped(st, number_of(st, st->reader.gen), file + 1);
    got(st, file + 1, edge);
}

static void attach_step(struct state *st, struct explore_edge *edge)
{
    unsigned named;
    switch (st->reader.next) {
    case ATTACH_STATE:
        look_at_state(st);
        break;
    case ATTACH_PIN:
        take_hold(st, edge);
        break;
    case ATTACH_OPEN:
        named = st->data_name[number_of(st, st->reader.gen) - 1];
        st->reader.opened = named == NO_FILE ? 0 : (uint8_t)named;
        st->reader.next = named == NO_FILE ? ATTACH_FAIL : ATTACH_FORGET;
        if (named == NO_FILE && !st->ended)
            edge->broken = "A7: a promised block's segment is gone from an arena that nobody has marked";
        break;
    case ATTACH_FAIL:
        st->word &= (uint8_t)~HOLD;
        join_again(st);
        break;
    case ATTACH_FORGET:
        forget_retired(st);
        st->reader.next = ATTACH_MAP;
        break;
    default: /* ATTACH_MAP */
        map_opened(st, edge);
    }
}

/* ---- pin: register the pages of a mapped segment with a driver, before any block is attached -------------------- */

bool reader_pin(struct state *st, unsigned number, struct explore_edge *edge)
{
    unsigned place = 0;
    while (place < PLACES && st->number[place] != number)
        place++;
    edge->action = PIN_FIND;
    if (!mapped_file(st, number) || st->reader.pinned || place == PLACES)
        return false;
    st->reader.place = (uint8_t)place;
    st->reader.pin = (uint8_t)number;
    st->reader.next = PIN_MARK;
    return true;
}

void reader_unpin(struct state *st, struct explore_edge *edge)
{
    edge->action = UNPIN;
    st->mark[st->reader.place] &= (uint8_t)~PINNED;
    st->reader.pinned = st->reader.place = 0;
}

static void pin_step(struct state *st)
{
    unsigned place = st->reader.place;
    switch (st->reader.next) {
    case PIN_MARK:
        st->reader.next = PIN_LOOK_AGAIN;
        if (st->mark[place] & RETIRED)
            break;
        st->mark[place] |= PINNED;
        if (arena_world.bug != PIN_LOOKS_ONCE)
            return;
        st->reader.pinned = (uint8_t)mapped_file(st, st->reader.pin);
        break;
    case PIN_LOOK_AGAIN:
        if (st->number[place] != st->reader.pin) {
            st->reader.next = PIN_UNDO;
            return;
        }
        st->reader.pinned = (uint8_t)mapped_file(st, st->reader.pin);
        break;
    default: /* PIN_UNDO */
        st->mark[place] &= (uint8_t)~PINNED;
    }
    st->reader.next = IDLE;
    st->reader.pin = 0;
    if (!st->reader.pinned)
        st->reader.place = 0;
}

void reader_step(struct state *st, struct explore_edge *edge)
{
    unsigned step = st->reader.next;
    edge->action = (uint8_t)step;
    if (step < ATTACH_STATE)
        join_step(st, edge);
    else if (step < RELEASE)
        attach_step(st, edge);
    else
        pin_step(st);
}
