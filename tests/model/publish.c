/* What only the owner does: publish, revoke, drop an empty T. The owner is one thread. */
#include "protocol.h"

/* Who is granted by name, how many anonymous readers there are, who is sent the anonymous handle. Masks of
 * processes. */
static const struct offer {
    unsigned granted, anonymous, receivers;
    bool alias;
} offers[PUBLICATIONS] = {
    [GRANT_A] = {.granted = 1u << READER_A},
    [GRANT_B] = {.granted = 1u << READER_B},
    [GRANT_AB] = {.granted = 1u << READER_A | 1u << READER_B},
    [GRANT_N] = {.granted = 1u << NEWCOMER},
    [ANON1_A] = {.anonymous = 1, .receivers = 1u << READER_A},
    [ANON1_AB] = {.anonymous = 1, .receivers = 1u << READER_A | 1u << READER_B},
    [ANON2_AB] = {.anonymous = 2, .receivers = 1u << READER_A | 1u << READER_B},
    [ANON1_N] = {.anonymous = 1, .receivers = 1u << NEWCOMER},
    [ANON2_AN] = {.anonymous = 2, .receivers = 1u << READER_A | 1u << NEWCOMER},
    [ANON2_OA] = {.anonymous = 2, .receivers = 1u << OWNER | 1u << READER_A},
    [ALIAS_A] = {.granted = 1u << READER_A, .alias = true},
    [ALIAS_B] = {.granted = 1u << READER_B, .alias = true},
};

/* Registers of a publication: msg = gen and slot; flags = which; target = process granted on byte 1 | on byte 2 << 2
 * | block << 4 (0: nobody on that byte); inc = what was read of byte 1 | of byte 2 << 4. */
static unsigned granted_on(const struct proc *own, unsigned byte)
{
    return own->target >> 2 * (byte - 1) & 3u;
}

static void drop_target(struct proc *own, unsigned byte)
{
    own->target &= (uint8_t)~(3u << 2 * (byte - 1));
}

/* The steps in their order; RECHECK is followed by CLEAR only where the incarnation has changed. */
static const uint8_t law[] = {PUB_PAYLOAD, PUB_INC_1,    PUB_TOKEN_1,   PUB_INC_2,     PUB_TOKEN_2, PUB_TOOK,
                              PUB_GEN,     PUB_EXCHANGE, PUB_RECHECK_1, PUB_RECHECK_2, IDLE};
static const uint8_t recheck_first[] = {PUB_PAYLOAD, PUB_INC_1,     PUB_TOKEN_1,   PUB_INC_2,    PUB_TOKEN_2, PUB_TOOK,
                                        PUB_GEN,     PUB_RECHECK_1, PUB_RECHECK_2, PUB_EXCHANGE, IDLE};
static const uint8_t exchange_first[] = {PUB_INC_1,     PUB_TOKEN_1,   PUB_INC_2, PUB_TOKEN_2,
                                         PUB_EXCHANGE,  PUB_PAYLOAD,   PUB_GEN,   PUB_TOOK,
                                         PUB_RECHECK_1, PUB_RECHECK_2, IDLE};

static bool is_needed(const struct proc *own, unsigned step)
{
    switch (step) {
    case PUB_PAYLOAD:
        return !offers[own->flags].alias;
    case PUB_INC_1:
    case PUB_TOKEN_1:
        return granted_on(own, 1);
    case PUB_INC_2:
    case PUB_TOKEN_2:
        return granted_on(own, 2);
    case PUB_RECHECK_1:
        return granted_on(own, 1) && world.bug != NO_PUBLISH_RECHECK;
    case PUB_RECHECK_2:
        return granted_on(own, 2) && world.bug != NO_PUBLISH_RECHECK;
    default:
        return true;
    }
}

/* The handle leaves, to whoever is still a target. Who has left since it was looked at again, perhaps to come back as
 * somebody new, is promised nothing: its scrub has ended the grant, or is about to. */
static void send_all(struct state *st, const struct proc *own)
{
    const struct offer *offer = &offers[own->flags];
    unsigned slot = msg_slot(own->msg), gen = msg_gen(own->msg);
    for (unsigned byte = 1; byte < BYTES; byte++) {
        unsigned p = granted_on(own, byte);
        if (p)
            message_send(st, slot, gen, p, is_peer(st, p, byte) && grantee_of(st, slot, byte) == p ? PROMISED : LATE);
    }
    for (unsigned p = 0; p < PROCS; p++)
        if (offer->receivers & 1u << p)
            message_send(st, slot, gen, p, st->taken[slot] >= 0x10 ? OF_ANON : LATE);
}

static void go_on(struct state *st, unsigned done)
{
    struct proc *own = &st->proc[OWNER];
    const uint8_t *order = world.bug == GRANT_AFTER_RECHECK   ? recheck_first
                           : world.bug == EXCHANGE_BEFORE_GEN ? exchange_first
                                                              : law;
    if (done != PUB_SCAN) { /* the scan comes before the first of the order */
        while (*order != done)
            order++;
        order++;
    }
    while (!is_needed(own, *order))
        order++;
    own->next = *order;
    if (own->next != IDLE)
        return;
    send_all(st, own);
    own->msg = own->target = own->inc = own->flags = 0;
}

/* The byte where p is a peer as far as others know, or NO_BYTE. A dead one stays known until its byte is taken. */
unsigned known_byte(const struct state *st, unsigned p)
{
    if (has_joined(st, p))
        return st->proc[p].byte;
    for (unsigned byte = 1; byte < BYTES; byte++)
        if (st->token[byte] == p)
            return byte;
    return NO_BYTE;
}

/* Finds the slot free by one look at its word. An alias goes to a block that the other slot names; anything else to a
 * block that no other slot names, or one that names it without claims. */
bool publish_begin(struct state *st, unsigned slot, unsigned publication, unsigned block, struct explore_edge *edge)
{
    const struct offer *offer = &offers[publication];
    struct proc *own = &st->proc[OWNER];
    unsigned looked_at = world.bug == TWO_WORDS ? ALL_HOLDS : CLAIMS;
    bool shared = st->block[1 - slot] == block;
    if (st->word[slot] & looked_at || (offer->alias && !shared))
        return false;
    unsigned target = block << 4;
    for (unsigned p = READER_A; p <= NEWCOMER; p++) {
        unsigned byte = offer->granted & 1u << p ? known_byte(st, p) : NO_BYTE;
        if (byte < BYTES)
            target |= p << 2 * (byte - 1);
    }
    own->target = (uint8_t)target;
    own->flags = (uint8_t)publication;
    own->msg = MSG(st->seq + 1u, slot, OWNER, LATE);
    edge->action = PUB_SCAN;
    edge->slot = (uint8_t)slot;
    if (world.bug == TWO_WORDS)
        own->next = PUB_SCAN_REST;
    else if (shared && !offer->alias)
        own->next = PUB_SCAN_BLOCK;
    else
        go_on(st, PUB_SCAN);
    return true;
}

static void give_up(struct proc *own)
{
    own->next = own->msg = own->target = own->flags = 0;
}

static void write_gen(struct state *st, unsigned slot, unsigned gen, unsigned block, struct explore_edge *edge)
{
    const struct proc *own = &st->proc[OWNER];
    unsigned content = offers[own->flags].alias ? st->origin[st->gen[1 - slot] - 1] & 7u : gen;
    if (!edge->broken && world.bug != EXCHANGE_BEFORE_GEN)
        edge->broken = reuse_of_slot(st, slot);
    st->gen[slot] = (uint8_t)gen;
    st->seq = (uint8_t)gen;
    st->block[slot] = (uint8_t)block;
    st->origin[gen - 1] = (uint8_t)(content | block << 4);
}

static void exchange(struct state *st, unsigned slot, unsigned gen, struct explore_edge *edge)
{
    struct proc *own = &st->proc[OWNER];
    unsigned word = HOLD(0) | (offers[own->flags].anonymous ? ANON : 0);
    if (st->word[slot] & CLAIMS && !edge->broken)
        edge->broken = "G2: the exchange overwrites claims";
    for (unsigned byte = 1; byte < BYTES; byte++) {
        grantee_set(st, slot, byte, granted_on(own, byte));
        if (granted_on(own, byte))
            word |= GRANT(byte);
    }
    st->word[slot] = (uint8_t)word;
    own->lease[slot] = (uint8_t)(gen | 1u << 4);
}

/* The second looks of a scan: any claim found there, and the owner leaves the slot alone. */
static void scan_step(struct state *st, unsigned slot)
{
    struct proc *own = &st->proc[OWNER];
    bool other = own->next == PUB_SCAN_BLOCK;
    if (st->word[other ? 1 - slot : slot] & (other ? CLAIMS : CLAIMS & ~ALL_HOLDS)) {
        give_up(own);
        return;
    }
    if (other)
        st->block[1 - slot] = NO_BLOCK;
    go_on(st, PUB_SCAN);
}

static bool is_of_byte_1(unsigned step)
{
    return step == PUB_INC_1 || step == PUB_TOKEN_1 || step == PUB_RECHECK_1 || step == PUB_CLEAR_1;
}

/* Reads of a target's incarnation and token, before and after the exchange. */
static void target_step(struct state *st, unsigned slot, unsigned byte)
{
    struct proc *own = &st->proc[OWNER];
    unsigned step = own->next, shift = 4 * (byte - 1);
    bool changed = (own->inc >> shift & 15u) != st->inc[byte];
    switch (step) {
    case PUB_INC_1:
    case PUB_INC_2:
        own->inc |= (uint8_t)(st->inc[byte] << shift);
        break;
    case PUB_TOKEN_1:
    case PUB_TOKEN_2:
        if (st->token[byte] != granted_on(own, byte))
            drop_target(own, byte);
        break;
    case PUB_RECHECK_1:
    case PUB_RECHECK_2:
        if (changed && world.bug != GRANT_AFTER_RECHECK) {
            own->next = byte == 1 ? PUB_CLEAR_1 : PUB_CLEAR_2;
            return;
        }
        if (changed)
            drop_target(own, byte);
        break;
    default: /* PUB_CLEAR: clearing is safe, since nobody else can grant before the handle has left */
        word_clear(st, slot, GRANT(byte));
        drop_target(own, byte);
        step = byte == 1 ? PUB_RECHECK_1 : PUB_RECHECK_2;
    }
    go_on(st, step);
}

void publish_step(struct state *st, struct explore_edge *edge)
{
    struct proc *own = &st->proc[OWNER];
    unsigned slot = msg_slot(own->msg), gen = msg_gen(own->msg), block = own->target >> 4, step = own->next;
    edge->slot = (uint8_t)slot;
    switch (step) {
    case PUB_SCAN_REST:
    case PUB_SCAN_BLOCK:
        scan_step(st, slot);
        return;
    case PUB_PAYLOAD:
        if (world.bug != EXCHANGE_BEFORE_GEN)
            edge->broken = reuse_of_block(st, block);
        st->payload[block] = (uint8_t)gen;
        break;
    case PUB_GEN:
        write_gen(st, slot, gen, block, edge);
        break;
    case PUB_TOOK:
        st->took[slot] = st->taken[slot] = (uint8_t)(offers[own->flags].anonymous << 4);
        break;
    case PUB_EXCHANGE:
        exchange(st, slot, gen, edge);
        break;
    case EMPTY_DROP:
        word_clear(st, slot, ANON);
        give_up(own);
        return;
    default:
        target_step(st, slot, is_of_byte_1(step) ? 1 : 2);
        return;
    }
    go_on(st, step);
}

/* The deadline has passed and space is needed: one CAS. A grant whose peer has its hold set stays: taking it would
 * free nothing while that peer holds, and the peer may be about to consume it. Were it taken away just then and set
 * anew by a pass-on, the peer would consume the new one. */
bool revoke(struct state *st, unsigned slot, struct explore_edge *edge)
{
    unsigned word = st->word[slot], ends = word & (ANON | TRUST);
    for (unsigned byte = 1; byte < BYTES; byte++)
        if (!(word & HOLD(byte)) || world.bug == REVOKE_TAKES_CLAIMED)
            ends |= word & GRANT(byte);
    if (!ends)
        return false;
    edge->slot = (uint8_t)slot;
    if (word & TOUCHED && world.bug != X_IGNORED) {
        edge->action = REVOKE_RESTART;
        word_clear(st, slot, TOUCHED);
        promises_restart(st, slot);
        return true;
    }
    edge->action = REVOKE;
    edge->broken = promises_revoke(st, slot);
    word_clear(st, slot, ends | (world.bug == REVOKE_TAKES_HOLDS ? ALL_HOLDS & ~HOLD(0) : 0));
    return true;
}

/* Who marked took as the last one died before it cleared T, or has not come to it yet. Reading took needs no pin
 * here: only the owner writes it anew. */
bool empty_begin(struct state *st, unsigned slot, struct explore_edge *edge)
{
    struct proc *own = &st->proc[OWNER];
    if (!(st->word[slot] & ANON) || st->took[slot] >= 0x10)
        return false;
    own->msg = MSG(st->gen[slot], slot, OWNER, LATE);
    own->next = EMPTY_DROP;
    edge->action = EMPTY_SEEN;
    edge->slot = (uint8_t)slot;
    return true;
}
