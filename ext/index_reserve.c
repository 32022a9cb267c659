/* Taking places for blocks: makes room, and adds the nodes of blocks that are new. */
#include "index_core.h"
#include "index_density.h"

/* Return the node of the block at a position, after adding it under its parent if it is new; NONE
 * if the parent is nowhere. `last` is the node of the previous position if known, and `fresh` is
 * whether that was added just now: then no later block of the prompt has a node to look up. */
static ref node_take(struct block_index *index, const unsigned char *keys, int64_t position,
                     ref last, bool *fresh)
{
    struct key key = key_at(keys, position), above = key_at(keys, position - 1);
    uint32_t bucket = bucket_at(index, keys, position);
    bool follows = node_has(index, last, above);
    ref number = follows && *fresh ? NONE : node_find(index, key, bucket), parent = last;

    *fresh = number == NONE;
    if (!*fresh)
        return number;
    if (!follows)
        parent = node_find(index, above, position ? bucket_at(index, keys, position - 1)
                                                  : bucket_of_root(index, above));
    if (parent == NONE) {
        if (position)
            return NONE;
        parent = node_add(index, above, bucket_of_root(index, above), NONE);
    }
    return node_add(index, key, bucket, parent);
}

/* Return for how many blocks there is room, in the tier and in the quota. */
static size_t room_of(const struct block_index *index, unsigned t, unsigned quota)
{
    int64_t left = quota_left(index, t, quota), free = index->tier[t].free;

    return left < 0 ? 0 : (size_t)(left < free ? left : free);
}

/* Make room for `wanted` blocks; where the quota is used up, evict its own blocks first. `least` is
 * the least number of blocks of an eviction. Return for how many blocks there is room. */
static size_t room_grow(struct block_index *index, unsigned t, unsigned quota, size_t wanted,
                      size_t least)
{
    const struct tier *tier = &index->tier[t];
    int64_t left = quota_left(index, t, quota);

    if ((int64_t)wanted > left) {
        index_evict(index, t, quota, 0, (size_t)((int64_t)wanted - left));
        left = quota_left(index, t, quota);
        if ((int64_t)wanted > left)
            wanted = left > 0 ? (size_t)left : 0;
    }
    if (wanted > tier->free) {
        size_t lacking = wanted - tier->free;

        index_evict(index, t, ANY_QUOTA, 0, lacking > least ? lacking : least);
    }
    return room_of(index, t, quota);
}

/* Make room for one block after the other, as long as a victim is worth less than the block. */
static void room_if_worthy(struct block_index *index, unsigned t, unsigned quota,
                           const struct batch *batch, const int64_t *uses)
{
    struct density *density = index->tier[t].density;
    float bound = density->bound;
    bool grows = true;

    for (size_t i = room_of(index, t, quota), end = i; grows && i < batch->n; i = end) {
        density->bound = density_of_new(density, (uint32_t)uses[i], is_last(batch, i));
        while (end < batch->n && uses[end] == uses[i] && is_last(batch, end) == is_last(batch, i))
            end++;
        grows = room_grow(index, t, quota, end, 0) >= end;
    }
    density->bound = bound;
}

static void room_for_all(struct block_index *index, unsigned t, unsigned quota, size_t n)
{
    const struct tier *tier = &index->tier[t];
    int64_t left = quota_left(index, t, quota);
    size_t own = (int64_t)n > left ? (size_t)((int64_t)n - left) : 0;
    size_t lacking = n > tier->free ? n - tier->free : 0;
    size_t needed = own > lacking ? own : lacking;

    index_evict_all(index, t, quota, own, needed,
                    lacking > own && needed < tier->evict_blocks ? tier->evict_blocks : needed);
}

size_t room_make(struct block_index *index, unsigned t, unsigned quota, const struct batch *batch,
                 enum reserve_how how, const int64_t *uses)
{
    size_t room = room_of(index, t, quota);

    if (batch->n <= room)
        return batch->n;
    if (how == RESERVE_ALL)
        room_for_all(index, t, quota, batch->n);
    else if (how == RESERVE_WORTHY && index->tier[t].density)
        room_if_worthy(index, t, quota, batch, uses);
    else
        room_grow(index, t, quota, batch->n, index->tier[t].evict_blocks);
    room = room_of(index, t, quota);
    if (batch->n <= room)
        return batch->n;
    return how == RESERVE_ALL ? 0 : room;
}

/* Refuse a batch that breaks a law, and free the first `taken` places, which it took already. */
static int64_t refuse(struct block_index *index, unsigned t, const int64_t *ids, size_t taken,
                      const char *law)
{
    index_abort(index, t, ids, taken);
    index->broken = law;
    return -1;
}

/* Take places for the first `n` blocks of a batch of a chain, and write them to `ids`. */
static int64_t chain_reserve(struct block_index *index, unsigned t, const struct batch *batch,
                             unsigned quota, size_t n, int64_t *ids)
{
    bool fresh = false, by_uses = index->tier[t].density;
    ref last = NONE;

    for (size_t i = 0; i < n; i++) {
        if (i + EXPECT_AHEAD < n)
            bucket_expect(index, batch->keys, batch->positions[i + EXPECT_AHEAD]);
        last = node_take(index, batch->keys, batch->positions[i], last, &fresh);
        if (last == NONE)
            return refuse(index, t, ids, i, "reserve of a block whose parent is not in the index");
        if (node_at(index, last)->place[t] != NONE)
            return refuse(index, t, ids, i, "reserve of a block that has a place already");
        ids[i] = place_reserve(index, t, last, quota, by_uses ? (uint32_t)ids[i] : 0,
                               is_last(batch, i));
    }
    return (int64_t)n;
}

/* Do the same for leaves: their parents are the chain's blocks at their positions. */
static int64_t leaves_reserve(struct block_index *index, unsigned t, const struct batch *batch,
                              unsigned quota, size_t n, int64_t *ids)
{
    bool by_uses = index->tier[t].density;
    ref parent = NONE, last = NONE;

    for (size_t i = 0; i < n; i++) {
        int64_t apart = i ? batch->positions[i] - batch->positions[i - 1] : 0;

        if ((batch->positions[i] + 1) % index->rule[batch->group].ratio)
            return refuse(index, t, ids, i, "reserve of a leaf where none can end");
        parent = node_seek(index, batch->keys, batch->positions[i], parent + (ref)apart);
        if (parent == NONE)
            return refuse(index, t, ids, i, "reserve of a leaf whose block is not in the index");
        last = leaf_take(index, parent, batch->group, last + 1);
        if (node_at(index, last)->place[t] != NONE)
            return refuse(index, t, ids, i, "reserve of a leaf that has a place already");
        ids[i] = place_reserve(index, t, last, quota, by_uses ? (uint32_t)ids[i] : 0,
                               is_last(batch, i));
    }
    return (int64_t)n;
}

/* Under LHD, `ids` holds each block's uses until the block has its place. */
int64_t index_reserve(struct block_index *index, unsigned t, const struct batch *batch,
                      enum reserve_how how, int64_t *ids)
{
    unsigned quota = index->quotas ? quota_of(index, key_at(batch->keys, -1)) : 0;
    size_t n;

    if (index->tier[t].density)
        density_foresee(index->tier[t].density, batch, ids);
    n = room_make(index, t, quota, batch, how, ids);
    return batch->group ? leaves_reserve(index, t, batch, quota, n, ids)
                        : chain_reserve(index, t, batch, quota, n, ids);
}
