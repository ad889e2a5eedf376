/* What must hold in every state of an arena's life, and what must be left, which is nothing, whoever dies when. */
#include "arena.h"

#include <string.h>

/* A1: nobody takes a live owner's names away. What takes one away is looked at as it happens; a control segment that
 * never had the name is seen here. */
static const char *check_owner(const struct state *st)
{
    if (st->owns && st->control_name != st->control)
        return "A1: a live owner's arena has no control segment under its name";
    return NULL;
}

static const char *check_sweepers(const struct state *st)
{
    if (sweeper_acts(st, SWEEPER_1) && sweeper_acts(st, SWEEPER_2))
        return "A2: two sweepers act on one arena at a time";
    return NULL;
}

/* A3: control is there before data and goes after it, so data without control belongs to nobody. */
static const char *check_names(const struct state *st)
{
    if (st->control_name == NO_FILE && names_listed(st) && !(st->dead & BY_HAND_BEFORE))
        return "A3: a data segment has a name, and its control segment has none";
    return NULL;
}

static const char *check_content(const struct state *st)
{
    if (!st->reader.leased)
        return NULL;
    unsigned file = st->reader.leased - 1u, origin = st->origin[st->reader.gen - 1];
    if (file != (origin & 15u))
        return "A4: a reader has mapped another file than the one that the block lies in";
    if (st->pages[file] != RESERVED || st->content[file] != st->reader.gen)
        return "A4: a lease sees other bytes than those that were published";
    return NULL;
}

/* A5: what the arena takes from the host, in segments: pages that are there, under a name or mapped by somebody. */
static const char *check_budget(const struct state *st)
{
    unsigned mapped = 0, taken = 0;
    for (unsigned number = 1; number <= FILES; number++) {
        if (mapped_file(st, number))
            mapped |= 1u << (mapped_file(st, number) - 1);
        if (st->data_name[number - 1] != NO_FILE)
            mapped |= 1u << st->data_name[number - 1];
    }
    if (st->reader.leased)
        mapped |= 1u << (st->reader.leased - 1);
    for (unsigned file = 0; file < FILES; file++)
        taken += mapped >> file & 1u && st->pages[file] == RESERVED;
    return taken > arena_world.config->max ? "A5: the segments take more than max_bytes" : NULL;
}

/* A6: whatever says that it is ready is; while the owner serves, a record with a number is of a file that is there. */
static const char *check_ready(const struct state *st)
{
    bool serves = st->owns && st->next < END_STATE;
    if (st->ready != NO_FILE && st->header != st->ready)
        return "A6: a control segment has the magic before its header";
    for (unsigned place = 0; place < PLACES && serves; place++) {
        unsigned number = st->number[place];
        if (!number)
            continue;
        unsigned file = st->data_name[number - 1];
        if (st->size[place] != number)
            return "A6: a record has a number before its size";
        if (file == NO_FILE)
            return "A6: a record names a segment whose name is gone";
        if (!(st->pages[file] & RESERVED))
            return "A6: a record names a segment whose pages were never reserved";
    }
    return NULL;
}

static const char *check_pins(const struct state *st)
{
    if (st->reader.pinned && st->pages[st->reader.pinned - 1] & PUNCHED)
        return "A8: pages are pinned that were punched";
    return NULL;
}

/* ---- what is left ----------------------------------------------------------------------------------------------- */

/* Looked at on a copy: what breaks on the way is found where it is explored. */
static void run_to_idle(struct state *st, unsigned p)
{
    struct explore_edge edge = {0};
    while (is_alive(st, p) && *arena_next(st, p) != IDLE)
        arena_advance(st, p, &edge);
}

/* One sweep by somebody who has just come. */
static void sweep_once(struct state *st)
{
    struct explore_edge edge = {0};
    st->dead &= (uint8_t)~(1u << SWEEPER_1);
    memset(&st->sweeper[0], 0, sizeof st->sweeper[0]);
    if (sweeper_begin(st, SWEEPER_1, &edge))
        run_to_idle(st, SWEEPER_1);
}

static void kill(struct state *st, unsigned first, unsigned last)
{
    for (unsigned p = first; p <= last; p++)
        if (is_alive(st, p))
            process_die(st, p);
}

/* Everybody dies now. */
static const char *left_by_the_dead(const struct state *st)
{
    struct state end = *st;
    kill(&end, OWNER, READER);
    sweep_once(&end);
    return names_listed(&end) ? "A3: everybody has died, one sweep has been, and names are left" : NULL;
}

/* The owner dies now, the sweepers go on to their end, one after the other; then one more comes. */
static const char *left_by_sweepers(const struct state *st)
{
    for (unsigned first = SWEEPER_1; first <= SWEEPER_2; first++) {
        struct state end = *st;
        kill(&end, OWNER, OWNER);
        run_to_idle(&end, first);
        run_to_idle(&end, first == SWEEPER_1 ? SWEEPER_2 : SWEEPER_1);
        sweep_once(&end);
        if (names_listed(&end))
            return "A3: all sweepers are done, one more sweep has been, and names are left";
    }
    return NULL;
}

/* Nobody lives but the owner, which goes on to the end of what it does. What it has ended needs no sweep; where it serves,
 * it can give every segment back. */
static const char *left_by_the_owner(const struct state *st)
{
    struct state end = *st;
    struct explore_edge edge = {0};
    if (!is_alive(st, OWNER))
        return NULL;
    kill(&end, SWEEPER_1, READER);
    run_to_idle(&end, OWNER);
    if (!is_alive(&end, OWNER) && names_listed(&end))
        return "A3: the owner has ended its arena, and names are left";
    if (end.owns && end.next == IDLE && scrub_begin(&end, OWNER, &edge))
        run_to_idle(&end, OWNER);
    owner_revoke(&end, &edge);
    owner_reclaim(&end, &edge);
    for (unsigned place = 0; place < PLACES && end.owns; place++) {
        if (end.file_at[place] && !owner_retire(&end, place, &edge))
            return "A3: nobody reads or pins a segment, and the owner can not give it back";
        run_to_idle(&end, OWNER);
    }
    return NULL;
}

const char *arena_check(const void *state)
{
    static const char *(*const checks[])(const struct state *) = {
        check_owner, check_sweepers, check_names,       check_content,    check_budget,
        check_ready, check_pins,     left_by_the_owner, left_by_the_dead, left_by_sweepers,
    };
    const char *broken = NULL;
    for (unsigned i = 0; i < sizeof checks / sizeof *checks && !broken; i++)
        broken = checks[i](state);
    return broken;
}
