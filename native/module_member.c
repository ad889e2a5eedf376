/* module_member.c: Segment (a mapping) and Member (this process in one arena), and a look from outside. */
#include "module.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <structmember.h>

#include "metrics.h"
#include "steps.h"

/* ---- Segment: unmapped in dealloc and nowhere else ----------------------------------------------------------------- */

static void segment_dealloc(SegmentObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    shmc_segment_unmap(self->shared, self->size_bytes);
    lanes_unmap(self->lanes, self->size_bytes);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot segment_slots[] = {
    {Py_tp_dealloc, segment_dealloc},
    {Py_tp_doc, "A data segment mapped in this process."},
    {0, NULL},
};

PyType_Spec segment_spec = {
    .name = "shmcast._native.Segment",
    .basicsize = sizeof(SegmentObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = segment_slots,
};

SegmentObject *segment_new(const struct module_state *state, uint32_t number, uint64_t size_bytes)
{
    SegmentObject *self = PyObject_New(SegmentObject, state->segment_type);
    if (self != NULL) {
        self->number = number;
        self->size_bytes = size_bytes;
        self->shared = NULL;
        self->lanes = NULL;
        self->private_broken = false;
    }
    return self;
}

static SegmentObject *map_for_reading(const struct module_state *state, uint32_t number, int fd)
{
    uint64_t size_bytes;
    void *base;
    struct shmc_detail detail = {0, SHMC_PAGE_BYTES};
    enum shmc_status status = shmc_segment_size(fd, &size_bytes);
    if (status == SHMC_OK) {
        status = size_bytes != 0 ? shmc_segment_map(fd, size_bytes, SHMC_MAP_READ, &base) : SHMC_SEGMENT_SHORT;
    }
    if (status != SHMC_OK) {
        raise_status(state, status, &detail, "map data segment");
        return NULL;
    }
    SegmentObject *self = segment_new(state, number, size_bytes);
    if (self == NULL) {
        shmc_segment_unmap(base, size_bytes);
        return NULL;
    }
    self->shared = base;
    return self;
}

/* ---- which segments a member has mapped ---------------------------------------------------------------------------- */

static SegmentObject *find_segment(const MemberObject *self, uint32_t number)
{
    for (Py_ssize_t i = self->segment_count - 1; i >= 0; i--) {
        if (self->segments[i]->number == number) {
            return self->segments[i];
        }
    }
    return NULL;
}

static void forget_segment(MemberObject *self, Py_ssize_t i)
{
    SegmentObject *segment = self->segments[i];
    self->segments[i] = self->segments[--self->segment_count];
    Py_DECREF(segment); /* unmapped now, or with the last lease on it */
}

void member_unmap(MemberObject *self, uint32_t number)
{
    for (Py_ssize_t i = 0; i < self->segment_count; i++) {
        if (self->segments[i]->number == number) {
            forget_segment(self, i);
            return;
        }
    }
}

/* Segments that the owner has given back since; done when another one is mapped, which is rare. */
static void forget_retired(MemberObject *self)
{
    for (Py_ssize_t i = self->segment_count - 1; i >= 0; i--) {
        if (shmc_control_segment(&self->member.control, self->segments[i]->number) == NULL) {
            forget_segment(self, i);
        }
    }
}

bool member_map(MemberObject *self, uint32_t number, int fd, bool populate)
{
    forget_retired(self);
    SegmentObject *segment = map_for_reading(self->state, number, fd);
    if (segment == NULL) {
        return false;
    }
    if (populate) {
        Py_BEGIN_ALLOW_THREADS shmc_segment_populate(segment->shared, segment->size_bytes, false);
        Py_END_ALLOW_THREADS
    }
    if (find_segment(self, number) != NULL) { /* another thread was faster */
        Py_DECREF(segment);
        return true;
    }
    SegmentObject **segments = PyMem_Realloc(self->segments, (size_t)(self->segment_count + 1) * sizeof *segments);
    if (segments == NULL) {
        Py_DECREF(segment);
        PyErr_NoMemory();
        return false;
    }
    self->segments = segments;
    self->segments[self->segment_count++] = segment;
    return true;
}

static bool map_through_opener(MemberObject *self, uint32_t number, bool populate)
{
    int fd = open_through(self->opener, number);
    if (fd < 0) {
        return false;
    }
    bool mapped = member_map(self, number, fd, populate);
    close(fd);
    return mapped;
}

SegmentObject *member_segment(MemberObject *self, uint32_t number)
{
    SegmentObject *segment = find_segment(self, number);
    if (segment == NULL && map_through_opener(self, number, false)) {
        segment = find_segment(self, number);
    }
    return segment;
}

/* ---- Member: create, join, leave ------------------------------------------------------------------------------------ */

static MemberObject *member_alloc(PyTypeObject *type, PyObject *opener)
{
    struct module_state *state = PyType_GetModuleState(type);
    MemberObject *self = PyObject_GC_New(MemberObject, state->member_type);
    if (self != NULL) {
        self->state = state;
        self->member = (struct shmc_member){0};
        self->weakrefs = NULL;
        self->opener = Py_NewRef(opener);
        self->segments = NULL;
        self->segment_count = 0;
        PyObject_GC_Track(self);
    }
    return self;
}

static PyObject *member_create(PyTypeObject *type, PyObject *arguments)
{
    const struct shmc_detail none = {0, 0};
    struct shmc_control_config config;
    unsigned long long arena_id, host, max_bytes;
    PyObject *opener;
    int map_fd, lock_fd;
    if (!PyArg_ParseTuple(arguments, "iiOKKKI:create", &map_fd, &lock_fd, &opener, &arena_id, &host, &max_bytes,
                          &config.slot_count)) {
        return NULL;
    }
    if (config.slot_count == 0 || config.slot_count > SHMC_SLOT_COUNT_MAX) {
        return PyErr_Format(PyExc_ValueError, "create arena: %u blocks, 1 to %d are possible", config.slot_count,
                            SHMC_SLOT_COUNT_MAX);
    }
    config.arena_id = arena_id;
    config.host = host;
    config.max_bytes = max_bytes;
    MemberObject *self = member_alloc(type, opener);
    if (self == NULL) {
        return NULL;
    }
    enum shmc_status status = shmc_member_create(&self->member, map_fd, lock_fd, &config);
    if (status != SHMC_OK) {
        raise_status(self->state, status, &none, "create arena");
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static PyObject *member_join(PyTypeObject *type, PyObject *arguments)
{
    struct shmc_detail detail = {0, 0};
    unsigned long long arena_id;
    PyObject *opener;
    int map_fd, lock_fd;
    if (!PyArg_ParseTuple(arguments, "iiOK:join", &map_fd, &lock_fd, &opener, &arena_id)) {
        return NULL;
    }
    MemberObject *self = member_alloc(type, opener);
    if (self == NULL) {
        return NULL;
    }
    enum shmc_status status = shmc_member_join(&self->member, map_fd, lock_fd, arena_id, &detail);
    if (status != SHMC_OK) {
        char action[64];
        snprintf(action, sizeof action, "join arena %016llx", arena_id);
        raise_status(self->state, status, &detail, action);
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static int member_traverse(MemberObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->opener);
    return 0;
}

static int member_clear(MemberObject *self)
{
    Py_CLEAR(self->opener);
    return 0;
}

static void member_dealloc(MemberObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs((PyObject *)self);
    }
    while (self->segment_count > 0) {
        forget_segment(self, self->segment_count - 1);
    }
    PyMem_Free(self->segments);
    shmc_member_leave(&self->member); /* nobody has a lease any more: leases hold us */
    member_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- Member: leases ------------------------------------------------------------------------------------------------- */

/* With the pin taken: everything that the handle says is checked against what lies in shared memory. */
static bool check_block(MemberObject *self, LeaseObject *lease, uint32_t segment_number, const char *action)
{
    struct shmc_detail detail = {0, 0};
    enum shmc_status status = shmc_member_check(&self->member, lease->slot, segment_number, lease->offset_bytes,
                                                lease->size_bytes, &lease->block, &detail);
    if (status != SHMC_OK) {
        raise_status(self->state, status, &detail, action);
        return false;
    }
    SegmentObject *segment = member_segment(self, segment_number);
    if (segment == NULL) {
        return false;
    }
    uint64_t end = lease->block.block_offset + lease->block.block_bytes; /* shmc_member_check saw that it fits */
    if (end > segment->size_bytes) {
        detail = (struct shmc_detail){segment->size_bytes, end};
        raise_status(self->state, SHMC_SEGMENT_SHORT, &detail, action);
        return false;
    }
    lease->segment = (SegmentObject *)Py_NewRef(segment);
    return true;
}

/* Before the pin, which uses up a promise: who has no memory or no descriptor for the mapping may come again when it has.
 * A segment that is not in service, or whose name is gone, is left to what the pin and the checks after it find. */
static bool map_beforehand(MemberObject *self, uint32_t number)
{
    const struct shmc_member *member = &self->member;
    if (find_segment(self, number) != NULL || member->control.header == NULL || shmc_member_inherited(member) ||
        shmc_control_segment(&member->control, number) == NULL || map_through_opener(self, number, false)) {
        return true;
    }
    if (!PyErr_ExceptionMatches(PyExc_FileNotFoundError)) {
        return false;
    }
    PyErr_Clear();
    return true;
}

static PyObject *member_attach(MemberObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    uint32_t slot, segment_number;
    uint64_t generation, offset_bytes, size_bytes;
    if (!check_arguments("attach", count, 6) || !as_u32(arguments[1], &slot) || !as_u64(arguments[2], &generation) ||
        !as_u32(arguments[3], &segment_number) || !as_u64(arguments[4], &offset_bytes) ||
        !as_u64(arguments[5], &size_bytes)) {
        return NULL;
    }
    PyTypeObject *type = (PyTypeObject *)arguments[0];
    if (!PyType_Check(type) || !PyType_IsSubtype(type, self->state->lease_type)) {
        PyErr_SetString(PyExc_TypeError, "attach: the first argument is not a kind of Lease");
        return NULL;
    }
    if (!map_beforehand(self, segment_number)) {
        return NULL;
    }
    LeaseObject *lease = (LeaseObject *)type->tp_alloc(type, 0);
    if (lease == NULL) {
        return NULL;
    }
    char action[96];
    struct shmc_detail detail = {0, 0};
    enum shmc_status status = shmc_member_attach(&self->member, slot, generation, &detail);
    if (status == SHMC_OK) {
        /* from here on the lease's dealloc gives the hold back */
        lease->member = (MemberObject *)Py_NewRef(self);
        lease->slot = slot;
        lease->generation = generation;
        lease->offset_bytes = offset_bytes;
        lease->size_bytes = size_bytes;
    }
    if (status != SHMC_OK) {
        snprintf(action, sizeof action, "attach block %u of arena %016llx", slot,
                 (unsigned long long)self->member.control.arena_id);
        raise_status(self->state, status, &detail, action);
        Py_CLEAR(lease);
    } else if (!check_block(self, lease, segment_number, "attach block")) {
        Py_CLEAR(lease);
    }
    return (PyObject *)lease;
}

static PyObject *member_map_segment(MemberObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    uint32_t number;
    if (!check_arguments("map_segment", count, 2) || !as_u32(arguments[0], &number)) {
        return NULL;
    }
    int populate = PyObject_IsTrue(arguments[1]);
    if (populate < 0 || (find_segment(self, number) == NULL && !map_through_opener(self, number, populate))) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* ---- Member: the others ---------------------------------------------------------------------------------------------- */

typedef PyObject *(*peer_value)(const struct shmc_peer_record *record, unsigned p);

static PyObject *by_token(const MemberObject *self, peer_value value)
{
    const struct shmc_control *control = &self->member.control;
    PyObject *result = PyDict_New();
    for (unsigned p = 0; result != NULL && p < SHMC_PEER_COUNT; p++) {
        const struct shmc_peer_record *record = &control->peers[p];
        uint32_t ready = shmc_acquire_load(&record->ready); /* pairs with the store in shmc_peer_take_over */
        if (ready == 0 || ready != shmc_seq_load(&record->incarnation)) {
            continue;
        }
        PyObject *token = PyLong_FromUnsignedLongLong(shmc_relaxed_load(&record->token)), *item = value(record, p);
        if (token == NULL || item == NULL || PyDict_SetItem(result, token, item) != 0) {
            Py_CLEAR(result);
        }
        Py_XDECREF(token);
        Py_XDECREF(item);
    }
    return result;
}

static PyObject *index_of(const struct shmc_peer_record *Py_UNUSED(record), unsigned p)
{
    return PyLong_FromUnsignedLong(p);
}

static PyObject *steps_of(const struct shmc_peer_record *record, unsigned Py_UNUSED(p))
{
    unsigned long long step = shmc_acquire_load(&record->step); /* pairs with the store in member_set_step */
    return Py_BuildValue("KK", step, (unsigned long long)shmc_relaxed_load(&record->failed_step));
}

static PyObject *member_tokens(MemberObject *self, PyObject *Py_UNUSED(ignored))
{
    return by_token(self, index_of);
}

static PyObject *member_steps(MemberObject *self, PyObject *Py_UNUSED(ignored))
{
    return by_token(self, steps_of);
}

static PyObject *member_set_step(MemberObject *self, PyObject *arguments)
{
    unsigned long long step;
    int failed = 0;
    if (!PyArg_ParseTuple(arguments, "K|p:set_step", &step, &failed)) {
        return NULL;
    }
    if (shmc_member_inherited(&self->member)) {
        const struct shmc_detail none = {0, 0};
        return raise_status(self->state, SHMC_INHERITED, &none, "set step");
    }
    struct shmc_peer_record *record = &self->member.control.peers[self->member.index];
    if (failed) {
        SHMC_STEP(MEMBER_FAILED_STEP);
        shmc_relaxed_store(&record->failed_step, step);
    }
    SHMC_STEP(MEMBER_STEP);
    shmc_release_store(&record->step, step); /* pairs with the load in steps_of: the failure is seen with the step */
    Py_RETURN_NONE;
}

static PyObject *member_alive(MemberObject *self, PyObject *argument)
{
    uint64_t token;
    uint32_t incarnation;
    if (!as_u64(argument, &token)) {
        return NULL;
    }
    int p = shmc_peer_find(&self->member.control, token, &incarnation);
    if (p < 0) {
        Py_RETURN_FALSE;
    }
    if ((unsigned)p == self->member.index) {
        return PyBool_FromLong(!shmc_member_inherited(&self->member));
    }
    int fd = open_through(self->opener, 0);
    if (fd < 0) {
        return NULL;
    }
    bool alive = shmc_peer_probe(fd, (unsigned)p);
    close(fd);
    return PyBool_FromLong(alive);
}

static PyObject *member_sweep_peers(MemberObject *self, PyObject *Py_UNUSED(ignored))
{
    const struct shmc_detail none = {0, 0};
    if (shmc_member_inherited(&self->member)) {
        return raise_status(self->state, SHMC_INHERITED, &none, "sweep peers");
    }
    int fd = open_through(self->opener, 0);
    if (fd < 0) {
        return NULL;
    }
    unsigned swept;
    Py_BEGIN_ALLOW_THREADS swept = shmc_peer_sweep(&self->member.control, fd);
    SHMC_STEP(SWEEP_CLOSE);
    Py_END_ALLOW_THREADS close(fd);
    shmc_metric_add(self->member.control.header->metrics, SHMC_METRIC_swept, swept);
    return PyLong_FromUnsignedLong(swept);
}

static PyObject *member_leave(MemberObject *self, PyObject *Py_UNUSED(ignored))
{
    if (self->member.control.header != NULL && !shmc_member_inherited(&self->member)) {
        for (uint32_t slot = 0; slot < self->member.control.slot_count; slot++) {
            if (self->member.leases[slot] != 0) {
                return PyErr_Format(PyExc_BufferError, "leave arena: %u leases on slot %u are alive; drop them first",
                                    self->member.leases[slot], slot);
            }
        }
        if (self->member.index != SHMC_OWNER) {
            shmc_peer_leave(&self->member.control, self->member.index);
            shmc_peer_drop_anchor(self->member.lock_page);
            self->member.lock_page = NULL;
            self->member.token = 0; /* from here on as if forked: nothing is ours any more */
        }
    }
    Py_RETURN_NONE;
}

/* ---- Member: properties ----------------------------------------------------------------------------------------------- */

static PyObject *member_get_index(MemberObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(self->member.index);
}

static PyObject *member_get_incarnation(MemberObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(shmc_seq_load(&self->member.control.peers[self->member.index].incarnation));
}

static PyObject *member_get_arena_id(MemberObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(self->member.control.arena_id);
}

static PyObject *member_get_nonce(MemberObject *self, void *Py_UNUSED(closure))
{
    const struct shmc_control *control = &self->member.control;
    return PyBytes_FromStringAndSize((const char *)control->nonce, sizeof control->nonce);
}

static PyObject *member_get_max_bytes(MemberObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(self->member.control.max_bytes);
}

static PyObject *member_get_ended(MemberObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(shmc_control_ended(&self->member.control));
}

static PyObject *member_get_inherited(MemberObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(shmc_member_inherited(&self->member));
}

static PyObject *member_get_step(MemberObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(shmc_acquire_load(&self->member.control.peers[self->member.index].step));
}

static PyGetSetDef member_properties[] = {
    {"index", (getter)member_get_index, NULL, "Peer index; 0 is the owner.", NULL},
    {"incarnation", (getter)member_get_incarnation, NULL, "How often our byte was taken or swept.", NULL},
    {"arena_id", (getter)member_get_arena_id, NULL, "The id in the segment's name.", NULL},
    {"nonce", (getter)member_get_nonce, NULL, "16 random bytes that prove who sees the same memory.", NULL},
    {"max_bytes", (getter)member_get_max_bytes, NULL, "Bound on the sum of data segments, bytes.", NULL},
    {"ended", (getter)member_get_ended, NULL, "Whether the owner has closed the arena, or a sweeper has ended it.",
     NULL},
    {"inherited", (getter)member_get_inherited, NULL, "Whether this process was forked after joining, or has left.",
     NULL},
    {"step", (getter)member_get_step, NULL, "Our step word.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef member_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(MemberObject, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyMethodDef member_methods[] = {
    {"create", (PyCFunction)(void (*)(void))member_create, METH_VARARGS | METH_CLASS,
     "Become the owner of a new arena."},
    {"join", (PyCFunction)(void (*)(void))member_join, METH_VARARGS | METH_CLASS,
     "Join an arena: take a free peer byte."},
    {"attach", (PyCFunction)(void (*)(void))member_attach, METH_FASTCALL,
     "Pin, validate, map: a lease of exactly these bytes."},
    {"map_segment", (PyCFunction)(void (*)(void))member_map_segment, METH_FASTCALL, "Map a data segment ahead of use."},
    {"tokens", (PyCFunction)member_tokens, METH_NOARGS, "{process token: peer index} of who has joined."},
    {"steps", (PyCFunction)member_steps, METH_NOARGS, "{process token: (step, failed step)}."},
    {"set_step", (PyCFunction)member_set_step, METH_VARARGS, "Set our step word, and the failed step with it."},
    {"alive", (PyCFunction)member_alive, METH_O, "Whether the process of a token still has its byte."},
    {"sweep_peers", (PyCFunction)member_sweep_peers, METH_NOARGS, "Scrub every dead peer; returns how many."},
    {"leave", (PyCFunction)member_leave, METH_NOARGS, "Scrub our own claims and give the byte up."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot member_slots[] = {
    {Py_tp_dealloc, member_dealloc},
    {Py_tp_traverse, member_traverse},
    {Py_tp_clear, member_clear},
    {Py_tp_methods, member_methods},
    {Py_tp_members, member_members},
    {Py_tp_getset, member_properties},
    {Py_tp_doc, "This process in one arena."},
    {0, NULL},
};

PyType_Spec member_spec = {
    .name = "shmcast._native.Member",
    .basicsize = sizeof(MemberObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = member_slots,
};
