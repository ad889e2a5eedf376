/* The life of an arena as a model: its names in /dev/shm, its files, who has the owner's byte, and what becomes of them.
 *
 * A file lives on without a name as long as somebody maps it; a lock belongs to an open file description and goes with
 * its last user. Slots are explored in protocol.h; here is one, and what it does to the segment that its block lies in.
 */
#ifndef SHMCAST_MODEL_ARENA_H
#define SHMCAST_MODEL_ARENA_H

#include <stdbool.h>
#include <stdint.h>

#include "family.h"

enum { CONTROLS = 3, FILES = 3, PLACES = 2, PUBLICATIONS = 3 };

/* The owner creates the arena, too. A sweeper is anybody who sweeps; the reader has its own byte, which nobody wants. */
enum process_id { OWNER, SWEEPER_1, SWEEPER_2, READER, PROCS };
enum { SWEEPERS = 2, NO_FILE = 7, NOBODY = 7 };

enum { RESERVED = 1, PUNCHED = 2 }; /* a data file's pages */
enum { PINNED = 1, RETIRED = 2 };   /* a record's mark */
enum { HOLD = 1, GRANT = 2 };       /* the word: the reader's bits */
enum { BY_HAND_BEFORE = 0x80 };     /* beside the dead: somebody has removed the control segment by hand */
enum { LISTED_CONTROL = 1 };        /* a listing: bit 0 the control segment, bit n data segment n */
#define LISTED(number) (1u << (number))

struct sweeper {
    uint8_t next;   /* the step that it takes next, IDLE: it may begin */
    uint8_t file;   /* the control file that it has opened */
    uint8_t listed; /* what it has still to unlink */
};

struct state {
    /* /dev/shm: which file a name means. Data segment n is data_name[n - 1] */
    uint8_t control_name, data_name[FILES];
    /* files */
    uint8_t lock[CONTROLS];               /* byte 0: whose */
    uint8_t pages[FILES], content[FILES]; /* content: the publication whose bytes lie there */
    /* the control segment; `header` and `ready` name the file that has them, as only one ever gets that far */
    uint8_t header, ready, ended;
    uint8_t number[PLACES], size[PLACES], mark[PLACES]; /* records; size: of which number */
    uint8_t word, gen;
    uint8_t peer_ready, peer_lock; /* the reader's byte: is it ready, and who has the lock */
    /* private to the owner */
    uint8_t next, control, attempts;            /* attempts: control files made */
    uint8_t files, last;                        /* data files made; the last number given */
    uint8_t file_at[PLACES], number_at[PLACES]; /* segments in service; file + 1, 0: none */
    uint8_t used;                               /* place + 1 that the slot's block lies in */
    uint8_t cur_file, cur_number, cur_place;
    uint8_t anchored, published;
    /* the others */
    struct sweeper sweeper[SWEEPERS];
    struct {
        uint8_t next, file, joined;
        uint8_t handle, gen;  /* one on its way; the one being attached, or leased */
        uint8_t mapped;       /* for each number 2 bits: file + 1 */
        uint8_t opened;       /* a data file */
        uint8_t leased;       /* file + 1 */
        uint8_t place;        /* of the record that it pins */
        uint8_t pin, pinned;  /* the number it is about to pin; file + 1 that is registered with the driver */
        uint8_t began_marked; /* the attach began when the arena was marked already */
    } reader;
    /* known to the specification only */
    uint8_t owns;                 /* the owner has locked what it found to be current, and has not unlinked it yet */
    uint8_t origin[PUBLICATIONS]; /* file | number << 4 */
    uint8_t dead;                 /* mask of processes, and BY_HAND_BEFORE */
    uint8_t deaths, sweeps;
    uint8_t always_zero[6];
};
_Static_assert(sizeof(struct state) == 72, "no padding: states are compared as bytes, in words of 8");

/* Every kind of step: what the process does, and what it stands for (see struct action_row). */
#define ACTIONS(X) \
    X(IDLE, "is idle", NO_CODE_MISTAKE) \
    X(DIE, "dies; its locks drop", NO_CODE_KERNEL) \
    X(BY_HAND, "somebody removes the dead owner's control segment by hand", NO_CODE_KERNEL) \
    X(CREATE_OPEN, "create: makes the control segment, a name that was free", "arena._create_control NAME_CREATE") \
    X(CREATE_OPEN_LOCK, "create: opens it again, for the lock", "arena._create_control NAME_OPEN") \
    X(CREATE_LOCK, "create: takes byte 0, or sees that it is taken", "arena._create_control PEER_LOCK") \
    X(CREATE_CURRENT, "create: looks whether the name still means the file", "arena._create_control NAME_IS_CURRENT") \
    X(CREATE_GIVE_UP, "create: closes what it has opened, begins again", "arena._create_control (os.close)") \
    X(CREATE_RESERVE, "create: reserves the pages", "shmc_control_create SEGMENT_RESERVE") \
    X(CREATE_FULL, "create: there is no room", NO_CODE_KERNEL) \
    X(CREATE_UNLINK, "create: takes the name away again", "arena._create_control NAME_UNLINK") \
    X(CREATE_HEADER, "create: fills the header in", \
      "shmc_control_create SEGMENT_MAP CONTROL_STATE_OPEN, fill_header CONTROL_CLOCK") \
    X(CREATE_ANCHOR, "create: maps the page that keeps the lock", "shmc_peer_anchor ANCHOR_MAP ANCHOR_DONTFORK") \
    X(CREATE_READY, "create: writes the magic", "shmc_control_ready CONTROL_MAGIC") \
    X(CREATE_CLOSE, "create: closes its descriptors", "arena._create_control (os.close)") \
    X(GROW_CREATE, "grow: makes a data segment under the next number", "growth.Segments.add NAME_CREATE") \
    X(GROW_RESERVE, "grow: reserves its pages", \
      "shmc_owner_prepare_segment SEGMENT_MAP SEGMENT_SEED SEGMENT_GATHER SEGMENT_RESERVE SEGMENT_POPULATE") \
    X(GROW_FULL, "grow: there is no room", NO_CODE_KERNEL) \
    X(GROW_UNDO, "grow: takes the name away again", "growth.Segments.add NAME_UNLINK") \
    X(GROW_SIZE, "grow: writes the size into the record", \
      "shmc_owner_add_segment (nobody looks before the number is there)") \
    X(GROW_MARK, "grow: clears the mark", "shmc_owner_add_segment GROW_MARK") \
    X(GROW_NUMBER, "grow: writes the number", "shmc_owner_add_segment GROW_NUMBER") \
    X(RETIRE_MARK, "retire: marks the segment as retired", "shmc_owner_retire_segment RETIRE_MARK") \
    X(RETIRE_LOOK, "retire: sees that nobody has marked the segment", NO_CODE_MISTAKE) \
    X(RETIRE_PUNCH, "retire: punches its pages", "shmc_owner_retire_segment SEGMENT_PUNCH") \
    X(RETIRE_NUMBER, "retire: clears the number", "shmc_owner_retire_segment RETIRE_NUMBER") \
    X(RETIRE_UNLINK, "retire: takes its name away", "growth.Segments.retire NAME_UNLINK") \
    X(PUBLISH, "publishes a block, granted to the reader", "shmc_slot_publish PUBLISH_EXCHANGE") \
    X(REVOKE, "revokes a grant that nobody has made use of", "shmc_slot_revoke REVOKE") \
    X(RECLAIM, "sees that the word has no claims, takes the block back", "shmc_owner_reclaim RECLAIM_SEE") \
    X(SCRUB_LOCK, "scrub: takes the dead reader's byte, sees what it has left", \
      "gc._Sweep.scrub NAME_OPEN NAME_IS_CURRENT, shmc_peer_sweep PEER_LOCK, " \
      "has_left SWEEP_SEE SWEEP_MARK_SEE, shmc_slot_claimed_by CLAIMED_SEE") \
    X(SCRUB_READY, "scrub: the byte is not ready any more", "shmc_peer_leave LEAVE_NOT_READY") \
    X(SCRUB_WORD, "scrub: clears the reader's bits in the word", "shmc_slot_scrub CLEAR_BITS") \
    X(SCRUB_MARK, "scrub: clears the reader's marks", "scrub SCRUB_MARK_SEE SCRUB_MARK") \
    X(SCRUB_UNLOCK, "scrub: drops the byte", "shmc_peer_sweep PEER_UNLOCK") \
    X(END_STATE, "end: marks the arena as ended", "owner_end CONTROL_END") \
    X(END_DATA, "end: takes a data segment's name away", "growth.Segments.unlink_all NAME_UNLINK") \
    X(END_CONTROL, "end: takes the control segment's name away", "growth.Segments.unlink_all NAME_UNLINK") \
    X(END_EXIT, "end: unmaps the page that keeps the lock", "shmc_peer_drop_anchor ANCHOR_DROP") \
    X(SWEEP_LIST, "sweep: lists what there is", \
      "gc.scan NAME_LIST, process._tidy NAME_LIST, cli.watch.Watch._sweep NAME_LIST") \
    X(SWEEP_OPEN, "sweep: opens the control segment, or finds none", "gc._Sweep._take NAME_OPEN") \
    X(SWEEP_ORPHAN, "sweep: no control segment, takes a listed name away", "gc._Sweep.orphan NAME_UNLINK") \
    X(SWEEP_LOCK, "sweep: takes byte 0, or sees that it is taken", "gc._Sweep._dead PEER_LOCK") \
    X(SWEEP_CURRENT, "sweep: looks whether the name still means the file", \
      "gc._Sweep._dead NAME_IS_CURRENT CONTROL_FORMAT") \
    X(SWEEP_MARK, "sweep: marks the arena as ended", "gc._Sweep._dead CONTROL_END") \
    X(SWEEP_LIST_AGAIN, "sweep: lists again, nobody makes more now", "gc._Sweep._listing NAME_LIST") \
    X(SWEEP_DATA, "sweep: takes a data segment's name away", "gc._Sweep._remove NAME_SIZE NAME_UNLINK") \
    X(SWEEP_CONTROL, "sweep: takes the control segment's name away", "gc._Sweep._remove NAME_SIZE NAME_UNLINK") \
    X(SWEEP_CLOSE, "sweep: closes its descriptor", "gc._Sweep.some (os.close)") \
    X(JOIN_OPEN, "join: opens the control segment, or finds none", "process._join NAME_OPEN") \
    X(JOIN_OPEN_LOCK, "join: opens it again, for the lock", "process._join NAME_OPEN") \
    X(JOIN_MAGIC, "join: reads the magic", \
      "shmc_control_open SEGMENT_SIZE SEGMENT_MAP, check_header CONTROL_OPEN_MAGIC") \
    X(JOIN_STATE, "join: reads whether the arena has ended", "shmc_member_join ENDED_SEE") \
    X(JOIN_LOCK, "join: takes its byte", "shmc_peer_join PEER_LOCK") \
    X(ATTACH_STATE, "attach: reads whether the arena has ended", "shmc_member_attach ENDED_SEE") \
    X(ATTACH_PIN, "attach: sets its hold, or sees that it is too late", "pin ATTACH_PIN_SEE ATTACH_PIN") \
    X(ATTACH_OPEN, "attach: opens the data segment, or finds none", "process.opener NAME_OPEN") \
    X(ATTACH_FAIL, "attach: clears its hold", "shmc_slot_release CLEAR_BITS") \
    X(ATTACH_FORGET, "attach: unmaps what has no record any more", \
      "forget_retired CONTROL_FIND_SEGMENT, segment_dealloc SEGMENT_UNMAP") \
    X(ATTACH_MAP, "attach: maps the data segment", "map_for_reading SEGMENT_SIZE SEGMENT_MAP") \
    X(RELEASE, "releases, clears its hold", "shmc_slot_release CLEAR_BITS") \
    X(PIN_FIND, "pin: finds the record of a segment that it has mapped", NO_CODE_LAYOUT) \
    X(PIN_MARK, "pin: marks it, unless it is retired", NO_CODE_LAYOUT) \
    X(PIN_LOOK_AGAIN, "pin: reads the number again", NO_CODE_LAYOUT) \
    X(PIN_UNDO, "pin: another segment has come there, clears its mark", NO_CODE_LAYOUT) \
    X(UNPIN, "pin: has unregistered the pages, clears its mark", NO_CODE_LAYOUT)
enum action {
#define ACTION_NAME(name, text, code) name,
    ACTIONS(ACTION_NAME)
#undef ACTION_NAME
        ACTION_COUNT
};
_Static_assert((int)ACTION_COUNT <= (int)EXPLORE_MAX_ACTIONS, "the explorer counts actions in an array");

/* One bounded world. Where `created` is true it begins with an arena in service, one data segment in it. */
struct config {
    const char *name, *what;
    bool created, may_be_full, closes, by_hand, pins, scrubs; /* scrubs: sweepers do */
    unsigned files, max, publishes;                           /* data segments ever made; at a time; publications */
    unsigned sweeps, deaths, mortal;
};

/* Mistakes that can be put in; see bugs[] in arena_worlds.c. */
enum bug {
    PROTOCOL_AS_IS,
    CREATE_CURRENT_UNCHECKED,
    MAGIC_FIRST,
    LOCK_NOT_ANCHORED,
    KNOWN_BEFORE_RESERVED,
    NUMBER_BEFORE_SIZE,
    NUMBER_REUSED,
    GROW_BEFORE_RETIRE,
    RETIRE_IN_USE,
    RETIRE_IGNORES_MARKS,
    RETIRE_ONLY_LOOKS,
    RETIRE_WITHOUT_PUNCH,
    RETIRE_UNLINKS_FIRST,
    PIN_LOOKS_ONCE,
    SCRUB_FORGETS_MARKS,
    END_UNLINKS_FIRST,
    END_CONTROL_FIRST,
    SWEEP_PROBES,
    SWEEP_CURRENT_UNCHECKED,
    SWEEP_LETS_GO_EARLY,
    SWEEP_LISTS_ONCE,
    SWEEP_BY_RECORDS,
    SWEEP_LOOKS_BEFORE_LIST,
    SWEEP_LEAVES_ORPHANS,
    SWEEP_CONTROL_FIRST,
    SWEEP_UNMARKED,
    ATTACH_SKIPS_STATE
};

struct arena_world {
    const struct config *config;
    enum bug bug;
};
extern struct arena_world arena_world;

static inline bool is_alive(const struct state *st, unsigned p)
{
    return !(st->dead & 1u << p);
}
static inline unsigned mapped_file(const struct state *st, unsigned number) /* file + 1 */
{
    return st->reader.mapped >> 2 * (number - 1) & 3u;
}

/* arena_names.c: what everybody does with names, files and locks */
unsigned names_listed(const struct state *st);
void name_unlink(struct state *st, unsigned p, unsigned number, struct explore_edge *edge); /* 0: the control segment */
void lock_drop(struct state *st, unsigned file, unsigned p);
void process_die(struct state *st, unsigned p);

/* arena_owner.c */
bool owner_create(struct state *st, struct explore_edge *edge);
bool owner_grow(struct state *st, struct explore_edge *edge);
bool owner_retire(struct state *st, unsigned place, struct explore_edge *edge);
bool owner_publish(struct state *st, unsigned place, struct explore_edge *edge);
bool owner_revoke(struct state *st, struct explore_edge *edge);
bool owner_reclaim(struct state *st, struct explore_edge *edge);
bool owner_end(struct state *st, struct explore_edge *edge);
void owner_step(struct state *st, struct explore_edge *edge);

/* arena_sweep.c */
bool sweeper_begin(struct state *st, unsigned p, struct explore_edge *edge);
void sweeper_step(struct state *st, unsigned p, struct explore_edge *edge);
bool sweeper_acts(const struct state *st, unsigned p);

/* arena_scrub.c */
bool scrub_begin(struct state *st, unsigned p, struct explore_edge *edge);
void scrub_step(struct state *st, unsigned p, struct explore_edge *edge);

/* arena_reader.c */
bool reader_attach(struct state *st, struct explore_edge *edge);
void reader_release(struct state *st, struct explore_edge *edge);
bool reader_pin(struct state *st, unsigned number, struct explore_edge *edge);
void reader_unpin(struct state *st, struct explore_edge *edge);
void reader_step(struct state *st, struct explore_edge *edge);

/* arena_moves.c: who may do what */
uint8_t *arena_next(struct state *st, unsigned p);
void arena_advance(struct state *st, unsigned p, struct explore_edge *edge);
void arena_initial(void *state);
size_t arena_successors(const void *state, struct explore_edge *edges, void *states);
void arena_print(FILE *out, const struct explore_edge *edge, const void *after);

/* arena_checks.c */
const char *arena_check(const void *state);

#endif
