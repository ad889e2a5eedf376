#include "cpu.h"

#include <stdio.h>
#include <unistd.h>

#if defined(__x86_64__)
/* the compiler's run-time library asks cpuid and xgetbv */
bool shmc_cpu_has_avx2(void)
{
    return __builtin_cpu_supports("avx2");
}

bool shmc_cpu_has_avx512f(void)
{
    return __builtin_cpu_supports("avx512f");
}
#else
bool shmc_cpu_has_avx2(void)
{
    return false;
}

bool shmc_cpu_has_avx512f(void)
{
    return false;
}
#endif

/* One level as the kernel reports it, such as "32768K". */
static size_t cache_bytes_of_index(int index)
{
    char path[64], unit = 0;
    unsigned long size = 0;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
    FILE *file = fopen(path, "re");
    if (!file)
        return 0;
    int fields = fscanf(file, "%8lu%c", &size, &unit);
    fclose(file);
    if (fields < 1)
        return 0;
    return unit == 'K' ? (size_t)size << 10 : unit == 'M' ? (size_t)size << 20 : (size_t)size;
}

size_t shmc_cpu_cache_bytes(void)
{
    size_t largest = 0;
    for (int index = 0; index < 8; index++) {
        size_t bytes = cache_bytes_of_index(index);
        if (bytes > largest)
            largest = bytes;
    }
#if defined(_SC_LEVEL3_CACHE_SIZE)
    if (largest == 0) { /* no sysfs, as in some sandboxes */
        long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
        largest = bytes > 0 ? (size_t)bytes : 0;
    }
#endif
    return largest;
}
