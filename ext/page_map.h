/* The Python object PageMap, and the reading of id buffers against it. */
#ifndef FLEXKV_PAGE_MAP_H
#define FLEXKV_PAGE_MAP_H

#include "copies.h"
#include "ext.h"

typedef struct {
    PyObject_HEAD
    struct layout layout;
    Py_buffer host;
    Py_buffer sums; /* buf is NULL if no sums are kept */
    PyObject *owner;
} PageMap;

/* The id buffers of one job, held until page_ids_release. */
struct page_ids {
    struct int64_view device;
    struct int64_view host;
    size_t bytes; /* how many the job copies */
};

/* Return the PageMap of an argument, or NULL with TypeError. */
PageMap *page_map_read(const struct ext_state *state, PyObject *object);

/* Read pages, direction, device_ids and host_ids; the ids are held. Return the pages, or NULL with
 * an exception. */
PageMap *page_job_read(const struct ext_state *state, PyObject *const *values, int64_t *direction,
                       struct page_ids *ids);

/* Hold both id buffers. Return 0, or -1 with an exception. */
int page_ids_hold(const PageMap *map, PyObject *device, PyObject *host, struct page_ids *ids);

/* Check the ids, and copy them to device_ids[n], unless it is NULL, and host_ids[n]. Return 0, or
 * -1 with ValueError. */
int page_ids_copy(const PageMap *map, const struct page_ids *ids, int64_t *device_ids,
                  int64_t *host_ids);

void page_ids_release(struct page_ids *ids);

#endif
