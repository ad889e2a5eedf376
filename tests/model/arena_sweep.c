/* What a sweeper does: list, look whether the owner is dead by taking its byte, list again, unlink. */
#include "arena.h"

static struct sweeper *sweeper_of(struct state *st, unsigned p)
{
    return &st->sweeper[p - SWEEPER_1];
}

/* It has the owner's byte of the file that it found current. */
bool sweeper_acts(const struct state *st, unsigned p)
{
    unsigned next = st->sweeper[p - SWEEPER_1].next;
    return next >= SWEEP_MARK && next <= SWEEP_CONTROL;
}

static void forget(struct sweeper *me)
{
    me->next = IDLE;
    me->file = me->listed = 0;
}

/* Control comes before data and goes after it: what was listed before this look belongs to nobody. */
static void open_control(struct state *st, struct sweeper *me)
{
    if (arena_world.bug == SWEEP_LOOKS_BEFORE_LIST && st->control_name == NO_FILE && !me->listed) {
        me->next = SWEEP_LIST;
    } else if (st->control_name != NO_FILE) {
        me->file = st->control_name;
        me->next = SWEEP_LOCK;
    } else {
        me->listed &= (uint8_t)~LISTED_CONTROL;
        me->next = me->listed && arena_world.bug != SWEEP_LEAVES_ORPHANS ? SWEEP_ORPHAN : IDLE;
    }
    if (me->next == IDLE)
        forget(me);
}

bool sweeper_begin(struct state *st, unsigned p, struct explore_edge *edge)
{
    struct sweeper *me = sweeper_of(st, p);
    if (arena_world.bug == SWEEP_LOOKS_BEFORE_LIST) {
        edge->action = SWEEP_OPEN;
        open_control(st, me);
    } else {
        edge->action = SWEEP_LIST;
        me->listed = (uint8_t)names_listed(st);
        me->next = SWEEP_OPEN;
        if (!me->listed)
            return false;
    }
    st->sweeps++;
    return true;
}

/* The records of the control segment, as if they told of every file. */
static unsigned list_records(const struct state *st, unsigned file)
{
    unsigned listed = LISTED(0);
    for (unsigned place = 0; place < PLACES && st->ready == file; place++)
        if (st->number[place])
            listed |= LISTED(st->number[place]);
    return listed;
}

static void list_again(struct state *st, unsigned p)
{
    struct sweeper *me = sweeper_of(st, p);
    if (arena_world.bug == SWEEP_BY_RECORDS)
        me->listed = (uint8_t)list_records(st, me->file);
    else if (arena_world.bug != SWEEP_LISTS_ONCE)
        me->listed = (uint8_t)names_listed(st);
    if (arena_world.bug == SWEEP_LETS_GO_EARLY)
        lock_drop(st, me->file, p);
}

/* Data first, the highest number first, control last. */
static void choose_name(struct sweeper *me)
{
    bool data = me->listed & ~LISTED(0);
    if (arena_world.bug == SWEEP_CONTROL_FIRST && me->listed & LISTED_CONTROL)
        me->next = SWEEP_CONTROL;
    else if (data)
        me->next = SWEEP_DATA;
    else
        me->next = me->listed ? SWEEP_CONTROL : SWEEP_CLOSE;
}

static void unlink_listed(struct state *st, unsigned p, struct explore_edge *edge)
{
    struct sweeper *me = sweeper_of(st, p);
    unsigned number = FILES;
    while (!(me->listed & LISTED(number)))
        number--;
    if (me->next == SWEEP_CONTROL)
        number = 0;
    edge->detail = (uint8_t)number;
    name_unlink(st, p, number, edge);
    me->listed &= (uint8_t)~LISTED(number);
}

static void take_byte(struct state *st, unsigned p)
{
    struct sweeper *me = sweeper_of(st, p);
    if (st->lock[me->file] != NOBODY) {
        forget(me);
        return;
    }
    if (arena_world.bug != SWEEP_PROBES)
        st->lock[me->file] = (uint8_t)p;
    me->next = arena_world.bug == SWEEP_CURRENT_UNCHECKED ? SWEEP_MARK : SWEEP_CURRENT;
}

void sweeper_step(struct state *st, unsigned p, struct explore_edge *edge)
{
    struct sweeper *me = sweeper_of(st, p);
    edge->action = me->next;
    if (me->next < END_STATE) {
        scrub_step(st, p, edge);
        return;
    }
    switch (me->next) {
    case SWEEP_LIST: /* a mistake's: after the look */
        me->listed = (uint8_t)(names_listed(st) & ~LISTED_CONTROL);
        me->next = me->listed ? SWEEP_ORPHAN : IDLE;
        break;
    case SWEEP_OPEN:
        open_control(st, me);
        break;
    case SWEEP_ORPHAN:
        unlink_listed(st, p, edge);
        if (!me->listed)
            forget(me);
        break;
    case SWEEP_LOCK:
        take_byte(st, p);
        break;
    case SWEEP_CURRENT:
        me->next = st->control_name == me->file ? SWEEP_MARK : SWEEP_CLOSE;
        break;
    case SWEEP_MARK:
        if (st->ready == me->file && arena_world.bug != SWEEP_UNMARKED)
            st->ended = 1;
        me->next = SWEEP_LIST_AGAIN;
        break;
    case SWEEP_LIST_AGAIN:
        list_again(st, p);
        choose_name(me);
        break;
    case SWEEP_DATA:
    case SWEEP_CONTROL:
        unlink_listed(st, p, edge);
        choose_name(me);
        break;
    default: /* SWEEP_CLOSE */
        lock_drop(st, me->file, p);
        forget(me);
    }
}
