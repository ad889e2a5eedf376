/* steps.h: the places where a process can be stopped or killed, numbered.
 *
 * A step stands directly before a system call, or an access to memory that other processes share: to die there is to die
 * after the one before and before this one. Ordinary builds have nothing at these places. With -DSHMCAST_FAULTS=ON a test
 * hangs a board into the process (`_native.fault_board`) that says where to stop, and reads from it where it was.
 *
 * tests/steps.py lists every system call and every atomic, and fails for one that has neither a step nor a reason to have
 * none; tests/model names the step that each transition stands for. A number is never used for another place. */
#ifndef SHMC_STEPS_H
#define SHMC_STEPS_H

#include <stdint.h>

/* clang-format off */
#define SHMC_STEP_TABLE(X) \
    /* control.h, control.c */                                                                 \
    X(101, CONTROL_CLOCK, "create: reads the time and the nonce into the header")              \
    X(102, CONTROL_STATE_OPEN, "create: the arena is open")                                    \
    X(103, CONTROL_MAGIC, "create: writes the magic")                                          \
    X(104, CONTROL_OPEN_MAGIC, "open: reads the magic")                                        \
    X(105, CONTROL_END, "end: marks the arena as ended")                                       \
    X(106, CONTROL_FIND_SEGMENT, "looks for the record of a data segment")                     \
    X(107, CONTROL_FORMAT, "probe: reads magic and format, is it an arena of ours")            \
    X(151, ENDED_SEE, "reads whether the arena has ended")                                     \
    /* peers.c */                                                                              \
    X(201, TOKEN_MAP, "token: maps the page that children find empty")                         \
    X(202, TOKEN_WIPE, "token: has the kernel wipe it in children")                            \
    X(203, TOKEN_UNMAP, "token: gives the page back, no child would find it empty")            \
    X(204, TOKEN_RANDOM, "token: asks for random bytes")                                       \
    X(205, ANCHOR_MAP, "anchor: maps a page through the descriptor that has the lock")         \
    X(206, ANCHOR_DONTFORK, "anchor: keeps it from children")                                  \
    X(207, ANCHOR_UNDO, "anchor: gives the page back, a child would keep it")                  \
    X(208, ANCHOR_DROP, "anchor: unmaps the page; the lock goes with it")                      \
    X(209, TAKE_INCARNATION, "takeover, leave, sweep: raises the incarnation")                 \
    X(210, SCRUB_MARK_SEE, "scrub: reads the mark of a data segment")                          \
    X(211, SCRUB_MARK, "scrub: clears the mark of a data segment")                             \
    X(212, TAKE_WORD_STEP, "takeover: resets the group's word")                                \
    X(213, TAKE_WORD_FAILED, "takeover: resets the failed step")                               \
    X(214, TAKE_WORD_MASK, "takeover: resets the mask")                                        \
    X(215, TAKE_RING_READ, "takeover: resets the count of ring entries read")                  \
    X(216, TAKE_TOKEN, "takeover: writes the token")                                           \
    X(217, TAKE_READY, "takeover: the byte is ready")                                          \
    X(218, LEAVE_NOT_READY, "leave, sweep: the byte is no longer ready")                       \
    X(219, SWEEP_INCARNATION, "sweep: reads the incarnation, was it ever used")                \
    X(220, SWEEP_SEE, "sweep: reads whether the dead peer had been ready")                     \
    X(221, FIND_INCARNATION, "find: reads the incarnation of a byte")                          \
    X(222, FIND_TOKEN, "find: reads readiness and token of the byte")                          \
    X(223, PEER_LOCK, "takes the lock of a byte, or sees that it is taken")                    \
    X(224, PEER_UNLOCK, "drops the lock of a byte")                                            \
    X(225, PEER_PROBE, "asks whether the lock of a byte is taken")                             \
    X(226, TAKE_DESCRIBE, "takeover: writes pid, start time and command")                      \
    X(227, SWEEP_MARK_SEE, "sweep: reads a data segment's mark, has the dead peer left its own") \
    /* slots.c */                                                                              \
    X(301, FREED_SEE, "release: does the owner wait for space")                                \
    X(302, FREED_ADD, "release: counts the notice")                                            \
    X(303, FREED_WAKE, "release: wakes the owner")                                             \
    X(304, CLEAR_BITS, "clears claims in the word")                                            \
    X(305, PUBLISH_TOOK, "publish: writes took")                                               \
    X(306, PUBLISH_GENERATION, "publish: writes the generation")                               \
    X(307, PUBLISH_FENCE, "publish: orders streaming stores before the exchange")              \
    X(308, PUBLISH_EXCHANGE, "publish: exchanges the word")                                    \
    X(309, PUBLISH_RECHECK, "publish: reads the incarnation of a target again")                \
    X(310, ATTACH_PIN_SEE, "attach: reads the word")                                           \
    X(311, ATTACH_PIN, "attach: sets its hold")                                                \
    X(312, ATTACH_TOOK_SEE, "attach: reads took")                                              \
    X(313, ATTACH_TOOK, "attach: marks took")                                                  \
    X(314, ATTACH_CONSUME, "attach: clears its grant, and T when nobody is left to come")      \
    X(315, ATTACH_LOOK, "attach: reads the generation")                                        \
    X(316, ATTACH_LOOK_AGAIN, "attach: reads the generation again")                            \
    X(317, ATTACH_AGAIN, "attach: holds it already, reads the word")                           \
    X(318, PASS_SEE, "pass on: reads the word")                                                \
    X(319, PASS_GRANT, "pass on: sets the grant, X, and L where it must")                      \
    X(320, PASS_RECHECK, "pass on: reads the incarnation again")                               \
    X(321, REVOKE_SEE, "revoke: reads the word")                                               \
    X(322, REVOKE, "revoke: clears X, or the claims that were not made use of")                \
    X(323, SETTLE_SEE, "settle: reads the word")                                               \
    X(324, SETTLE_TOOK_SEE, "settle: reads took")                                              \
    X(325, SCRUB_SEE, "scrub: reads the word")                                                 \
    X(326, SCRUB_T_SEE, "scrub: reads took, is T to be dropped")                               \
    X(327, SCRUB_T, "scrub: drops T")                                                          \
    X(328, SCRUB_TOOK_SEE, "scrub: reads took, is the byte marked")                            \
    X(329, SCRUB_TOOK, "scrub: clears the byte's mark in took")                                \
    X(330, CLAIMED_SEE, "sweep: reads a word, has the dead peer claims left")                  \
    X(331, PUBLISH_FIELDS, "publish: writes what the record says of the block")                \
    /* owner.c, module_owner.c */                                                              \
    X(401, GROW_MARK, "grow: the segment has no mark")                                         \
    X(402, GROW_NUMBER, "grow: makes the segment known")                                       \
    X(403, RETIRE_MARK, "retire: marks the segment, so that nobody pins it")                   \
    X(404, RETIRE_NUMBER, "retire: the segment is not known any more")                         \
    X(405, REVOKE_X_SEE, "reclaim: reads whether a lasting promise was passed on")             \
    X(406, RECLAIM_SEE, "reclaim: reads a word, has it claims")                                \
    X(408, WAIT_FREED_SEE, "waits for space: reads the count of notices")                      \
    X(409, WAIT_FREED_WAITING, "waits for space: says so")                                     \
    X(410, WAIT_FREED_SLEEP, "waits for space: sleeps")                                        \
    X(411, WAIT_FREED_DONE, "waits for space: waits no more")                                  \
    X(412, WAIT_FREED_SEE_AGAIN, "waits for space: reads the count again")                     \
    X(413, COPY_PAYLOAD, "publish: writes the payload")                                        \
    /* segment.c */                                                                            \
    X(501, SEGMENT_RESERVE, "reserves the pages of a segment")                                 \
    X(502, SEGMENT_SIZE, "asks for the length of a segment")                                   \
    X(503, SEGMENT_MAP, "maps a segment")                                                      \
    X(504, SEGMENT_UNMAP, "unmaps a segment")                                                  \
    X(505, SEGMENT_POPULATE, "fills page tables ahead of use")                                 \
    X(506, SEGMENT_PUNCH, "gives the pages of a segment back")                                 \
    X(507, PRIVATE_SCAN, "lists the written pages of a private mapping")                       \
    X(508, PRIVATE_OPEN, "opens the list of this process's pages")                             \
    X(509, PRIVATE_DROP, "drops written pages of a private mapping")                           \
    X(510, PRIVATE_CLOSE, "closes the list of this process's pages")                           \
    X(511, SEGMENT_SEED, "adds one page of what shall be a huge page")                         \
    X(512, SEGMENT_GATHER, "has the kernel make huge pages")                                   \
    /* agree.c */                                                                              \
    X(601, RESET_FAILED, "group begins: resets the failed step")                               \
    X(602, RESET_MASK, "group begins: resets the mask")                                        \
    X(603, RESET_WORD, "group begins: resets the word")                                        \
    X(604, BEGIN_SEE, "group begins: reads the verdict")                                       \
    X(605, BEGIN_VERDICT, "group begins: names the group in the verdict")                      \
    X(606, JOINED_SEE, "is a fellow joined")                                                   \
    X(607, OWN_SEE, "were the words read that fellow's own")                                   \
    X(608, OWN_READY_SEE, "were the words read that fellow's own: has it left")                \
    X(609, WORDS_STEP_SEE, "reads a fellow's word")                                            \
    X(610, WORDS_FAILED_SEE, "reads a fellow's failed step")                                   \
    X(611, LAST_SEE, "record: reads a fellow's word, is anybody missing")                      \
    X(612, RECORD_FAILED, "record: writes the failed step")                                    \
    X(613, RECORD_MASK, "record: writes the mask")                                             \
    X(614, RECORD_WORD, "record: writes the word")                                             \
    X(615, RECORD_SLEEPERS_SEE, "record: does anybody sleep")                                  \
    X(616, END_FAILED, "end: writes the failed step")                                          \
    X(617, END_WORD, "end: writes the word")                                                   \
    X(618, RECORD_VERDICT_SEE, "record: reads the verdict, is it still this group")            \
    X(619, WAITING_WORD, "record: waits for the next message")                                 \
    X(620, LOOK_WORD, "agree: reads a fellow's word")                                          \
    X(621, LOOK_MASK, "agree: reads its mask")                                                 \
    X(622, VERDICT_PARTS_SEE, "agree: reads what was found, parts")                            \
    X(623, VERDICT_RANKS_SEE, "agree: reads what was found, ranks")                            \
    X(624, DECIDE_PARTS, "agree: writes what it has found, parts")                             \
    X(625, DECIDE_RANKS, "agree: writes what it has found, ranks")                             \
    X(626, DECIDE_VERDICT, "agree: decides")                                                   \
    X(627, VERDICT_SEE, "agree: reads the verdict")                                            \
    X(628, GIVE_UP_SEE, "give up: reads the verdict")                                          \
    X(629, GIVE_UP, "give up: breaks the verdict")                                             \
    X(630, GIVEN_UP_SEE, "reads the verdict, is it broken")                                    \
    /* bell.c */                                                                               \
    X(701, BELL_SLEEP, "bell: sleeps")                                                         \
    X(702, BELL_RUNG_SEE, "bell: reads its number")                                            \
    X(703, BELL_SLEEPER, "bell: says that it sleeps")                                          \
    X(704, BELL_TAKE, "bell: takes the sleepers")                                              \
    X(705, BELL_RUNG, "bell: raises its number")                                               \
    X(706, BELL_WAKE, "bell: wakes them")                                                      \
    X(707, BELL_FORGET_SEE, "bell: is there a sleeper to forget")                              \
    X(708, BELL_FORGET, "bell: forgets a sleeper")                                             \
    /* ring.c */                                                                               \
    X(801, RING_HEAD_SEE, "ring: reads the head, for a group that begins")                     \
    X(802, RING_JOIN, "ring: a reader says where it begins")                                   \
    X(803, RING_ROOM_SEE, "ring: the writer reads a reader's count")                           \
    X(804, RING_HEAD, "ring: the writer raises the head")                                      \
    X(805, RING_MORE_SEE, "ring: a reader reads the head")                                     \
    X(806, RING_READ, "ring: a reader raises its count")                                       \
    X(807, RING_FILL, "ring: the writer fills an entry")                                       \
    /* module_member.c */                                                                      \
    X(901, MEMBER_FAILED_STEP, "set_step: writes the failed step")                             \
    X(902, MEMBER_STEP, "set_step: writes the step")                                           \
    X(903, SWEEP_CLOSE, "sweep: closes the descriptor that it took locks through")             \
    /* shmcast/names.py */                                                                     \
    X(1001, NAME_CREATE, "creates a segment of a name that was free")                          \
    X(1002, NAME_OPEN, "opens a segment")                                                      \
    X(1003, NAME_UNLINK, "takes the name of a segment away")                                   \
    X(1004, NAME_IS_CURRENT, "asks whether a name still means the file that was opened")       \
    X(1005, NAME_LIST, "lists the segments that exist")                                        \
    X(1006, NAME_SIZE, "asks what a name is: kind, owner, length")
/* clang-format on */

enum shmc_step {
#define SHMC_STEP_ENUM(number, name, text) SHMC_STEP_##name = number,
    SHMC_STEP_TABLE(SHMC_STEP_ENUM)
#undef SHMC_STEP_ENUM
};

#ifdef SHMCAST_FAULTS

/* The board: words of memory that a test shares with the process. */
enum {
    SHMC_BOARD_STEP,       /* where to stop; 0: nowhere. Written last by who arms it */
    SHMC_BOARD_LEFT,       /* the how-manieth time there, counted down */
    SHMC_BOARD_SIGNAL,     /* what the process then sends itself */
    SHMC_BOARD_LAST,       /* the step that was reached last */
    SHMC_BOARD_COUNT,      /* how many were */
    SHMC_BOARD_TRACE = 16, /* from here on: all of them, in order, as long as there is room */
};

/* `words` counts those of `board`, NULL takes it away. */
void shmc_steps_watch(uint32_t *board, uint32_t words);
void shmc_step_reached(enum shmc_step step);
#define SHMC_STEP(name) shmc_step_reached(SHMC_STEP_##name)

#else
#define SHMC_STEP(name) ((void)SHMC_STEP_##name)
#endif

#endif
