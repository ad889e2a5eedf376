/* layout.h: what lies in shared memory. Normative; nothing else defines a shared byte (metrics: with metrics.h).
 *
 * CONTRACT
 *   An arena is one control segment and up to SHMC_SEGMENT_COUNT live data segments, all POSIX shared memory:
 *       /shmcast.<namespace>.<arena id, 16 hex digits>.<n>        n = 0 control; n = 1, 2, ... data, never used twice
 *   Data segments hold nothing but payload. Everything that processes must agree on is in the control segment,
 *   and everything that only the owner needs (free lists, deadlines, who aliases what) is in the owner's private
 *   memory, where no other process can corrupt it and no crash leaves it half written.
 *   All integers are little-endian and naturally aligned; offsets, never pointers. Only C touches these bytes.
 *
 * GLOSSARY
 *   owner        the one process that publishes into the arena; peer 0
 *   peer         a process that has joined; it holds an OFD write lock on byte p of the control segment for life
 *   incarnation  how often byte p was taken or swept; raised before anything is scrubbed, so that whoever names a
 *                peer can tell by reading it twice that the peer is still the same process
 *   token        random 64-bit name of a process, the same in every arena that it joins; new after fork
 *   slot         one published block: a word of claims and a record
 *   hold         peer p reads the block (bit p)          grant   peer p may still attach (bit 32 + p)
 *   T            anonymous claim: the first n processes that attach, whoever they are
 *   L            the owner as trustee until a deadline: somebody will attach who can not be named by a bit
 *   X            a pass-on has touched the word since the owner last looked; not a claim
 *   generation   arena-wide publish sequence number; 64 bits, never wraps; a handle names (slot, generation)
 *   bell         where peers sleep until something that they wait for may have come true; one of three
 *   ring         small messages of the owner to all ranks of a group, in order; an entry holds one or a piece of one
 *   fellow       a peer that is a rank of a group, as its records name it: index and incarnation
 *   word         how far a fellow has come; mask: what of that message it could not take in
 *   verdict      the last message that all fellows have agreed on
 *
 * THE CONTROL SEGMENT
 *
 *        0 +---------------------------------------------------------------+
 *          | header: magic, format, sizes, identity           constant     |
 *      128 |         state                                    owner/sweeper|
 *      192 |         release notice (futex)                   everybody    |
 *      256 |         bells: sent, read, agreed (futexes)      everybody    |
 *      448 |         verdict                                  fellows      |
 *     1024 |         metrics block                            everybody    |
 *     4096 +---------------------------------------------------------------+
 *          | peers[32]     256 bytes each; 31 used            each its own |
 *    12288 +---------------------------------------------------------------+
 *          | segments[256]  32 bytes each                     owner; marks |
 *    20480 +---------------------------------------------------------------+
 *          | words[slot_count]    8 bytes each                everybody    |
 *          +---------------------------------------------------------------+
 *          | records[slot_count] 64 bytes each                owner; took  |
 *          +---------------------------------------------------------------+ next page
 *          | ring: head, 4096 bytes; entries[64], 4096 each   owner        |
 *          +---------------------------------------------------------------+
 *   words are apart from records so that the owner finds what became free by reading 8 bytes a slot.
 *   One page of the file, mapped once more through the descriptor that took the lock and marked MADV_DONTFORK, is
 *   what keeps a peer's lock alive: it lives exactly as long as that address space.
 *
 * THE LIFE OF A SLOT           every arrow is one atomic read-modify-write of the word; [role] may take it
 *
 *                     publish [owner]: exchange, once the payload and the record are written
 *      FREE ------------------------------------------------------------------> CLAIMED
 *   claims == 0                                                                claims != 0
 *       ^                                                                        |   ^
 *       |   release [holder]      clear own hold                                 |   | attach  [any peer] set own hold
 *       |   took    [attacher]    clear T when n have taken                      |   |         then read the generation
 *       |   consume [attacher]    clear own grant, only after the hold is set    |   |         again, undo if it differs
 *       |   revoke  [owner]       clear unclaimed grants, T, L past a deadline   |   | pass on [holder] set grant|X (|L)
 *       |   scrub   [who has the dead peer's byte] clear that peer's bits        |   | keep    [owner] set own hold
 *       +------------------------------------------------------------------------+   +--- stays CLAIMED
 *   claims == 0 can be left by the owner alone, so finding it once is enough to reuse the memory: no barrier.
 *   An attach sets its hold only by compare-and-swap on a word that has claims: it can never revive a free slot.
 *   Hold first, consume second, everywhere: a death in between over-counts, and the scrub ends that. An attach consumes
 *   only what was set when its hold was set. These and the other rules were found by exploring the protocol: every one
 *   of them, and what happens without it, is in tests/model/README.md.
 *
 * THE LIFE OF A PEER'S BYTE
 *      free --[joiner: lock, incarnation+1, scrub own bits, write record, ready=incarnation]--> joined
 *      joined --[leaver: ready=0, scrub own bits, unmap the lock page]--> free
 *      joined --[death: the kernel drops the lock]--> free --[sweeper: lock, ready=0, incarnation+1, scrub, unlock]--> free
 *   A sweeper that is killed midway leaves a byte that is not ready: the next one looks for claims and marks as well.
 *
 * A BELL      condition: whatever the sleeper waits for; another word of the control segment
 *      sleeper p: read rung; set bit p of sleepers; condition true -> go on; else futex-wait while rung is what was read
 *      ringer   : make the condition true; sleepers == 0 -> done; else exchange sleepers with 0; rung+1; futex-wake all
 *   Both sides store, then load what the other side stores, so all four accesses are sequentially consistent: either
 *   the ringer sees the bit or the sleeper sees the condition. A bit may be taken by who rings for another condition;
 *   that one raises rung afterwards, so that a sleeper who had read rung before it set the bit does not sleep. Who is
 *   woken looks again, and sets its bit again if it has to. A bit is a hint: one that is set for nobody costs a system
 *   call, once; a sleeper that is killed leaves at most its own bit, which the next ring or the scrub clears. A ringer
 *   that is killed between condition and wake lets others sleep on, so every sleep has a time limit of half a second
 *   or so, after which the sleeper looks for itself.
 *
 * THE RING    one writer, the owner; any number of readers, each with a count of its own
 *      head          entries ever written; never goes back. Entry n lies at n mod 64
 *      ring_read[p]  entries that reader p is done with; only p writes it, and who takes the byte over (0)
 *   The writer fills entry n once every reader of the group is done with entry n - 64; then head = n + 1 (sequentially
 *   consistent, for the bell `sent`; it also releases the entry). A reader looks at entry n once head > n (acquire),
 *   copies it out, checks the copy, then ring_read = n + 1 (sequentially consistent, for the bell `read`; it also
 *   releases the place). A reader that is stopped stops the writer, 64 entries later; one that has died does until its
 *   incarnation is raised. A message that is longer than one entry takes several in a row and streams through. A group
 *   begins at the head of that moment and its readers set their counts to it; a count of earlier days is lower, so
 *   that a reader that has not done so yet makes the writer wait and nothing worse. Whatever a reader finds is
 *   checked: it is this entry, of this group, continues this message, fits, and hashes to what it says.
 *
 * AGREEMENT   every fellow's word and mask, each written by its own process alone; one verdict, in the header
 *      word    2n: message n is taken in; 2n + 1: waiting for the next one; bit 63: the fellow has ended, and will take
 *              in nothing more. With bit 63 set the rest still says what it has taken in
 *      mask    what the fellow could not take in of that message, a bit each; written before the word
 *      failed_step   the last word 2n at which a mask was not 0; 0: never
 *      verdict       the last word 2n that was agreed on, and the fellow that found so; bit 63: broken, nothing after
 *                    that word will ever be agreed on. The owner starts it anew for every group, and names the group in
 *                    it; to fellows of another one it is broken before, and their words are not theirs any more
 *      decided_...   what a fellow has found: all masks, and who has one that is not 0
 *   Who takes part in the agreement on n records n, and goes on to n + 1 only when the verdict says n or broken.
 *   Messages that nobody agrees on pass in between: fellows may be any number of those apart. Meanwhile it looks:
 *      verdict at 2n         the finder's decided_ fields are the answer
 *      broken before         there is none
 *      all words >= 2n       read the masks; write own decided_ fields; compare-and-swap the verdict from what it was
 *                            before the words were read to (2n, self), or look again; ring `agreed`
 *      a fellow ended or left before n    make the verdict broken by compare-and-swap, unless it says n by now
 *      else                  sleep at `agreed`
 *   So there is one answer, whoever stops or dies when. One mask a fellow is enough: it is overwritten only after the
 *   verdict says n, and who reads it too late finds the verdict changed. One answer a fellow is enough: it finds for m
 *   > n only where every word is >= 2m, so all have got the answer on n.
 *   All of it stays valid when its fellow leaves or dies: word and mask until the byte is taken over, the decided_
 *   fields for good. After a leave or a sweep the incarnation is one more than it was and `ready` is 0. Who takes the
 *   byte over resets word and mask after it has raised the incarnation (release, acquire), so reading the incarnation
 *   last tells.
 *   The bell `agreed` is rung by whose word was the last (of two that record at once the later store sees both), by
 *   who changes the verdict, and by who ends; who ends rings the other two bells as well.
 *
 * THE LIFE OF AN ARENA     explored like the life of a slot; what each order is for is in tests/model/README.md
 *      create    open exclusively; lock byte 0; the name is still this inode, or begin again with another id; reserve;
 *                header; map the page that keeps the lock; magic last; only then close the descriptor of the lock
 *      grow      open exclusively, a number never used before; reserve; map; record: size, no mark, number last
 *      give back [owner] no block lies there; mark from 0 to RETIRED; punch; number = 0; unlink. The room that this makes
 *                counts from number = 0 on
 *      pin       [any peer that maps the segment] find the record by its number; set own bit of mark unless RETIRED is
 *                set; read the number again, clear the bit if it differs: another segment has come there. Only then
 *                register the pages; unregister them before the bit is cleared
 *      end       [owner] state = ENDED; unlink data segments; unlink control last; the byte goes with its page
 *      sweep     list; open control; lock byte 0, asking whether it is locked is not enough; the name is still this
 *                inode; state = ENDED; list again, as the owner may have grown; unlink data segments; unlink control
 *                last; only then let the byte go. What was listed of an arena that has no control by now: unlink
 *      attach    state is OPEN; set the hold; open the data segment by its number, unless it is mapped; map
 *   A name is taken away by the owner, or by the one process that has the owner's byte of the file that the control name
 *   means. Control is there before data and goes after it, so data without control is nobody's, if it was listed before
 *   the look for control. A list is of names, not of records: a segment has its name before and after it has a record.
 *   A mapping outlives its name: who reads keeps reading, and what is given back is punched, as unlinking alone frees
 *   nothing that is mapped. state is ENDED before the first name goes, so a promised block that can not be opened is of an
 *   arena that has ended.
 */
#ifndef SHMC_LAYOUT_H
#define SHMC_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include "atomics.h"

#define SHMC_MAGIC 0x31747361636d6873ull /* "shmcast1" */
#define SHMC_FORMAT 2u                   /* raised with every change of what the bytes below mean */

enum {
    SHMC_PAGE_BYTES = 4096,
    SHMC_BLOCK_ALIGN_BYTES = 64, /* payload alignment: one cache line, one AVX-512 store */
    SHMC_PEER_COUNT = 31,        /* the owner included: bits 0..30 */
    SHMC_SEGMENT_COUNT = 256,    /* live data segments */
    SHMC_SLOT_COUNT_MAX = 1 << 20,
    SHMC_COMMAND_BYTES = 96,
    SHMC_RING_ENTRIES = 64, /* a reader may be that many behind before the writer waits; a power of two */
    SHMC_RING_ENTRY_BYTES = 4096,
};

/* ---- the slot word -------------------------------------------------------------------------------------------- */

#define SHMC_HOLD(p) (UINT64_C(1) << (p))          /* p = 0..30 */
#define SHMC_GRANT(p) (UINT64_C(1) << (32u + (p))) /* p = 1..30 */
#define SHMC_T (UINT64_C(1) << 31)
#define SHMC_L (UINT64_C(1) << 32) /* the place of the owner's grant bit: the owner never needs one */
#define SHMC_X (UINT64_C(1) << 63)
#define SHMC_CLAIMS (~SHMC_X)
#define SHMC_HOLDS UINT64_C(0x7fffffff)
#define SHMC_GRANTS (UINT64_C(0x7ffffffe) << 32)

/* ---- header --------------------------------------------------------------------------------------------------- */

enum shmc_arena_state { SHMC_ARENA_OPEN = 1, SHMC_ARENA_ENDED = 2 };

/* On a cache line of its own: `sleepers` is read whenever something is sent, and hardly ever written. */
struct shmc_bell {
    shmc_atomic_u32 rung;     /* futex word */
    shmc_atomic_u32 sleepers; /* bit p: peer p sleeps here, or is about to */
    uint32_t _reserved0[14];
};

struct shmc_header {
    /* constant once magic is set; written by the creator */
    shmc_atomic_u64 magic;  /* 0 until the segment is ready; store-release, pairs with the load-acquire of openers */
    uint32_t format;        /* SHMC_FORMAT */
    uint32_t record_bytes;  /* sizeof(struct shmc_record): a build with other structs refuses even at equal format */
    uint64_t control_bytes; /* length of the control segment */
    uint64_t arena_id;      /* the id in the name */
    uint64_t nonce[2];      /* random: proves that two processes look at the same memory */
    uint64_t host;          /* hash of the kernel's boot id; for handles that stray to another host */
    uint64_t created_ns;    /* CLOCK_REALTIME, ns; for people */
    uint64_t max_bytes;     /* bound on the sum of live data segments, bytes */
    uint32_t slot_count;
    uint32_t peer_count;    /* SHMC_PEER_COUNT */
    uint32_t segment_count; /* SHMC_SEGMENT_COUNT */
    uint32_t _reserved0[11];

    /* 128: written by the owner, or by the sweeper that has taken byte 0 */
    shmc_atomic_u32 state; /* enum shmc_arena_state; store-release, pairs with the load-acquire in attach and join */
    uint32_t _reserved1[15];

    /* 192: a hint, never the truth: the owner waits here when it is out of space */
    shmc_atomic_u32 freed;   /* +1 by whoever clears a word's last claim while `waiting` is set; futex word */
    shmc_atomic_u32 waiting; /* 1 while the owner waits */
    uint32_t _reserved2[14];

    /* 256 */
    struct shmc_bell sent;   /* readers wait for a message: head has grown */
    struct shmc_bell read;   /* the writer waits for room: a ring_read has grown */
    struct shmc_bell agreed; /* fellows wait for words */

    /* 448: see AGREEMENT */
    shmc_atomic_u64 verdict;
    uint64_t _reserved3[7];

    uint8_t _reserved4[512];

    /* 1024: the metrics block: words that every peer adds to, read by anybody, never trusted, nothing decided by them.
     * Which word counts what, and why relaxed is enough, is in metrics.h; words without a row there are zero. */
    shmc_atomic_u64 metrics[384];
};

/* ---- peers ---------------------------------------------------------------------------------------------------- */

struct shmc_peer_record {
    shmc_atomic_u32
        incarnation;       /* +1 by who has the byte, first thing; pairs with the two loads of publish and pass_on */
    shmc_atomic_u32 ready; /* == incarnation once the rest is valid, 0 after leave; store-release by the joiner */
    shmc_atomic_u64 token; /* process token */
    uint32_t pid;          /* in the joiner's pid namespace; for people, as are the next two */
    uint32_t _reserved0;
    uint64_t start_ticks;             /* start time, clock ticks since boot (field 22 of /proc/self/stat) */
    char command[SHMC_COMMAND_BYTES]; /* NUL-terminated, cut */

    /* 128: two lines of their own, written by peer p, and by who takes its byte over. See AGREEMENT and THE RING. */
    shmc_atomic_u64 step; /* the word */
    shmc_atomic_u64 failed_step;
    shmc_atomic_u64 mask;
    shmc_atomic_u64 ring_read;
    shmc_atomic_u64 decided_parts; /* all masks */
    shmc_atomic_u64 decided_ranks; /* bit r: the mask of rank r was not 0 */
    uint64_t _reserved1[10];
};

#define SHMC_WORD_ENDED (UINT64_C(1) << 63)
#define SHMC_VERDICT_BROKEN (UINT64_C(1) << 63)
/* bits 0..4: the peer that found it; 5..46: the word; 47..62: which group of this arena, so that a fellow of an earlier
 * one that was stopped midway neither changes anything when it goes on nor takes another group's verdict for its own */
#define SHMC_VERDICT_GROUP (UINT64_C(1) << 47)
#define SHMC_VERDICT_GROUPS (UINT64_C(0xffff) << 47)
#define SHMC_VERDICT(before, word, p) (((before) & SHMC_VERDICT_GROUPS) | (word) << 5 | (p))
#define SHMC_VERDICT_WORD(verdict) (((verdict) & (SHMC_VERDICT_GROUP - 1)) >> 5)
#define SHMC_VERDICT_PEER(verdict) ((unsigned)((verdict) & 31u))

/* ---- data segments -------------------------------------------------------------------------------------------- */

/* `mark` is one word, so that marking pages as pinned and retiring the segment can not both succeed:
 * bit p: peer p has registered pages of the segment with a GPU driver (set by p as in THE LIFE OF AN ARENA, cleared by p
 * or by the scrub);
 * SHMC_SEGMENT_RETIRED: no block will ever lie here again (set by the owner by compare-and-swap from 0, after which
 * the pages are punched and the name is unlinked; pinned pages are never punched). */
#define SHMC_SEGMENT_RETIRED (UINT64_C(1) << 63)

struct shmc_segment_record {
    shmc_atomic_u32 number; /* n in the name; 0: this record is unused. Store-release by the owner, after the rest */
    uint32_t _reserved0;
    uint64_t size_bytes;
    shmc_atomic_u64 mark;
    uint64_t _reserved1;
};

/* ---- slots ---------------------------------------------------------------------------------------------------- */

/* Written by the owner only while the slot has no claim, `took` excepted. A reader looks at it only while it holds. */
struct shmc_record {
    shmc_atomic_u64 generation; /* pairs with both loads in shmc_slot_attach */
    shmc_atomic_u64 took;       /* bits 0..30: who has taken one of the n; bits 32..62: how many are left */
    uint64_t offset_bytes;      /* in the data segment; multiple of SHMC_BLOCK_ALIGN_BYTES */
    uint64_t size_bytes;        /* payload */
    uint32_t segment;           /* n in the name */
    uint32_t flags;             /* enum shmc_record_flag */
    uint64_t hash_low;          /* XXH3-128 of the payload where SHMC_RECORD_HASHED */
    uint64_t hash_high;
    uint64_t _reserved0;
};

enum shmc_record_flag {
    SHMC_RECORD_HASHED = 1,
    SHMC_RECORD_OWN_PAGES =
        2, /* starts on a page and shares its last page with no other block: may be mapped privately */
};

#define SHMC_TOOK_ONE (UINT64_C(1) << 32)
#define SHMC_TOOK_LEFT(took) ((uint32_t)((took) >> 32))

/* ---- the ring ------------------------------------------------------------------------------------------------- */

/* Written by the owner between two heads. A reader copies the first 48 bytes, then checks them, then copies bytes. */
struct shmc_ring_entry {
    uint64_t number;        /* entries before this one, ever */
    uint64_t group;         /* which group it is for: hash of its processes and of where it begins */
    uint64_t message_bytes; /* of the whole message */
    uint64_t offset_bytes;  /* where in the message these bytes belong; 0: it begins here */
    uint64_t hash;          /* low half of the XXH3-128 of the bytes; seed: shmc_ring_seed */
    uint32_t bytes;
    uint32_t _reserved0;
    uint8_t payload[SHMC_RING_ENTRY_BYTES - 48];
};

struct shmc_ring_region {
    shmc_atomic_u64 head;
    uint8_t _reserved0[SHMC_PAGE_BYTES - 8];
    struct shmc_ring_entry entries[SHMC_RING_ENTRIES];
};

enum { SHMC_RING_PAYLOAD_BYTES = sizeof(((struct shmc_ring_entry *)0)->payload) };

/* ---- where things are ----------------------------------------------------------------------------------------- */

#define SHMC_PEERS_OFFSET 4096
#define SHMC_SEGMENTS_OFFSET 12288
#define SHMC_WORDS_OFFSET 20480

/* slot_count is checked against SHMC_SLOT_COUNT_MAX first, so neither can overflow */
static inline uint64_t shmc_layout_records_offset(uint32_t slot_count)
{
    uint64_t end = SHMC_WORDS_OFFSET + (uint64_t)slot_count * sizeof(uint64_t);
    return (end + 63) & ~UINT64_C(63);
}

static inline uint64_t shmc_layout_ring_offset(uint32_t slot_count)
{
    uint64_t end = shmc_layout_records_offset(slot_count) + (uint64_t)slot_count * sizeof(struct shmc_record);
    return (end + SHMC_PAGE_BYTES - 1) & ~(uint64_t)(SHMC_PAGE_BYTES - 1);
}

static inline uint64_t shmc_layout_control_bytes(uint32_t slot_count)
{
    return shmc_layout_ring_offset(slot_count) + sizeof(struct shmc_ring_region);
}

#define SHMC_AT(type, field, offset) \
    _Static_assert(offsetof(struct type, field) == (offset), #type "." #field " moved: raise SHMC_FORMAT")
SHMC_AT(shmc_header, magic, 0);
SHMC_AT(shmc_header, format, 8);
SHMC_AT(shmc_header, record_bytes, 12);
SHMC_AT(shmc_header, control_bytes, 16);
SHMC_AT(shmc_header, arena_id, 24);
SHMC_AT(shmc_header, nonce, 32);
SHMC_AT(shmc_header, host, 48);
SHMC_AT(shmc_header, created_ns, 56);
SHMC_AT(shmc_header, max_bytes, 64);
SHMC_AT(shmc_header, slot_count, 72);
SHMC_AT(shmc_header, peer_count, 76);
SHMC_AT(shmc_header, segment_count, 80);
SHMC_AT(shmc_header, state, 128);
SHMC_AT(shmc_header, freed, 192);
SHMC_AT(shmc_header, waiting, 196);
SHMC_AT(shmc_header, sent, 256);
SHMC_AT(shmc_header, read, 320);
SHMC_AT(shmc_header, agreed, 384);
SHMC_AT(shmc_header, verdict, 448);
SHMC_AT(shmc_header, metrics, 1024);
SHMC_AT(shmc_bell, rung, 0);
SHMC_AT(shmc_bell, sleepers, 4);
_Static_assert(sizeof(struct shmc_bell) == 64, "bell is one cache line");
_Static_assert(sizeof(struct shmc_header) == SHMC_PEERS_OFFSET, "header is one page");
SHMC_AT(shmc_peer_record, incarnation, 0);
SHMC_AT(shmc_peer_record, ready, 4);
SHMC_AT(shmc_peer_record, token, 8);
SHMC_AT(shmc_peer_record, pid, 16);
SHMC_AT(shmc_peer_record, start_ticks, 24);
SHMC_AT(shmc_peer_record, command, 32);
SHMC_AT(shmc_peer_record, step, 128);
SHMC_AT(shmc_peer_record, failed_step, 136);
SHMC_AT(shmc_peer_record, mask, 144);
SHMC_AT(shmc_peer_record, ring_read, 152);
SHMC_AT(shmc_peer_record, decided_parts, 160);
SHMC_AT(shmc_peer_record, decided_ranks, 168);
_Static_assert(sizeof(struct shmc_peer_record) == 256, "peer record is 256 bytes");
_Static_assert(SHMC_PEERS_OFFSET + 32 * sizeof(struct shmc_peer_record) == SHMC_SEGMENTS_OFFSET,
               "peers end where segments start");
SHMC_AT(shmc_segment_record, number, 0);
SHMC_AT(shmc_segment_record, size_bytes, 8);
SHMC_AT(shmc_segment_record, mark, 16);
_Static_assert(sizeof(struct shmc_segment_record) == 32, "segment record is 32 bytes");
_Static_assert(SHMC_SEGMENTS_OFFSET + SHMC_SEGMENT_COUNT * sizeof(struct shmc_segment_record) == SHMC_WORDS_OFFSET,
               "segments end where words start");
SHMC_AT(shmc_record, generation, 0);
SHMC_AT(shmc_record, took, 8);
SHMC_AT(shmc_record, offset_bytes, 16);
SHMC_AT(shmc_record, size_bytes, 24);
SHMC_AT(shmc_record, segment, 32);
SHMC_AT(shmc_record, flags, 36);
SHMC_AT(shmc_record, hash_low, 40);
SHMC_AT(shmc_record, hash_high, 48);
_Static_assert(sizeof(struct shmc_record) == 64, "slot record is one cache line");
SHMC_AT(shmc_ring_entry, number, 0);
SHMC_AT(shmc_ring_entry, group, 8);
SHMC_AT(shmc_ring_entry, message_bytes, 16);
SHMC_AT(shmc_ring_entry, offset_bytes, 24);
SHMC_AT(shmc_ring_entry, hash, 32);
SHMC_AT(shmc_ring_entry, bytes, 40);
SHMC_AT(shmc_ring_entry, payload, 48);
_Static_assert(sizeof(struct shmc_ring_entry) == SHMC_RING_ENTRY_BYTES, "ring entry is one page");
_Static_assert((SHMC_RING_ENTRIES & (SHMC_RING_ENTRIES - 1)) == 0, "ring entries are a power of two");
SHMC_AT(shmc_ring_region, entries, 4096);
#undef SHMC_AT

#endif
