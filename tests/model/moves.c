/* Who may do what in a state. A process in the middle of something has one next step; an idle one has choices. */
#include "protocol.h"

#include <stdlib.h>
#include <string.h>

static const char *const process_names[PROCS] = {"owner", "A", "B", "newcomer"};

void initial_state(void *state)
{
    struct state *st = state;
    memset(st, 0, sizeof *st);
    memset(st->lock, NO_LOCK, sizeof st->lock);
    memset(st->block, NO_BLOCK, sizeof st->block);
    for (unsigned p = OWNER; p < NEWCOMER; p++) {
        st->proc[p].byte = st->lock[p] = (uint8_t)p;
        st->token[p] = (uint8_t)p;
    }
    st->proc[NEWCOMER].byte = world.config->newcomer ? NO_BYTE : DEAD;
}

/* The one next step of a process that is not idle. */
void advance(struct state *st, unsigned p, struct explore_edge *edge)
{
    unsigned step = st->proc[p].next;
    edge->actor = (uint8_t)p;
    edge->action = (uint8_t)step;
    if (step < REVOKE_RESTART || step == EMPTY_DROP)
        publish_step(st, edge);
    else if (step < RELEASE_COUNT)
        attach_step(st, p, edge);
    else if (step < JOIN_LOCK)
        pass_step(st, p, edge);
    else
        takeover_step(st, p, edge);
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
        messages_sort(&out->states[out->count++]);
}

static void owner_choices(struct choices *out)
{
    const struct config *config = world.config;
    for (unsigned slot = 0; slot < config->slots; slot++) {
        if (config->revoke)
            keep(out, revoke(fork_state(out, OWNER), slot, edge_of(out)));
        keep(out, empty_begin(fork_state(out, OWNER), slot, edge_of(out)));
        if (out->from->seq >= config->publishes)
            continue;
        for (unsigned publication = 0; publication < PUBLICATIONS; publication++)
            for (unsigned block = 0; block < config->slots && config->publish & MAY(publication); block++) {
                /* Blocks and slots are independent only where aliases are: elsewhere slot i lies in block i. */
                bool sharing = config->publish & (MAY(ALIAS_A) | MAY(ALIAS_B));
                if (sharing || block == slot)
                    keep(out, publish_begin(fork_state(out, OWNER), slot, publication, block, edge_of(out)));
            }
    }
}

static void deliver_choices(struct choices *out, unsigned p)
{
    const struct state *from = out->from;
    for (unsigned i = 0; i < MESSAGES; i++) {
        if (!from->msgs[i] || msg_target(from->msgs[i]) != p || (i && from->msgs[i] == from->msgs[i - 1]))
            continue;
        struct state *st = fork_state(out, p);
        st->msgs[i] = 0;
        attach_begin(st, p, from->msgs[i], edge_of(out));
        keep(out, true);
    }
    if (from->proc[p].memo) {
        struct state *st = fork_state(out, p);
        st->proc[p].memo = 0;
        attach_begin(st, p, from->proc[p].memo, edge_of(out));
        keep(out, true);
    }
}

static void lease_choices(struct choices *out, unsigned p)
{
    const struct config *config = world.config;
    bool may_pass = config->passers & 1u << p && out->from->passes < config->passes, any = false;
    for (unsigned slot = 0; slot < config->slots; slot++) {
        if (!out->from->proc[p].lease[slot])
            continue;
        any = true;
        release(fork_state(out, p), p, slot, edge_of(out));
        keep(out, true);
        for (unsigned target = 0; target < PROCS && may_pass; target++)
            if (target != p && config->pass_targets & 1u << target)
                keep(out, pass_begin(fork_state(out, p), p, slot, target, edge_of(out)));
    }
    if (!any && p != OWNER && out->from->leaves < config->leaves)
        keep(out, takeover_begin(fork_state(out, p), p, out->from->proc[p].byte, LEAVE, edge_of(out)));
}

static void idle_choices(struct choices *out, unsigned p)
{
    const struct proc *me = &out->from->proc[p];
    if (me->byte == NO_BYTE) {
        for (unsigned byte = 1; byte < BYTES; byte++)
            keep(out, takeover_begin(fork_state(out, p), p, byte, JOIN, edge_of(out)));
        return;
    }
    if (p == OWNER)
        owner_choices(out);
    deliver_choices(out, p);
    lease_choices(out, p);
    for (unsigned byte = 1; byte < BYTES && world.config->sweepers & 1u << p; byte++)
        if (byte != me->byte && out->from->token[byte] != TOKEN_FREE)
            keep(out, takeover_begin(fork_state(out, p), p, byte, SWEEP, edge_of(out)));
}

size_t successors(const void *state, struct explore_edge *edges, void *states)
{
    struct choices out = {.from = state, .edges = edges, .states = states};
    for (unsigned p = 0; p < PROCS; p++) {
        if (!is_alive(out.from, p))
            continue;
        if (world.config->mortal & 1u << p && out.from->deaths < world.config->deaths) {
            struct state *st = fork_state(&out, p);
            edge_of(&out)->action = DIE;
            process_end(st, p);
            st->deaths++;
            keep(&out, true);
        }
        if (out.from->proc[p].next == IDLE) {
            idle_choices(&out, p);
        } else {
            struct state *st = fork_state(&out, p);
            advance(st, p, edge_of(&out));
            keep(&out, true);
        }
    }
    return out.count;
}

static void print_word(FILE *out, const struct state *st, unsigned slot)
{
    static const char *const bits[8] = {"h0", "h1", "h2", "T", "g1", "g2", "L", "X"};
    fprintf(out, "  slot %u [", slot);
    const char *gap = "";
    for (unsigned bit = 0; bit < 8; bit++)
        if (st->word[slot] & 1u << bit) {
            fprintf(out, "%s%s", gap, bits[bit]);
            gap = " ";
        }
    fprintf(out, "] gen %u", st->gen[slot]);
    if (st->took[slot])
        fprintf(out, " took %x, %u to come", st->took[slot] & 7u, st->took[slot] >> 4);
}

void print_step(FILE *out, const struct explore_edge *edge, const void *after)
{
    static const char *const texts[] = {
#define ACTION_TEXT(name, text, code) text,
        ACTIONS(ACTION_TEXT)
#undef ACTION_TEXT
    };
    const struct state *st = after;
    char line[160];
    int n = snprintf(line, sizeof line, "%-8s %s", process_names[edge->actor], texts[edge->action]);
    unsigned action = edge->action;
    if (action >= ATT_LOOK && action <= RELEASE_LAST)
        snprintf(line + n, sizeof line - (size_t)n, " (slot %u, handle of gen %u)", edge->slot, edge->detail);
    else if (action >= PASS_INC && action <= PASS_TRUST)
        snprintf(line + n, sizeof line - (size_t)n, " (slot %u, to %s)", edge->slot, process_names[edge->detail]);
    else if (action >= JOIN_LOCK)
        snprintf(line + n, sizeof line - (size_t)n, " (byte %u, slot %u)", edge->detail, edge->slot);
    else if (action != DIE)
        snprintf(line + n, sizeof line - (size_t)n, " (slot %u)", edge->slot);
    fprintf(out, "%-82s", line);
    for (unsigned slot = 0; slot < world.config->slots; slot++)
        print_word(out, st, slot);
    fprintf(out, "  inc %u %u\n", st->inc[1], st->inc[2]);
}
