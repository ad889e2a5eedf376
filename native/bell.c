#include "bell.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "steps.h"

/* Two ranks in lockstep on two cores: 1 µs a step, where sleeping at once takes 10 to 90 (a virtual core that idles is slow
 * to wake); 4 µs is too short to meet the answer half of the time. With more ranks than cores looking only takes time from
 * who is waited for. Yielding in between is faster still as long as nobody else wants the core, but then costs a time
 * slice, 4 ms, and a rank that materializes in the background always wants it. */
enum { SPIN_NS = 8000, LOOKS_A_CLOCK = 16 };

uint64_t shmc_bell_spin_ns(unsigned processes)
{
    cpu_set_t set;
    /* where the set can not be had (more processors than it has room for) there are enough */
    bool enough = sched_getaffinity(0, sizeof set, &set) != 0 || (unsigned)CPU_COUNT(&set) >= processes;
    return enough ? SPIN_NS : 0;
}

static void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__("isb" ::: "memory");
#endif
}

static bool spin(shmc_condition met, void *of, uint64_t spin_ns)
{
    uint64_t end = shmc_clock_ns() + spin_ns;
    do {
        for (unsigned i = 0; i < LOOKS_A_CLOCK; i++) {
            if (met(of)) {
                return true;
            }
            pause_briefly();
        }
    } while (shmc_clock_ns() < end);
    return false;
}

static enum shmc_waited sleep_once(struct shmc_bell *bell, uint32_t rung, uint64_t deadline_ns)
{
    uint64_t now = shmc_clock_ns();
    if (now >= deadline_ns) {
        return SHMC_WAIT_TIMEOUT;
    }
    uint64_t left = deadline_ns - now;
    struct timespec timeout = {.tv_sec = (time_t)(left / 1000000000u), .tv_nsec = (long)(left % 1000000000u)};
    SHMC_STEP(BELL_SLEEP);
    if (syscall(SYS_futex, &bell->rung, FUTEX_WAIT, rung, &timeout, NULL, 0) == 0 || errno == EAGAIN) {
        return SHMC_WAIT_RUNG;
    }
    return errno == EINTR ? SHMC_WAIT_SIGNAL : SHMC_WAIT_TIMEOUT;
}

enum shmc_waited shmc_bell_wait(struct shmc_bell *bell, unsigned p, shmc_condition met, void *of, uint64_t deadline_ns,
                                uint64_t spin_ns)
{
    if (spin_ns != 0 && spin(met, of, spin_ns)) {
        return SHMC_WAIT_MET;
    }
    /* The number before the bit: who takes the bit away for a condition that is not ours raises the number afterwards, and
     * then we must not sleep, for the next to ring would find no bit. Pairs with the addition in shmc_bell_ring. */
    SHMC_STEP(BELL_RUNG_SEE);
    uint32_t rung = shmc_seq_load(&bell->rung);
    /* pairs with the exchange in shmc_bell_ring: it finds the bit, or we find what was made true before it */
    SHMC_STEP(BELL_SLEEPER);
    shmc_seq_or(&bell->sleepers, UINT32_C(1) << p);
    bool done = met(of);
    enum shmc_waited waited = done ? SHMC_WAIT_MET : sleep_once(bell, rung, deadline_ns);
    /* Or the next ring would cost a system call for nobody. */
    shmc_bell_forget(bell, p);
    return done || met(of) ? SHMC_WAIT_MET : waited;
}

void shmc_bell_ring(struct shmc_bell *bell)
{
    /* pairs with the bit set in shmc_bell_wait; the load alone would do, the exchange keeps the next ring from a call */
    SHMC_STEP(BELL_TAKE);
    if (shmc_seq_load(&bell->sleepers) != 0 && shmc_seq_exchange(&bell->sleepers, 0) != 0) {
        SHMC_STEP(BELL_RUNG);
        shmc_seq_add(&bell->rung, 1); /* pairs with the load in shmc_bell_wait: who read it before does not sleep */
        SHMC_STEP(BELL_WAKE);
        syscall(SYS_futex, &bell->rung, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}

void shmc_bell_forget(struct shmc_bell *bell, unsigned p)
{
    SHMC_STEP(BELL_FORGET_SEE);
    if ((shmc_seq_load(&bell->sleepers) & (UINT32_C(1) << p)) != 0) {
        SHMC_STEP(BELL_FORGET);
        shmc_seq_and(&bell->sleepers, ~(UINT32_C(1) << p)); /* only ever one bit: others keep theirs */
    }
}
