/* module_lease.c: Lease (the right to read a range of a block) and View (what arrays are built over). */
#include "module.h"

#include <stdlib.h>

/* ---- lanes: private mappings, whose pages a lease may write without anybody else seeing it ------------------------------ */

/* The page at which the block starts in its segment; blocks that may be mapped privately start on one. */
static size_t first_page(const LeaseObject *self)
{
    return (size_t)(self->block.block_offset / SHMC_PAGE_BYTES);
}

static uint64_t block_page_bytes(const LeaseObject *self)
{
    return shmc_round_up(self->block.block_bytes, SHMC_PAGE_BYTES);
}

void lanes_unmap(struct lane *lane, uint64_t size_bytes)
{
    while (lane != NULL) {
        struct lane *next = lane->next;
        shmc_segment_unmap(lane->base, size_bytes);
        free(lane->taken);
        free(lane);
        lane = next;
    }
}

static struct lane *find_lane(const LeaseObject *self)
{
    struct lane *lane = self->segment->lanes;
    while (lane != NULL && lane->taken[first_page(self)]) {
        lane = lane->next;
    }
    return lane;
}

/* Another mapping of the segment, for it to keep; false with an exception set. */
static bool add_lane(LeaseObject *self)
{
    SegmentObject *segment = self->segment;
    const struct shmc_detail none = {0, 0};
    void *base = NULL;
    struct lane *lane = NULL;
    enum shmc_status status;
    int fd = open_through(self->member->opener, segment->number);
    if (fd < 0) {
        return false;
    }
    status = shmc_segment_map(fd, segment->size_bytes, SHMC_MAP_PRIVATE_COW, &base);
    close(fd);
    if (status != SHMC_OK) {
        raise_status(self->member->state, status, &none, "map data segment privately");
        return false;
    }
    lane = calloc(1, sizeof *lane);
    uint8_t *taken = calloc(segment->size_bytes / SHMC_PAGE_BYTES + 1, 1);
    if (lane == NULL || taken == NULL) {
        free(lane);
        free(taken);
        shmc_segment_unmap(base, segment->size_bytes);
        PyErr_NoMemory();
        return false;
    }
    *lane = (struct lane){.base = base, .taken = taken};
    struct lane **last = &segment->lanes; /* at the end: the first ones are those whose pages are mapped already */
    while (*last != NULL) {
        last = &(*last)->next;
    }
    *last = lane;
    return true;
}

static bool map_privately(LeaseObject *self)
{
    while (self->lane == NULL) {
        struct lane *lane = find_lane(self);
        if (lane != NULL) {
            lane->taken[first_page(self)] = 1;
            self->lane = lane;
        } else if (!add_lane(self)) { /* the opener is Python: look again, another thread may have run */
            return false;
        }
    }
    return true;
}

/* Before the hold is given up: what we wrote goes, or we would see it in the next block that lies here. */
static void forget_private(LeaseObject *self)
{
    if (self->lane == NULL) {
        return;
    }
    uint8_t *base = self->lane->base + self->block.block_offset;
    if (shmc_segment_forget_private(base, block_page_bytes(self)) != SHMC_OK) {
        self->segment->private_broken = true; /* locked pages can not be dropped: others get copies from now on */
    }
    self->lane->taken[first_page(self)] = 0;
    self->lane = NULL;
}

static bool owns_pages(const LeaseObject *self)
{
    return (self->block.flags & SHMC_RECORD_OWN_PAGES) != 0 && self->block.block_offset % SHMC_PAGE_BYTES == 0 &&
           block_page_bytes(self) <= self->segment->size_bytes - self->block.block_offset &&
           !self->segment->private_broken;
}

/* ---- Lease ---------------------------------------------------------------------------------------------------------------- */

static void lease_finish(LeaseObject *self)
{
    MemberObject *member = self->member;
    if (member != NULL) {
        self->member = NULL;
        /* a forked child has its parent's pages and its parent's hold, neither of them its own to give up */
        if (self->segment != NULL && !shmc_member_inherited(&member->member)) {
            forget_private(self);
        }
        shmc_member_release(&member->member, self->slot);
        Py_CLEAR(self->segment);
        Py_DECREF(member);
    }
}

static void lease_dealloc(LeaseObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    lease_finish(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* Ended by release(), though the hold may last: see lease_getbuffer. */
static bool is_released(const LeaseObject *self)
{
    return self->member == NULL || self->ended;
}

static PyObject *raise_released(const LeaseObject *self)
{
    return PyErr_Format(PyExc_ValueError, "use lease: it was released (slot %u, generation %llu); attach again",
                        self->slot, (unsigned long long)self->generation);
}

static PyObject *lease_release(LeaseObject *self, PyObject *Py_UNUSED(ignored))
{
    if (self->exports != 0) {
        return PyErr_Format(PyExc_BufferError,
                            "release lease: %zd arrays or buffers over it are alive; drop them first", self->exports);
    }
    self->ended = true;
    if (!self->kept_by_address) {
        lease_finish(self);
    }
    Py_RETURN_NONE;
}

/* A View that counts as an export while it lives; `private` was mapped before. */
static ViewObject *new_view(LeaseObject *self, bool private)
{
    ViewObject *view = PyObject_New(ViewObject, self->member->state->view_type);
    if (view != NULL) {
        view->lease = (LeaseObject *)Py_NewRef(self);
        view->private = private;
        view->base = (private ? self->lane->base : self->segment->shared) + self->offset_bytes;
        self->exports++;
    }
    return view;
}

/* numpy.ndarray(buffer=) and torch.frombuffer() give a buffer back at once and keep the memory with the object that it was
 * got from. So who asks for the format as well, as memoryview does, gets a View, which counts for as long as anybody keeps
 * it; and after a request without, as those two make, the hold lasts as long as the lease object does, whatever
 * release() says. */
static int lease_getbuffer(LeaseObject *self, Py_buffer *buffer, int flags)
{
    if (is_released(self)) {
        buffer->obj = NULL;
        raise_released(self);
        return -1;
    }
    if ((flags & PyBUF_FORMAT) != 0) {
        ViewObject *view = new_view(self, false);
        int result = view != NULL ? PyObject_GetBuffer((PyObject *)view, buffer, flags) : -1;
        Py_XDECREF(view);
        return result;
    }
    if (PyBuffer_FillInfo(buffer, (PyObject *)self, self->segment->shared + self->offset_bytes,
                          (Py_ssize_t)self->size_bytes, 1, flags) != 0) {
        return -1;
    }
    self->kept_by_address = true;
    self->exports++;
    return 0;
}

static void lease_releasebuffer(LeaseObject *self, Py_buffer *Py_UNUSED(buffer))
{
    self->exports--;
}

static PyObject *lease_view(LeaseObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    int private = count > 0 ? PyObject_IsTrue(arguments[0]) : 0;
    if (private < 0 || (count > 1 && !check_arguments("view", count, 1))) {
        return NULL;
    }
    if (is_released(self)) {
        return raise_released(self);
    }
    if (private && !owns_pages(self)) {
        const struct shmc_detail detail = {self->block.block_bytes, self->block.block_offset};
        return raise_status(self->member->state, SHMC_SHARED_PAGES, &detail, "map block privately");
    }
    self->exports++; /* the opener is Python: another thread may run, and must not release us meanwhile */
    ViewObject *view = !private || map_privately(self) ? new_view(self, private) : NULL;
    self->exports--;
    return (PyObject *)view;
}

static PyObject *lease_modified(LeaseObject *self, PyObject *Py_UNUSED(ignored))
{
    if (is_released(self) || self->lane == NULL) {
        Py_RETURN_FALSE;
    }
    uint64_t offset = self->block.block_offset;
    return PyBool_FromLong(shmc_segment_private_written(self->lane->base + offset, self->segment->shared + offset,
                                                        block_page_bytes(self)));
}

static PyObject *lease_pass_on(LeaseObject *self, PyObject *argument)
{
    struct tokens tokens;
    if (is_released(self)) {
        return raise_released(self);
    }
    struct module_state *state = self->member->state;
    struct shmc_detail detail = {0, 0};
    if (shmc_member_inherited(&self->member->member)) {
        return raise_status(state, SHMC_INHERITED, &detail, "pass block on");
    }
    if (!as_tokens(argument, &tokens)) {
        return NULL;
    }
    unsigned long granted = 0;
    for (uint32_t i = 0; i < tokens.count; i++) {
        bool joined;
        enum shmc_status status =
            shmc_slot_pass_on(&self->member->member.control, self->slot, tokens.values[i], &joined, &detail);
        if (status != SHMC_OK) {
            return raise_status(state, status, &detail, "pass block on");
        }
        granted += joined;
    }
    return PyLong_FromUnsignedLong(granted);
}

static PyObject *lease_pending(LeaseObject *self, PyObject *argument)
{
    struct tokens tokens;
    if (is_released(self)) {
        return raise_released(self);
    }
    if (!as_tokens(argument, &tokens)) {
        return NULL;
    }
    const struct shmc_control *control = &self->member->member.control;
    uint64_t word = shmc_seq_load(&control->words[self->slot]);
    unsigned long pending = 0;
    for (uint32_t i = 0; i < tokens.count; i++) {
        uint32_t incarnation;
        int p = shmc_peer_find(control, tokens.values[i], &incarnation);
        pending += p > SHMC_OWNER && (word & SHMC_GRANT(p)) != 0;
    }
    return PyLong_FromUnsignedLong(pending);
}

static PyObject *lease_get_address(LeaseObject *self, void *Py_UNUSED(closure))
{
    return !is_released(self) ? PyLong_FromVoidPtr(self->segment->shared + self->offset_bytes) : raise_released(self);
}

static PyObject *lease_get_nbytes(LeaseObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(self->size_bytes);
}

static PyObject *lease_get_released(LeaseObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(is_released(self));
}

static PyObject *lease_get_owns_pages(LeaseObject *self, void *Py_UNUSED(closure))
{
    return !is_released(self) ? PyBool_FromLong(owns_pages(self)) : raise_released(self);
}

static PyObject *lease_get_hash(LeaseObject *self, void *Py_UNUSED(closure))
{
    if (is_released(self)) {
        return raise_released(self);
    }
    bool whole = self->offset_bytes == self->block.block_offset && self->size_bytes == self->block.block_bytes;
    if (!whole || (self->block.flags & SHMC_RECORD_HASHED) == 0) {
        Py_RETURN_NONE;
    }
    return int_from_hash(self->block.hash_low, self->block.hash_high);
}

static PyGetSetDef lease_properties[] = {
    {"address", (getter)lease_get_address, NULL, "Address of the first byte in the shared read-only mapping.", NULL},
    {"nbytes", (getter)lease_get_nbytes, NULL, "Bytes that the lease covers.", NULL},
    {"released", (getter)lease_get_released, NULL, "Whether the lease was given back.", NULL},
    {"owns_pages", (getter)lease_get_owns_pages, NULL, "Whether the block may be mapped privately.", NULL},
    {"content_hash", (getter)lease_get_hash, NULL, "XXH3-128 of the block as published, None where there is none.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef lease_methods[] = {
    {"release", (PyCFunction)lease_release, METH_NOARGS,
     "Give the hold up now; BufferError while arrays or buffers over it are alive. Idempotent."},
    {"view", (PyCFunction)(void (*)(void))lease_view, METH_FASTCALL, "An exporter of the bytes, read-only or private."},
    {"modified", (PyCFunction)lease_modified, METH_NOARGS,
     "Whether this process wrote into its private pages of the block."},
    {"grant_to", (PyCFunction)lease_pass_on, METH_O, "Grant the block to these processes; returns how many by name."},
    {"pending", (PyCFunction)lease_pending, METH_O, "How many of these processes have not consumed their grant yet."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot lease_slots[] = {
    {Py_tp_dealloc, lease_dealloc},
    {Py_tp_methods, lease_methods},
    {Py_tp_getset, lease_properties},
    {Py_bf_getbuffer, lease_getbuffer},
    {Py_bf_releasebuffer, lease_releasebuffer},
    {Py_tp_doc, "The right to read a range of a block."},
    {0, NULL},
};

PyType_Spec lease_spec = {
    .name = "shmcast._native.Lease",
    .basicsize = sizeof(LeaseObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = lease_slots,
};

/* ---- View ------------------------------------------------------------------------------------------------------------------ */

static void view_dealloc(ViewObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    self->lease->exports--;
    Py_DECREF(self->lease);
    type->tp_free(self);
    Py_DECREF(type);
}

static int view_getbuffer(ViewObject *self, Py_buffer *buffer, int flags)
{
    return PyBuffer_FillInfo(buffer, (PyObject *)self, self->base, (Py_ssize_t)self->lease->size_bytes, !self->private,
                             flags);
}

static PyObject *view_get_lease(ViewObject *self, void *Py_UNUSED(closure))
{
    return Py_NewRef(self->lease);
}

static PyObject *view_get_private(ViewObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->private);
}

static PyObject *view_get_address(ViewObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromVoidPtr(self->base);
}

static PyGetSetDef view_properties[] = {
    {"lease", (getter)view_get_lease, NULL, "The lease whose bytes these are.", NULL},
    {"private", (getter)view_get_private, NULL, "Whether writes are possible, and seen by this process alone.", NULL},
    {"address", (getter)view_get_address, NULL, "Address of the first byte.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot view_slots[] = {
    {Py_tp_dealloc, view_dealloc},
    {Py_tp_getset, view_properties},
    {Py_bf_getbuffer, view_getbuffer},
    {Py_tp_doc, "Exports a lease's bytes; the lease can not be released while it lives."},
    {0, NULL},
};

PyType_Spec view_spec = {
    .name = "shmcast._native.View",
    .basicsize = sizeof(ViewObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = view_slots,
};
