#include "steps.h"

#ifdef SHMCAST_FAULTS

#include <errno.h>
#include <signal.h>
#include <unistd.h>

#include "atomics.h"

static shmc_atomic_u32 *board;
static uint32_t board_words;

void shmc_steps_watch(uint32_t *words, uint32_t count)
{
    board = (shmc_atomic_u32 *)words;
    board_words = count;
}

void shmc_step_reached(enum shmc_step step)
{
    if (board == NULL) {
        return;
    }
    shmc_relaxed_store(&board[SHMC_BOARD_LAST], (uint32_t)step);
    uint32_t at = SHMC_BOARD_TRACE + shmc_seq_add(&board[SHMC_BOARD_COUNT], 1);
    if (at < board_words) {
        shmc_relaxed_store(&board[at], (uint32_t)step);
    }
    /* pairs with who arms it from another process: the other words are there once this one is */
    if (shmc_acquire_load(&board[SHMC_BOARD_STEP]) == (uint32_t)step &&
        shmc_seq_add(&board[SHMC_BOARD_LEFT], -1u) == 1) {
        int saved = errno;
        kill(getpid(), (int)shmc_relaxed_load(&board[SHMC_BOARD_SIGNAL]));
        errno = saved;
    }
}

#endif
