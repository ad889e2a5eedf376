#include "agree.h"

#include "clock.h"
#include "steps.h"

enum { LOOKS_MAX = 64 };

static struct shmc_peer_record *record_of(const struct shmc_fellows *fellows, uint32_t rank)
{
    return &fellows->member->control.peers[fellows->ranks[rank].p];
}

enum shmc_status shmc_fellows_init(struct shmc_fellows *fellows, struct shmc_member *member, const uint64_t *tokens,
                                   uint32_t count, struct shmc_detail *detail)
{
    *fellows =
        (struct shmc_fellows){.member = member, .count = count, .own = count, .spin_ns = shmc_bell_spin_ns(count)};
    if (shmc_member_inherited(member)) {
        return SHMC_INHERITED;
    }
    for (uint32_t rank = 0; rank < count; rank++) {
        uint32_t incarnation;
        int p = shmc_peer_find(&member->control, tokens[rank], &incarnation);
        if (p < 0) {
            *detail = (struct shmc_detail){tokens[rank], SHMC_PEER_COUNT};
            return SHMC_PEER_LOST;
        }
        fellows->ranks[rank] = (struct shmc_fellow){.p = (unsigned)p, .incarnation = incarnation};
        if ((unsigned)p == member->index) {
            fellows->own = rank;
        }
    }
    if (fellows->own == count) {
        *detail = (struct shmc_detail){member->token, member->index};
        return SHMC_PEER_LOST;
    }
    return SHMC_OK;
}

enum shmc_status shmc_fellows_reset(struct shmc_member *member)
{
    if (shmc_member_inherited(member)) {
        return SHMC_INHERITED;
    }
    struct shmc_peer_record *record = &member->control.peers[member->index];
    SHMC_STEP(RESET_FAILED);
    shmc_release_store(&record->failed_step, 0);
    SHMC_STEP(RESET_MASK);
    shmc_release_store(&record->mask, 0);
    SHMC_STEP(RESET_WORD);
    shmc_seq_store(&record->step, 0);
    return SHMC_OK;
}

uint64_t shmc_fellows_begin(struct shmc_member *owner)
{
    shmc_atomic_u64 *verdict = &owner->control.header->verdict;
    SHMC_STEP(BEGIN_SEE);
    uint64_t group = (shmc_seq_load(verdict) + SHMC_VERDICT_GROUP) & SHMC_VERDICT_GROUPS;
    SHMC_STEP(BEGIN_VERDICT);
    shmc_seq_store(verdict, group); /* pairs with the loads in shmc_ballot_look */
    return group;
}

static bool is_of(const struct shmc_fellows *fellows, uint64_t verdict)
{
    return (verdict & SHMC_VERDICT_GROUPS) == fellows->group;
}

/* ---- looking at one fellow ----------------------------------------------------------------------------------------- */

static bool is_joined(const struct shmc_peer_record *record, uint32_t incarnation)
{
    /* pairs with the stores in shmc_peer_take_over and shmc_peer_leave: not ready, then the last words are there */
    SHMC_STEP(JOINED_SEE);
    return shmc_acquire_load(&record->ready) == incarnation && shmc_seq_load(&record->incarnation) == incarnation;
}

/* After the words were read: whether they were this fellow's. Who takes the byte over raises the incarnation before it
 * resets the words; who leaves raises it, too, and leaves them. */
static bool were_its_own(const struct shmc_peer_record *record, uint32_t incarnation)
{
    SHMC_STEP(OWN_SEE);
    uint32_t now = shmc_seq_load(&record->incarnation); /* pairs with the addition in raise_incarnation */
    SHMC_STEP(OWN_READY_SEE);
    return now == incarnation || (now == incarnation + 1 && shmc_acquire_load(&record->ready) == 0);
}

bool shmc_fellows_joined(const struct shmc_fellows *fellows, uint32_t rank)
{
    return is_joined(record_of(fellows, rank), fellows->ranks[rank].incarnation);
}

void shmc_fellows_words(const struct shmc_fellows *fellows, uint32_t rank, uint64_t *word, uint64_t *failed_step)
{
    const struct shmc_peer_record *record = record_of(fellows, rank);
    SHMC_STEP(WORDS_STEP_SEE);
    *word = shmc_seq_load(&record->step); /* pairs with the stores in shmc_fellows_record */
    SHMC_STEP(WORDS_FAILED_SEE);
    *failed_step = shmc_acquire_load(&record->failed_step);
    if (!shmc_fellows_joined(fellows, rank)) {
        *word = SHMC_WORD_ABSENT;
        *failed_step = 0;
    }
}

/* ---- recording ------------------------------------------------------------------------------------------------------ */

/* Whether nobody is missing any more who could still come. */
static bool was_the_last(const struct shmc_fellows *fellows, uint64_t word)
{
    for (uint32_t rank = 0; rank < fellows->count; rank++) {
        /* pairs with the store in record_taken: of two ranks that record at once, one sees the other's */
        SHMC_STEP(LAST_SEE);
        if ((shmc_seq_load(&record_of(fellows, rank)->step) & ~SHMC_WORD_ENDED) < word) {
            return false;
        }
    }
    return true;
}

static void record_taken(struct shmc_fellows *fellows, struct shmc_peer_record *record, uint64_t word, uint64_t mask)
{
    if (mask != 0) {
        SHMC_STEP(RECORD_FAILED);
        shmc_release_store(&record->failed_step, word);
    }
    SHMC_STEP(RECORD_MASK);
    shmc_release_store(&record->mask, mask); /* pairs with the load in look_at, as does the next */
    fellows->taken = word;
    SHMC_STEP(RECORD_WORD);
    shmc_seq_store(&record->step, word);
    struct shmc_bell *agreed = &fellows->member->control.header->agreed;
    /* sleepers first: it is cheaper than everybody's words; pairs with the bit set in shmc_bell_wait */
    SHMC_STEP(RECORD_SLEEPERS_SEE);
    if (shmc_seq_load(&agreed->sleepers) != 0 && was_the_last(fellows, word)) {
        shmc_bell_ring(agreed);
    }
}

static void record_end(struct shmc_fellows *fellows, struct shmc_peer_record *record, uint64_t word, uint64_t mask)
{
    uint64_t reached = word & ~SHMC_WORD_ENDED;
    word = SHMC_WORD_ENDED | (reached < fellows->taken ? reached : fellows->taken);
    if (mask != 0) {
        SHMC_STEP(END_FAILED);
        shmc_release_store(&record->failed_step, word); /* the mask itself stays that of the last message */
    }
    SHMC_STEP(END_WORD);
    shmc_seq_store(&record->step, word); /* pairs with the load in look_at */
    /* whoever waits for us in whatever way looks again now, and not when its time is up */
    struct shmc_header *header = fellows->member->control.header;
    shmc_bell_ring(&header->sent);
    shmc_bell_ring(&header->read);
    shmc_bell_ring(&header->agreed);
}

enum shmc_status shmc_fellows_record(struct shmc_fellows *fellows, uint64_t word, uint64_t mask)
{
    if (shmc_member_inherited(fellows->member)) {
        return SHMC_INHERITED;
    }
    SHMC_STEP(RECORD_VERDICT_SEE);
    if (!is_of(fellows, shmc_seq_load(&fellows->member->control.header->verdict))) {
        return SHMC_OK; /* an end of an earlier group, which nobody waits for; the word is the new one's */
    }
    struct shmc_peer_record *record = record_of(fellows, fellows->own);
    if ((word & SHMC_WORD_ENDED) != 0) {
        record_end(fellows, record, word, mask);
    } else if ((word & 1) == 0) {
        record_taken(fellows, record, word, mask);
    } else {
        SHMC_STEP(WAITING_WORD);
        shmc_release_store(&record->step, word); /* pairs with the load in shmc_fellows_words; nobody sleeps for it */
    }
    return SHMC_OK;
}

/* ---- agreeing ------------------------------------------------------------------------------------------------------- */

void shmc_ballot_init(struct shmc_ballot *ballot, const struct shmc_fellows *fellows, uint64_t word)
{
    *ballot = (struct shmc_ballot){.fellows = fellows, .word = word, .state = SHMC_AGREE_PENDING};
}

/* Whether that rank has come as far as `word`, and its mask. ENDED: it never will. */
static enum shmc_agreement look_at(const struct shmc_fellows *fellows, uint32_t rank, uint64_t word, uint64_t *mask)
{
    const struct shmc_peer_record *record = record_of(fellows, rank);
    uint32_t incarnation = fellows->ranks[rank].incarnation;
    bool joined = is_joined(record, incarnation); /* before the word: of who has left this is the last one */
    SHMC_STEP(LOOK_WORD);
    uint64_t found = shmc_seq_load(&record->step); /* pairs with the stores in record_taken and record_end */
    SHMC_STEP(LOOK_MASK);
    *mask = shmc_acquire_load(&record->mask);
    if (!were_its_own(record, incarnation)) {
        return SHMC_AGREE_ENDED;
    }
    if ((found & ~SHMC_WORD_ENDED) >= word) {
        return SHMC_AGREE_REACHED;
    }
    return joined && (found & SHMC_WORD_ENDED) == 0 ? SHMC_AGREE_PENDING : SHMC_AGREE_ENDED;
}

bool shmc_fellows_has(const struct shmc_fellows *fellows, uint32_t rank, uint64_t word)
{
    uint64_t mask;
    return look_at(fellows, rank, word, &mask) == SHMC_AGREE_REACHED;
}

/* Everybody's words and masks. A rank that is missing must not hide one that will never come. */
static enum shmc_agreement count_ballot(struct shmc_ballot *ballot)
{
    enum shmc_agreement state = SHMC_AGREE_REACHED;
    ballot->parts = ballot->ranks = 0;
    for (uint32_t rank = 0; rank < ballot->fellows->count; rank++) {
        uint64_t mask;
        enum shmc_agreement found = look_at(ballot->fellows, rank, ballot->word, &mask);
        if (found == SHMC_AGREE_ENDED) {
            return found;
        }
        if (found == SHMC_AGREE_PENDING) {
            state = found;
        } else if (mask != 0) {
            ballot->parts |= mask;
            ballot->ranks |= UINT64_C(1) << rank;
        }
    }
    return state;
}

/* What somebody has found before us. */
static enum shmc_agreement read_verdict(struct shmc_ballot *ballot, uint64_t verdict)
{
    const struct shmc_control *control = &ballot->fellows->member->control;
    uint64_t word = SHMC_VERDICT_WORD(verdict);
    if (!is_of(ballot->fellows, verdict)) {
        return SHMC_AGREE_BROKEN; /* what ours has agreed on is gone; who was late for it has been given up */
    }
    if (word < ballot->word) {
        return (verdict & SHMC_VERDICT_BROKEN) != 0 ? SHMC_AGREE_BROKEN : SHMC_AGREE_PENDING;
    }
    if (word > ballot->word) {
        ballot->later = word;
        return SHMC_AGREE_LATER;
    }
    const struct shmc_peer_record *finder = &control->peers[SHMC_VERDICT_PEER(verdict)]; /* there is room for 32 */
    SHMC_STEP(VERDICT_PARTS_SEE);
    ballot->parts = shmc_acquire_load(&finder->decided_parts); /* pair with the stores in decide */
    SHMC_STEP(VERDICT_RANKS_SEE);
    ballot->ranks = shmc_acquire_load(&finder->decided_ranks);
    return SHMC_AGREE_REACHED;
}

/* All have come: say so, unless the verdict has changed since `before` was read. */
static bool decide(struct shmc_ballot *ballot, uint64_t before)
{
    struct shmc_control *control = &ballot->fellows->member->control;
    unsigned p = ballot->fellows->member->index;
    /* pair with the loads in read_verdict */
    SHMC_STEP(DECIDE_PARTS);
    shmc_release_store(&control->peers[p].decided_parts, ballot->parts);
    SHMC_STEP(DECIDE_RANKS);
    shmc_release_store(&control->peers[p].decided_ranks, ballot->ranks);
    /* pairs with the loads in shmc_ballot_look and shmc_fellows_give_up */
    SHMC_STEP(DECIDE_VERDICT);
    if (!shmc_seq_cas(&control->header->verdict, &before, SHMC_VERDICT(before, ballot->word, p))) {
        return false;
    }
    shmc_bell_ring(&control->header->agreed);
    return true;
}

enum shmc_agreement shmc_ballot_look(struct shmc_ballot *ballot)
{
    shmc_atomic_u64 *verdict = &ballot->fellows->member->control.header->verdict;
    ballot->state = SHMC_AGREE_PENDING;
    /* Honest fellows change a pending verdict twice at most; who changes it for ever must not keep us from our clock. */
    for (unsigned looks = 0; looks < LOOKS_MAX; looks++) {
        SHMC_STEP(VERDICT_SEE);
        uint64_t before = shmc_seq_load(verdict); /* before the words: pairs with the compare-and-swaps */
        ballot->state = read_verdict(ballot, before);
        if (ballot->state != SHMC_AGREE_PENDING) {
            break;
        }
        ballot->state = count_ballot(ballot);
        if (ballot->state != SHMC_AGREE_REACHED || decide(ballot, before)) {
            break;
        }
        ballot->state = SHMC_AGREE_PENDING;
    }
    return ballot->state;
}

bool shmc_fellows_give_up(const struct shmc_fellows *fellows, uint64_t word)
{
    struct shmc_header *header = fellows->member->control.header;
    SHMC_STEP(GIVE_UP_SEE);
    uint64_t verdict = shmc_seq_load(&header->verdict);
    do {
        if (!is_of(fellows, verdict)) {
            return true; /* long since, and it is not for us to break another group */
        }
        if (SHMC_VERDICT_WORD(verdict) >= word) {
            return false;
        }
        if ((verdict & SHMC_VERDICT_BROKEN) != 0) {
            return true;
        }
        /* pairs with the loads in shmc_ballot_look */
        SHMC_STEP(GIVE_UP);
    } while (!shmc_seq_cas(&header->verdict, &verdict, verdict | SHMC_VERDICT_BROKEN));
    shmc_bell_ring(&header->agreed);
    return true;
}

bool shmc_fellows_given_up(const struct shmc_fellows *fellows)
{
    /* pairs with the exchange in shmc_fellows_give_up */
    SHMC_STEP(GIVEN_UP_SEE);
    uint64_t verdict = shmc_seq_load(&fellows->member->control.header->verdict);
    return (verdict & SHMC_VERDICT_BROKEN) != 0 || !is_of(fellows, verdict);
}

static bool is_decided(void *of)
{
    return shmc_ballot_look(of) != SHMC_AGREE_PENDING;
}

enum shmc_agreement shmc_ballot_wait(struct shmc_ballot *ballot, uint64_t deadline_ns, bool *interrupted)
{
    const struct shmc_fellows *fellows = ballot->fellows;
    struct shmc_member *member = fellows->member;
    enum shmc_waited waited;
    do {
        waited = shmc_bell_wait(&member->control.header->agreed, member->index, is_decided, ballot, deadline_ns,
                                fellows->spin_ns);
    } while (waited ==
             SHMC_WAIT_RUNG); /* for nothing: it tells of another message, or of who has ended after this one */
    *interrupted = waited == SHMC_WAIT_SIGNAL;
    return ballot->state;
}
