/* module_steps.c: the numbered steps (steps.h) as Python sees them. */
#include "module.h"

#include "steps.h"

#ifdef SHMCAST_FAULTS

static Py_buffer watched; /* the board lies in it */

static PyObject *module_fault_board(PyObject *Py_UNUSED(module), PyObject *buffer)
{
    Py_buffer next = {0};
    if (buffer != Py_None && PyObject_GetBuffer(buffer, &next, PyBUF_WRITABLE) != 0) {
        return NULL;
    }
    if (next.buf != NULL && next.len < (Py_ssize_t)(SHMC_BOARD_TRACE * sizeof(uint32_t))) {
        PyBuffer_Release(&next);
        return PyErr_Format(PyExc_ValueError, "fault_board: %zd bytes, at least %zu are needed", next.len,
                            SHMC_BOARD_TRACE * sizeof(uint32_t));
    }
    shmc_steps_watch(next.buf, (uint32_t)((size_t)next.len / sizeof(uint32_t)));
    PyBuffer_Release(&watched);
    watched = next;
    Py_RETURN_NONE;
}

#endif

static PyObject *module_step(PyObject *Py_UNUSED(module), PyObject *argument)
{
    long step = PyLong_AsLong(argument);
    if (step == -1 && PyErr_Occurred()) {
        return NULL;
    }
#ifdef SHMCAST_FAULTS
    shmc_step_reached((enum shmc_step)step);
#endif
    Py_RETURN_NONE;
}

PyMethodDef step_methods[] = {
    {"step", module_step, METH_O, "Pass a numbered step; nothing in ordinary builds."},
#ifdef SHMCAST_FAULTS
    {"fault_board", module_fault_board, METH_O, "Watch steps on a board, or None."},
#endif
    {NULL, NULL, 0, NULL},
};

bool add_step_constants(PyObject *module)
{
    PyObject *steps = PyDict_New();
    bool done = steps != NULL;
#define STEP_ROW(number, name, text) \
    if (done) { \
        PyObject *value = PyLong_FromLong(number); \
        done = value != NULL && PyDict_SetItemString(steps, #name, value) == 0; \
        Py_XDECREF(value); \
    }
    SHMC_STEP_TABLE(STEP_ROW)
#undef STEP_ROW
    done =
        done && PyModule_AddFunctions(module, step_methods) == 0 && PyModule_AddObjectRef(module, "STEPS", steps) == 0;
    Py_XDECREF(steps);
    return done;
}
