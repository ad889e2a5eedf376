/* module.c: shmcast._native: the module itself, its functions, and how a status becomes an exception. */
#include "module.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "hash.h"
#include "metrics.h"

/* ---- exceptions ----------------------------------------------------------------------------------------------------- */

static const char *const exception_names[SHMC_STATUS_COUNT] = {
#define SHMC_STATUS_EXCEPTION(name, exception, message) exception,
    SHMC_STATUS_TABLE(SHMC_STATUS_EXCEPTION)
#undef SHMC_STATUS_EXCEPTION
};

static void describe(enum shmc_status status, unsigned long long a, unsigned long long b, char *text, size_t size)
{
#define SHMC_STATUS_UNPACK(...) __VA_ARGS__
#define SHMC_STATUS_TEXT(name, exception, message) \
    case SHMC_##name: \
        snprintf(text, size, SHMC_STATUS_UNPACK message); \
        break;
    switch (status) {
        SHMC_STATUS_TABLE(SHMC_STATUS_TEXT)
    case SHMC_STATUS_COUNT:
        break;
    }
    (void)a;
    (void)b;
}

PyObject *raise_status(const struct module_state *state, enum shmc_status status, const struct shmc_detail *detail,
                       const char *action)
{
    char text[512] = "";
    if (status == SHMC_ERRNO) {
        PyObject *arguments = Py_BuildValue("iN", errno, PyUnicode_FromFormat("%s: %s", action, strerror(errno)));
        if (arguments != NULL) {
            PyErr_SetObject(PyExc_OSError, arguments);
            Py_DECREF(arguments);
        }
        return NULL;
    }
    describe(status, detail->a, detail->b, text, sizeof text);
    PyErr_Format(state->exceptions[status], "%s: %s", action, text);
    return NULL;
}

/* Each row's class: shmcast.errors has it, or it is a built-in. */
static bool find_exceptions(struct module_state *state)
{
    PyObject *errors = PyImport_ImportModule("shmcast.errors");
    PyObject *builtins = errors != NULL ? PyImport_ImportModule("builtins") : NULL;
    bool found = builtins != NULL;
    for (unsigned i = 0; found && i < SHMC_STATUS_COUNT; i++) {
        bool ours = PyObject_HasAttrString(errors, exception_names[i]);
        state->exceptions[i] = PyObject_GetAttrString(ours ? errors : builtins, exception_names[i]);
        found = state->exceptions[i] != NULL;
    }
    Py_XDECREF(builtins);
    Py_XDECREF(errors);
    return found;
}

/* ---- arguments ------------------------------------------------------------------------------------------------------ */

bool check_arguments(const char *function, Py_ssize_t given, Py_ssize_t wanted)
{
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, %zd were given", function, wanted, given);
    }
    return given == wanted;
}

bool as_u64(PyObject *object, uint64_t *value)
{
    *value = PyLong_AsUnsignedLongLong(object);
    return *value != UINT64_MAX || !PyErr_Occurred();
}

bool as_u32(PyObject *object, uint32_t *value)
{
    uint64_t wide;
    if (!as_u64(object, &wide)) {
        return false;
    }
    if (wide > UINT32_MAX) {
        PyErr_Format(PyExc_OverflowError, "%llu does not fit 32 bits", (unsigned long long)wide);
        return false;
    }
    *value = (uint32_t)wide;
    return true;
}

bool as_fd(PyObject *object, int *fd)
{
    *fd = PyObject_AsFileDescriptor(object);
    return *fd >= 0;
}

bool as_tokens(PyObject *iterable, struct tokens *tokens)
{
    PyObject *sequence = PySequence_Fast(iterable, "process tokens must be an iterable of integers");
    if (sequence == NULL) {
        return false;
    }
    Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
    bool good = count <= SHMC_PEER_COUNT;
    if (!good) {
        PyErr_Format(PyExc_ValueError, "%zd processes are named, an arena has room for %d", count, SHMC_PEER_COUNT);
    }
    for (Py_ssize_t i = 0; good && i < count; i++) {
        good = as_u64(PySequence_Fast_GET_ITEM(sequence, i), &tokens->values[i]);
    }
    tokens->count = good ? (uint32_t)count : 0;
    Py_DECREF(sequence);
    return good;
}

int open_through(PyObject *opener, uint32_t number)
{
    PyObject *result = PyObject_CallFunction(opener, "k", (unsigned long)number);
    if (result == NULL) {
        return -1;
    }
    int fd = PyObject_AsFileDescriptor(result);
    Py_DECREF(result);
    return fd;
}

PyObject *int_from_hash(uint64_t low, uint64_t high)
{
    const uint64_t words[2] = {low, high};
#if PY_VERSION_HEX >= 0x030d0000
    return PyLong_FromUnsignedNativeBytes(words, sizeof words, Py_ASNATIVEBYTES_LITTLE_ENDIAN);
#else
    return _PyLong_FromByteArray((const unsigned char *)words, sizeof words, 1, 0);
#endif
}

/* ---- hashing ---------------------------------------------------------------------------------------------------------- */

static PyObject *hash_buffer(PyObject *module, enum shmc_hash_path path, PyObject *object, uint64_t seed)
{
    const struct module_state *state = PyModule_GetState(module);
    /* a lease takes a plain request for somebody who keeps the memory (module_lease.c); numpy has no format for dates */
    int flags = PyObject_TypeCheck(object, state->lease_type) ? PyBUF_CONTIG_RO | PyBUF_FORMAT : PyBUF_SIMPLE;
    Py_buffer buffer;
    if (PyObject_GetBuffer(object, &buffer, flags) != 0) {
        return NULL;
    }
    shmc_hash128 hash;
    if (buffer.len >= SHMC_GIL_BYTES) {
        Py_BEGIN_ALLOW_THREADS hash = shmc_hash_bytes_with(path, buffer.buf, (size_t)buffer.len, seed);
        Py_END_ALLOW_THREADS
    } else {
        hash = shmc_hash_bytes_with(path, buffer.buf, (size_t)buffer.len, seed);
    }
    PyBuffer_Release(&buffer);
    return int_from_hash(hash.low64, hash.high64);
}

static PyObject *module_hash128(PyObject *module, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"", "seed", NULL};
    PyObject *object, *seed_object = NULL;
    uint64_t seed = 0;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O|O:hash128", names, &object, &seed_object) ||
        (seed_object != NULL && !as_u64(seed_object, &seed))) {
        return NULL;
    }
    return hash_buffer(module, shmc_hash_path_active(), object, seed);
}

static bool as_path(const char *name, enum shmc_hash_path *path)
{
    if (!shmc_hash_path_find(name, path)) {
        PyErr_Format(PyExc_ValueError, "there is no hash path '%s'; see hash_paths()", name);
        return false;
    }
    if (!shmc_hash_path_supported(*path)) {
        PyErr_Format(PyExc_ValueError, "hash path '%s' needs instructions that this processor lacks", name);
        return false;
    }
    return true;
}

static PyObject *module_hash_paths(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    PyObject *names = PyList_New(0);
    for (int i = 0; names != NULL && i < SHMC_HASH_PATH_COUNT; i++) {
        if (shmc_hash_path_supported((enum shmc_hash_path)i)) {
            PyObject *name = PyUnicode_FromString(shmc_hash_path_name((enum shmc_hash_path)i));
            if (name == NULL || PyList_Append(names, name) != 0) {
                Py_CLEAR(names);
            }
            Py_XDECREF(name);
        }
    }
    PyObject *result = names != NULL ? PyList_AsTuple(names) : NULL;
    Py_XDECREF(names);
    return result;
}

static PyObject *module_hash_with(PyObject *module, PyObject *arguments)
{
    const char *name;
    PyObject *object;
    unsigned long long seed;
    enum shmc_hash_path path;
    if (!PyArg_ParseTuple(arguments, "sOK:hash_with", &name, &object, &seed) || !as_path(name, &path)) {
        return NULL;
    }
    return hash_buffer(module, path, object, seed);
}

static bool get_pair(PyObject *target, PyObject *source, Py_buffer *to, Py_buffer *from)
{
    if (PyObject_GetBuffer(target, to, PyBUF_WRITABLE) != 0) {
        return false;
    }
    if (PyObject_GetBuffer(source, from, PyBUF_SIMPLE) != 0) {
        PyBuffer_Release(to);
        return false;
    }
    if (to->len < from->len) {
        PyErr_Format(PyExc_ValueError, "copy: the source has %zd bytes, the target %zd", from->len, to->len);
        PyBuffer_Release(from);
        PyBuffer_Release(to);
        return false;
    }
    return true;
}

static PyObject *module_hash_copy_with(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    static const char *const stores_names[] = {
        [SHMC_STORES_AUTO] = "auto", [SHMC_STORES_PLAIN] = "plain", [SHMC_STORES_STREAMING] = "streaming"};
    const char *name, *stores_name;
    PyObject *target, *source;
    unsigned long long seed;
    enum shmc_hash_path path;
    Py_buffer to, from;
    if (!PyArg_ParseTuple(arguments, "ssOOK:hash_copy_with", &name, &stores_name, &target, &source, &seed) ||
        !as_path(name, &path)) {
        return NULL;
    }
    int stores = SHMC_STORES_AUTO;
    while (strcmp(stores_name, stores_names[stores]) != 0) {
        if (++stores > SHMC_STORES_STREAMING) {
            return PyErr_Format(PyExc_ValueError, "stores are 'auto', 'plain' or 'streaming', not '%s'", stores_name);
        }
    }
    if (!get_pair(target, source, &to, &from)) {
        return NULL;
    }
    shmc_hash128 hash;
    Py_BEGIN_ALLOW_THREADS hash =
        shmc_hash_copy_with(path, (enum shmc_hash_stores)stores, to.buf, from.buf, (size_t)from.len, seed);
    Py_END_ALLOW_THREADS PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    return int_from_hash(hash.low64, hash.high64);
}

static PyObject *module_copy_with(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    const char *method;
    PyObject *target, *source;
    Py_buffer to, from;
    if (!PyArg_ParseTuple(arguments, "sOO:copy_with", &method, &target, &source)) {
        return NULL;
    }
    bool streaming = strcmp(method, "streaming") == 0;
    if (!streaming && strcmp(method, "memcpy") != 0) {
        return PyErr_Format(PyExc_ValueError, "copy methods are 'memcpy' and 'streaming', not '%s'", method);
    }
    if (!get_pair(target, source, &to, &from)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS if (streaming)
    {
        shmc_copy_streaming(to.buf, from.buf, (size_t)from.len);
    }
    else
    {
        memcpy(to.buf, from.buf, (size_t)from.len);
    }
    Py_END_ALLOW_THREADS PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    Py_RETURN_NONE;
}

/* ---- processes and dead arenas ------------------------------------------------------------------------------------------ */

static PyObject *module_process_token(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    uint64_t token = shmc_process_token();
    return token != 0 ? PyLong_FromUnsignedLongLong(token) : PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *module_take_owner_byte(PyObject *Py_UNUSED(module), PyObject *argument)
{
    int fd;
    return as_fd(argument, &fd) ? PyBool_FromLong(shmc_peer_lock(fd, SHMC_OWNER)) : NULL;
}

static PyObject *module_mark_ended(PyObject *module, PyObject *argument)
{
    struct shmc_control control;
    struct shmc_detail detail = {0, 0};
    int fd;
    if (!as_fd(argument, &fd)) {
        return NULL;
    }
    enum shmc_status status = shmc_control_open(fd, 0, &control, &detail);
    if (status == SHMC_ERRNO) {
        return raise_status(PyModule_GetState(module), status, &detail, "mark arena as ended");
    }
    if (status == SHMC_OK) {
        shmc_control_end(&control);
        shmc_control_close(&control);
    }
    return PyBool_FromLong(status == SHMC_OK); /* what is not an arena of ours needs no mark */
}

static PyObject *module_inspect(PyObject *module, PyObject *argument)
{
    int fd;
    return as_fd(argument, &fd) ? inspect_control(PyModule_GetState(module), fd) : NULL;
}

static PyObject *module_probe(PyObject *Py_UNUSED(module), PyObject *argument)
{
    int fd;
    if (!as_fd(argument, &fd)) {
        return NULL;
    }
    return Py_BuildValue("(OI)", shmc_peer_probe(fd, SHMC_OWNER) ? Py_True : Py_False, shmc_control_format(fd));
}

static PyObject *module_scrub_dead_peers(PyObject *module, PyObject *argument)
{
    struct shmc_control control;
    struct shmc_detail detail = {0, 0};
    unsigned swept = 0;
    int fd;
    if (!as_fd(argument, &fd)) {
        return NULL;
    }
    enum shmc_status status = shmc_control_open(fd, 0, &control, &detail);
    if (status != SHMC_OK) {
        return raise_status(PyModule_GetState(module), status, &detail, "scrub dead peers");
    }
    if (!shmc_control_ended(&control)) {
        Py_BEGIN_ALLOW_THREADS swept = shmc_peer_sweep(&control, fd);
        Py_END_ALLOW_THREADS shmc_metric_add(control.header->metrics, SHMC_METRIC_swept, swept);
    }
    shmc_control_close(&control);
    return PyLong_FromUnsignedLong(swept);
}

/* ---- the module ---------------------------------------------------------------------------------------------------------- */

static PyMethodDef module_methods[] = {
    {"hash128", (PyCFunction)(void (*)(void))module_hash128, METH_VARARGS | METH_KEYWORDS,
     "XXH3-128 of a buffer as an int (Yann Collet's XXH3, as published with xxHash 0.8)."},
    {"hash_paths", module_hash_paths, METH_NOARGS, "Names of the hash kernels that this processor can run."},
    {"hash_with", module_hash_with, METH_VARARGS, "hash128 by a named kernel."},
    {"hash_copy_with", module_hash_copy_with, METH_VARARGS,
     "Copy and hash in one pass, by a named kernel and kind of store."},
    {"copy_with", module_copy_with, METH_VARARGS,
     "Copy by 'memcpy' or with 'streaming' stores: what benchmarks compare with."},
    {"process_token", module_process_token, METH_NOARGS,
     "Random 64-bit name of this process; another one in a forked child."},
    {"take_owner_byte", module_take_owner_byte, METH_O,
     "Take the owner's lock through a descriptor; False if it is taken."},
    {"mark_ended", module_mark_ended, METH_O, "Mark the arena behind a descriptor as ended."},
    {"inspect", module_inspect, METH_O, "Look at a control segment without joining."},
    {"probe", module_probe, METH_O, "(whether a live process has the owner's byte, format of the header or 0)."},
    {"scrub_dead_peers", module_scrub_dead_peers, METH_O,
     "Scrub what dead peers of a live arena claim; returns how many there were."},
    {"metric", module_metric, METH_O, "Index of a metric, for the calls of Meter."},
    {NULL, NULL, 0, NULL},
};

static int module_execute(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    struct {
        PyType_Spec *spec;
        PyTypeObject **type;
    } types[] = {
        {&segment_spec, &state->segment_type}, {&member_spec, &state->member_type},
        {&lease_spec, &state->lease_type},     {&view_spec, &state->view_type},
        {&owner_spec, &state->owner_type},     {&reservation_spec, &state->reservation_type},
        {&fellows_spec, &state->fellows_type}, {&ring_spec, &state->ring_type},
        {&meter_spec, &state->meter_type},     {&window_spec, &state->window_type},
    };
    if (!find_exceptions(state)) {
        return -1;
    }
    char message[256];
    if (!shmc_hash_setup(message, sizeof message)) {
        PyErr_SetString(PyExc_ImportError, message);
        return -1;
    }
    for (unsigned i = 0; i < sizeof types / sizeof types[0]; i++) {
        *types[i].type = (PyTypeObject *)PyType_FromModuleAndSpec(module, types[i].spec, NULL);
        if (*types[i].type == NULL ||
            (types[i].spec != &segment_spec && PyModule_AddType(module, *types[i].type) != 0)) {
            return -1;
        }
    }
    if (PyModule_AddIntConstant(module, "FORMAT", SHMC_FORMAT) != 0 ||
        PyModule_AddIntConstant(module, "PEER_COUNT", SHMC_PEER_COUNT) != 0 ||
        PyModule_AddIntConstant(module, "SLOT_COUNT_MAX", SHMC_SLOT_COUNT_MAX) != 0 ||
        PyModule_AddIntConstant(module, "SEGMENT_COUNT", SHMC_SEGMENT_COUNT) != 0 ||
        PyModule_AddIntConstant(module, "BLOCK_ALIGN_BYTES", SHMC_BLOCK_ALIGN_BYTES) != 0 ||
        PyModule_AddIntConstant(module, "RING_ENTRIES", SHMC_RING_ENTRIES) != 0 ||
        PyModule_AddIntConstant(module, "RING_PAYLOAD_BYTES", SHMC_RING_PAYLOAD_BYTES) != 0 ||
        PyModule_AddIntConstant(module, "PAGE_BYTES", SHMC_PAGE_BYTES) != 0 || !add_metric_constants(module) ||
        !add_step_constants(module) || PyModule_AddFunctions(module, worker_methods) != 0) {
        return -1;
    }
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    struct module_state *state = PyModule_GetState(module);
    for (unsigned i = 0; i < SHMC_STATUS_COUNT; i++) {
        Py_VISIT(state->exceptions[i]);
    }
    Py_VISIT(state->segment_type);
    Py_VISIT(state->member_type);
    Py_VISIT(state->lease_type);
    Py_VISIT(state->view_type);
    Py_VISIT(state->owner_type);
    Py_VISIT(state->reservation_type);
    Py_VISIT(state->fellows_type);
    Py_VISIT(state->ring_type);
    Py_VISIT(state->meter_type);
    Py_VISIT(state->window_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    for (unsigned i = 0; i < SHMC_STATUS_COUNT; i++) {
        Py_CLEAR(state->exceptions[i]);
    }
    Py_CLEAR(state->segment_type);
    Py_CLEAR(state->member_type);
    Py_CLEAR(state->lease_type);
    Py_CLEAR(state->view_type);
    Py_CLEAR(state->owner_type);
    Py_CLEAR(state->reservation_type);
    Py_CLEAR(state->fellows_type);
    Py_CLEAR(state->ring_type);
    Py_CLEAR(state->meter_type);
    Py_CLEAR(state->window_type);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_execute},
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* the GIL is what serialises us */
#endif
#if PY_VERSION_HEX >= 0x030d0000
    {Py_mod_gil, Py_MOD_GIL_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmcast._native",
    .m_doc = "The C core of shmcast: bytes in shared memory, claims, hash and copy. See _native.pyi.",
    .m_size = sizeof(struct module_state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&module_definition);
}
