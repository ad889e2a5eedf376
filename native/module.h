/* module.h: what the files of the Python binding share. Only module*.c know Python; nothing below them does. */
#ifndef SHMC_MODULE_H
#define SHMC_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "agree.h"
#include "member.h"
#include "owner.h"
#include "ring.h"
#include "segment.h"

/* Below this the work is done before another thread could have taken the GIL; above it others run meanwhile. */
enum { SHMC_GIL_BYTES = 64 * 1024 };

struct module_state {
    PyObject *exceptions[SHMC_STATUS_COUNT];
    PyTypeObject *segment_type, *member_type, *lease_type, *view_type, *reservation_type, *owner_type, *fellows_type,
        *ring_type, *meter_type, *window_type;
};

/* A copy-on-write mapping of a whole segment. A block lies in it once; leases that need it at the same time have a lane
 * each, so that what one writes the others do not see. Kept as long as the segment: what was read there stays mapped. */
struct lane {
    struct lane *next;
    uint8_t *base;
    uint8_t *taken; /* per page: whether a lease has the block that starts there */
};

/* A data segment mapped in this process. Unmapped when the last of those who need it let go: leases and the member for
 * the read-only mapping, reservations and the owner for the writable one. */
typedef struct {
    PyObject_HEAD uint32_t number;
    uint64_t size_bytes;
    uint8_t *shared;     /* PROT_READ, but for the owner's own */
    struct lane *lanes;  /* as many as there were ever needed at once */
    bool private_broken; /* written pages could not be dropped once: nobody gets a private view any more */
} SegmentObject;

typedef struct {
    PyObject_HEAD struct module_state *state; /* lives as long as our type, so as long as we do */
    struct shmc_member member;
    PyObject *weakrefs;
    PyObject *opener; /* opener(n) -> descriptor of segment n; 0: the control segment, opened afresh */
    SegmentObject **segments;
    Py_ssize_t segment_count;
} MemberObject;

typedef struct {
    PyObject_HEAD MemberObject *member; /* NULL once released */
    SegmentObject *segment;
    uint64_t generation, offset_bytes, size_bytes;
    struct shmc_block_view block;
    uint32_t slot;
    Py_ssize_t exports;   /* buffers and views given out */
    struct lane *lane;    /* where its private views lie, NULL as long as there are none */
    bool ended;           /* released by the caller */
    bool kept_by_address; /* somebody may keep the memory without an export: the hold lasts until dealloc */
} LeaseObject;

typedef struct {
    PyObject_HEAD LeaseObject *lease;
    uint8_t *base;
    bool private;
} ViewObject;

typedef struct {
    PyObject_HEAD MemberObject *member;
    struct shmc_owner owner;
    SegmentObject *segments[SHMC_SEGMENT_COUNT]; /* the writable mappings behind owner.segments */
} OwnerObject;

typedef struct {
    PyObject_HEAD OwnerObject *owner; /* NULL once sealed or aborted */
    SegmentObject *segment; /* an array over the reservation may outlive its sealing, and the segment's service */
    uint8_t *base;
    uint64_t size_bytes;
    uint32_t block;
} ReservationObject;

typedef struct {
    PyObject_HEAD MemberObject *member;
    struct shmc_fellows fellows;
} FellowsObject;

typedef struct {
    PyObject_HEAD MemberObject *member;
    struct shmc_ring ring;
    PyObject *message; /* a reader's, while it is in the middle of one */
} RingObject;

/* module.c */
PyObject *raise_status(const struct module_state *state, enum shmc_status status, const struct shmc_detail *detail,
                       const char *action);
PyObject *int_from_hash(uint64_t low, uint64_t high);
bool check_arguments(const char *function, Py_ssize_t given, Py_ssize_t wanted);
bool as_u64(PyObject *object, uint64_t *value);
bool as_u32(PyObject *object, uint32_t *value);
bool as_fd(PyObject *object, int *fd);

/* Process tokens out of any iterable; at most as many as there are peers. */
struct tokens {
    uint64_t values[SHMC_PEER_COUNT];
    uint32_t count;
};
bool as_tokens(PyObject *iterable, struct tokens *tokens);
int open_through(PyObject *opener, uint32_t number); /* -1 with an exception set */

/* module_meter.c */
typedef struct {
    PyObject_HEAD MemberObject *member; /* NULL: the words are our own */
    shmc_atomic_u64 *words;
} MeterObject;

PyObject *metric_words(const shmc_atomic_u64 *block); /* a list of all that the table names */
PyObject *module_metric(PyObject *module, PyObject *name);
bool add_metric_constants(PyObject *module);

/* module_steps.c */
bool add_step_constants(PyObject *module);

/* module_worker.c */
extern PyMethodDef worker_methods[];

/* module_inspect.c */
PyObject *inspect_control(const struct module_state *state, int fd);

/* module_member.c */
SegmentObject *segment_new(const struct module_state *state, uint32_t number,
                           uint64_t size_bytes);                    /* nothing mapped yet */
SegmentObject *member_segment(MemberObject *self, uint32_t number); /* borrowed; mapped on demand */
bool member_map(MemberObject *self, uint32_t number, int fd, bool populate);
void member_unmap(MemberObject *self, uint32_t number);

/* module_lease.c */
void lanes_unmap(struct lane *lane, uint64_t size_bytes);

/* module_fellows.c */
bool as_ranks(PyTypeObject *type, PyObject *arguments, const char *format, MemberObject **member, struct tokens *tokens,
              uint64_t *start);

extern PyType_Spec segment_spec, member_spec, lease_spec, view_spec, reservation_spec, owner_spec, fellows_spec,
    ring_spec, meter_spec, window_spec;

#endif
