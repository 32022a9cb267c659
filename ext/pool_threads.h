/* Threads that run copy jobs in units, urgent jobs first. Knows no Python. */
#ifndef FLEXKV_POOL_THREADS_H
#define FLEXKV_POOL_THREADS_H

#include "copies.h"

#include <pthread.h>
#include <stdbool.h>
#include <sys/types.h>

#define POOL_THREADS_MAX 256

struct pool_job {
    struct copy_work work;
    struct pool_job *next;
    size_t claimed_bytes; /* claimed by some thread */
    size_t ended_bytes;   /* copied and published */
    bool waited;          /* a thread waits for it in pool_run; it is not reaped */
    int64_t op_id;
    void *owner; /* what the submitter keeps alive until the job is reaped */
};

struct job_list {
    struct pool_job *first, *last;
};

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t work;  /* a job was queued, or the pool closes */
    pthread_cond_t ended; /* a waited job ended */
    struct job_list urgent, background, done;
    size_t sleepers;
    size_t in_flight; /* submitted and not reaped */
    bool signalled;   /* the eventfd is readable */
    bool closing;
    int eventfd;
    pid_t pid;
    int thread_count;
    pthread_t threads[POOL_THREADS_MAX];
};

/* Start the threads. Return 0, or a positive errno with nothing left behind. */
int pool_open(struct pool *pool, int threads);

/* Queue a job, which the pool owns until pool_reap returns it. Return false if the pool closes. */
bool pool_submit(struct pool *pool, struct pool_job *job, bool urgent);

/* Run a job and wait for its end. Return false if the pool closes. */
bool pool_run(struct pool *pool, struct pool_job *job);

/* Return the list of the jobs that ended, and clear the eventfd. */
struct pool_job *pool_reap(struct pool *pool);

/* Finish the queued jobs, join the threads, close the eventfd. If another thread does that already,
 * return false once it is done. */
bool pool_close(struct pool *pool);

#endif
