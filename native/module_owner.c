/* module_owner.c: Owner (the publisher's side of an arena) and Reservation (a block that is being written in place). */
#include "module.h"

#include <limits.h>

#include "hash.h"
#include "metrics.h"
#include "steps.h"

/* ---- terms: how a block is to be published --------------------------------------------------------------------------- */

struct terms {
    struct shmc_terms terms;
    struct tokens tokens;
    bool hashed;
};

/* count, tokens (None: everybody who has joined), keep, timeout_ns[, hashed] */
static bool as_terms(PyObject *const *arguments, Py_ssize_t count, struct terms *terms)
{
    uint32_t anonymous;
    uint64_t timeout_ns;
    bool everyone = arguments[1] == Py_None;
    terms->tokens.count = 0;
    if (!as_u32(arguments[0], &anonymous) || (!everyone && !as_tokens(arguments[1], &terms->tokens)) ||
        !as_u64(arguments[3], &timeout_ns)) {
        return false;
    }
    int keep = PyObject_IsTrue(arguments[2]);
    int hashed = count > 4 ? PyObject_IsTrue(arguments[4]) : 0;
    if (keep < 0 || hashed < 0) {
        return false;
    }
    if (anonymous > SHMC_PEER_COUNT) {
        PyErr_Format(PyExc_ValueError, "publish: readers=%u, an arena has room for %d processes", anonymous,
                     SHMC_PEER_COUNT);
        return false;
    }
    terms->hashed = hashed;
    terms->terms = (struct shmc_terms){
        .tokens = terms->tokens.values,
        .token_count = terms->tokens.count,
        .everyone = everyone,
        .anonymous = anonymous,
        .keep = keep,
        .timeout_ns = timeout_ns,
    };
    return true;
}

static PyObject *published_tuple(const struct shmc_published *published, const shmc_hash128 *hash)
{
    PyObject *number = hash != NULL ? int_from_hash(hash->low64, hash->high64) : Py_NewRef(Py_None);
    return Py_BuildValue("IKIKN", published->slot, (unsigned long long)published->generation, published->segment,
                         (unsigned long long)published->offset_bytes, number);
}

/* ---- Owner: life and segments ------------------------------------------------------------------------------------------- */

static PyObject *owner_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    const struct shmc_detail none = {0, 0};
    struct module_state *state = PyType_GetModuleState(type);
    MemberObject *member;
    if (state == NULL || !PyArg_ParseTuple(arguments, "O!:Owner", state->member_type, &member)) {
        return NULL;
    }
    if (keywords != NULL && PyDict_GET_SIZE(keywords) != 0) {
        PyErr_SetString(PyExc_TypeError, "Owner() takes no keyword arguments");
        return NULL;
    }
    if (member->member.index != SHMC_OWNER) {
        return PyErr_Format(PyExc_ValueError, "make owner: this process is peer %u of the arena, not 0",
                            member->member.index);
    }
    OwnerObject *self = (OwnerObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    enum shmc_status status = shmc_owner_init(&self->owner, &member->member);
    if (status != SHMC_OK) {
        raise_status(state, status, &none, "make owner");
        Py_DECREF(self);
        return NULL;
    }
    self->member = (MemberObject *)Py_NewRef(member);
    return (PyObject *)self;
}

static void owner_dealloc(OwnerObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    shmc_owner_destroy(&self->owner);
    for (unsigned i = 0; i < SHMC_SEGMENT_COUNT; i++) {
        Py_XDECREF(self->segments[i]);
    }
    Py_XDECREF(self->member);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *owner_raise(const OwnerObject *self, enum shmc_status status, const struct shmc_detail *detail,
                             const char *action)
{
    return raise_status(self->member->state, status, detail, action);
}

static PyObject *owner_add_segment(OwnerObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct shmc_detail detail = {0, 0};
    uint32_t number;
    uint64_t size_bytes;
    int fd;
    if (!check_arguments("add_segment", count, 3) || !as_u32(arguments[0], &number) || !as_fd(arguments[1], &fd) ||
        !as_u64(arguments[2], &size_bytes)) {
        return NULL;
    }
    if (number == 0 || size_bytes == 0 || size_bytes % SHMC_PAGE_BYTES != 0 || size_bytes > INT64_MAX) {
        return PyErr_Format(PyExc_ValueError, "add segment %u: %llu bytes is no positive multiple of %d", number,
                            (unsigned long long)size_bytes, SHMC_PAGE_BYTES);
    }
    SegmentObject *segment = segment_new(self->member->state, number, size_bytes);
    if (segment == NULL) {
        return NULL;
    }
    enum shmc_status status;
    Py_BEGIN_ALLOW_THREADS status = shmc_owner_prepare_segment(fd, size_bytes, &segment->shared);
    Py_END_ALLOW_THREADS unsigned index;
    if (status == SHMC_OK) {
        /* the owner reads its own blocks through read-only pages as well; populated now, so that it never waits later */
        if (!member_map(self->member, number, fd, true)) {
            Py_DECREF(segment);
            return NULL;
        }
        status = shmc_owner_add_segment(&self->owner, number, segment->shared, size_bytes, &index, &detail);
    }
    if (status != SHMC_OK) {
        member_unmap(self->member, number);
        Py_DECREF(segment);
        return owner_raise(self, status, &detail, "add data segment");
    }
    self->segments[index] = segment;
    Py_RETURN_NONE;
}

static PyObject *owner_retire_segment(OwnerObject *self, PyObject *argument)
{
    const struct shmc_detail none = {0, 0};
    uint32_t number;
    unsigned index;
    bool done;
    if (!as_u32(argument, &number)) {
        return NULL;
    }
    enum shmc_status status = shmc_owner_retire_segment(&self->owner, number, &index, &done);
    if (done) {
        member_unmap(self->member, number);
        Py_CLEAR(self->segments[index]); /* unmapped now, or with the last reservation that was written there */
    }
    return status == SHMC_OK ? PyBool_FromLong(done) : owner_raise(self, status, &none, "retire data segment");
}

static PyObject *owner_segments(OwnerObject *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *list = PyList_New(0);
    for (unsigned i = 0; list != NULL && i < SHMC_SEGMENT_COUNT; i++) {
        const struct shmc_data_segment *segment = &self->owner.segments[i];
        if (segment->number == 0) {
            continue;
        }
        PyObject *item = Py_BuildValue("IKKK", segment->number, (unsigned long long)segment->size_bytes,
                                       (unsigned long long)segment->used_bytes,
                                       (unsigned long long)(segment->used_bytes == 0 ? segment->idle_since_ns : 0));
        if (item == NULL || PyList_Append(list, item) != 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(item);
    }
    return list;
}

/* ---- Owner: publish ------------------------------------------------------------------------------------------------------ */

static shmc_hash128 copy_in(void *target, const void *source, size_t size_bytes, bool hashed)
{
    SHMC_STEP(COPY_PAYLOAD);
    if (hashed) {
        return shmc_hash_copy(target, source, size_bytes, 0);
    }
    shmc_copy_bytes(target, source, size_bytes);
    return (shmc_hash128){0, 0};
}

/* One block: take, copy, publish. NO_SPACE changes nothing. */
static enum shmc_status publish_buffer(OwnerObject *self, const Py_buffer *buffer, const struct terms *terms,
                                       struct shmc_published *published, shmc_hash128 *hash, struct shmc_detail *detail)
{
    size_t size_bytes = (size_t)buffer->len;
    uint32_t block;
    void *target;
    enum shmc_status status = shmc_owner_take(&self->owner, size_bytes, &block, &target, detail);
    if (status != SHMC_OK) {
        return status;
    }
    /* the block is in no list until it is published or dropped, so other threads may use the owner meanwhile */
    if (size_bytes >= SHMC_GIL_BYTES) {
        Py_BEGIN_ALLOW_THREADS *hash = copy_in(target, buffer->buf, size_bytes, terms->hashed);
        Py_END_ALLOW_THREADS
    } else {
        *hash = copy_in(target, buffer->buf, size_bytes, terms->hashed);
    }
    status = shmc_owner_publish(&self->owner, block, size_bytes, terms->hashed ? (const uint64_t *)hash : NULL,
                                &terms->terms, published, detail);
    if (status != SHMC_OK) {
        shmc_owner_drop(&self->owner, block);
    }
    return status;
}

static PyObject *publish_object(OwnerObject *self, PyObject *object, const struct terms *terms)
{
    struct shmc_detail detail = {0, 0};
    struct shmc_published published;
    shmc_hash128 hash;
    Py_buffer buffer;
    if (PyObject_GetBuffer(object, &buffer, PyBUF_SIMPLE) != 0) {
        return NULL;
    }
    enum shmc_status status = publish_buffer(self, &buffer, terms, &published, &hash, &detail);
    PyBuffer_Release(&buffer);
    if (status == SHMC_NO_SPACE) {
        Py_RETURN_NONE;
    }
    return status == SHMC_OK ? published_tuple(&published, terms->hashed ? &hash : NULL)
                             : owner_raise(self, status, &detail, "publish");
}

static PyObject *owner_publish(OwnerObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct terms terms;
    if (!check_arguments("publish", count, 6) || !as_terms(arguments + 1, 5, &terms)) {
        return NULL;
    }
    shmc_owner_reclaim(&self->owner, false);
    return publish_object(self, arguments[0], &terms);
}

/* All or nothing: what was published of a list that can not be finished was seen by nobody, and is taken back. */
static void withdraw_all(OwnerObject *self, PyObject *list)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list) && PyList_GET_ITEM(list, i) != NULL; i++) {
        PyObject *item = PyList_GET_ITEM(list, i);
        uint32_t slot = (uint32_t)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(item, 0));
        shmc_owner_withdraw(&self->owner, slot, PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(item, 1)));
    }
    shmc_owner_reclaim(&self->owner, false);
}

static PyObject *owner_publish_many(OwnerObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct terms terms;
    if (!check_arguments("publish_many", count, 6) || !as_terms(arguments + 1, 5, &terms)) {
        return NULL;
    }
    PyObject *sequence = PySequence_Tuple(arguments[0]); /* of our own: nobody changes it while the GIL is dropped */
    PyObject *result = sequence != NULL ? PyList_New(PyTuple_GET_SIZE(sequence)) : NULL;
    shmc_owner_reclaim(&self->owner, false);
    for (Py_ssize_t i = 0; result != NULL && i < PyTuple_GET_SIZE(sequence); i++) {
        PyObject *item = publish_object(self, PyTuple_GET_ITEM(sequence, i), &terms);
        if (item == NULL || item == Py_None) { /* an error, or no space */
            PyObject *type, *value, *traceback;
            PyErr_Fetch(&type, &value, &traceback);
            withdraw_all(self, result);
            PyErr_Restore(type, value, traceback);
            Py_DECREF(result);
            Py_DECREF(sequence);
            return item;
        }
        PyList_SET_ITEM(result, i, item);
    }
    Py_XDECREF(sequence);
    return result;
}

static PyObject *owner_alias(OwnerObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct shmc_detail detail = {0, 0};
    struct shmc_published published;
    struct terms terms;
    uint32_t slot;
    uint64_t generation;
    if (!check_arguments("alias", count, 6) || !as_u32(arguments[0], &slot) || !as_u64(arguments[1], &generation) ||
        !as_terms(arguments + 2, 4, &terms)) {
        return NULL;
    }
    enum shmc_status status = shmc_owner_alias(&self->owner, slot, generation, &terms.terms, &published, &detail);
    if (status != SHMC_OK) {
        return owner_raise(self, status, &detail, "publish block again");
    }
    shmc_hash128 hash = {published.hash_low, published.hash_high};
    return published_tuple(&published, published.hashed ? &hash : NULL);
}

/* ---- Owner: the end of blocks ---------------------------------------------------------------------------------------------- */

typedef bool (*slot_end)(struct shmc_owner *owner, uint32_t slot, uint64_t generation);

static PyObject *end_slot(OwnerObject *self, PyObject *const *arguments, Py_ssize_t count, slot_end end,
                          const char *name)
{
    uint32_t slot;
    uint64_t generation;
    if (!check_arguments(name, count, 2) || !as_u32(arguments[0], &slot) || !as_u64(arguments[1], &generation)) {
        return NULL;
    }
    return PyBool_FromLong(end(&self->owner, slot, generation));
}

static PyObject *owner_release(OwnerObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    return end_slot(self, arguments, count, shmc_owner_release, "release");
}

static PyObject *owner_withdraw(OwnerObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    return end_slot(self, arguments, count, shmc_owner_withdraw, "withdraw");
}

static PyObject *owner_is_live(OwnerObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    return end_slot(self, arguments, count, shmc_owner_is_live, "is_live");
}

static PyObject *owner_takers(OwnerObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    uint32_t slot;
    uint64_t generation, tokens[SHMC_PEER_COUNT];
    if (!check_arguments("takers", count, 2) || !as_u32(arguments[0], &slot) || !as_u64(arguments[1], &generation)) {
        return NULL;
    }
    uint32_t found = shmc_owner_takers(&self->owner, slot, generation, tokens);
    PyObject *result = PyTuple_New(found);
    for (uint32_t i = 0; result != NULL && i < found; i++) {
        PyObject *token = PyLong_FromUnsignedLongLong(tokens[i]);
        if (token == NULL) {
            Py_CLEAR(result);
        } else {
            PyTuple_SET_ITEM(result, i, token);
        }
    }
    return result;
}

static PyObject *owner_reclaim(OwnerObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    int revoke = count > 0 ? PyObject_IsTrue(arguments[0]) : 0;
    return revoke < 0 ? NULL : PyLong_FromUnsignedLongLong(shmc_owner_reclaim(&self->owner, revoke));
}

static PyObject *owner_wait_freed(OwnerObject *self, PyObject *argument)
{
    uint64_t timeout_ns;
    if (!as_u64(argument, &timeout_ns)) {
        return NULL;
    }
    bool noticed;
    Py_BEGIN_ALLOW_THREADS noticed = shmc_owner_wait_freed(&self->member->member.control, timeout_ns);
    Py_END_ALLOW_THREADS return PyBool_FromLong(noticed);
}

static PyObject *owner_stats(OwnerObject *self, PyObject *Py_UNUSED(ignored))
{
    const struct shmc_owner *owner = &self->owner;
    if (owner->ended) {
        return PyDict_New();
    }
    const shmc_atomic_u64 *metrics = owner->member->control.header->metrics;
    uint32_t slots_used = owner->member->control.slot_count - owner->free_slot_count;
#define METRIC(name) #name, (unsigned long long)shmc_metric_get(metrics, SHMC_METRIC_##name)
    return Py_BuildValue("{sKsKsKsKsKsIsIsKsKsKsKsK}",                                                       //
                         "reserved_bytes", (unsigned long long)owner->reserved_bytes,                        //
                         "used_bytes", (unsigned long long)owner->used_bytes,                                //
                         "peak_used_bytes", (unsigned long long)owner->peak_used_bytes,                      //
                         "free_bytes", (unsigned long long)owner->blocks.free_bytes,                         //
                         "largest_free_bytes", (unsigned long long)shmc_blocks_largest_free(&owner->blocks), //
                         "slots_used", slots_used, "slots", owner->member->control.slot_count,               //
                         METRIC(published), METRIC(published_bytes), METRIC(grown), METRIC(revoked), METRIC(swept));
#undef METRIC
}

static PyObject *owner_end(OwnerObject *self, PyObject *Py_UNUSED(ignored))
{
    if (!self->owner.ended && !shmc_member_inherited(&self->member->member)) {
        shmc_control_end(&self->member->member.control);
        self->owner.ended = true;
    }
    Py_RETURN_NONE;
}

/* ---- Reservation ------------------------------------------------------------------------------------------------------------ */

static PyObject *owner_reserve(OwnerObject *self, PyObject *argument)
{
    struct shmc_detail detail = {0, 0};
    uint64_t size_bytes;
    uint32_t block;
    void *target;
    if (!as_u64(argument, &size_bytes)) {
        return NULL;
    }
    shmc_owner_reclaim(&self->owner, false);
    enum shmc_status status = shmc_owner_take(&self->owner, size_bytes, &block, &target, &detail);
    if (status == SHMC_NO_SPACE) {
        Py_RETURN_NONE;
    }
    if (status != SHMC_OK) {
        return owner_raise(self, status, &detail, "reserve");
    }
    ReservationObject *reservation = PyObject_New(ReservationObject, self->member->state->reservation_type);
    if (reservation == NULL) {
        shmc_owner_drop(&self->owner, block);
        return NULL;
    }
    reservation->owner = (OwnerObject *)Py_NewRef(self);
    reservation->segment = (SegmentObject *)Py_NewRef(self->segments[self->owner.blocks.extents[block].segment]);
    reservation->base = target;
    reservation->size_bytes = size_bytes;
    reservation->block = block;
    return (PyObject *)reservation;
}

static void reservation_abort(ReservationObject *self)
{
    OwnerObject *owner = self->owner;
    if (owner != NULL) {
        self->owner = NULL;
        shmc_owner_drop(&owner->owner, self->block);
        Py_DECREF(owner);
    }
}

static void reservation_dealloc(ReservationObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    reservation_abort(self);
    Py_DECREF(self->segment);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *reservation_py_abort(ReservationObject *self, PyObject *Py_UNUSED(ignored))
{
    reservation_abort(self);
    Py_RETURN_NONE;
}

static shmc_hash128 hash_in_place(const ReservationObject *self)
{
    shmc_hash128 hash;
    if (self->size_bytes < SHMC_GIL_BYTES) {
        return shmc_hash_bytes(self->base, self->size_bytes, 0);
    }
    Py_BEGIN_ALLOW_THREADS hash = shmc_hash_bytes(self->base, self->size_bytes, 0);
    Py_END_ALLOW_THREADS return hash;
}

static PyObject *reservation_seal(ReservationObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct shmc_detail detail = {0, 0};
    struct shmc_published published;
    struct terms terms;
    shmc_hash128 hash = {0, 0};
    if (!check_arguments("seal", count, 5) || !as_terms(arguments, 5, &terms)) {
        return NULL;
    }
    OwnerObject *owner = self->owner;
    if (owner == NULL) {
        PyErr_SetString(PyExc_ValueError, "seal: the reservation is sealed or aborted already");
        return NULL;
    }
    /* ours alone from here on: another thread that seals or aborts meanwhile finds nothing */
    self->owner = NULL;
    if (terms.hashed) {
        hash = hash_in_place(self);
    }
    enum shmc_status status =
        shmc_owner_publish(&owner->owner, self->block, self->size_bytes, terms.hashed ? (const uint64_t *)&hash : NULL,
                           &terms.terms, &published, &detail);
    if (status != SHMC_OK) {
        self->owner = owner; /* still reserved: the caller may seal on other terms, or abort */
        return owner_raise(owner, status, &detail, "seal");
    }
    Py_DECREF(owner);
    return published_tuple(&published, terms.hashed ? &hash : NULL);
}

static int reservation_getbuffer(ReservationObject *self, Py_buffer *buffer, int flags)
{
    if (self->owner == NULL) {
        buffer->obj = NULL;
        PyErr_SetString(PyExc_BufferError,
                        "write to reservation: it is sealed or aborted, its bytes are not yours any more");
        return -1;
    }
    return PyBuffer_FillInfo(buffer, (PyObject *)self, self->base, (Py_ssize_t)self->size_bytes, 0, flags);
}

static PyObject *reservation_get_nbytes(ReservationObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(self->size_bytes);
}

static PyObject *reservation_get_place(ReservationObject *self, void *Py_UNUSED(closure))
{
    return Py_BuildValue("IK", self->segment->number, (unsigned long long)(self->base - self->segment->shared));
}

static PyGetSetDef reservation_properties[] = {
    {"nbytes", (getter)reservation_get_nbytes, NULL, "Bytes reserved.", NULL},
    {"place", (getter)reservation_get_place, NULL, "(number of the data segment, offset in it).", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef reservation_methods[] = {
    {"seal", (PyCFunction)(void (*)(void))reservation_seal, METH_FASTCALL, "Publish what was written in place."},
    {"abort", (PyCFunction)reservation_py_abort, METH_NOARGS, "Give the block back unpublished. Idempotent."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot reservation_slots[] = {
    {Py_tp_dealloc, reservation_dealloc},
    {Py_tp_methods, reservation_methods},
    {Py_tp_getset, reservation_properties},
    {Py_bf_getbuffer, reservation_getbuffer},
    {Py_tp_doc, "A block that is being written in place; exports a writable buffer until it is sealed or aborted."},
    {0, NULL},
};

PyType_Spec reservation_spec = {
    .name = "shmcast._native.Reservation",
    .basicsize = sizeof(ReservationObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = reservation_slots,
};

static PyMethodDef owner_methods[] = {
    {"add_segment", (PyCFunction)(void (*)(void))owner_add_segment, METH_FASTCALL,
     "Reserve, map, prefault and use a data segment."},
    {"retire_segment", (PyCFunction)owner_retire_segment, METH_O,
     "Punch an empty, unpinned segment; False where it is neither."},
    {"segments", (PyCFunction)owner_segments, METH_NOARGS, "[(number, size_bytes, used_bytes, idle_since_ns)]."},
    {"publish", (PyCFunction)(void (*)(void))owner_publish, METH_FASTCALL,
     "Copy, hash and publish a buffer; None: no space."},
    {"publish_many", (PyCFunction)(void (*)(void))owner_publish_many, METH_FASTCALL,
     "Publish all of a list, or nothing."},
    {"reserve", (PyCFunction)owner_reserve, METH_O, "A block to write in place; None: no space."},
    {"alias", (PyCFunction)(void (*)(void))owner_alias, METH_FASTCALL, "Publish the bytes of a live block once more."},
    {"release", (PyCFunction)(void (*)(void))owner_release, METH_FASTCALL, "Drop the arena's own hold."},
    {"withdraw", (PyCFunction)(void (*)(void))owner_withdraw, METH_FASTCALL,
     "End every claim that nobody made use of yet."},
    {"is_live", (PyCFunction)(void (*)(void))owner_is_live, METH_FASTCALL, "Whether anybody has a claim on the block."},
    {"takers", (PyCFunction)(void (*)(void))owner_takers, METH_FASTCALL, "Who has taken one of the n."},
    {"reclaim", (PyCFunction)(void (*)(void))owner_reclaim, METH_FASTCALL,
     "Take back what became free; returns bytes."},
    {"wait_freed", (PyCFunction)owner_wait_freed, METH_O, "Wait until some block may have become free."},
    {"stats", (PyCFunction)owner_stats, METH_NOARGS, "Counts and bytes."},
    {"end", (PyCFunction)owner_end, METH_NOARGS, "Mark the arena as ended."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot owner_slots[] = {
    {Py_tp_new, owner_new},
    {Py_tp_dealloc, owner_dealloc},
    {Py_tp_methods, owner_methods},
    {Py_tp_doc, "Publisher's side of an arena: allocator, slots, deadlines."},
    {0, NULL},
};

PyType_Spec owner_spec = {
    .name = "shmcast._native.Owner",
    .basicsize = sizeof(OwnerObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = owner_slots,
};
