/* Who may do what in a state of the arena. A process in the middle of something has one next step, and where room may run
 * out two; an idle one has choices. */
#include "arena.h"

#include <stdlib.h>
#include <string.h>

static const char *const process_names[PROCS] = {"owner", "sweeper 1", "sweeper 2", "reader"};

void arena_initial(void *state)
{
    struct state *st = state;
    memset(st, 0, sizeof *st);
    memset(st->data_name, NO_FILE, sizeof st->data_name);
    memset(st->lock, NOBODY, sizeof st->lock);
    st->peer_lock = NOBODY;
    st->control_name = st->header = st->ready = NO_FILE;
    st->dead = arena_world.config->publishes ? 0 : 1u << READER;
    if (!arena_world.config->created)
        return;
    struct explore_edge edge = {0};
    owner_create(st, &edge);
    while (st->next != IDLE)
        owner_step(st, &edge);
    owner_grow(st, &edge);
    while (st->next != IDLE)
        owner_step(st, &edge);
}

uint8_t *arena_next(struct state *st, unsigned p)
{
    return p == OWNER ? &st->next : p == READER ? &st->reader.next : &st->sweeper[p - SWEEPER_1].next;
}

/* The one next step of a process that is not idle. */
void arena_advance(struct state *st, unsigned p, struct explore_edge *edge)
{
    edge->actor = (uint8_t)p;
    if (p == OWNER)
        owner_step(st, edge);
    else if (p == READER)
        reader_step(st, edge);
    else
        sweeper_step(st, p, edge);
}

struct choices {
    const struct state *from;
    struct explore_edge *edges;
    struct state *states;
    size_t count;
};

/* A fresh copy to move in; it counts only after keep(). */
static struct state *fork_state(struct choices *out, unsigned p)
{
    if (out->count >= EXPLORE_MAX_EDGES) {
        fprintf(stderr, "a state has more successors than the explorer can hold\n");
        exit(2);
    }
    out->edges[out->count] = (struct explore_edge){.actor = (uint8_t)p};
    out->states[out->count] = *out->from;
    return &out->states[out->count];
}

static struct explore_edge *edge_of(struct choices *out)
{
    return &out->edges[out->count];
}

static void keep(struct choices *out, bool possible)
{
    if (possible)
        out->count++;
}

static void owner_choices(struct choices *out)
{
    if (!out->from->owns) {
        keep(out, owner_create(fork_state(out, OWNER), edge_of(out)));
        return;
    }
    keep(out, owner_grow(fork_state(out, OWNER), edge_of(out)));
    if (!out->from->last)
        return; /* not in service before it has its first segment */
    for (unsigned place = 0; place < PLACES; place++) {
        keep(out, owner_retire(fork_state(out, OWNER), place, edge_of(out)));
        keep(out, owner_publish(fork_state(out, OWNER), place, edge_of(out)));
    }
    keep(out, owner_revoke(fork_state(out, OWNER), edge_of(out)));
    keep(out, owner_reclaim(fork_state(out, OWNER), edge_of(out)));
    keep(out, scrub_begin(fork_state(out, OWNER), OWNER, edge_of(out)));
    if (arena_world.config->closes)
        keep(out, owner_end(fork_state(out, OWNER), edge_of(out)));
}

static void reader_choices(struct choices *out)
{
    if (out->from->reader.leased) {
        reader_release(fork_state(out, READER), edge_of(out));
        keep(out, true);
    }
    keep(out, reader_attach(fork_state(out, READER), edge_of(out)));
    for (unsigned number = 1; number <= FILES && arena_world.config->pins && out->from->reader.joined; number++)
        keep(out, reader_pin(fork_state(out, READER), number, edge_of(out)));
    if (out->from->reader.pinned) {
        reader_unpin(fork_state(out, READER), edge_of(out));
        keep(out, true);
    }
}

static void idle_choices(struct choices *out, unsigned p)
{
    if (p == OWNER)
        owner_choices(out);
    else if (p == READER)
        reader_choices(out);
    else if (out->from->sweeps < arena_world.config->sweeps)
        keep(out, sweeper_begin(fork_state(out, p), p, edge_of(out)));
    if (p != OWNER && p != READER && arena_world.config->scrubs)
        keep(out, scrub_begin(fork_state(out, p), p, edge_of(out)));
}

/* What no process of ours does: a death, no room left, a file removed by hand. */
static void fate_choices(struct choices *out, unsigned p)
{
    const struct config *config = arena_world.config;
    const struct state *from = out->from;
    if (config->mortal & 1u << p && from->deaths < config->deaths) {
        struct state *st = fork_state(out, p);
        edge_of(out)->action = DIE;
        process_die(st, p);
        st->deaths++;
        keep(out, true);
    }
    bool full = p == OWNER && (from->next == CREATE_RESERVE || from->next == GROW_RESERVE);
    if (full && config->may_be_full) {
        struct state *st = fork_state(out, p);
        edge_of(out)->action = from->next == CREATE_RESERVE ? CREATE_FULL : GROW_FULL;
        st->next = from->next == CREATE_RESERVE ? CREATE_UNLINK : GROW_UNDO;
        keep(out, true);
    }
}

static void by_hand(struct choices *out)
{
    const struct state *from = out->from;
    bool idle = from->control_name != NO_FILE && from->lock[from->control_name] == NOBODY;
    if (!arena_world.config->by_hand || from->dead & BY_HAND_BEFORE || is_alive(from, OWNER) || !idle)
        return;
    struct state *st = fork_state(out, SWEEPER_1);
    edge_of(out)->action = BY_HAND;
    st->control_name = NO_FILE;
    st->dead |= BY_HAND_BEFORE;
    keep(out, true);
}

size_t arena_successors(const void *state, struct explore_edge *edges, void *states)
{
    struct choices out = {.from = state, .edges = edges, .states = states};
    for (unsigned p = 0; p < PROCS; p++) {
        if (!is_alive(out.from, p))
            continue;
        fate_choices(&out, p);
        struct state *st = fork_state(&out, p);
        if (*arena_next(st, p) == IDLE) {
            idle_choices(&out, p);
        } else {
            arena_advance(st, p, edge_of(&out));
            keep(&out, true);
        }
    }
    by_hand(&out);
    return out.count;
}

static void print_names(FILE *out, const struct state *st)
{
    if (st->control_name != NO_FILE)
        fprintf(out, "  control %u", st->control_name);
    for (unsigned number = 1; number <= FILES; number++)
        if (st->data_name[number - 1] != NO_FILE)
            fprintf(out, "  data %u", number);
    for (unsigned file = 0; file < CONTROLS; file++)
        if (st->lock[file] != NOBODY)
            fprintf(out, "  byte 0 of %u: %s", file, process_names[st->lock[file]]);
}

void arena_print(FILE *out, const struct explore_edge *edge, const void *after)
{
    static const char *const texts[] = {
#define ACTION_TEXT(name, text, code) text,
        ACTIONS(ACTION_TEXT)
#undef ACTION_TEXT
    };
    const struct state *st = after;
    fprintf(out, "%-10s %-62s", edge->action == BY_HAND ? "somebody" : process_names[edge->actor], texts[edge->action]);
    print_names(out, st);
    for (unsigned place = 0; place < PLACES; place++)
        if (st->number[place])
            fprintf(out, "  record of %u%s", st->number[place], st->mark[place] ? " (marked)" : "");
    fprintf(out, "%s\n", st->ended ? "  ended" : "");
}
