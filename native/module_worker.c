/* module_worker.c: what worker processes need: Window (one block of somebody else's arena, to be written), and to end. */
#include "module.h"

#include <errno.h>
#include <limits.h>
#include <malloc.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

typedef struct {
    PyObject_HEAD struct shmc_window window;
    uint64_t size_bytes;
    const struct module_state *state;
    bool closed;
} WindowObject;

static PyObject *window_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    struct shmc_detail detail = {0, 0};
    struct module_state *state = PyType_GetModuleState(type);
    unsigned long long offset_bytes, size_bytes;
    int fd;
    if (state == NULL || !PyArg_ParseTuple(arguments, "iKK:Window", &fd, &offset_bytes, &size_bytes)) {
        return NULL;
    }
    if (keywords != NULL && PyDict_GET_SIZE(keywords) != 0) {
        PyErr_SetString(PyExc_TypeError, "Window() takes no keyword arguments");
        return NULL;
    }
    if (offset_bytes % SHMC_PAGE_BYTES != 0 || size_bytes < SHMC_OWN_PAGES_BYTES || size_bytes > INT64_MAX / 2) {
        return PyErr_Format(PyExc_ValueError,
                            "open window: %llu bytes at offset %llu are no block that has its pages to itself",
                            size_bytes, offset_bytes);
    }
    WindowObject *self = (WindowObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    enum shmc_status status;
    Py_BEGIN_ALLOW_THREADS status = shmc_window_open(fd, offset_bytes, size_bytes, &self->window, &detail);
    Py_END_ALLOW_THREADS if (status != SHMC_OK)
    {
        raise_status(state, status, &detail, "open window");
        Py_DECREF(self);
        return NULL;
    }
    self->size_bytes = size_bytes;
    self->state = state;
    return (PyObject *)self;
}

static void window_dealloc(WindowObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->window.space != NULL) {
        shmc_window_unmap(&self->window);
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *window_close(WindowObject *self, PyObject *Py_UNUSED(ignored))
{
    const struct shmc_detail none = {0, 0};
    if (!self->closed) {
        enum shmc_status status = shmc_window_close(&self->window);
        if (status != SHMC_OK) {
            return raise_status(self->state, status, &none, "close window");
        }
        self->closed = true;
    }
    Py_RETURN_NONE;
}

static int window_getbuffer(WindowObject *self, Py_buffer *buffer, int flags)
{
    if (self->closed) {
        buffer->obj = NULL;
        PyErr_SetString(PyExc_BufferError, "write to window: it is closed, its bytes are not yours any more");
        return -1;
    }
    return PyBuffer_FillInfo(buffer, (PyObject *)self, self->window.base, (Py_ssize_t)self->size_bytes, 0, flags);
}

static PyMethodDef window_methods[] = {
    {"close", (PyCFunction)window_close, METH_NOARGS, "Put private memory in the place of the block. Idempotent."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot window_slots[] = {
    {Py_tp_new, window_new},
    {Py_tp_dealloc, window_dealloc},
    {Py_tp_methods, window_methods},
    {Py_bf_getbuffer, window_getbuffer},
    {Py_tp_doc, "One block of somebody else's arena, to be written; exports a writable buffer until it is closed."},
    {0, NULL},
};

PyType_Spec window_spec = {
    .name = "shmcast._native.Window",
    .basicsize = sizeof(WindowObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = window_slots,
};

/* ---- the end ------------------------------------------------------------------------------------------------------ */

static PyObject *module_end_with_parent(PyObject *Py_UNUSED(module), PyObject *argument)
{
    long parent = PyLong_AsLong(argument);
    if (parent == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyBool_FromLong(getppid() == parent); /* asked after that: otherwise it is gone already */
}

/* Images and their like are larger than what malloc keeps by itself: each would be mapped, or the heap grown, page by page,
 * for every request anew, which is a quarter of what a photograph costs. 32 MiB is the most that glibc takes from its heap. */
static PyObject *module_keep_freed(PyObject *Py_UNUSED(module), PyObject *argument)
{
    long bytes = PyLong_AsLong(argument);
    if (bytes == -1 && PyErr_Occurred()) {
        return NULL;
    }
#ifdef M_TRIM_THRESHOLD
    int kept = bytes > INT_MAX ? INT_MAX : (int)bytes;
    return PyBool_FromLong(mallopt(M_MMAP_THRESHOLD, 32 << 20) != 0 && mallopt(M_TRIM_THRESHOLD, kept) != 0);
#else
    Py_RETURN_FALSE;
#endif
}

PyMethodDef worker_methods[] = {
    {"end_with_parent", module_end_with_parent, METH_O,
     "SIGKILL for this process when the thread ends that has started it; False where its process is gone already."},
    {"keep_freed", module_keep_freed, METH_O, "Have malloc keep so many freed bytes; False where it can not be told."},
    {NULL, NULL, 0, NULL},
};
