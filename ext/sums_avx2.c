/* The kernel for CPUs with AVX2: the library's own code, compiled for them. */
#if defined(__x86_64__)
#pragma GCC target("avx2")

#include "sums.h"

#define XXH_VECTOR XXH_AVX2
#define XXH_INLINE_ALL
#include <xxhash.h>

void sum_add_avx2(struct sum *sum, const void *data, size_t bytes)
{
    XXH3_64bits_update((XXH3_state_t *)sum, data, bytes);
}
#endif
