/* The Python object Ring: what its life (ring.c) and its calls (ring_calls.c) share.
 *
 * The mutex protects a ring while a call has released the GIL. Threads wait for the mutex without
 * the GIL, so its holder can always take the GIL back.
 */
#ifndef FLEXKV_RING_H
#define FLEXKV_RING_H

#include "ext.h"
#include "ring_queue.h"

#include <pthread.h>
#include <sys/types.h>

typedef struct {
    PyObject_HEAD
    struct ring_queue queue;
    pthread_mutex_t lock;
    pid_t pid;
    bool open;
    bool registered; /* the lent buffers are registered with the kernel */
    Py_buffer *lent;
    Py_ssize_t lent_count;
    Py_ssize_t lent_hint; /* index of the buffer that the last extent was in */
    Py_ssize_t file_count;   /* registered files, or 0 */
    Py_ssize_t socket_count; /* places for sockets, or 0 */
    unsigned *taken; /* [capacity]: scratch of submit and nop */
} Ring;

void ring_lock(Ring *self);
void ring_unlock(Ring *self);

/* Lock an open ring; return false with an exception if it is closed. */
bool ring_enter(Ring *self);

fast_call ring_submit, ring_stream, ring_nop;
PyObject *ring_reap(Ring *, PyObject *);

#endif
