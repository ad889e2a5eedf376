/* module_ring.c: Ring: one end of the ring of a group. */
#include "module.h"

#include "clock.h"

static PyObject *ring_new(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(keywords))
{
    struct shmc_detail detail = {0, 0};
    struct tokens tokens;
    MemberObject *member;
    uint64_t start;
    if (!as_ranks(type, arguments, "O!OK:Ring", &member, &tokens, &start)) {
        return NULL;
    }
    RingObject *self = (RingObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->member = (MemberObject *)Py_NewRef(member);
    enum shmc_status status = shmc_ring_init(&self->ring, &member->member, tokens.values, tokens.count, start, &detail);
    if (status != SHMC_OK) {
        raise_status(member->state, status, &detail, "begin to use the ring");
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void ring_dealloc(RingObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->message);
    Py_XDECREF(self->member);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *ring_position(PyTypeObject *type, PyObject *argument)
{
    const struct module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyObject_TypeCheck(argument, state->member_type)) {
        return PyErr_Format(PyExc_TypeError, "position: %s is no Member", Py_TYPE(argument)->tp_name);
    }
    return PyLong_FromUnsignedLongLong(shmc_ring_head(&((MemberObject *)argument)->member.control));
}

/* Everything else is for members, and for one of the two ends. */
static bool may(const RingObject *self, bool writer, const char *action)
{
    const struct shmc_detail none = {0, 0};
    if (shmc_member_inherited(&self->member->member)) {
        raise_status(self->member->state, SHMC_INHERITED, &none, action);
        return false;
    }
    if ((self->member->member.index == SHMC_OWNER) != writer) {
        PyErr_Format(PyExc_ValueError,
                     "%s: this is peer %u; the owner of the arena, peer 0, writes and the others read", action,
                     self->member->member.index);
        return false;
    }
    return true;
}

/* True: look again. False without an exception: it was in vain, as far as this call goes. */
static bool wait_for_more(const RingObject *self, uint64_t deadline_ns)
{
    enum shmc_waited waited;
    Py_BEGIN_ALLOW_THREADS waited = shmc_ring_wait(&self->ring, deadline_ns);
    Py_END_ALLOW_THREADS return waited == SHMC_WAIT_MET || (waited == SHMC_WAIT_SIGNAL && PyErr_CheckSignals() == 0);
}

static PyObject *send_rest(RingObject *self, const Py_buffer *payload, uint64_t done_bytes, uint64_t timeout_ns)
{
    struct shmc_detail detail = {0, 0};
    uint64_t began_at = self->ring.position, deadline_ns = 0;
    bool ended;
    for (;;) {
        enum shmc_status status =
            shmc_ring_put(&self->ring, payload->buf, (uint64_t)payload->len, &done_bytes, &ended, &detail);
        if (status != SHMC_OK) {
            return raise_status(self->member->state, status, &detail, "send through the ring");
        }
        deadline_ns = deadline_ns == 0 && !ended ? shmc_clock_deadline(timeout_ns) : deadline_ns;
        if (ended || !wait_for_more(self, deadline_ns)) {
            break;
        }
    }
    if (PyErr_Occurred()) {
        return NULL;
    }
    return self->ring.position != began_at ? PyLong_FromUnsignedLongLong(done_bytes) : Py_NewRef(Py_None);
}

static PyObject *ring_send(RingObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    uint64_t done_bytes, timeout_ns;
    Py_buffer payload;
    if (!check_arguments("send", count, 3) || !as_u64(arguments[1], &done_bytes) ||
        !as_u64(arguments[2], &timeout_ns) || !may(self, true, "send through the ring") ||
        PyObject_GetBuffer(arguments[0], &payload, PyBUF_SIMPLE) != 0) {
        return NULL;
    }
    PyObject *result;
    if (done_bytes > (uint64_t)payload.len) {
        result = PyErr_Format(PyExc_ValueError, "send: %llu bytes are said to be in, the message has %zd",
                              (unsigned long long)done_bytes, payload.len);
    } else {
        result = send_rest(self, &payload, done_bytes, timeout_ns);
    }
    PyBuffer_Release(&payload);
    return result;
}

/* Room for the message that begins. */
static enum shmc_status begin_message(RingObject *self, uint64_t message_bytes, struct shmc_detail *detail)
{
    Py_XSETREF(self->message,
               message_bytes <= PY_SSIZE_T_MAX ? PyBytes_FromStringAndSize(NULL, (Py_ssize_t)message_bytes) : NULL);
    if (self->message == NULL) {
        PyErr_Clear();
        detail->a = message_bytes;
        return SHMC_RING_MEMORY;
    }
    return SHMC_OK;
}

/* One entry. *message: where its message ends here. */
static bool take_piece(RingObject *self, PyObject **message)
{
    struct shmc_detail detail = {0, 0};
    struct shmc_ring_piece piece;
    bool ended = false;
    enum shmc_status status = shmc_ring_look(&self->ring, &piece, &detail);
    if (status == SHMC_OK && !self->ring.within) {
        status = begin_message(self, piece.message_bytes, &detail);
    }
    if (status == SHMC_OK) {
        status = shmc_ring_take(&self->ring, &piece, (uint8_t *)PyBytes_AS_STRING(self->message), &ended, &detail);
    }
    if (status != SHMC_OK) {
        char action[64];
        snprintf(action, sizeof action, "receive from the ring, entry %llu", (unsigned long long)self->ring.position);
        raise_status(self->member->state, status, &detail, action);
        return false;
    }
    if (ended) {
        *message = self->message;
        self->message = NULL;
    }
    return true;
}

static PyObject *ring_receive(RingObject *self, PyObject *argument)
{
    uint64_t timeout_ns, deadline_ns = 0;
    PyObject *message = NULL;
    if (!as_u64(argument, &timeout_ns) || !may(self, false, "receive from the ring")) {
        return NULL;
    }
    for (;;) {
        while (message == NULL && shmc_ring_has_more(&self->ring)) {
            if (!take_piece(self, &message)) {
                return NULL;
            }
        }
        if (message != NULL) {
            return message;
        }
        deadline_ns = deadline_ns == 0 ? shmc_clock_deadline(timeout_ns) : deadline_ns;
        if (!wait_for_more(self, deadline_ns)) {
            return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
        }
    }
}

static PyObject *ring_poll(RingObject *self, PyObject *Py_UNUSED(ignored))
{
    if (!may(self, false, "poll the ring")) {
        return NULL;
    }
    return PyBool_FromLong(self->ring.within || shmc_ring_has_more(&self->ring));
}

static PyMethodDef ring_methods[] = {
    {"position", (PyCFunction)ring_position, METH_O | METH_CLASS, "How many entries were ever sent."},
    {"send", (PyCFunction)(void (*)(void))ring_send, METH_FASTCALL, "Send a message, or what is left of it."},
    {"receive", (PyCFunction)ring_receive, METH_O, "The next whole message; None: not yet."},
    {"poll", (PyCFunction)ring_poll, METH_NOARGS, "Whether at least the start of a message is there."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, ring_methods},
    {Py_tp_doc, "One end of the ring of a group."},
    {0, NULL},
};

PyType_Spec ring_spec = {
    .name = "shmcast._native.Ring",
    .basicsize = sizeof(RingObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = ring_slots,
};
