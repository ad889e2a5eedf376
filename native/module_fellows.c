/* module_fellows.c: Fellows: the ranks of a group as peers of one arena. */
#include "module.h"

#include "clock.h"

bool as_ranks(PyTypeObject *type, PyObject *arguments, const char *format, MemberObject **member, struct tokens *tokens,
              uint64_t *start)
{
    const struct module_state *state = PyType_GetModuleState(type);
    unsigned long long number = 0;
    PyObject *iterable;
    if (state == NULL || !PyArg_ParseTuple(arguments, format, state->member_type, member, &iterable, &number) ||
        !as_tokens(iterable, tokens)) {
        return false;
    }
    *start = number;
    return true;
}

static PyObject *fellows_new(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(keywords))
{
    struct shmc_detail detail = {0, 0};
    struct tokens tokens;
    MemberObject *member;
    uint64_t group;
    if (!as_ranks(type, arguments, "O!OK:Fellows", &member, &tokens, &group)) {
        return NULL;
    }
    FellowsObject *self = (FellowsObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->member = (MemberObject *)Py_NewRef(member);
    enum shmc_status status = shmc_fellows_init(&self->fellows, &member->member, tokens.values, tokens.count, &detail);
    if (status != SHMC_OK) {
        raise_status(member->state, status, &detail, "find the ranks of a group");
        Py_CLEAR(self);
    } else {
        self->fellows.group = group;
    }
    return (PyObject *)self;
}

static void fellows_dealloc(FellowsObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->member);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *fellows_reset(PyTypeObject *type, PyObject *argument)
{
    const struct shmc_detail none = {0, 0};
    const struct module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyObject_TypeCheck(argument, state->member_type)) {
        return PyErr_Format(PyExc_TypeError, "reset: %s is no Member", Py_TYPE(argument)->tp_name);
    }
    enum shmc_status status = shmc_fellows_reset(&((MemberObject *)argument)->member);
    return status == SHMC_OK ? Py_NewRef(Py_None) : raise_status(state, status, &none, "reset our word");
}

static PyObject *fellows_begin(PyTypeObject *type, PyObject *argument)
{
    const struct shmc_detail none = {0, 0};
    const struct module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyObject_TypeCheck(argument, state->member_type)) {
        return PyErr_Format(PyExc_TypeError, "begin: %s is no Member", Py_TYPE(argument)->tp_name);
    }
    struct shmc_member *member = &((MemberObject *)argument)->member;
    if (shmc_member_inherited(member)) {
        return raise_status(state, SHMC_INHERITED, &none, "begin a group");
    }
    if (member->index != SHMC_OWNER) {
        return PyErr_Format(PyExc_ValueError, "begin a group: this is peer %u; the owner of the arena, peer 0, begins",
                            member->index);
    }
    return PyLong_FromUnsignedLongLong(shmc_fellows_begin(member));
}

static PyObject *fellows_record(FellowsObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    const struct shmc_detail none = {0, 0};
    uint64_t word, mask = 0;
    if (count < 1 || count > 2) {
        return PyErr_Format(PyExc_TypeError, "record() takes 1 or 2 arguments, %zd were given", count);
    }
    if (!as_u64(arguments[0], &word) || (count == 2 && !as_u64(arguments[1], &mask))) {
        return NULL;
    }
    enum shmc_status status = shmc_fellows_record(&self->fellows, word, mask);
    return status == SHMC_OK ? Py_NewRef(Py_None) : raise_status(self->member->state, status, &none, "record our word");
}

static PyObject *fellows_words(FellowsObject *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *list = PyList_New(self->fellows.count);
    for (uint32_t rank = 0; list != NULL && rank < self->fellows.count; rank++) {
        uint64_t word, failed_step;
        shmc_fellows_words(&self->fellows, rank, &word, &failed_step);
        PyObject *item = Py_BuildValue("KK", (unsigned long long)word, (unsigned long long)failed_step);
        if (item == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SET_ITEM(list, rank, item);
        }
    }
    return list;
}

/* Message numbers are half of words. */
static bool as_word(PyObject *object, uint64_t *word)
{
    uint64_t step;
    if (!as_u64(object, &step)) {
        return false;
    }
    if (step >= SHMC_VERDICT_WORD(UINT64_MAX) / 2) {
        PyErr_Format(PyExc_OverflowError, "message %llu is more than an agreement counts", (unsigned long long)step);
        return false;
    }
    *word = 2 * step;
    return true;
}

static bool is_member(const FellowsObject *self, const char *action)
{
    const struct shmc_detail none = {0, 0};
    if (shmc_member_inherited(&self->member->member)) {
        raise_status(self->member->state, SHMC_INHERITED, &none, action);
        return false;
    }
    return true;
}

static PyObject *fellows_has(FellowsObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    uint64_t rank, word;
    if (!check_arguments("has", count, 2) || !as_u64(arguments[0], &rank) || !as_word(arguments[1], &word)) {
        return NULL;
    }
    if (rank >= self->fellows.count) {
        return PyErr_Format(PyExc_IndexError, "rank %llu of %u", (unsigned long long)rank, self->fellows.count);
    }
    return PyBool_FromLong(shmc_fellows_has(&self->fellows, (uint32_t)rank, word));
}

static PyObject *fellows_give_up(FellowsObject *self, PyObject *argument)
{
    uint64_t word;
    if (!as_word(argument, &word) || !is_member(self, "give up")) {
        return NULL;
    }
    return PyBool_FromLong(shmc_fellows_give_up(&self->fellows, word));
}

static PyObject *fellows_agree(FellowsObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    uint64_t word, timeout_ns;
    if (!check_arguments("agree", count, 2) || !as_word(arguments[0], &word) || !as_u64(arguments[1], &timeout_ns) ||
        !is_member(self, "agree")) {
        return NULL;
    }
    struct shmc_ballot ballot;
    shmc_ballot_init(&ballot, &self->fellows, word);
    enum shmc_agreement state = shmc_ballot_look(&ballot);
    uint64_t deadline_ns = state == SHMC_AGREE_PENDING ? shmc_clock_deadline(timeout_ns) : 0;
    bool interrupted = true;
    while (state == SHMC_AGREE_PENDING && interrupted) {
        Py_BEGIN_ALLOW_THREADS state = shmc_ballot_wait(&ballot, deadline_ns, &interrupted);
        Py_END_ALLOW_THREADS if (interrupted && PyErr_CheckSignals() != 0)
        {
            return NULL;
        }
    }
    if (state == SHMC_AGREE_LATER) {
        const struct shmc_detail detail = {ballot.later / 2, word / 2};
        return raise_status(self->member->state, SHMC_AGREED_LATER, &detail, "agree");
    }
    return state == SHMC_AGREE_REACHED
               ? Py_BuildValue("KK", (unsigned long long)ballot.parts, (unsigned long long)ballot.ranks)
               : Py_NewRef(Py_None);
}

static PyObject *fellows_given_up(FellowsObject *self, PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(shmc_fellows_given_up(&self->fellows));
}

static PyMethodDef fellows_methods[] = {
    {"reset", (PyCFunction)fellows_reset, METH_O | METH_CLASS, "Our word, as if there had never been a group."},
    {"begin", (PyCFunction)fellows_begin, METH_O | METH_CLASS, "A new group of the arena: its name."},
    {"record", (PyCFunction)(void (*)(void))fellows_record, METH_FASTCALL, "Set our word, and our mask with it."},
    {"words", (PyCFunction)fellows_words, METH_NOARGS, "[(word, failed step)] by rank."},
    {"agree", (PyCFunction)(void (*)(void))fellows_agree, METH_FASTCALL, "All masks of a message, and whose; or None."},
    {"has", (PyCFunction)(void (*)(void))fellows_has, METH_FASTCALL, "Whether a rank has come as far as a message."},
    {"give_up", (PyCFunction)fellows_give_up, METH_O, "Nothing from that message on shall be agreed on."},
    {"given_up", (PyCFunction)fellows_given_up, METH_NOARGS, "Whether some rank has given up."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot fellows_slots[] = {
    {Py_tp_new, fellows_new},
    {Py_tp_dealloc, fellows_dealloc},
    {Py_tp_methods, fellows_methods},
    {Py_tp_doc, "The ranks of a group as peers of one arena: what they say in their words."},
    {0, NULL},
};

PyType_Spec fellows_spec = {
    .name = "shmcast._native.Fellows",
    .basicsize = sizeof(FellowsObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = fellows_slots,
};
