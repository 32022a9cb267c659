/* Block keys and block ids: XXH3-128 chains over tokens, and slot mappings in one pass. */
#include "ext.h"

#include <endian.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define KEY_BYTES ((size_t)16)

static void digest_write(XXH128_hash_t hash, unsigned char *digest)
{
    XXH128_canonical_t canonical;

    XXH128_canonicalFromHash(&canonical, hash);
    memcpy(digest, canonical.digest, KEY_BYTES);
}

void keys_digest(const void *data, size_t bytes, uint64_t seed, unsigned char *digest)
{
    digest_write(XXH3_128bits_withSeed(data, bytes, seed), digest);
}

static PyObject *hash128(PyObject *Py_UNUSED(module), struct value *values)
{
    const Py_buffer *data = &values[0].view.buffer;
    unsigned char digest[KEY_BYTES];
    uint64_t seed = values[1].object ? PyLong_AsUnsignedLongLong(values[1].object) : 0;
    PyThreadState *saved;

    if (PyErr_Occurred())
        return NULL;
    saved = gil_leave((size_t)data->len > GIL_HOLD_BYTES_MAX);
    keys_digest(data->buf, (size_t)data->len, seed, digest);
    gil_return(saved);
    return PyBytes_FromStringAndSize((const char *)digest, (Py_ssize_t)KEY_BYTES);
}

CALL(keys_, hash128, PyObject, 1, READ("data", read_bytes), OBJECT("seed"))

/* Copy tokens as little-endian, four bytes each. Return the tokens or-ed together: all fit if no
 * bit above the 32nd is set. */
static uint64_t tokens_pack(uint32_t *target, const char *source, size_t count)
{
    uint64_t all = 0;

    for (size_t i = 0; i < count; i++) {
        uint64_t token;

        memcpy(&token, source + i * sizeof(token), sizeof(token));
        all |= token;
        target[i] = htole32((uint32_t)token);
    }
    return all;
}

/* Write the keys of `blocks` blocks. `scratch` holds the parent, then room for one block. Return
 * the number of blocks before the first with a token that is negative or has more than 32 bits. */
static size_t keys_write(const char *tokens, size_t blocks, size_t block_tokens, char *scratch,
                         const Py_buffer *secret, unsigned char *keys)
{
    size_t bytes = KEY_BYTES + block_tokens * sizeof(uint32_t);

    for (size_t block = 0; block < blocks; block++) {
        const char *source = tokens + block * block_tokens * sizeof(uint64_t);

        if (tokens_pack((uint32_t *)(scratch + KEY_BYTES), source, block_tokens) >> 32)
            return block;
        digest_write(XXH3_128bits_withSecret(scratch, bytes, secret->buf, (size_t)secret->len),
                     keys + block * KEY_BYTES);
        memcpy(scratch, keys + block * KEY_BYTES, KEY_BYTES);
    }
    return blocks;
}

/* Raise ValueError(index, token) for the first token from `first` on that does not fit in 32 bits,
 * if there is one. */
static int token_raise(const char *tokens, Py_ssize_t count, Py_ssize_t first)
{
    for (Py_ssize_t i = first; i < count; i++) {
        int64_t token = int64_load(tokens, i);

        if ((uint64_t)token >> 32)
            return raise_details(Py_BuildValue("(nL)", i, (long long)token));
    }
    return 0;
}

/* Return the parent and the keys of the whole blocks, or NULL with an exception. */
static PyObject *keys_of_blocks(const char *tokens, Py_ssize_t count, size_t block_tokens,
                                const void *parent, const Py_buffer *secret)
{
    size_t blocks = (size_t)count / block_tokens, done = 0;
    PyObject *result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)((blocks + 1) * KEY_BYTES));

    if (result) {
        unsigned char *keys = (unsigned char *)PyBytes_AsString(result) + KEY_BYTES;
        char *scratch = PyMem_Malloc(KEY_BYTES + block_tokens * sizeof(uint32_t));
        PyThreadState *saved;

        if (!scratch) {
            Py_DECREF(result);
            return PyErr_NoMemory();
        }
        memcpy(PyBytes_AsString(result), parent, KEY_BYTES);
        memcpy(scratch, parent, KEY_BYTES);
        saved = gil_leave((size_t)count * sizeof(int64_t) > GIL_HOLD_BYTES_MAX);
        done = keys_write(tokens, blocks, block_tokens, scratch, secret, keys);
        gil_return(saved);
        PyMem_Free(scratch);
    }
    if (result && token_raise(tokens, count, (Py_ssize_t)(done * block_tokens)) < 0)
        Py_CLEAR(result);
    return result;
}

/* Replace an OverflowError, of an integer of more than 64 bits, with ValueError(index, integer). */
static void overflow_raise(Py_ssize_t index, PyObject *item)
{
    if (!PyErr_ExceptionMatches(PyExc_OverflowError))
        return;
    PyErr_Clear();
    raise_details(Py_BuildValue("(nO)", index, item));
}

/* Return the tokens of a list as int64, or NULL with an exception. This takes half as long as to
 * convert the list to an array first. */
static char *tokens_of_list(PyObject *list, Py_ssize_t count)
{
    int64_t *tokens = PyMem_Malloc(((size_t)count + 1) * sizeof(int64_t));

    if (!tokens)
        return (char *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        /* An __index__ may have made the list shorter, or drop the item. */
        PyObject *item = PyList_GetItem(list, i);

        Py_XINCREF(item);
        tokens[i] = item ? PyLong_AsLongLong(item) : -1;
        if (tokens[i] == -1 && PyErr_Occurred()) {
            if (item)
                overflow_raise(i, item);
            Py_XDECREF(item);
            PyMem_Free(tokens);
            return NULL;
        }
        Py_DECREF(item);
    }
    return (char *)tokens;
}

static PyObject *pack_int64(PyObject *Py_UNUSED(module), struct value *values)
{
    PyObject *list = values[0].object, *result = NULL;
    Py_ssize_t length;
    char *packed;

    if (!PyList_Check(list))
        return PyErr_Format(PyExc_TypeError, "values must be a list");
    length = PyList_Size(list);
    packed = tokens_of_list(list, length);
    if (packed)
        result = PyBytes_FromStringAndSize(packed, length * (Py_ssize_t)sizeof(int64_t));
    PyMem_Free(packed);
    return result;
}

CALL(keys_, pack_int64, PyObject, 1, OBJECT("values"))

/* Read a bytes object. Its content cannot change, so it need not be held. */
static int read_constant(PyObject *Py_UNUSED(self), const struct parameter *Py_UNUSED(parameter),
                         struct value *value)
{
    return PyBytes_AsStringAndSize(value->object, (char **)&value->view.buffer.buf,
                                   &value->view.buffer.len);
}

/* Accept a list of integers, which is read later, or hold a buffer of them. */
static int read_tokens(PyObject *self, const struct parameter *parameter, struct value *value)
{
    return PyList_Check(value->object) ? 0 : read_int64s(self, parameter, value);
}

static PyObject *chain_keys(PyObject *Py_UNUSED(module), struct value *values)
{
    size_t block_tokens = (size_t)values[1].integer;
    const struct int64_view *view = &values[0].view;
    const Py_buffer *parent = &values[2].view.buffer, *secret = &values[3].view.buffer;
    PyObject *result = NULL;
    Py_ssize_t length;
    char *tokens;

    if (parent->len != (Py_ssize_t)KEY_BYTES)
        return PyErr_Format(PyExc_ValueError, "parent has %zd bytes, not 16", parent->len);
    if (secret->len < XXH3_SECRET_SIZE_MIN)
        return PyErr_Format(PyExc_ValueError, "secret has %zd bytes, fewer than %d", secret->len,
                            XXH3_SECRET_SIZE_MIN);
    if (view->buffer.obj)
        return keys_of_blocks(view->buffer.buf, view->count, block_tokens, parent->buf, secret);
    length = PyList_Size(values[0].object);
    tokens = tokens_of_list(values[0].object, length);
    if (tokens)
        result = keys_of_blocks(tokens, length, block_tokens, parent->buf, secret);
    PyMem_Free(tokens);
    return result;
}

CALL(keys_, chain_keys, PyObject, 4, READ("tokens", read_tokens),
     INTEGER("tokens_per_block", 1, PY_SSIZE_T_MAX / 16), READ("parent", read_constant),
     READ("secret", read_constant))

/* Write the block id of every whole block. Return false if a slot breaks a rule.
 *
 * A block whose slots count up from an aligned first slot inside the pool is whole inside it, so
 * one comparison for each slot checks everything. */
static bool ids_write(const char *slots, size_t blocks, size_t block_tokens, uint64_t limit,
                      int64_t *ids)
{
    for (size_t block = 0; block < blocks; block++) {
        const char *at = slots + block * block_tokens * sizeof(uint64_t);
        uint64_t first = (uint64_t)int64_load(at, 0), difference = 0;

        for (size_t i = 0; i < block_tokens; i++)
            difference |= (uint64_t)int64_load(at, (Py_ssize_t)i) ^ (first + i);
        if (difference || first >= limit || first % block_tokens)
            return false;
        ids[block] = (int64_t)(first / block_tokens);
    }
    return true;
}

static int slot_raise(const struct int64_view *slots, Py_ssize_t index, const char *why)
{
    return raise_details(Py_BuildValue("(nLs)", index, (long long)int64_at(slots, index), why));
}

/* Raise for the first slot that breaks a rule: range before alignment before contiguity. */
static int slots_check(const struct int64_view *slots, Py_ssize_t block_tokens, uint64_t limit)
{
    Py_ssize_t whole = slots->count / block_tokens * block_tokens;

    for (Py_ssize_t i = 0; i < slots->count; i++)
        if ((uint64_t)int64_at(slots, i) >= limit)
            return slot_raise(slots, i, "range");
    for (Py_ssize_t i = 0; i < whole; i += block_tokens)
        if (int64_at(slots, i) % block_tokens)
            return slot_raise(slots, i, "alignment");
    for (Py_ssize_t i = 0; i < whole; i++)
        if (int64_at(slots, i) != int64_at(slots, i - i % block_tokens) + i % block_tokens)
            return slot_raise(slots, i, "contiguity");
    return 0;
}

/* Return the ids of the whole blocks, or NULL with an exception. */
static PyObject *ids_of_blocks(const struct int64_view *slots, size_t block_tokens, uint64_t limit)
{
    size_t blocks = (size_t)slots->count / block_tokens;
    size_t tail = (size_t)slots->count % block_tokens;
    PyObject *result =
        PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(blocks * sizeof(int64_t)));
    bool good;

    if (!result)
        return NULL;
    good = ids_write(slots->buffer.buf, blocks, block_tokens, limit,
                     (int64_t *)PyBytes_AsString(result));
    for (size_t i = 0; i < tail; i++)
        good &= (uint64_t)int64_at(slots, slots->count - 1 - (Py_ssize_t)i) < limit;
    if (!good && slots_check(slots, (Py_ssize_t)block_tokens, limit) < 0)
        Py_CLEAR(result);
    return result;
}

static PyObject *block_slots(PyObject *Py_UNUSED(module), struct value *values)
{
    int64_t block_tokens = values[1].integer, limit;

    if (__builtin_mul_overflow(block_tokens, values[2].integer, &limit))
        return PyErr_Format(PyExc_ValueError, "num_blocks * tokens_per_block overflows");
    return ids_of_blocks(&values[0].view, (size_t)block_tokens, (uint64_t)limit);
}

CALL(keys_, block_slots, PyObject, 3, READ("slots", read_int64s),
     INTEGER("tokens_per_block", 1, PY_SSIZE_T_MAX), INTEGER("num_blocks", 0, PY_SSIZE_T_MAX))
