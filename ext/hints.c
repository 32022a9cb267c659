/* Hints: pairs of spans and holders in lines of a cache line each. See README.md, "Hints". */
#include "hints.h"

#include <errno.h>
#include <string.h>

#include "memory.h"

#define AHEAD 32 /* keys whose lines are loaded at once */

#define PAGE_LINES 64

/* The two lines in which the pairs of a span may be. */
struct home {
    struct line *lines[2];
    pair tag;
};

bool hints_open(struct hints *hints, uint64_t pairs_max, uint32_t span_blocks)
{
    memset(hints, 0, sizeof(*hints));
    /* 0.85 of the places are used when it is full: 9.4 bytes a pair. */
    hints->line_count = pairs_max * 20 / 17 / LINE_PAIRS / PAGE_LINES * PAGE_LINES + PAGE_LINES;
    hints->bytes = hints->line_count * sizeof(struct line);
    hints->span_blocks = span_blocks;
    hints->lines = memory_map(hints->bytes);
    return hints->lines;
}

void hints_close(struct hints *hints)
{
    if (hints->lines)
        munmap(hints->lines, hints->bytes);
    hints->lines = NULL;
}

/* -- where pairs are -------------------------------------------------------------------------- */

/* Return the other line of a pair. It is in the same page of 4 KiB, so that both need only one
 * translation of an address. */
static inline struct line *line_other(const struct hints *hints, struct line *line, pair tag)
{
    size_t number = (size_t)(line - hints->lines);

    return &hints->lines[number ^ (1 + (tag * (PAGE_LINES - 1) >> 32))];
}

/* The first line comes from the high bits of a key's first word, and the tag is its low half. */
static inline struct home home_of(const struct hints *hints, uint64_t word)
{
    struct line *line = &hints->lines[(unsigned __int128)word * hints->line_count >> 64];
    pair tag = word & PAIR_TAG ? word & PAIR_TAG : 1;

    return (struct home){{line, line_other(hints, line, tag)}, tag};
}

static uint64_t word_at(struct keys keys, size_t number)
{
    uint64_t word;

    memcpy(&word, keys.bytes + number * keys.size, sizeof(word));
    return word;
}

/* Bring the lines of the next keys near, all at once. They are loaded, not prefetched: processors
 * may drop a prefetch whose page is not translated yet, and then each key waits for memory. */
static void homes_load(const struct hints *hints, struct keys keys, size_t first)
{
    size_t last = keys.count - first > AHEAD ? first + AHEAD : keys.count;
    pair any = 0;

    for (size_t i = first; i < last; i++) {
        struct home home = home_of(hints, word_at(keys, i));

        any |= home.lines[0]->pairs[0] | home.lines[1]->pairs[0];
    }
    __asm__ volatile("" : : "r"(any)); /* else the compiler would leave the loads out */
}

/* Return the home of a key; keys are asked for in order. */
static struct home home_at(const struct hints *hints, struct keys keys, size_t number)
{
    if (number % AHEAD == 0)
        homes_load(hints, keys, number);
    return home_of(hints, word_at(keys, number));
}

static inline pair *place_of(struct home home, unsigned number)
{
    return &home.lines[number / LINE_PAIRS]->pairs[number % LINE_PAIRS];
}

#define HOME_PAIRS (2 * LINE_PAIRS)

/* Return a bit for each place of a home whose pair has these bits under the mask. */
static inline unsigned home_match(struct home home, pair bits, pair mask)
{
    unsigned found = 0;

    for (unsigned i = 0; i < HOME_PAIRS; i++)
        found |= (unsigned)((*place_of(home, i) & mask) == bits) << i;
    return found;
}

static pair *pair_find(struct home home, unsigned holder)
{
    unsigned at = home_match(home, home.tag | (pair)holder << PAIR_HOLDER_SHIFT, PAIR_NAME);

    return at ? place_of(home, (unsigned)__builtin_ctz(at)) : NULL;
}

/* -- what is known of pairs ------------------------------------------------------------------- */

static bool is_unseen(const struct holder *holder, pair pair)
{
    return (pair >> PAIR_ROUND_SHIFT & 1) != holder->round;
}

static bool is_dead(const struct hints *hints, pair pair)
{
    const struct holder *holder = &hints->holders[pair_holder(pair)];

    return holder->retired || (!holder->in_round && is_unseen(holder, pair));
}

uint32_t holder_dead(const struct holder *holder)
{
    return holder->retired ? holder->pairs : holder->in_round ? 0 : holder->unseen;
}

static void pair_remove(struct hints *hints, pair *pair)
{
    struct holder *holder = &hints->holders[pair_holder(*pair)];

    hints->dead -= is_dead(hints, *pair);
    hints->pairs--;
    holder->unseen -= is_unseen(holder, *pair);
    holder->pairs--;
    *pair = 0;
}

/* Return whether a doubt holds; forget one that is over, so that it does not come back when the
 * clock has gone round. */
static bool is_doubted(const struct hints *hints, pair *pair)
{
    int64_t end = (int64_t)(*pair >> PAIR_DOUBT_SHIFT) - 1;
    int64_t left = (end - hints->clock % DOUBT_PERIOD + DOUBT_PERIOD) % DOUBT_PERIOD;

    if (end < 0)
        return false;
    if (left > 0 && left <= DOUBT_TICKS_MAX)
        return true;
    *pair &= (UINT64_C(1) << PAIR_DOUBT_SHIFT) - 1;
    return false;
}

/* -- notes ------------------------------------------------------------------------------------ */

/* Count the free places of a line. Dead pairs do not count as anything. */
static unsigned line_free(struct hints *hints, struct line *line)
{
    unsigned count = 0;

    for (unsigned i = 0; i < LINE_PAIRS; i++) {
        if (line->pairs[i] && is_dead(hints, line->pairs[i]))
            pair_remove(hints, &line->pairs[i]);
        count += !line->pairs[i];
    }
    return count;
}

static pair *line_place(struct line *line)
{
    for (unsigned i = 0; i < LINE_PAIRS; i++)
        if (!line->pairs[i])
            return &line->pairs[i];
    return NULL;
}

/* Return the pair of a span that has as many nodes as are remembered, or NULL; each in turn. */
static pair *spare_copy(struct hints *hints, struct home home)
{
    unsigned places = home_match(home, home.tag, PAIR_TAG);
    pair *copies[HOME_PAIRS];
    unsigned count = 0;

    for (; places; places &= places - 1) {
        pair *place = place_of(home, (unsigned)__builtin_ctz(places));

        if (pair_holder(*place) != STORE)
            copies[count++] = place;
    }
    return count < COPIES_MAX ? NULL : copies[hints->turn++ % count];
}

/* Move a pair of a full home to its other line, if one has room there; return its place. */
static pair *place_empty(struct hints *hints, struct home home)
{
    for (unsigned i = 0; i < HOME_PAIRS; i++) {
        pair *place = place_of(home, i);
        pair *other = line_place(line_other(hints, home.lines[i / LINE_PAIRS], *place & PAIR_TAG));

        if (other) {
            *other = *place;
            *place = 0;
            return place;
        }
    }
    return NULL;
}

/* Return a place for a new pair, in the emptier line; if there is none, displace one. */
static pair *place_take(struct hints *hints, struct home home, unsigned holder)
{
    unsigned free[2] = {line_free(hints, home.lines[0]), line_free(hints, home.lines[1])};
    pair *place = holder != STORE ? spare_copy(hints, home) : NULL;

    if (!place) {
        if (free[0] + free[1])
            return line_place(home.lines[free[1] > free[0]]);
        place = place_empty(hints, home);
        if (place)
            return place;
        place = place_of(home, hints->turn++ % HOME_PAIRS);
    }
    hints->lost++;
    pair_remove(hints, place);
    return place;
}

size_t hints_note(struct hints *hints, struct keys keys, unsigned number, unsigned tier)
{
    struct holder *holder = &hints->holders[number];
    pair noted = (pair)number << PAIR_HOLDER_SHIFT | (pair)tier << PAIR_TIER_SHIFT |
                 (pair)holder->round << PAIR_ROUND_SHIFT;
    size_t added = 0;

    for (size_t i = 0; i < keys.count && !holder->retired; i++) {
        struct home home = home_at(hints, keys, i);
        pair *place = pair_find(home, number);

        if (place) {
            added += is_dead(hints, *place);
            pair_remove(hints, place);
        } else {
            place = place_take(hints, home, number);
            added++;
        }
        *place = home.tag | noted;
        hints->pairs++;
        holder->pairs++;
    }
    return added;
}

size_t hints_drop(struct hints *hints, struct keys keys, unsigned holder)
{
    size_t removed = 0;

    for (size_t i = 0; i < keys.count; i++) {
        pair *place = pair_find(home_at(hints, keys, i), holder);

        if (place) {
            removed += !is_dead(hints, *place);
            pair_remove(hints, place);
        }
    }
    return removed;
}

size_t hints_doubt(struct hints *hints, struct keys keys, unsigned holder, unsigned ticks)
{
    pair doubt = (pair)((hints->clock + ticks) % DOUBT_PERIOD + 1) << PAIR_DOUBT_SHIFT;
    size_t doubted = 0;

    for (size_t i = 0; i < keys.count; i++) {
        pair *place = pair_find(home_at(hints, keys, i), holder);

        if (place && !is_dead(hints, *place)) {
            *place = (*place & ((UINT64_C(1) << PAIR_DOUBT_SHIFT) - 1)) | doubt;
            doubted++;
        }
    }
    return doubted;
}

void hints_know(struct hints *hints, struct keys keys, unsigned holder, bool usable,
                uint8_t *known)
{
    bool is_left_out = usable && hints->holders[holder].is_down;

    for (size_t i = 0; i < keys.count; i++) {
        pair *place = is_left_out ? NULL : pair_find(home_at(hints, keys, i), holder);

        known[i] = place && !is_dead(hints, *place) && !(usable && is_doubted(hints, place));
    }
}

/* -- runs ------------------------------------------------------------------------------------- */

/* The spans of a prompt that a run may have. */
struct spans {
    struct keys keys; /* the keys of the spans are a span's blocks apart */
    size_t loaded;    /* the lines of spans before this one were loaded */
};

/* Return what may be used of a span: the pair of holder `wanted` if there is one, else any. */
static pair span_pair(struct hints *hints, struct home home, enum use use, int64_t wanted)
{
    unsigned places = home_match(home, home.tag, PAIR_TAG);
    pair any = 0;

    for (; places; places &= places - 1) {
        pair *place = place_of(home, (unsigned)__builtin_ctz(places));
        int64_t holder = pair_holder(*place);

        if ((use == USE_NODES) == (holder != STORE) && !hints->holders[holder].is_down &&
            !is_dead(hints, *place) && !is_doubted(hints, place)) {
            any = *place;
            if (wanted < 0 || holder == wanted)
                break;
        }
    }
    return any;
}

void hints_nodes(struct hints *hints, struct keys keys, int64_t *ids)
{
    int64_t wanted = -1;

    for (size_t i = 0; i < keys.count; i++) {
        pair pair = span_pair(hints, home_at(hints, keys, i), USE_NODES, wanted);

        ids[i] = pair ? pair_id(pair) : -1;
        if (pair)
            wanted = pair_holder(pair);
    }
}

/* Fill `found` from span `at` on, while the store, or some node, has the spans; return where that
 * ends. More lines are loaded behind a hit only: of most prompts nothing is far. */
static size_t run_extend(struct hints *hints, struct spans *spans, enum use use, size_t at,
                         pair *found)
{
    for (; at < spans->keys.count; at++) {
        if (at && at >= spans->loaded) {
            homes_load(hints, spans->keys, at);
            spans->loaded = at + AHEAD;
        }
        found[at] = span_pair(hints, home_of(hints, word_at(spans->keys, at)), use, -1);
        if (!found[at])
            break;
    }
    return at;
}

/* Choose the nodes of a run so that they change seldom. From its end backwards, each is kept as
 * long as it has the spans: nodes hold prefixes, so the one that has the last span has most. */
static void run_gather(struct hints *hints, const struct spans *spans, size_t begin, size_t end,
                       pair *found)
{
    for (size_t at = end; at > begin + 1; at--) {
        int64_t wanted = pair_holder(found[at - 1]);

        if (pair_holder(found[at - 2]) != wanted)
            found[at - 2] = span_pair(hints, home_of(hints, word_at(spans->keys, at - 2)),
                                      USE_NODES, wanted);
    }
}

size_t hints_run(struct hints *hints, struct keys prompt, size_t first, size_t last, unsigned use,
                 pair *found)
{
    size_t step = hints->span_blocks, begin = first / step, end = (last + step - 1) / step;
    struct spans spans = {{prompt.bytes, 0, step * prompt.size}, 0};
    size_t nodes = 0, all;

    /* A span has the key of its last block. If the prompt ends before that, the span is unknown. */
    if (end > prompt.count / step)
        end = prompt.count / step;
    if (first >= last || begin >= end)
        return 0;
    spans.keys.bytes += (begin + 1) * step * prompt.size; /* the root precedes all blocks */
    spans.keys.count = end - begin;
    if (use & USE_NODES)
        nodes = run_extend(hints, &spans, USE_NODES, 0, found);
    all = use & USE_STORE ? run_extend(hints, &spans, USE_STORE, nodes, found) : nodes;
    if (nodes || !all || !(use & USE_NODES)) {
        run_gather(hints, &spans, 0, nodes, found);
        return all;
    }
    /* The store has the first spans and no node has; nodes may have those behind. */
    nodes = run_extend(hints, &spans, USE_NODES, all, found);
    run_gather(hints, &spans, all, nodes, found);
    return nodes;
}

/* -- holders ---------------------------------------------------------------------------------- */

const char *holder_retire(struct hints *hints, unsigned number)
{
    struct holder *holder = &hints->holders[number];

    hints->dead += holder->pairs - holder_dead(holder);
    holder->retired = true;
    return NULL;
}

const char *holder_revive(struct hints *hints, unsigned number)
{
    struct holder *holder = &hints->holders[number];

    if (!holder->retired)
        return "it is not retired";
    if (holder->pairs)
        return "scrub its pairs first: they are of an earlier life";
    holder->retired = holder->in_round = holder->is_down = false;
    return NULL;
}

const char *round_begin(struct hints *hints, unsigned number)
{
    struct holder *holder = &hints->holders[number];

    if (holder->in_round)
        return "end its round first";
    if (holder->unseen)
        return "scrub what its last round did not note first";
    holder->in_round = true;
    holder->round = !holder->round;
    holder->unseen = holder->pairs;
    return NULL;
}

const char *round_end(struct hints *hints, unsigned number)
{
    struct holder *holder = &hints->holders[number];

    if (!holder->in_round)
        return "it is in no round";
    hints->dead -= holder_dead(holder);
    holder->in_round = false;
    hints->dead += holder_dead(holder);
    return NULL;
}

uint64_t hints_scrub(struct hints *hints, uint64_t lines)
{
    for (; lines && hints->dead; lines--) {
        line_free(hints, &hints->lines[hints->cursor]);
        hints->cursor = hints->cursor + 1 == hints->line_count ? 0 : hints->cursor + 1;
    }
    return hints->dead;
}

void hints_clear(struct hints *hints)
{
    /* Memory that is locked cannot be given back. */
    if (madvise(hints->lines, hints->bytes, MADV_DONTNEED) < 0)
        memset(hints->lines, 0, hints->bytes);
    for (unsigned i = 0; i < HOLDERS_MAX; i++)
        hints->holders[i].pairs = hints->holders[i].unseen = 0;
    hints->pairs = hints->dead = 0;
}
