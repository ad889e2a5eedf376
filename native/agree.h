/* agree.h: the ranks of a group, what they say in their words, and agreement without a collective (layout.h, AGREEMENT).
 * Not thread-safe but for ballots, which only read what never changes of it; the caller serialises (module.c by the GIL). */
#ifndef SHMC_AGREE_H
#define SHMC_AGREE_H

#include "bell.h"
#include "member.h"

#define SHMC_WORD_ABSENT (UINT64_C(1) << 62) /* in place of the word of a fellow that is not there */

struct shmc_fellow {
    unsigned p;
    uint32_t incarnation;
};

struct shmc_fellows {
    struct shmc_member *member; /* outlives us */
    uint32_t count, own;        /* how many ranks; which of them we are */
    struct shmc_fellow ranks[SHMC_PEER_COUNT];
    uint64_t group; /* as the verdict names it: SHMC_VERDICT_GROUPS */
    uint64_t taken; /* our word when we last recorded a message as taken in */
    uint64_t spin_ns;
};

/* Every rank's token, in their order. PEER_LOST (one has not joined, or we are not among them). */
enum shmc_status shmc_fellows_init(struct shmc_fellows *fellows, struct shmc_member *member, const uint64_t *tokens,
                                   uint32_t count, struct shmc_detail *detail);

/* Our word, as if there had never been a group; before anybody may take it for that of a new one. */
enum shmc_status shmc_fellows_reset(struct shmc_member *member);

/* The owner, before any other rank of a new group resets its word: nothing has been agreed on. Gives the group's name, for
 * `group` on every rank. To whoever still asks for an earlier group that one is broken. INHERITED is the caller's to ask. */
uint64_t shmc_fellows_begin(struct shmc_member *owner);

/* Set our word, unless the arena has another group now, whose it is. `mask`: with an even word, what we could not take in of the message. A word with SHMC_WORD_ENDED never
 * claims more than was recorded before. INHERITED. */
enum shmc_status shmc_fellows_record(struct shmc_fellows *fellows, uint64_t word, uint64_t mask);

/* Word and failed step of a rank; SHMC_WORD_ABSENT and 0 where it is not joined any more. */
void shmc_fellows_words(const struct shmc_fellows *fellows, uint32_t rank, uint64_t *word, uint64_t *failed_step);

/* Whether the process of that rank has not left or been swept. */
bool shmc_fellows_joined(const struct shmc_fellows *fellows, uint32_t rank);

/* Whether that rank had come as far as `word` (even), also if it has ended or left since. */
bool shmc_fellows_has(const struct shmc_fellows *fellows, uint32_t rank, uint64_t word);

/* Nothing from `word` on shall be agreed on. False where that has been done already. INHERITED is the caller's to ask. */
bool shmc_fellows_give_up(const struct shmc_fellows *fellows, uint64_t word);

/* Whether some rank has done so. */
bool shmc_fellows_given_up(const struct shmc_fellows *fellows);

enum shmc_agreement {
    SHMC_AGREE_PENDING, /* or the time is up */
    SHMC_AGREE_REACHED,
    SHMC_AGREE_ENDED, /* a rank has ended or left before that message */
    SHMC_AGREE_BROKEN,
    SHMC_AGREE_LATER, /* a later message has been agreed on, which can not be */
};

/* One agreement as one rank sees it. */
struct shmc_ballot {
    const struct shmc_fellows *fellows;
    uint64_t word; /* 2n */
    enum shmc_agreement state;
    uint64_t parts, ranks; /* once it is reached: all masks; bit r: that of rank r was not 0 */
    uint64_t later;        /* the word that was agreed on instead */
};

void shmc_ballot_init(struct shmc_ballot *ballot, const struct shmc_fellows *fellows, uint64_t word);
enum shmc_agreement shmc_ballot_look(struct shmc_ballot *ballot);

/* Wait until it is not pending any more; INHERITED is the caller's to ask. PENDING with *interrupted: a signal came. */
enum shmc_agreement shmc_ballot_wait(struct shmc_ballot *ballot, uint64_t deadline_ns, bool *interrupted);

#endif
