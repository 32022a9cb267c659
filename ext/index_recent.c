/* A bounded map from keys to numbers that forgets what was touched longest ago. */
#include "index_density.h"

#include <stdlib.h>

bool recent_open(struct recent *recent, uint32_t capacity)
{
    uint32_t buckets = 64;

    while (buckets < capacity)
        buckets *= 2;
    *recent = (struct recent){.capacity = capacity, .mask = buckets - 1, .oldest = NONE,
                              .newest = NONE, .free = NONE};
    recent->entries = calloc(capacity, sizeof(*recent->entries));
    recent->buckets = calloc(buckets, sizeof(ref));
    return recent->entries && recent->buckets;
}

void recent_close(struct recent *recent)
{
    free(recent->entries);
    free(recent->buckets);
}

static ref *bucket_of(const struct recent *recent, const uint32_t tag[2])
{
    return &recent->buckets[tag[0] & recent->mask];
}

/* Buckets hold an entry's number plus one, so that zero is an empty bucket. */
struct recent_entry *recent_find(const struct recent *recent, struct key key)
{
    const uint32_t tag[2] = {key.word[2], key.word[3]};

    for (ref at = *bucket_of(recent, tag); at; at = recent->entries[at - 1].chain) {
        struct recent_entry *entry = &recent->entries[at - 1];

        if (entry->tag[0] == tag[0] && entry->tag[1] == tag[1])
            return entry;
    }
    return NULL;
}

static void unlink_entry(struct recent *recent, const struct recent_entry *entry)
{
    if (entry->older == NONE)
        recent->oldest = entry->newer;
    else
        recent->entries[entry->older].newer = entry->newer;
    if (entry->newer == NONE)
        recent->newest = entry->older;
    else
        recent->entries[entry->newer].older = entry->older;
}

static void link_entry(struct recent *recent, struct recent_entry *entry)
{
    ref number = (ref)(entry - recent->entries);

    entry->older = recent->newest;
    entry->newer = NONE;
    if (recent->newest == NONE)
        recent->oldest = number;
    else
        recent->entries[recent->newest].newer = number;
    recent->newest = number;
}

void recent_touch(struct recent *recent, struct recent_entry *entry)
{
    unlink_entry(recent, entry);
    link_entry(recent, entry);
}

void recent_drop(struct recent *recent, struct recent_entry *entry)
{
    ref *link = bucket_of(recent, entry->tag), number = (ref)(entry - recent->entries);

    while (*link != number + 1)
        link = &recent->entries[*link - 1].chain;
    *link = entry->chain;
    unlink_entry(recent, entry);
    entry->chain = recent->free;
    recent->free = number;
    recent->count--;
}

struct recent_entry *recent_add(struct recent *recent, struct key key, uint32_t value)
{
    struct recent_entry *entry;
    ref *bucket;

    if (recent->count == recent->capacity)
        recent_drop(recent, &recent->entries[recent->oldest]);
    if (recent->free == NONE) {
        entry = &recent->entries[recent->count];
    } else {
        entry = &recent->entries[recent->free];
        recent->free = entry->chain;
    }
    recent->count++;
    *entry = (struct recent_entry){.tag = {key.word[2], key.word[3]}, .value = value};
    bucket = bucket_of(recent, entry->tag);
    entry->chain = *bucket;
    *bucket = (ref)(entry - recent->entries) + 1;
    link_entry(recent, entry);
    return entry;
}
