/* The kernel for CPUs with AVX512: the library's own code, compiled for them. */
#if defined(__x86_64__)
#pragma GCC target("avx512f")

#include "sums.h"

#define XXH_VECTOR XXH_AVX512
#define XXH_INLINE_ALL
#include <xxhash.h>

void sum_add_avx512(struct sum *sum, const void *data, size_t bytes)
{
    XXH3_64bits_update((XXH3_state_t *)sum, data, bytes);
}
#endif
