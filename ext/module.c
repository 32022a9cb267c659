/* The module: its functions, its state, and the small functions that have no file of their own. */
#include "ext.h"

#include "copies.h"
#include "moves.h"
#include "sums.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include <liburing.h>
#if __has_include(<liburing/io_uring_version.h>)
#include <liburing/io_uring_version.h>
#endif
#include <xxhash.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define TEXT(number) #number
#define VERSION(major, minor) TEXT(major) "." TEXT(minor)
#define RELEASE(major, minor, release) VERSION(major, minor) "." TEXT(release)

/* Releases before 2.4 do not define their version. */
#ifdef IO_URING_VERSION_MAJOR
#define LIBURING_VERSION VERSION(IO_URING_VERSION_MAJOR, IO_URING_VERSION_MINOR)
#else
#define LIBURING_VERSION "before 2.4"
#endif

static PyObject *module_features(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return Py_BuildValue("{ssssss}", "simd", moves_simd(), "liburing", LIBURING_VERSION, "xxhash",
                         RELEASE(XXH_VERSION_MAJOR, XXH_VERSION_MINOR, XXH_VERSION_RELEASE));
}

/* Return whether an errno of madvise means that the call is refused, not that there is no memory:
 * kernels before 5.14 return EINVAL, and a seccomp profile may return anything. */
static bool is_refused(int error)
{
    return error == EINVAL || error == EPERM || error == EACCES || error == ENOSYS ||
           error == EOPNOTSUPP;
}

/* Fault in every page of [start, start + bytes) for writing; return an errno, or 0. */
static int pages_populate(char *start, size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t skew = (uintptr_t)start % page;
    int result;

    do
        result = madvise(start - skew, bytes + skew, MADV_POPULATE_WRITE);
    while (result < 0 && (errno == EINTR || errno == EAGAIN));
    if (result == 0 || !is_refused(errno))
        return result ? errno : 0;
    /* An atomic no-op writes a byte without losing another writer's. */
    for (size_t at = 0; at < bytes; at += page - (uintptr_t)(start + at) % page)
        __atomic_fetch_or(start + at, 0, __ATOMIC_RELAXED);
    return 0;
}

static PyObject *prefault(PyObject *Py_UNUSED(module), struct value *values)
{
    Py_buffer *buffer = &values[0].view.buffer;
    PyThreadState *saved = gil_leave(buffer->len);
    int error = buffer->len ? pages_populate(buffer->buf, (size_t)buffer->len) : 0;

    gil_return(saved);
    return error ? raise_errno(error) : Py_NewRef(Py_None);
}

static CALL(module_, prefault, PyObject, 1, READ("buffer", read_writable))

/* In a forked child: replace memory that is shared with the parent with private zeros. */
static PyObject *disown(PyObject *Py_UNUSED(module), struct value *values)
{
    void *start = mmap(values[0].view.buffer.buf, (size_t)values[0].view.buffer.len,
                       PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);

    return start == MAP_FAILED ? raise_errno(errno) : Py_NewRef(Py_None);
}

static CALL(module_, disown, PyObject, 1, READ("mapping", read_writable))

static PyMethodDef module_functions[] = {
    {"features", module_features, METH_NOARGS,
     "features()\n--\n\nReturn what this build and CPU offer."},
    {"notify_address", notify_address, METH_NOARGS,
     "notify_address()\n--\n\nReturn the address of a C function that adds to an eventfd."},
    FAST("prefault", module_prefault,
         "prefault(buffer)\n--\n\nTouch every page of a writable buffer."),
    FAST("disown", module_disown,
         "disown(mapping)\n--\n\nReplace a whole mapping by private pages of zeros."),
    FAST("hash128", keys_hash128,
         "hash128(data, seed=0)\n--\n\nReturn the canonical XXH3-128 digest of data."),
    FAST("chain_keys", keys_chain_keys,
         "chain_keys(tokens, tokens_per_block, parent, secret)\n--\n\n"
         "Return the chained keys of every whole block of tokens."),
    FAST("block_slots", keys_block_slots,
         "block_slots(slots, tokens_per_block, num_blocks)\n--\n\n"
         "Return the device block id of every whole block of slots."),
    FAST("pack_int64", keys_pack_int64,
         "pack_int64(values)\n--\n\nReturn a list of integers as int64."),
    FAST("change_counts", counts_change_counts,
         "change_counts(counts, ids, by)\n--\n\n"
         "Add to counts, and return how many of them left zero or reached it."),
    FAST("any_counted", counts_any_counted,
         "any_counted(counts, ids)\n--\n\nReturn whether any of some counts is not zero."),
    FAST("needed", needs_needed,
         "needed(kind, window, block_tokens, end_tokens)\n--\n\n"
         "Return which blocks of a KV group a prefix needs: (first, last exclusive)."),
    FAST("copy_now", pages_copy_now,
         "copy_now(pages, direction, device_ids, host_ids)\n--\n\n"
         "Do one job in the calling thread."),
    FAST("list_runs", pages_list_runs,
         "list_runs(pages, direction, device_ids, host_ids, out)\n--\n\n"
         "List a job's runs of bytes: targets, sources, sizes."),
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
    static PyType_Spec *const specs[] = {&page_map_spec, &copy_pool_spec, &ring_spec,
                                         &block_index_spec, &hints_spec};
    struct ext_state *state = PyModule_GetState(module);

    moves_choose();
    sums_choose();
    for (size_t i = 0; i < sizeof(specs) / sizeof(*specs); i++) {
        PyObject *type = PyType_FromModuleAndSpec(module, specs[i], NULL);
        int result = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;

        if (specs[i] == &page_map_spec)
            state->page_map = (PyTypeObject *)Py_XNewRef(type);
        Py_XDECREF(type);
        if (result < 0)
            return -1;
    }
    if (PyModule_AddIntConstant(module, "TO_HOST", TO_HOST) < 0)
        return -1;
    return PyModule_AddIntConstant(module, "TO_DEVICE", TO_DEVICE);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    Py_VISIT(((struct ext_state *)PyModule_GetState(module))->page_map);
    return 0;
}

static int module_clear(PyObject *module)
{
    Py_CLEAR(((struct ext_state *)PyModule_GetState(module))->page_map);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "flexkv._ext",
    .m_doc = "Native parts of FlexKV.",
    .m_size = sizeof(struct ext_state),
    .m_methods = module_functions,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__ext(void)
{
    return PyModuleDef_Init(&module_definition);
}
