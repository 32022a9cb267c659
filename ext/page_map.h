/* The Python object PageMap, and jobs made of id buffers that are checked against it. */
#ifndef FLEXKV_PAGE_MAP_H
#define FLEXKV_PAGE_MAP_H

#include "copies.h"
#include "ext.h"

#define PAGE_JOB                                                                                   \
    READ("pages", read_pages), INTEGER("direction", TO_HOST, TO_DEVICE),                           \
        READ("device_ids", read_int64s), READ("host_ids", read_int64s)

typedef struct {
    PyObject_HEAD
    struct layout layout;
    Py_buffer host;
    Py_buffer sums; /* buf is NULL if no sums are kept */
    PyObject *owner;
} PageMap;

/* Read an argument that must be a PageMap. */
int read_pages(PyObject *self, const struct parameter *parameter, struct value *value);

/* Check the ids of a job, and copy them to `ids`, which has room for those of both sides; fill
 * `work` with them. Without device ids (NULL), only sums are made. Return 0, or -1 with ValueError.
 */
int page_work_fill(const PageMap *map, enum direction direction, const struct int64_view *device,
                   const struct int64_view *host, int64_t *ids, struct copy_work *work);

/* Do the same for the arguments of PAGE_JOB. Return the ids, to be freed, or NULL if that fails. */
int64_t *page_work_new(const struct value *values, struct copy_work *work);

#endif
