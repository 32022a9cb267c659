/* Memory that costs nothing until it is touched. */
#ifndef FLEXKV_MEMORY_H
#define FLEXKV_MEMORY_H

#include <stddef.h>
#include <sys/mman.h>

/* Map zeroed memory that becomes resident when it is touched, on huge pages where there are any.
 * Return NULL, with errno, if the kernel refuses. */
static inline void *memory_map(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (memory == MAP_FAILED)
        return NULL;
    madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

#endif
