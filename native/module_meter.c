/* module_meter.c: Meter (where a process adds to metrics), and what Python is told about the table. */
#include "module.h"

#include <string.h>

#include "metrics.h"

/* name in METRICS, call of Meter that writes it */
static const char *const kinds[SHMC_METRIC_KIND_COUNT][2] = {
    [SHMC_COUNTER] = {"counter", "add"},     [SHMC_GAUGE] = {"gauge", "set"},     [SHMC_PEAK] = {"peak", "peak"},
    [SHMC_TIMES] = {"histogram", "observe"}, [SHMC_SIZES] = {"sizes", "observe"},
};

/* ---- the table -------------------------------------------------------------------------------------------------------- */

static PyObject *table(void)
{
    PyObject *rows = PyTuple_New(SHMC_METRIC_COUNT);
    for (unsigned i = 0; rows != NULL && i < SHMC_METRIC_COUNT; i++) {
        const struct shmc_metric_row *row = &shmc_metric_rows[i];
        PyObject *item = Py_BuildValue("ssIs", row->name, kinds[row->kind][0], row->first_word, row->text);
        if (item == NULL) {
            Py_CLEAR(rows);
        } else {
            PyTuple_SET_ITEM(rows, i, item);
        }
    }
    return rows;
}

static PyObject *bucket_ends(enum shmc_metric_kind kind)
{
    PyObject *ends = PyTuple_New(SHMC_METRIC_BUCKETS - 1);
    for (unsigned bucket = 0; ends != NULL && bucket < SHMC_METRIC_BUCKETS - 1; bucket++) {
        PyObject *end = PyLong_FromUnsignedLongLong(shmc_metric_bucket_end(kind, bucket));
        if (end == NULL) {
            Py_CLEAR(ends);
        } else {
            PyTuple_SET_ITEM(ends, bucket, end);
        }
    }
    return ends;
}

static bool add_constant(PyObject *module, const char *name, PyObject *value)
{
    bool added = value != NULL && PyModule_AddObjectRef(module, name, value) == 0;
    Py_XDECREF(value);
    return added;
}

bool add_metric_constants(PyObject *module)
{
    return add_constant(module, "METRICS", table()) &&
           add_constant(module, "HISTOGRAM_ENDS_NS", bucket_ends(SHMC_TIMES)) &&
           add_constant(module, "SIZES_ENDS", bucket_ends(SHMC_SIZES));
}

PyObject *module_metric(PyObject *Py_UNUSED(module), PyObject *name)
{
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : NULL;
    for (unsigned i = 0; text != NULL && i < SHMC_METRIC_COUNT; i++) {
        if (strcmp(text, shmc_metric_rows[i].name) == 0) {
            return PyLong_FromUnsignedLong(i);
        }
    }
    return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "there is no metric %R; see METRICS", name);
}

PyObject *metric_words(const shmc_atomic_u64 *block)
{
    PyObject *list = PyList_New(SHMC_METRIC_WORD_COUNT);
    for (unsigned i = 0; list != NULL && i < SHMC_METRIC_WORD_COUNT; i++) {
        PyObject *word = PyLong_FromUnsignedLongLong(shmc_relaxed_load(&block[i]));
        if (word == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SET_ITEM(list, i, word);
        }
    }
    return list;
}

/* ---- Meter ------------------------------------------------------------------------------------------------------------ */

static PyObject *meter_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    struct module_state *state = PyType_GetModuleState(type);
    PyObject *member = Py_None;
    if (state == NULL || !PyArg_ParseTuple(arguments, "|O:Meter", &member)) {
        return NULL;
    }
    if (keywords != NULL && PyDict_GET_SIZE(keywords) != 0) {
        PyErr_SetString(PyExc_TypeError, "Meter() takes no keyword arguments");
        return NULL;
    }
    if (member != Py_None && !PyObject_TypeCheck(member, state->member_type)) {
        return PyErr_Format(PyExc_TypeError, "make meter: a Member or None is needed, not %R", Py_TYPE(member));
    }
    MeterObject *self = (MeterObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    if (member != Py_None) {
        self->member = (MemberObject *)Py_NewRef(member); /* which keeps the control segment mapped */
        self->words = self->member->member.control.header->metrics;
    } else {
        self->words = PyMem_Calloc(SHMC_METRIC_WORD_COUNT, sizeof *self->words);
        if (self->words == NULL) {
            Py_DECREF(self);
            return PyErr_NoMemory();
        }
    }
    return (PyObject *)self;
}

static void meter_dealloc(MeterObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->member == NULL) {
        PyMem_Free(self->words);
    }
    Py_XDECREF(self->member);
    type->tp_free(self);
    Py_DECREF(type);
}

/* index, value of one call; false with an exception set unless the metric is of that kind or of the other one */
static bool as_metric(PyObject *const *arguments, Py_ssize_t count, enum shmc_metric_kind kind,
                      enum shmc_metric_kind other, enum shmc_metric *metric, uint64_t *value)
{
    uint32_t index;
    if (!check_arguments(kinds[kind][1], count, 2) || !as_u32(arguments[0], &index) || !as_u64(arguments[1], value)) {
        return false;
    }
    if (index >= SHMC_METRIC_COUNT) {
        PyErr_Format(PyExc_ValueError, "%s: there is no metric %u, the table has %d", kinds[kind][1], index,
                     SHMC_METRIC_COUNT);
        return false;
    }
    const struct shmc_metric_row *row = &shmc_metric_rows[index];
    if (row->kind != kind && row->kind != other) {
        PyErr_Format(PyExc_ValueError, "%s: metric '%s' is a %s, which is written by %s", kinds[kind][1], row->name,
                     kinds[row->kind][0], kinds[row->kind][1]);
        return false;
    }
    *metric = (enum shmc_metric)index;
    return true;
}

/* A forked child is no member: what it did would be counted as its parent's. */
static bool writes(const MeterObject *self)
{
    return self->member == NULL || !shmc_member_inherited(&self->member->member);
}

#define METER_CALL(name, function, kind, other) \
    static PyObject *meter_##name(MeterObject *self, PyObject *const *arguments, Py_ssize_t count) \
    { \
        enum shmc_metric metric; \
        uint64_t value; \
        if (!as_metric(arguments, count, kind, other, &metric, &value)) { \
            return NULL; \
        } \
        if (writes(self)) { \
            function(self->words, metric, value); \
        } \
        Py_RETURN_NONE; \
    }
METER_CALL(add, shmc_metric_add, SHMC_COUNTER, SHMC_COUNTER)
METER_CALL(set, shmc_metric_set, SHMC_GAUGE, SHMC_GAUGE)
METER_CALL(peak, shmc_metric_peak, SHMC_PEAK, SHMC_PEAK)
METER_CALL(observe, shmc_metric_observe, SHMC_TIMES, SHMC_SIZES)
#undef METER_CALL

static PyObject *meter_words(MeterObject *self, PyObject *Py_UNUSED(ignored))
{
    return metric_words(self->words);
}

static PyObject *meter_get_shared(MeterObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->member != NULL);
}

static PyMethodDef meter_methods[] = {
    {"add", (PyCFunction)(void (*)(void))meter_add, METH_FASTCALL, "Add to a counter."},
    {"set", (PyCFunction)(void (*)(void))meter_set, METH_FASTCALL, "Set a gauge."},
    {"peak", (PyCFunction)(void (*)(void))meter_peak, METH_FASTCALL, "Raise a peak to a value, if it is below it."},
    {"observe", (PyCFunction)(void (*)(void))meter_observe, METH_FASTCALL,
     "Put a value into a histogram: ns, or a count where the kind is 'sizes'."},
    {"words", (PyCFunction)meter_words, METH_NOARGS, "All words of the block, as METRICS lays them out."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef meter_properties[] = {
    {"shared", (getter)meter_get_shared, NULL, "Whether it writes into an arena; else into memory of its own.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot meter_slots[] = {
    {Py_tp_new, meter_new},
    {Py_tp_dealloc, meter_dealloc},
    {Py_tp_methods, meter_methods},
    {Py_tp_getset, meter_properties},
    {Py_tp_doc, "Writes metrics: of a member's arena, or, without one, into memory of its own."},
    {0, NULL},
};

PyType_Spec meter_spec = {
    .name = "shmcast._native.Meter",
    .basicsize = sizeof(MeterObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = meter_slots,
};
