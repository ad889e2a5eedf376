#include "explore.h"

#include <stdlib.h>
#include <string.h>

/* States lie in chunks, so that growing copies nothing; the table holds the upper half of the hash beside the index,
 * so that a probe seldom has to look at a state and growing the table needs no state at all. */
enum { CHUNK_STATES = 1 << 16, MAX_CHUNKS = 1 << 12 };

struct entry {
    uint32_t tag;        /* upper half of the hash */
    uint32_t index_plus; /* index + 1; 0: empty */
};

struct search {
    const struct explore_model *model;
    unsigned char *chunks[MAX_CHUNKS];
    uint32_t *parents[MAX_CHUNKS];
    uint64_t count;
    struct entry *table;
    uint64_t mask; /* table size - 1 */
};

static unsigned char *state_at(const struct search *search, uint64_t index)
{
    return search->chunks[index / CHUNK_STATES] + index % CHUNK_STATES * search->model->state_bytes;
}

static uint64_t hash_state(const unsigned char *state, size_t bytes)
{
    uint64_t hash = 0x9E3779B97F4A7C15u;
    for (size_t at = 0; at < bytes; at += 8) {
        uint64_t word;
        memcpy(&word, state + at, 8);
        hash = (hash ^ word) * 0xFF51AFD7ED558CCDu;
        hash ^= hash >> 32;
    }
    return hash * 0xC4CEB9FE1A85EC53u;
}

static uint64_t home_of(const struct search *search, uint32_t tag)
{
    return (uint64_t)tag * 0x9E3779B1u & search->mask; /* the tag alone, so that growing finds the home again */
}

static int grow_table(struct search *search)
{
    struct entry *old = search->table;
    uint64_t old_size = old ? search->mask + 1 : 0;
    uint64_t size = old ? old_size * 2 : 1 << 16;
    search->table = calloc(size, sizeof *search->table);
    if (!search->table) {
        search->table = old;
        return -1;
    }
    search->mask = size - 1;
    for (uint64_t i = 0; i < old_size; i++) {
        if (!old[i].index_plus)
            continue;
        uint64_t at = home_of(search, old[i].tag);
        while (search->table[at].index_plus)
            at = (at + 1) & search->mask;
        search->table[at] = old[i];
    }
    free(old);
    return 0;
}

/* Adds the state unless it is known. Returns 1 when it was added, 0 when known, -1 when there is no room. */
static int add_state(struct search *search, const unsigned char *state, uint64_t parent)
{
    size_t bytes = search->model->state_bytes;
    if (search->count * 4 >= search->mask * 3 && grow_table(search) < 0)
        return -1;
    uint32_t tag = (uint32_t)(hash_state(state, bytes) >> 32);
    uint64_t at = home_of(search, tag);
    for (; search->table[at].index_plus; at = (at + 1) & search->mask) {
        const struct entry *known = &search->table[at];
        if (known->tag == tag && !memcmp(state_at(search, known->index_plus - 1), state, bytes))
            return 0;
    }
    uint64_t chunk = search->count / CHUNK_STATES;
    if (chunk >= MAX_CHUNKS)
        return -1;
    if (!search->chunks[chunk]) {
        search->chunks[chunk] = malloc(CHUNK_STATES * bytes);
        search->parents[chunk] = malloc(CHUNK_STATES * sizeof **search->parents);
        if (!search->chunks[chunk] || !search->parents[chunk])
            return -1;
    }
    memcpy(state_at(search, search->count), state, bytes);
    search->parents[chunk][search->count % CHUNK_STATES] = (uint32_t)parent;
    search->count++;
    search->table[at] = (struct entry){tag, (uint32_t)search->count};
    return 1;
}

/* Prints the steps that lead to `index`. Steps are not stored: each is found again among its parent's successors. */
static void print_trace(const struct search *search, uint64_t index, FILE *out)
{
    static struct explore_edge edges[EXPLORE_MAX_EDGES];
    size_t bytes = search->model->state_bytes;
    unsigned char *states = malloc(EXPLORE_MAX_EDGES * bytes);
    size_t length = 0;
    for (uint64_t at = index; at; at = search->parents[at / CHUNK_STATES][at % CHUNK_STATES])
        length++;
    uint64_t *path = malloc((length + 1) * sizeof *path);
    if (states && path) {
        uint64_t at = index;
        for (size_t i = length; i > 0; i--, at = search->parents[at / CHUNK_STATES][at % CHUNK_STATES])
            path[i] = at;
        path[0] = 0;
        for (size_t i = 1; i <= length; i++) {
            size_t n = search->model->successors(state_at(search, path[i - 1]), edges, states);
            for (size_t k = 0; k < n; k++) {
                if (memcmp(states + k * bytes, state_at(search, path[i]), bytes))
                    continue;
                fprintf(out, "%4zu  ", i);
                search->model->print_step(out, &edges[k], states + k * bytes);
                break;
            }
        }
    }
    free(path);
    free(states);
}

/* Visits one state's successors. Returns 0, or -1 when there is no room. */
static int expand(struct search *search, uint64_t index, FILE *out, struct explore_result *result)
{
    static struct explore_edge edges[EXPLORE_MAX_EDGES];
    static uint64_t states[EXPLORE_MAX_EDGES * 32]; /* words, for alignment; 256 bytes a state at most */
    size_t bytes = search->model->state_bytes;
    size_t n = search->model->successors(state_at(search, index), edges, states);
    for (size_t i = 0; i < n && !result->broken; i++) {
        const unsigned char *next = (const unsigned char *)states + i * bytes;
        result->transitions++;
        result->actions[edges[i].action]++;
        const char *broken = edges[i].broken;
        int added = broken ? 0 : add_state(search, next, index);
        if (added < 0)
            return -1;
        if (added)
            broken = search->model->check(next);
        if (!broken)
            continue;
        result->broken = broken;
        print_trace(search, index, out);
        fprintf(out, " ->   ");
        search->model->print_step(out, &edges[i], next);
    }
    return 0;
}

int explore(const struct explore_model *model, uint64_t max_states, FILE *out, struct explore_result *result)
{
    struct search *search = calloc(1, sizeof *search);
    unsigned char *first = calloc(1, model->state_bytes);
    int status = -1;
    memset(result, 0, sizeof *result);
    if (!search || !first || model->state_bytes > 256 || model->state_bytes % 8)
        goto done;
    search->model = model;
    model->initial(first);
    if (grow_table(search) < 0 || add_state(search, first, 0) < 0)
        goto done;
    result->broken = model->check(first);
    uint64_t level_end = search->count;
    for (uint64_t at = 0; at < search->count && !result->broken; at++) {
        if (at == level_end) {
            result->depth++;
            level_end = search->count;
        }
        if (search->count > max_states || expand(search, at, out, result) < 0)
            goto done;
    }
    status = 0;
done:
    if (search) {
        result->states = search->count;
        for (size_t i = 0; i < MAX_CHUNKS; i++) {
            free(search->chunks[i]);
            free(search->parents[i]);
        }
        free(search->table);
    }
    free(search);
    free(first);
    return status;
}
