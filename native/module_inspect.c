/* module_inspect.c: a look at a control segment from outside: no lock taken, no bit set, nothing believed. */
#include "module.h"

#include <string.h>

#include "metrics.h"

/* Who claims what. Holds and grants by peer; aliases count each. */
struct census {
    unsigned claimed, held, granted, awaited, entrusted;
    unsigned holds[SHMC_PEER_COUNT], grants[SHMC_PEER_COUNT];
    unsigned long long bytes, held_bytes[SHMC_PEER_COUNT];
};

static void count_slot(uint64_t word, uint64_t size_bytes, struct census *census)
{
    census->claimed++;
    census->held += (word & SHMC_HOLDS) != 0;
    census->granted += (word & (SHMC_GRANTS | SHMC_T | SHMC_L)) != 0;
    census->awaited += (word & SHMC_T) != 0;
    census->entrusted += (word & SHMC_L) != 0;
    census->bytes += size_bytes;
    for (unsigned p = 0; p < SHMC_PEER_COUNT; p++) {
        if ((word & SHMC_HOLD(p)) != 0) {
            census->holds[p]++;
            census->held_bytes[p] += size_bytes;
        }
        census->grants[p] += p != SHMC_OWNER && (word & SHMC_GRANT(p)) != 0;
    }
}

static void count_slots(const struct shmc_control *control, struct census *census)
{
    *census = (struct census){0};
    for (uint32_t slot = 0; slot < control->slot_count; slot++) {
        uint64_t word = shmc_relaxed_load(&control->words[slot]);
        if ((word & SHMC_CLAIMS) != 0) {
            count_slot(word, control->records[slot].size_bytes, census);
        }
    }
}

static PyObject *inspect_peer(const struct shmc_peer_record *record, unsigned p, bool alive,
                              const struct census *census)
{
    char command[SHMC_COMMAND_BYTES];
    memcpy(command, record->command, sizeof command);
    command[sizeof command - 1] = '\0'; /* whatever it said there */
    PyObject *text = PyUnicode_DecodeUTF8(command, (Py_ssize_t)strlen(command), "replace");
    if (text == NULL) {
        return NULL;
    }
    uint32_t incarnation = shmc_relaxed_load(&record->incarnation);
    PyObject *item = Py_BuildValue("{sIsIsOsOsKsIsKsOsKsKsIsKsI}", "index", p, "incarnation", incarnation, "alive",
                                   alive ? Py_True : Py_False, "ready",
                                   shmc_relaxed_load(&record->ready) == incarnation ? Py_True : Py_False, "token",
                                   (unsigned long long)shmc_relaxed_load(&record->token), "pid", record->pid,
                                   "start_ticks", (unsigned long long)record->start_ticks, "command", text, "step",
                                   (unsigned long long)shmc_relaxed_load(&record->step), "failed_step",
                                   (unsigned long long)shmc_relaxed_load(&record->failed_step), "holds",
                                   census->holds[p], "held_bytes", census->held_bytes[p], "grants", census->grants[p]);
    Py_DECREF(text);
    return item;
}

static PyObject *inspect_peers(const struct shmc_control *control, int fd, const struct census *census)
{
    PyObject *list = PyList_New(0);
    for (unsigned p = 0; list != NULL && p < SHMC_PEER_COUNT; p++) {
        const struct shmc_peer_record *record = &control->peers[p];
        if (shmc_relaxed_load(&record->incarnation) == 0) {
            continue; /* never used */
        }
        PyObject *item = inspect_peer(record, p, shmc_peer_probe(fd, p), census);
        if (item == NULL || PyList_Append(list, item) != 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *inspect_segments(const struct shmc_control *control)
{
    PyObject *list = PyList_New(0);
    for (unsigned i = 0; list != NULL && i < SHMC_SEGMENT_COUNT; i++) {
        const struct shmc_segment_record *record = &control->segments[i];
        uint32_t number = shmc_relaxed_load(&record->number);
        if (number == 0) {
            continue;
        }
        PyObject *item =
            Py_BuildValue("{sIsKsK}", "number", number, "size_bytes", (unsigned long long)record->size_bytes, "mark",
                          (unsigned long long)shmc_relaxed_load(&record->mark));
        if (item == NULL || PyList_Append(list, item) != 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(item);
    }
    return list;
}

PyObject *inspect_control(const struct module_state *state, int fd)
{
    struct shmc_control control;
    struct shmc_detail detail = {0, 0};
    enum shmc_status status = shmc_control_copy(fd, &control, &detail);
    if (status != SHMC_OK) {
        return raise_status(state, status, &detail, "inspect arena");
    }
    const struct shmc_header *header = control.header;
    struct census census;
    count_slots(&control, &census);
    PyObject *peers = inspect_peers(&control, fd, &census);
    PyObject *segments = peers != NULL ? inspect_segments(&control) : NULL;
    PyObject *result = NULL;
    if (segments != NULL) {
#define METRIC(name) #name, (unsigned long long)shmc_metric_get(header->metrics, SHMC_METRIC_##name)
        result = Py_BuildValue(
            "{sKsIsKsKsKsOsIsIsIsIsIsIsKsKsKsKsKsOsOsN}", "arena_id", (unsigned long long)header->arena_id, "format",
            header->format, "created_ns", (unsigned long long)header->created_ns, "max_bytes",
            (unsigned long long)header->max_bytes, "control_bytes", (unsigned long long)header->control_bytes, "ended",
            shmc_control_ended(&control) ? Py_True : Py_False, "slots", control.slot_count, "claimed", census.claimed,
            "held", census.held, "granted", census.granted, "awaited", census.awaited, "entrusted", census.entrusted,
            "claimed_bytes", census.bytes, METRIC(reserved_bytes), METRIC(used_bytes), METRIC(peak_used_bytes),
            METRIC(published), "peers", peers, "segments", segments, "metrics", metric_words(header->metrics));
#undef METRIC
    }
    Py_XDECREF(peers);
    Py_XDECREF(segments);
    shmc_control_drop_copy(&control);
    return result;
}
