/* Names, files and locks, as the kernel keeps them; and what taking a name away may break. */
#include "arena.h"

#include <string.h>

/* What os.listdir finds, as a mask. */
unsigned names_listed(const struct state *st)
{
    unsigned listed = st->control_name == NO_FILE ? 0 : LISTED(0);
    for (unsigned number = 1; number <= FILES; number++)
        if (st->data_name[number - 1] != NO_FILE)
            listed |= LISTED(number);
    return listed;
}

/* Who takes a name away must be the owner, or the one sweeper that has the owner's byte; whoever acts without it, because
 * there is no control segment, must find nothing that anybody else still minds. */
static const char *wrong_hands(const struct state *st, unsigned p)
{
    if (p != OWNER && st->owns)
        return "A1: a name of a live owner's arena is taken away by another process";
    for (unsigned other = SWEEPER_1; other <= SWEEPER_2; other++)
        if (other != p && sweeper_acts(st, other))
            return "A2: a name is taken away while a sweeper acts on the arena";
    return NULL;
}

void name_unlink(struct state *st, unsigned p, unsigned number, struct explore_edge *edge)
{
    uint8_t *name = number ? &st->data_name[number - 1] : &st->control_name;
    if (*name == NO_FILE)
        return; /* gone already */
    if (!edge->broken)
        edge->broken = wrong_hands(st, p);
    *name = NO_FILE;
    if (!number && p == OWNER)
        st->owns = 0;
}

void lock_drop(struct state *st, unsigned file, unsigned p)
{
    if (file < CONTROLS && st->lock[file] == p)
        st->lock[file] = NOBODY;
}

/* SIGKILL, or the end: what was private is gone, mappings and locks go, names stay. */
void process_die(struct state *st, unsigned p)
{
    for (unsigned file = 0; file < CONTROLS; file++)
        lock_drop(st, file, p);
    if (st->peer_lock == p)
        st->peer_lock = NOBODY;
    st->dead |= (uint8_t)(1u << p);
    if (p == READER) {
        memset(&st->reader, 0, sizeof st->reader);
    } else if (p != OWNER) {
        memset(&st->sweeper[p - SWEEPER_1], 0, sizeof st->sweeper[0]);
    } else {
        memset(st->file_at, 0, sizeof st->file_at);
        memset(st->number_at, 0, sizeof st->number_at);
        st->next = st->control = st->last = st->used = st->cur_file = st->cur_number = st->cur_place = st->anchored = 0;
        st->owns = 0;
    }
}
