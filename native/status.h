/* status.h: every way in which the C core can fail, the exception that it becomes, and the words that go with it.
 *
 * One row a status: name, exception class (in shmcast.errors, or a built-in), message. `a` and `b` are the two values
 * of struct shmc_detail. module.c turns a row into an exception; a test proves that the table is total. */
#ifndef SHMC_STATUS_H
#define SHMC_STATUS_H

#include <stdint.h>

struct shmc_detail {
    unsigned long long a, b;
};

/* clang-format off */
#define SHMC_STATUS_TABLE(X)                                                                                          \
    X(OK, "RuntimeError", ("no error"))                                                                               \
    X(NO_SPACE, "ArenaFullError", ("no free block of %llu bytes (%llu bytes are in use)", a, b))                      \
    X(ERRNO, "OSError", ("system call failed"))                                                                       \
    X(NO_MEMORY, "MemoryError", ("out of private memory"))                                                            \
    X(STALE, "StaleHandleError",                                                                                      \
      ("the handle names generation %llu, its slot is at generation %llu and the block is free or used again; "       \
       "attach before the last claim on it ends, or publish with keep=True", a, b))                                   \
    X(SLOT_RANGE, "HandleError", ("the handle names slot %llu, the arena has %llu slots; it is not a handle of this arena", a, b)) \
    X(BLOCK_RANGE, "HandleError",                                                                                     \
      ("the handle ends %llu bytes into its segment, the block ends at %llu; it is not a handle of this block", a, b)) \
    X(SEGMENT_MISMATCH, "HandleError",                                                                                \
      ("the handle names data segment %llu, the block lies in segment %llu; it is not a handle of this block", a, b)) \
    X(SEGMENT_SHORT, "LayoutMismatchError",                                                                           \
      ("the segment is %llu bytes long, %llu are needed; something else has cut it, recreate the arena", a, b))       \
    X(SEGMENTS_FULL, "ArenaFullError",                                                                                \
      ("%llu data segments exist, the format has room for %llu; create the arena with larger segment_bytes", a, b))   \
    X(SLOTS_FULL, "ArenaFullError",                                                                                   \
      ("%llu of %llu slots are in use; release handles or create the arena with more max_blocks", a, b))              \
    X(PEERS_FULL, "ArenaError",                                                                                       \
      ("%llu of %llu peer bytes are taken by live processes; fewer processes must share one arena", a, b))            \
    X(ENDED, "ArenaGoneError", ("the arena was ended by its owner or swept after the owner's death; publish again"))  \
    X(INHERITED, "ArenaError",                                                                                        \
      ("this process is no member: it left, or was forked after joining; attach anew, or create an arena of its own")) \
    X(NOT_READY, "ArenaError", ("the control segment has no magic yet; its creator is still at work or has died"))    \
    X(BAD_MAGIC, "LayoutMismatchError", ("magic is %#llx, this build reads %#llx; the file is not a shmcast arena", a, b)) \
    X(BAD_FORMAT, "LayoutMismatchError", ("format %llu, this build reads %llu; use one shmcast version on the host", a, b)) \
    X(BAD_LAYOUT, "LayoutMismatchError", ("a size or count in the header is %llu, this build needs %llu; use one build on the host", a, b)) \
    X(WRONG_ARENA, "LayoutMismatchError", ("the segment says arena %#llx, its name says %#llx; the file was copied or renamed", a, b)) \
    X(PEER_LOST, "PeerLostError",                                                                                     \
      ("process %#llx is not in the arena (any more): byte %llu belongs to nobody or to another process", a, b))      \
    X(NOT_HELD, "ValueError", ("the lease of slot %llu, generation %llu, is released", a, b))                         \
    X(SHARED_PAGES, "ValueError", ("the block of %llu bytes at offset %llu shares pages with its neighbours; copy it instead", a, b)) \
    X(SEALED, "ValueError", ("the reservation is sealed or aborted"))                                                 \
    X(CLOSED, "ArenaError", ("the arena is closed"))                                                                  \
    X(AGREED_LATER, "GroupError",                                                                                     \
      ("the ranks have agreed on message %llu already, this rank asks for %llu; it has skipped one, or memory is damaged", a, b)) \
    X(READER_LOST, "PeerLostError",                                                                                   \
      ("rank %llu, peer %llu, has left the arena and not read what is in the way", a, b))                             \
    X(RING_START, "GroupError", ("the group would begin at entry %llu of the ring, which is at %llu", a, b))          \
    X(RING_NUMBER, "GroupError",                                                                                      \
      ("the entry says that it is number %llu, this is %llu; another program has written there, or memory is damaged", a, b)) \
    X(RING_GROUP, "GroupError", ("the entry is for group %#llx, this is %#llx; the entry rank has gone on with others", a, b)) \
    X(RING_OFFSET, "GroupError",                                                                                      \
      ("the entry goes on at byte %llu of its message, %llu are here; the entry rank has given one up midway", a, b)) \
    X(RING_MESSAGE, "GroupError",                                                                                     \
      ("the entry is of a message of %llu bytes, it began as one of %llu; memory is damaged", a, b))                  \
    X(RING_BYTES, "GroupError", ("the entry carries %llu bytes, %llu belong there; memory is damaged", a, b))         \
    X(RING_MEMORY, "GroupError",                                                                                      \
      ("the message that begins has %llu bytes, for which this process has no memory", a))                            \
    X(RING_HASH, "GroupError", ("the entry's bytes hash to %#llx, it says %#llx; memory is damaged", a, b))
/* clang-format on */

enum shmc_status {
#define SHMC_STATUS_ENUM(name, exception, message) SHMC_##name,
    SHMC_STATUS_TABLE(SHMC_STATUS_ENUM)
#undef SHMC_STATUS_ENUM
        SHMC_STATUS_COUNT
};

#endif
