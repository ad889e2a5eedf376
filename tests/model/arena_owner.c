/* What the owner does: create, grow, give back, end. One thread at a time, as growth.Segments.lock has it. */
#include "arena.h"

static const uint8_t create_law[] = {CREATE_RESERVE, CREATE_HEADER, CREATE_ANCHOR, CREATE_READY, CREATE_CLOSE, IDLE};
static const uint8_t magic_first[] = {CREATE_RESERVE, CREATE_READY, CREATE_HEADER, CREATE_ANCHOR, CREATE_CLOSE, IDLE};
static const uint8_t not_anchored[] = {CREATE_RESERVE, CREATE_HEADER, CREATE_READY, CREATE_CLOSE, IDLE};
static const uint8_t grow_law[] = {GROW_CREATE, GROW_RESERVE, GROW_SIZE, GROW_MARK, GROW_NUMBER, IDLE};
static const uint8_t known_first[] = {GROW_CREATE, GROW_SIZE, GROW_MARK, GROW_NUMBER, GROW_RESERVE, IDLE};
static const uint8_t number_size[] = {GROW_CREATE, GROW_RESERVE, GROW_NUMBER, GROW_SIZE, GROW_MARK, IDLE};
static const uint8_t retire_law[] = {RETIRE_MARK, RETIRE_PUNCH, RETIRE_NUMBER, RETIRE_UNLINK, IDLE};
static const uint8_t only_looks[] = {RETIRE_LOOK, RETIRE_PUNCH, RETIRE_NUMBER, RETIRE_UNLINK, IDLE};
static const uint8_t no_punch[] = {RETIRE_MARK, RETIRE_NUMBER, RETIRE_UNLINK, IDLE};
static const uint8_t unlink_first[] = {RETIRE_MARK, RETIRE_PUNCH, RETIRE_UNLINK, RETIRE_NUMBER, IDLE};
static const uint8_t end_law[] = {END_STATE, END_DATA, END_CONTROL, END_EXIT};
static const uint8_t end_state_last[] = {END_DATA, END_CONTROL, END_STATE, END_EXIT};
static const uint8_t end_control_first[] = {END_STATE, END_CONTROL, END_DATA, END_EXIT};

static const uint8_t *order_of(unsigned step)
{
    unsigned bug = arena_world.bug;
    if (step < GROW_CREATE)
        return bug == MAGIC_FIRST ? magic_first : bug == LOCK_NOT_ANCHORED ? not_anchored : create_law;
    if (step < RETIRE_MARK)
        return bug == KNOWN_BEFORE_RESERVED ? known_first : bug == NUMBER_BEFORE_SIZE ? number_size : grow_law;
    if (step < PUBLISH)
        return bug == RETIRE_ONLY_LOOKS      ? only_looks
               : bug == RETIRE_WITHOUT_PUNCH ? no_punch
               : bug == RETIRE_UNLINKS_FIRST ? unlink_first
                                             : retire_law;
    return bug == END_UNLINKS_FIRST ? end_state_last : bug == END_CONTROL_FIRST ? end_control_first : end_law;
}

static void go_on(struct state *st, unsigned done)
{
    const uint8_t *order = order_of(done);
    while (*order != done)
        order++;
    st->next = order[1];
    if (st->next == IDLE)
        st->cur_place = st->cur_number = st->cur_file = 0;
}

/* ---- create ----------------------------------------------------------------------------------------------------- */

/* In the arena that is built every attempt has a name of its own, drawn at random. Here it is the same one again, when
 * it is free: nothing but the orphans of SWEEP_ORPHAN leans on names that never come again. */
bool owner_create(struct state *st, struct explore_edge *edge)
{
    if (st->control_name != NO_FILE || st->attempts == CONTROLS)
        return false;
    edge->action = CREATE_OPEN;
    st->control = st->control_name = st->attempts++;
    st->next = CREATE_OPEN_LOCK;
    return true;
}

/* The first steps: until the lock is ours and the name is still ours, a sweeper may take it all for a dead owner's. */
static void claim_step(struct state *st, unsigned step)
{
    bool current = st->control_name == st->control;
    switch (step) {
    case CREATE_OPEN_LOCK:
        st->next = current ? CREATE_LOCK : CREATE_GIVE_UP;
        break;
    case CREATE_LOCK:
        st->next = st->lock[st->control] == NOBODY ? CREATE_CURRENT : CREATE_GIVE_UP;
        if (st->next == CREATE_CURRENT)
            st->lock[st->control] = OWNER;
        break;
    case CREATE_CURRENT:
        st->owns = current || arena_world.bug == CREATE_CURRENT_UNCHECKED;
        st->next = st->owns ? CREATE_RESERVE : CREATE_GIVE_UP;
        break;
    default: /* CREATE_GIVE_UP */
        lock_drop(st, st->control, OWNER);
        st->next = IDLE;
        st->control = 0;
    }
}

static void create_step(struct state *st, struct explore_edge *edge)
{
    unsigned step = st->next;
    switch (step) {
    case CREATE_RESERVE:
        break;
    case CREATE_UNLINK:
        name_unlink(st, OWNER, 0, edge);
        st->next = END_EXIT;
        return;
    case CREATE_HEADER:
        st->header = st->control;
        break;
    case CREATE_ANCHOR:
        st->anchored = 1;
        break;
    case CREATE_READY:
        st->ready = st->control;
        break;
    case CREATE_CLOSE:
        if (!st->anchored)
            lock_drop(st, st->control, OWNER);
        break;
    default:
        claim_step(st, step);
        return;
    }
    go_on(st, step);
}

/* ---- grow ------------------------------------------------------------------------------------------------------- */

static unsigned live_segments(const struct state *st)
{
    unsigned live = 0;
    for (unsigned place = 0; place < PLACES; place++)
        live += st->file_at[place] != 0;
    return live;
}

static unsigned next_number(const struct state *st)
{
    for (unsigned number = 1; number <= FILES && arena_world.bug == NUMBER_REUSED; number++)
        if (st->data_name[number - 1] == NO_FILE)
            return number;
    return st->last + 1u;
}

bool owner_grow(struct state *st, struct explore_edge *edge)
{
    const struct config *config = arena_world.config;
    unsigned place = 0;
    while (place < PLACES && st->file_at[place])
        place++;
    unsigned room = config->max + (arena_world.bug == GROW_BEFORE_RETIRE);
    if (place == PLACES || live_segments(st) >= room || st->files == config->files)
        return false;
    edge->action = GROW_CREATE;
    st->cur_place = (uint8_t)place;
    st->cur_number = (uint8_t)next_number(st);
    if (st->last < st->cur_number)
        st->last = st->cur_number;
    st->cur_file = st->files++;
    st->data_name[st->cur_number - 1] = st->cur_file;
    go_on(st, GROW_CREATE);
    return true;
}

static void grow_step(struct state *st, struct explore_edge *edge)
{
    unsigned step = st->next, place = st->cur_place;
    switch (step) {
    case GROW_RESERVE:
        st->pages[st->cur_file] = RESERVED;
        break;
    case GROW_UNDO:
        name_unlink(st, OWNER, st->cur_number, edge);
        st->next = live_segments(st) ? IDLE : END_STATE; /* an arena without any is no arena */
        st->cur_place = st->cur_number = st->cur_file = 0;
        return;
    case GROW_SIZE:
        st->size[place] = st->cur_number;
        break;
    case GROW_MARK:
        st->mark[place] = 0;
        break;
    case GROW_NUMBER:
        st->number[place] = st->cur_number;
        st->file_at[place] = (uint8_t)(st->cur_file + 1);
        st->number_at[place] = st->cur_number;
        break;
    }
    go_on(st, step);
}

/* ---- give back -------------------------------------------------------------------------------------------------- */

bool owner_retire(struct state *st, unsigned place, struct explore_edge *edge)
{
    bool in_use = st->used == place + 1 && arena_world.bug != RETIRE_IN_USE;
    bool marked = st->mark[place] && arena_world.bug != RETIRE_IGNORES_MARKS;
    if (!st->file_at[place] || in_use || marked)
        return false;
    st->cur_place = (uint8_t)place;
    st->cur_number = st->number_at[place];
    st->cur_file = (uint8_t)(st->file_at[place] - 1);
    edge->action = arena_world.bug == RETIRE_ONLY_LOOKS ? RETIRE_LOOK : RETIRE_MARK;
    if (edge->action == RETIRE_MARK)
        st->mark[place] |= RETIRED;
    go_on(st, edge->action);
    return true;
}

static const char *punched_too_early(const struct state *st, unsigned file)
{
    if (st->reader.pinned == file + 1)
        return "A8: a segment is punched that a live reader has pinned";
    if (st->word & HOLD && is_alive(st, READER) && (st->origin[st->gen - 1] & 15u) == file)
        return "A4: a segment is punched in which a live reader holds a block";
    return NULL;
}

static void retire_step(struct state *st, struct explore_edge *edge)
{
    unsigned step = st->next, place = st->cur_place;
    switch (step) {
    case RETIRE_PUNCH:
        edge->broken = punched_too_early(st, st->cur_file);
        st->pages[st->cur_file] |= PUNCHED;
        break;
    case RETIRE_NUMBER:
        st->number[place] = 0;
        st->file_at[place] = st->number_at[place] = 0;
        break;
    case RETIRE_UNLINK:
        name_unlink(st, OWNER, st->cur_number, edge);
        break;
    }
    go_on(st, step);
}

/* ---- the slot, as far as it matters here ------------------------------------------------------------------------ */

bool owner_publish(struct state *st, unsigned place, struct explore_edge *edge)
{
    if (st->used || !st->file_at[place] || st->published == arena_world.config->publishes)
        return false;
    unsigned file = st->file_at[place] - 1u;
    edge->action = PUBLISH;
    st->gen = ++st->published;
    st->content[file] = st->gen;
    st->origin[st->gen - 1] = (uint8_t)(file | (unsigned)st->number_at[place] << 4);
    st->word = GRANT;
    st->used = (uint8_t)(place + 1);
    st->reader.handle = is_alive(st, READER) ? st->gen : 0; /* one that is still on its way is lost */
    return true;
}

bool owner_revoke(struct state *st, struct explore_edge *edge)
{
    edge->action = REVOKE;
    if (!(st->word & GRANT) || st->word & HOLD)
        return false;
    st->word &= (uint8_t)~GRANT;
    return true;
}

bool owner_reclaim(struct state *st, struct explore_edge *edge)
{
    edge->action = RECLAIM;
    if (!st->used || st->word)
        return false;
    st->used = 0;
    return true;
}

/* ---- end -------------------------------------------------------------------------------------------------------- */

bool owner_end(struct state *st, struct explore_edge *edge)
{
    st->next = *order_of(END_STATE);
    st->cur_number = st->last;
    owner_step(st, edge);
    return true;
}

static void end_step(struct state *st, struct explore_edge *edge)
{
    unsigned step = st->next;
    switch (step) {
    case END_STATE:
        st->ended = 1;
        st->cur_number = st->last;
        break;
    case END_DATA:
        if (st->cur_number)
            name_unlink(st, OWNER, st->cur_number--, edge);
        if (st->cur_number)
            return;
        break;
    case END_CONTROL:
        name_unlink(st, OWNER, 0, edge);
        break;
    default: /* END_EXIT */
        process_die(st, OWNER);
        return;
    }
    go_on(st, step);
}

void owner_step(struct state *st, struct explore_edge *edge)
{
    unsigned step = st->next;
    edge->action = (uint8_t)step;
    if (step < GROW_CREATE)
        create_step(st, edge);
    else if (step < RETIRE_MARK)
        grow_step(st, edge);
    else if (step < PUBLISH)
        retire_step(st, edge);
    else if (step < END_STATE)
        scrub_step(st, OWNER, edge);
    else
        end_step(st, edge);
}
