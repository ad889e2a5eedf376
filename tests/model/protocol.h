/* The slot and peer protocol as a model: what a state is, and the steps that processes take.
 *
 * Everything that processes share is under "shared" in struct state; each function named step_* performs one
 * access to it and whatever the same process can do privately until its next one. README.md says what is checked.
 */
#ifndef SHMCAST_MODEL_PROTOCOL_H
#define SHMCAST_MODEL_PROTOCOL_H

#include <stdbool.h>
#include <stdint.h>

#include "family.h"

enum { SLOTS = 2, BYTES = 3, PROCS = 4, MESSAGES = 8, MAX_GEN = 4 };

/* OWNER holds byte 0; A and B start on bytes 1 and 2; the newcomer N starts without one. */
enum process_id { OWNER, READER_A, READER_B, NEWCOMER };
enum { NO_BYTE = 3, DEAD = 4, NO_BLOCK = 7, NO_LOCK = 7 };

/* The slot word, as in the arena but narrower: three peers instead of 31. */
#define HOLD(byte) (1u << (byte))
#define ANON 0x08u                       /* T: anonymous claim */
#define GRANT(byte) (1u << (3 + (byte))) /* byte 1 and 2: the owner has no grant bit */
#define TRUST 0x40u                      /* L: the owner as trustee */
#define TOUCHED 0x80u                    /* X: touched by a pass-on */
#define CLAIMS 0x7Fu
#define ALL_HOLDS 0x07u
#define ALL_GRANTS 0x30u

/* token[byte]: who is ready there. FREE and SCRUBBING are not ready; SCRUBBING left by the dead needs a scrub. */
enum { TOKEN_FREE = 0, TOKEN_SCRUBBING = 7 };

/* A handle on its way, or in hand while it is being attached or sent: gen | slot | target process | what protects it.
 * The last is the specification's knowledge, no process ever reads it. */
enum promise {
    LATE,     /* nothing: attaching may succeed or be stale */
    OF_ANON,  /* readers=n, and fewer than n distinct processes have taken theirs */
    PROMISED, /* a grant or the trustee, set before the running deadline began: when that passes it may be revoked */
    FRESH     /* the same, set after the running deadline began: that deadline may not end it */
};
#define MSG(gen, slot, target, kind) ((uint8_t)((gen) | (slot) << 3 | (target) << 4 | (kind) << 6))
static inline unsigned msg_gen(uint8_t msg)
{
    return msg & 7u;
}
static inline unsigned msg_slot(uint8_t msg)
{
    return msg >> 3 & 1u;
}
static inline unsigned msg_target(uint8_t msg)
{
    return msg >> 4 & 3u;
}
static inline unsigned msg_kind(uint8_t msg)
{
    return msg >> 6;
}

struct proc {
    uint8_t byte;         /* 0..2, NO_BYTE (has not joined) or DEAD */
    uint8_t next;         /* the step that it takes next; IDLE: it may begin anything. From here on: registers */
    uint8_t msg;          /* the handle being published, attached or passed on */
    uint8_t target;       /* publish: two target processes and the block; pass on: byte; takeover: byte, why, slot */
    uint8_t inc;          /* incarnations read: one, or two of 4 bits */
    uint8_t flags;        /* publish: which publication; attach: what the pin saw */
    uint8_t lease[SLOTS]; /* the local record: gen | count << 4, 0 when none */
    uint8_t memo;         /* a handle that was attached once and may be attached again */
};

struct state {
    /* shared */
    uint8_t word[SLOTS], gen[SLOTS];
    uint8_t took[SLOTS];    /* peers that took (by byte) | how many may still << 4 */
    uint8_t payload[SLOTS]; /* of a block: the publication whose bytes lie there */
    uint8_t inc[BYTES], token[BYTES], lock[BYTES];
    /* private to the owner */
    uint8_t block[SLOTS]; /* which block a slot's publication lies in */
    uint8_t seq;          /* publications so far */
    /* known to the specification only */
    uint8_t origin[MAX_GEN]; /* [gen - 1]: content | block << 4 */
    uint8_t grantee[SLOTS];  /* whom a set grant bit is meant for: process of byte 1 | of byte 2 << 2; 0: nobody */
    uint8_t taken[SLOTS];    /* processes that took | how many may still << 4 */
    uint8_t msgs[MESSAGES];  /* in flight, sorted; 0: none. One that is never delivered is a lost one */
    uint8_t passes, deaths, leaves; /* how many there have been */
    struct proc proc[PROCS];
    uint8_t always_zero[5];
};
_Static_assert(sizeof(struct state) == 80, "no padding: states are compared as bytes, in words of 8");

/* Every kind of step. The upper-case name is also the "next step" of a process. */
#define ACTIONS(X) \
    X(IDLE, "is idle", NO_CODE_MISTAKE) \
    X(DIE, "dies; its locks drop", NO_CODE_KERNEL) \
    X(PUB_SCAN, "publish: reads the word, no claims", "shmc_owner_reclaim RECLAIM_SEE") \
    X(PUB_SCAN_REST, "publish: reads the other word of the slot", NO_CODE_MISTAKE) \
    X(PUB_SCAN_BLOCK, "publish: reads the word of the other slot that names the block", \
      "shmc_owner_reclaim RECLAIM_SEE") \
    X(PUB_PAYLOAD, "publish: writes the payload", "copy_in COPY_PAYLOAD") \
    X(PUB_GEN, "publish: writes the generation", "shmc_slot_publish PUBLISH_FIELDS PUBLISH_GENERATION") \
    X(PUB_TOOK, "publish: writes took", "shmc_slot_publish PUBLISH_TOOK") \
    X(PUB_INC_1, "publish: reads the incarnation of byte 1", "shmc_peer_find FIND_INCARNATION") \
    X(PUB_TOKEN_1, "publish: reads the token of byte 1", "shmc_peer_find FIND_TOKEN") \
    X(PUB_INC_2, "publish: reads the incarnation of byte 2", "shmc_peer_find FIND_INCARNATION") \
    X(PUB_TOKEN_2, "publish: reads the token of byte 2", "shmc_peer_find FIND_TOKEN") \
    X(PUB_EXCHANGE, "publish: exchanges the word", "shmc_slot_publish PUBLISH_FENCE PUBLISH_EXCHANGE") \
    X(PUB_RECHECK_1, "publish: reads the incarnation of byte 1 again", "shmc_slot_publish PUBLISH_RECHECK") \
    X(PUB_CLEAR_1, "publish: byte 1 has changed, clears its grant", "shmc_slot_publish CLEAR_BITS") \
    X(PUB_RECHECK_2, "publish: reads the incarnation of byte 2 again", "shmc_slot_publish PUBLISH_RECHECK") \
    X(PUB_CLEAR_2, "publish: byte 2 has changed, clears its grant", "shmc_slot_publish CLEAR_BITS") \
    X(REVOKE_RESTART, "deadline passed, X set: clears X and restarts the deadline", \
      "revoke_late REVOKE_X_SEE, shmc_slot_revoke REVOKE_SEE REVOKE") \
    X(REVOKE, "deadline passed: clears grants, T and L", "shmc_slot_revoke REVOKE_SEE REVOKE") \
    X(EMPTY_SEEN, "sees that T has no takers left to come", "shmc_slot_settle SETTLE_SEE SETTLE_TOOK_SEE") \
    X(EMPTY_DROP, "drops T", "shmc_slot_settle CLEAR_BITS") \
    X(ATT_LOOK, "attach: reads the generation", "shmc_slot_attach ATTACH_LOOK") \
    X(ATT_LOCAL, "attach: holds it already, counts, reads the word", "shmc_slot_attach_again ATTACH_AGAIN") \
    X(ATT_LOCAL_STALE, "attach: holds the slot at another generation, stale", "shmc_member_attach (private memory)") \
    X(ATT_PIN, "attach: sets its hold, or sees no claims: stale", "pin ATTACH_PIN_SEE ATTACH_PIN") \
    X(ATT_LOOK_AGAIN, "attach: reads the generation again", "shmc_slot_attach ATTACH_LOOK_AGAIN") \
    X(ATT_UNPIN, "attach: clears its hold, stale", "shmc_slot_attach CLEAR_BITS") \
    X(ATT_TOOK, "attach: marks took", "take_one ATTACH_TOOK_SEE ATTACH_TOOK") \
    X(ATT_T, "attach: clears T, nobody is left to come", "consume ATTACH_CONSUME") \
    X(ATT_GRANT, "attach: clears its grant", "consume ATTACH_CONSUME") \
    X(RELEASE_COUNT, "releases one of several leases", "shmc_member_release (private memory)") \
    X(RELEASE_LAST, "releases its last lease, clears its hold", "shmc_slot_release CLEAR_BITS") \
    X(PASS_INC, "pass on: reads the target's incarnation", "shmc_peer_find FIND_INCARNATION") \
    X(PASS_TOKEN, "pass on: reads the target's token", "shmc_peer_find FIND_TOKEN") \
    X(PASS_GRANT, "pass on: sets the target's grant and X", "add_grant PASS_SEE PASS_GRANT") \
    X(PASS_RECHECK, "pass on: reads the incarnation again, sends or gives up", "shmc_slot_pass_on PASS_RECHECK") \
    X(PASS_CLEAR, "pass on: gives up and clears the grant", NO_CODE_MISTAKE) \
    X(PASS_TRUST, "pass on: sets L and X for one that has no byte, sends", "add_grant PASS_SEE PASS_GRANT") \
    X(JOIN_LOCK, "join: takes the lock of a byte", "shmc_peer_join PEER_LOCK") \
    X(SWEEP_LOCK, "sweep: takes the lock of a dead peer's byte", \
      "shmc_peer_sweep SWEEP_INCARNATION PEER_LOCK, has_left SWEEP_SEE, shmc_slot_claimed_by CLAIMED_SEE") \
    X(LEAVE_BEGIN, "leave: begins", "member_leave (private memory)") \
    X(TAKE_TOKEN, "takeover: the byte is no longer ready", "shmc_peer_leave LEAVE_NOT_READY") \
    X(TAKE_INC, "takeover: raises the incarnation", "raise_incarnation TAKE_INCARNATION") \
    X(TAKE_SEE, "takeover: reads the word", "shmc_slot_scrub SCRUB_SEE") \
    X(TAKE_TOOK_SEE, "takeover: reads took", "shmc_slot_scrub SCRUB_T_SEE") \
    X(TAKE_T, "takeover: drops T", "shmc_slot_scrub SCRUB_T") \
    X(TAKE_MARK, "takeover: clears the byte's took mark", "shmc_slot_scrub SCRUB_TOOK_SEE SCRUB_TOOK") \
    X(TAKE_WORD, "takeover: clears the byte's bits in the word", "shmc_slot_scrub CLEAR_BITS") \
    X(TAKE_READY, "takeover: the byte is ready", "shmc_peer_take_over TAKE_DESCRIBE TAKE_TOKEN TAKE_READY") \
    X(TAKE_FREE, "takeover: the byte is clean", \
      "has_left (a byte that is not ready and has no claims is clean; nothing says so)") \
    X(TAKE_UNLOCK, "takeover: drops the lock", "shmc_peer_sweep PEER_UNLOCK, shmc_peer_drop_anchor ANCHOR_DROP")
enum action {
#define ACTION_NAME(name, text, code) name,
    ACTIONS(ACTION_NAME)
#undef ACTION_NAME
        ACTION_COUNT
};
_Static_assert((int)ACTION_COUNT <= (int)EXPLORE_MAX_ACTIONS, "the explorer counts actions in an array");

/* What the owner may publish, as bits of config.publish. */
enum publication {
    GRANT_A,
    GRANT_B,
    GRANT_AB,
    GRANT_N, /* granted by name */
    ANON1_A,
    ANON1_AB,
    ANON2_AB,
    ANON1_N,
    ANON2_AN,
    ANON2_OA, /* readers=n, and who gets the handle */
    ALIAS_A,
    ALIAS_B, /* a live block again, in the other slot */
    PUBLICATIONS
};
#define MAY(publication) (1u << (publication))

/* One bounded world. Masks are of processes, 1 << process_id. */
struct config {
    const char *name, *what;
    unsigned slots, publishes, publish;
    unsigned passes, passers, pass_targets;
    unsigned deaths, mortal, sweepers;
    unsigned leaves;
    bool newcomer, revoke, reattach;
};

/* Mistakes that can be put into the protocol; PROTOCOL_AS_IS is none. See bugs[] in main.c. */
enum bug {
    PROTOCOL_AS_IS,
    NO_SECOND_LOOK,
    GRANT_BEFORE_HOLD,
    INC_AFTER_SCRUB,
    GRANT_AFTER_RECHECK,
    TWO_WORDS,
    GEN_WRAPS,
    STALE_KEEPS_HOLD,
    SCRUB_AFTER_UNLOCK,
    NO_L_FOR_TWO,
    X_IGNORED,
    T_BEFORE_HOLD,
    LOCAL_GEN_UNCHECKED,
    LOCAL_GEN_IGNORED,
    UNSEEN_GRANT_CONSUMED,
    NO_L_BESIDE_T,
    READY_DURING_SCRUB,
    TOKEN_BEFORE_INC,
    LOST_PASS_CLEARS,
    EMPTY_T_UNPINNED,
    NO_PUBLISH_RECHECK,
    NO_L_FOR_NEWCOMER,
    LEAVE_KEEPS_INC,
    TOOK_TWICE,
    LOCAL_SKIPS_TOOK,
    EXCHANGE_BEFORE_GEN,
    SCRUB_SKIPS_GRANTS,
    REVOKE_TAKES_HOLDS,
    REVOKE_TAKES_CLAIMED,
    SWEEP_WITHOUT_LOCK,
    SCRUB_LOOKS_CLEAN
};

/* The world that is being explored: one per run of the program. */
struct world {
    const struct config *config;
    enum bug bug;
};
extern struct world world;

static inline bool is_alive(const struct state *st, unsigned p)
{
    return st->proc[p].byte != DEAD;
}
static inline bool has_joined(const struct state *st, unsigned p)
{
    return st->proc[p].byte < BYTES;
}
static inline bool same_gen(unsigned a, unsigned b)
{
    return world.bug == GEN_WRAPS ? (a & 1) == (b & 1) : a == b;
}

/* word.c: the word, and what the specification knows about it */
void word_clear(struct state *st, unsigned slot, unsigned bits);
unsigned grantee_of(const struct state *st, unsigned slot, unsigned byte);
void grantee_set(struct state *st, unsigned slot, unsigned byte, unsigned p);
void message_send(struct state *st, unsigned slot, unsigned gen, unsigned target, unsigned kind);
void messages_sort(struct state *st);
void promises_restart(struct state *st, unsigned slot);
const char *promises_revoke(struct state *st, unsigned slot);
void promises_took(struct state *st, unsigned slot, unsigned p);
bool is_peer(const struct state *st, unsigned p, unsigned byte);
void promises_leave(struct state *st, unsigned p);
void promises_used_by_late(struct state *st, unsigned slot, unsigned gen, unsigned p);
const char *reuse_of_slot(const struct state *st, unsigned slot);
const char *reuse_of_block(const struct state *st, unsigned block);
void process_end(struct state *st, unsigned p);

/* publish.c: what only the owner does */
unsigned known_byte(const struct state *st, unsigned p);
bool publish_begin(struct state *st, unsigned slot, unsigned publication, unsigned block, struct explore_edge *edge);
void publish_step(struct state *st, struct explore_edge *edge);
bool revoke(struct state *st, unsigned slot, struct explore_edge *edge);
bool empty_begin(struct state *st, unsigned slot, struct explore_edge *edge);

/* attach.c: what every holder does */
void attach_begin(struct state *st, unsigned p, uint8_t msg, struct explore_edge *edge);
void attach_step(struct state *st, unsigned p, struct explore_edge *edge);
void release(struct state *st, unsigned p, unsigned slot, struct explore_edge *edge);
bool pass_begin(struct state *st, unsigned p, unsigned slot, unsigned target, struct explore_edge *edge);
void pass_step(struct state *st, unsigned p, struct explore_edge *edge);

/* takeover.c: join, sweep and leave */
enum takeover { JOIN, SWEEP, LEAVE };
bool takeover_begin(struct state *st, unsigned p, unsigned byte, enum takeover why, struct explore_edge *edge);
void takeover_step(struct state *st, unsigned p, struct explore_edge *edge);

/* moves.c: who may do what, and the end of the world */
void advance(struct state *st, unsigned p, struct explore_edge *edge);
void initial_state(void *state);
size_t successors(const void *state, struct explore_edge *edges, void *states);
void print_step(FILE *out, const struct explore_edge *edge, const void *after);

/* checks.c */
const char *check_state(const void *state);

#endif
