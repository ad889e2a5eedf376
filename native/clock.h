/* clock.h: time that only goes forward. */
#ifndef SHMC_CLOCK_H
#define SHMC_CLOCK_H

#include <stdint.h>

uint64_t shmc_clock_ns(void); /* CLOCK_MONOTONIC */

/* `timeout_ns` from now; UINT64_MAX where that is out of range. */
uint64_t shmc_clock_deadline(uint64_t timeout_ns);

#endif
