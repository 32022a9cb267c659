/* Eviction order. A policy is a few lists, and rules about which list and which end.
 *
 *   LRU, MRU     list 0 by last use; the oldest, or the newest, goes
 *   FIFO, FILO   list 0 by arrival; the oldest, or the newest, goes
 *   LFU          list u: those used u times, by last use; the lowest list goes first
 *   SLRU         list 0 on probation, list 1 protected: used often enough, at most 4/5 of the tier
 *   LIFETIME     list c: those of class c by last use; of the oldest of each class goes the one
 *                that has lived longest for what its class is worth
 *   REWARD       a calendar: each use keeps a place for some seconds more. List 0 is overdue; the
 *                others are a ring of buckets of time, from `first_bucket` on
 */
#include "index_core.h"

#define USES_MAX UINT8_MAX
#define RING (LISTS_MAX - 1)
#define BUCKETS_A_USE 4
#define REWARD_USES_MAX ((RING - 2) / BUCKETS_A_USE)

void policy_open(struct policy *policy, enum policy_kind kind, uint32_t parameter,
                 uint32_t capacity)
{
    policy->kind = kind;
    policy->parameter = parameter;
    policy->protected_max = (uint32_t)((uint64_t)capacity * 4 / 5);
    policy->first_bucket = 0;
    policy->occupied = 0;
    for (unsigned i = 0; i < LISTS_MAX; i++)
        policy->lists[i] = (struct list){NONE, NONE, 0};
    for (unsigned i = 0; i < CLASSES; i++)
        policy->lifetime_s[i] = 1;
}

static void link_newest(struct tier *tier, unsigned number, ref place)
{
    struct list *list = &tier->policy.lists[number];
    struct place *at = &tier->places[place];

    at->list = (uint8_t)number;
    at->older = list->newest;
    at->newer = NONE;
    if (list->newest == NONE)
        list->oldest = place;
    else
        tier->places[list->newest].newer = place;
    list->newest = place;
    list->count++;
    tier->policy.occupied |= UINT64_C(1) << number;
}

static void link_oldest(struct tier *tier, unsigned number, ref place)
{
    struct list *list = &tier->policy.lists[number];
    struct place *at = &tier->places[place];

    at->list = (uint8_t)number;
    at->older = NONE;
    at->newer = list->oldest;
    if (list->oldest == NONE)
        list->newest = place;
    else
        tier->places[list->oldest].older = place;
    list->oldest = place;
    list->count++;
    tier->policy.occupied |= UINT64_C(1) << number;
}

void policy_remove(struct tier *tier, ref place)
{
    struct place *at = &tier->places[place];
    struct list *list;

    if (at->list >= LISTS_MAX) {
        at->list = LIST_NONE;
        return;
    }
    list = &tier->policy.lists[at->list];
    if (at->older == NONE)
        list->oldest = at->newer;
    else
        tier->places[at->older].newer = at->newer;
    if (at->newer == NONE)
        list->newest = at->older;
    else
        tier->places[at->newer].older = at->older;
    if (!--list->count)
        tier->policy.occupied &= ~(UINT64_C(1) << at->list);
    at->list = LIST_NONE;
}

/* -- the calendar of REWARD -------------------------------------------------------------------- */

static uint64_t bucket_of_second(const struct policy *policy, uint64_t second)
{
    return second * BUCKETS_A_USE / policy->parameter;
}

static unsigned list_of_bucket(uint64_t bucket)
{
    return 1 + (unsigned)(bucket % RING);
}

/* Let what is due by now join the overdue, in the order of their buckets. */
static void calendar_turn(struct tier *tier, uint32_t clock_s)
{
    struct policy *policy = &tier->policy;
    uint64_t now = bucket_of_second(policy, clock_s), bucket = policy->first_bucket;

    for (unsigned turns = 0; bucket < now && turns < RING; bucket++, turns++) {
        const struct list *list = &policy->lists[list_of_bucket(bucket)];

        while (list->oldest != NONE) {
            ref place = list->oldest;

            policy_remove(tier, place);
            link_newest(tier, 0, place);
        }
    }
    if (now > policy->first_bucket)
        policy->first_bucket = now;
}

static unsigned calendar_list(const struct tier *tier, ref place, uint32_t clock_s)
{
    const struct policy *policy = &tier->policy;
    uint64_t uses = tier->places[place].uses;

    if (uses > REWARD_USES_MAX)
        uses = REWARD_USES_MAX;
    return list_of_bucket(bucket_of_second(policy, clock_s + uses * policy->parameter));
}

/* The first list of the calendar with members; there is one. */
static unsigned calendar_first(const struct policy *policy)
{
    uint64_t bucket = policy->first_bucket;

    if (policy->lists[0].count)
        return 0;
    while (!policy->lists[list_of_bucket(bucket)].count)
        bucket++;
    return list_of_bucket(bucket);
}

/* -- the rules --------------------------------------------------------------------------------- */

/* In which list a place belongs, now. */
static unsigned list_of(struct tier *tier, ref place, uint32_t clock_s)
{
    struct policy *policy = &tier->policy;
    uint8_t uses = tier->places[place].uses;

    switch (policy->kind) {
    case POLICY_LFU:
        return uses < LISTS_MAX ? uses : LISTS_MAX - 1;
    case POLICY_SLRU:
        return uses >= policy->parameter;
    case POLICY_LIFETIME:
        return uses;
    case POLICY_REWARD:
        calendar_turn(tier, clock_s);
        return calendar_list(tier, place, clock_s);
    default:
        return 0;
    }
}

/* The protected ones that are too many go back on probation, the least recently used first. */
static void bound_protected(struct tier *tier)
{
    struct policy *policy = &tier->policy;

    while (policy->kind == POLICY_SLRU && policy->lists[1].count > policy->protected_max) {
        ref place = policy->lists[1].oldest;

        policy_remove(tier, place);
        link_newest(tier, 0, place);
    }
}

/* How long a place has lived, as a multiple of what its class is worth. */
static float share_lived(const struct tier *tier, ref place, uint32_t clock_s)
{
    const struct place *at = &tier->places[place];

    return ((float)(clock_s - at->used_s) + 0.001f) /
           (tier->policy.lifetime_s[at->uses] + 0.001f);
}

static ref lifetime_victim(const struct tier *tier, uint32_t clock_s, float *share)
{
    ref victim = NONE;

    *share = -1;
    for (uint64_t left = tier->policy.occupied; left; left &= left - 1) {
        ref oldest = tier->policy.lists[__builtin_ctzll(left)].oldest;
        float lived = share_lived(tier, oldest, clock_s);

        if (lived > *share) {
            *share = lived;
            victim = oldest;
        }
    }
    return victim;
}

void policy_classify(struct tier *tier, ref place, unsigned class)
{
    if (tier->policy.kind != POLICY_LIFETIME)
        return;
    if (tier->places[place].list < LISTS_MAX)
        policy_remove(tier, place);
    tier->places[place].uses = (uint8_t)class;
}

bool policy_expired(struct tier *tier, uint32_t clock_s)
{
    float share;

    return tier->policy.kind == POLICY_LIFETIME &&
           lifetime_victim(tier, clock_s, &share) != NONE && share >= 1;
}

void policy_insert(struct tier *tier, ref place, uint32_t clock_s)
{
    tier->places[place].used_s = clock_s;
    link_newest(tier, list_of(tier, place, clock_s), place);
    bound_protected(tier);
}

static bool by_arrival(const struct policy *policy)
{
    return policy->kind == POLICY_FIFO || policy->kind == POLICY_FILO;
}

void policy_use(struct tier *tier, ref place, uint32_t clock_s)
{
    struct place *at = &tier->places[place];

    at->used_s = clock_s;
    if (at->uses < USES_MAX && tier->policy.kind != POLICY_LIFETIME)
        at->uses++;
    if (by_arrival(&tier->policy))
        return;
    policy_remove(tier, place);
    link_newest(tier, list_of(tier, place, clock_s), place);
    bound_protected(tier);
}

static bool newest_goes(const struct policy *policy)
{
    return policy->kind == POLICY_MRU || policy->kind == POLICY_FILO;
}

void policy_return(struct tier *tier, ref place)
{
    if (newest_goes(&tier->policy))
        link_newest(tier, 0, place);
    else if (tier->policy.kind == POLICY_LIFETIME)
        link_oldest(tier, tier->places[place].uses, place);
    else
        link_oldest(tier, 0, place);
}

void policy_unpark(struct tier *tier, ref place, uint32_t clock_s)
{
    if (by_arrival(&tier->policy))
        policy_return(tier, place);
    else
        policy_insert(tier, place, clock_s);
}

ref policy_victim(struct tier *tier, uint32_t clock_s)
{
    struct policy *policy = &tier->policy;

    if (policy->kind == POLICY_REWARD)
        calendar_turn(tier, clock_s);
    if (!policy->occupied)
        return NONE;
    if (newest_goes(policy))
        return policy->lists[0].newest;
    if (policy->kind == POLICY_REWARD)
        return policy->lists[calendar_first(policy)].oldest;
    if (policy->kind == POLICY_LIFETIME)
        return lifetime_victim(tier, clock_s, &(float){0});
    return policy->lists[__builtin_ctzll(policy->occupied)].oldest;
}

const char *policy_check(const struct tier *tier)
{
    for (unsigned number = 0; number < LISTS_MAX; number++) {
        const struct list *list = &tier->policy.lists[number];
        uint32_t count = 0;
        ref older = NONE;

        for (ref at = list->oldest; at != NONE; at = tier->places[at].newer) {
            const struct place *place = &tier->places[at];

            if (place->older != older || place->list != number || place->state != PLACE_READY)
                return "a policy's list is broken";
            older = at;
            if (++count > list->count)
                return "a policy's list is longer than its count";
        }
        if (list->newest != older || count != list->count)
            return "a policy's list is shorter than its count";
        if ((tier->policy.occupied >> number & 1) != (count > 0))
            return "a policy's list is wrongly marked as occupied";
    }
    return NULL;
}
