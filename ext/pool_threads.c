/* Theory of operation.
 *
 *   submit ──> urgent ─────┐   claim a unit       ended_bytes == bytes
 *         └──> background ─┴─> [thread] [thread] ────────────────────────> done ──> reap
 *                                                  eventfd, once a batch
 *
 * One lock guards everything; a thread holds it only to claim a unit, and copies without it.
 * A unit is half a MiB of a job, whatever its pieces are, so that one job uses all threads and an
 * urgent job waits only for the units that are being copied when it comes. The jobs of a list take
 * turns, a unit each. A job whose last unit is claimed leaves its list; the thread that copies its
 * last byte moves it to `done`.
 */
#define _GNU_SOURCE
#include "pool_threads.h"

#include <errno.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

static void list_append(struct job_list *list, struct pool_job *job)
{
    job->next = NULL;
    if (list->first)
        list->last->next = job;
    else
        list->first = job;
    list->last = job;
}

static void list_drop_first(struct job_list *list)
{
    list->first = list->first->next;
}

/* Count bytes of a job that are done; the lock is held. */
static void job_advance(struct pool *pool, struct pool_job *job, size_t bytes)
{
    job->ended_bytes += bytes;
    if (job->ended_bytes < job->work.bytes)
        return;
    if (job->waited) {
        pthread_cond_broadcast(&pool->ended);
        return;
    }
    list_append(&pool->done, job);
    if (!pool->signalled) {
        pool->signalled = true;
        eventfd_write(pool->eventfd, 1);
    }
}

/* Copy one unit of the first job of a list; the lock is held on entry and on return. */
static void unit_run(struct pool *pool, struct job_list *list)
{
    struct pool_job *job = list->first;
    size_t first = job->claimed_bytes, last = unit_end(&job->work, first);

    job->claimed_bytes = last;
    list_drop_first(list);
    if (job->claimed_bytes < job->work.bytes)
        list_append(list, job);
    pthread_mutex_unlock(&pool->lock);
    copy_range(&job->work, first, last);
    pthread_mutex_lock(&pool->lock);
    job_advance(pool, job, last - first);
}

static void *thread_main(void *argument)
{
    struct pool *pool = argument;

    pthread_mutex_lock(&pool->lock);
    for (;;) {
        if (pool->urgent.first) {
            unit_run(pool, &pool->urgent);
        } else if (pool->background.first) {
            unit_run(pool, &pool->background);
        } else if (pool->closing) {
            break;
        } else {
            pool->sleepers++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->sleepers--;
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Start one thread that handles no signals: those are for the interpreter's threads. */
static int thread_start(struct pool *pool)
{
    sigset_t all, before;
    int error;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&pool->threads[pool->thread_count], NULL, thread_main, pool);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error == 0)
        pthread_setname_np(pool->threads[pool->thread_count++], "flexkv-copy");
    return error;
}

int pool_open(struct pool *pool, int threads)
{
    int error = 0;

    pool->pid = getpid();
    pool->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (pool->eventfd < 0)
        return errno;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->ended, NULL);
    while (pool->thread_count < threads && error == 0)
        error = thread_start(pool);
    if (error)
        pool_close(pool);
    return error;
}

/* Queue a job and wake as many threads as it has units; the lock is held. */
static void job_queue(struct pool *pool, struct job_list *list, struct pool_job *job)
{
    if (job->work.bytes == 0) {
        job_advance(pool, job, 0);
        return;
    }
    list_append(list, job);
    if (pool->sleepers == 0)
        return;
    if (unit_end(&job->work, 0) == job->work.bytes)
        pthread_cond_signal(&pool->work);
    else
        pthread_cond_broadcast(&pool->work);
}

bool pool_submit(struct pool *pool, struct pool_job *job, bool urgent)
{
    bool open;

    pthread_mutex_lock(&pool->lock);
    open = !pool->closing;
    if (open) {
        pool->in_flight++;
        job_queue(pool, urgent ? &pool->urgent : &pool->background, job);
    }
    pthread_mutex_unlock(&pool->lock);
    return open;
}

bool pool_run(struct pool *pool, struct pool_job *job)
{
    bool open;

    job->waited = true;
    pthread_mutex_lock(&pool->lock);
    open = !pool->closing;
    if (open) {
        job_queue(pool, &pool->urgent, job);
        while (job->ended_bytes < job->work.bytes)
            pthread_cond_wait(&pool->ended, &pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
    return open;
}

struct pool_job *pool_reap(struct pool *pool)
{
    struct pool_job *first;
    eventfd_t count;

    pthread_mutex_lock(&pool->lock);
    first = pool->done.first;
    pool->done.first = NULL;
    for (struct pool_job *job = first; job; job = job->next)
        pool->in_flight--;
    if (pool->signalled) {
        pool->signalled = false;
        if (pool->eventfd >= 0)
            eventfd_read(pool->eventfd, &count);
    }
    pthread_mutex_unlock(&pool->lock);
    return first;
}

bool pool_close(struct pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    if (pool->closing) {
        while (pool->eventfd >= 0) /* until the closing thread has joined the others */
            pthread_cond_wait(&pool->ended, &pool->lock);
        pthread_mutex_unlock(&pool->lock);
        return false;
    }
    pool->closing = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->thread_count; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_mutex_lock(&pool->lock);
    close(pool->eventfd);
    pool->eventfd = -1;
    pthread_cond_broadcast(&pool->ended);
    pthread_mutex_unlock(&pool->lock);
    return true;
}
