/* Breadth-first exploration of every state that a model can reach.
 *
 * The model gives its states as fixed-size byte strings (padding zeroed, so that equal states are equal bytes), lists
 * the successors of one, and names what is broken in a state or in a step. Breadth first, so that the first
 * counterexample found is one of the shortest.
 */
#ifndef SHMCAST_MODEL_EXPLORE_H
#define SHMCAST_MODEL_EXPLORE_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum {
    EXPLORE_MAX_EDGES = 96,  /* successors of one state */
    EXPLORE_MAX_ACTIONS = 96 /* kinds of step */
};

/* One step of one actor. `broken` names the property that the step itself breaks, or is NULL. */
struct explore_edge {
    uint8_t action, actor, slot, detail;
    const char *broken;
};

struct explore_model {
    size_t state_bytes; /* a multiple of 8 */
    void (*initial)(void *state);
    /* Fills edges[i] and the state i * state_bytes into `states`; returns how many. */
    size_t (*successors)(const void *state, struct explore_edge *edges, void *states);
    /* NULL, or what is broken in this state. */
    const char *(*check)(const void *state);
    void (*print_step)(FILE *out, const struct explore_edge *edge, const void *after);
};

struct explore_result {
    uint64_t states, transitions;
    unsigned depth;                        /* steps from the initial state to the last level */
    const char *broken;                    /* NULL: explored to the end, nothing found */
    uint64_t actions[EXPLORE_MAX_ACTIONS]; /* how often each kind of step was taken */
};

/* Explores everything, or up to the first broken property, whose trace goes to `out`.
 * Returns 0 when the exploration came to an end (see result->broken), -1 when memory or `max_states` ran out. */
int explore(const struct explore_model *model, uint64_t max_states, FILE *out, struct explore_result *result);

#endif
