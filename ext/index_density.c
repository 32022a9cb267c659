/* What the policy LHD learns: how many hits a block of a class and age is worth, for the places and
 * the time that it will take. The idea is from "LHD: Improving Cache Hit Rate by Maximizing Hit
 * Density" (Beckmann, Chen, Cidon, NSDI 2018); classes, prior and markers are made for prefixes.
 *
 *   age      counted in epochs; in an epoch as many blocks are asked for as an eighth of the tier
 *            has. So no clock is read, and no workload's pace is built in
 *   class    how often the block's path was asked for before; or that it ends a new prompt
 *   marker   a prompt's second-to-last block, remembered when the prompt is gone: if it is asked
 *            for again, the blocks that lead to it are known to come back
 *   sample   a block, resident or not, out of a part of all keys: that it comes back (a hit at some
 *            age), or is not seen again, tells something about its class
 *
 * The prior of a class's chance of a hit at an age is the chance of all classes together; the prior
 * of that is 1 / age, which gives the order of LRU. A cell is the places of one class and epoch.
 */
#include "index_density.h"

#include <float.h>
#include <stdlib.h>

#define SAMPLES_MAX 65536u
#define MARKERS_MAX (1u << 20)
#define SHARE_BITS 24
#define PRIOR_HITS 0.1
#define PRIOR_ALL 16.0
#define PRIOR_CLASS 8.0
#define DEVIATION_MAX 4.0
/* An observation this many epochs old has about a third of its weight (1 / e). */
#define MEMORY_EPOCHS 512

/* Where each bucket of ages begins, in epochs; the last bucket has all greater ages, too. */
static const uint16_t edges[BUCKETS + 1] = {0,  1,  2,  3,  4,  5,  6,   8,   11,  14, 19,
                                            25, 32, 42, 55, 71, 93, 121, 157, 205, EPOCHS - 1};

static unsigned bucket_of(unsigned age)
{
    unsigned bucket = 0;

    while (bucket + 1 < BUCKETS && age >= edges[bucket + 1])
        bucket++;
    return bucket;
}

static double width(unsigned bucket)
{
    return edges[bucket + 1] - edges[bucket];
}

static double middle(unsigned bucket)
{
    return (edges[bucket + 1] + edges[bucket]) / 2.0;
}

static unsigned age_of(const struct density *density, uint16_t epoch)
{
    unsigned age = (uint16_t)(density->epoch - epoch);

    return age < EPOCHS - 1 ? age : EPOCHS - 1;
}

unsigned density_cell(const struct density *density, const struct place *place)
{
    unsigned age = age_of(density, place->epoch);

    return place->class * CELLS_OF_CLASS + (age < EPOCHS - 1 ? place->epoch % EPOCHS : ANCIENT);
}

unsigned density_class_of(unsigned uses, bool last)
{
    static const uint8_t most[] = {0, 1, 2, 3, 4, 6, 12, 30, 100};
    unsigned class = 0;

    if (last && !uses)
        return CLASS_LAST;
    while (class < sizeof(most) && uses > most[class])
        class++;
    return class;
}

static uint32_t smaller(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

struct density *density_new(uint32_t capacity)
{
    struct density *density = calloc(1, sizeof(*density));
    uint32_t half = capacity / 2 > 8 ? capacity / 2 : 8;

    if (!density)
        return NULL;
    density->samples_max = smaller(half, SAMPLES_MAX);
    /* Sample one key in four, or fewer where that would certainly be too many. */
    density->share = (uint32_t)((UINT64_C(1) << (SHARE_BITS - 2)) * density->samples_max / half);
    density->bound = FLT_MAX;
    if (!recent_open(&density->samples, density->samples_max + 1) ||
        !recent_open(&density->markers, smaller(half, MARKERS_MAX))) {
        density_free(density);
        return NULL;
    }
    density_learn(density);
    return density;
}

void density_free(struct density *density)
{
    if (!density)
        return;
    recent_close(&density->samples);
    recent_close(&density->markers);
    free(density);
}

/* -- samples ----------------------------------------------------------------------------------- */

static bool word_is_sampled(const struct density *density, uint32_t word)
{
    return (word & ((1u << SHARE_BITS) - 1)) < density->share;
}

static bool is_sampled(const struct density *density, struct key key)
{
    return word_is_sampled(density, key.word[3]);
}

static uint32_t sample_value(unsigned class, uint32_t epoch)
{
    return class << 16 | (epoch & UINT16_MAX);
}

static uint32_t *living_of(struct density *density, uint32_t value)
{
    return &density->living[value >> 16][value % EPOCHS];
}

/* Drop a sample that was not seen again: it was exposed to every age. */
static void sample_expire(struct density *density, struct recent_entry *sample)
{
    for (unsigned bucket = 0; bucket < BUCKETS; bucket++)
        density->exposed[sample->value >> 16][bucket]++;
    --*living_of(density, sample->value);
    recent_drop(&density->samples, sample);
}

static void counts_scale(struct density *density, double factor)
{
    for (unsigned class = 0; class < CLASSES; class++)
        for (unsigned bucket = 0; bucket < BUCKETS; bucket++) {
            density->hits[class][bucket] *= factor;
            density->exposed[class][bucket] *= factor;
        }
}

/* Sample fewer keys from now on, and scale the counts as if that had always been so. */
static void samples_thin(struct density *density)
{
    struct recent *samples = &density->samples;

    density->share -= density->share / 8 + 1;
    for (ref at = samples->oldest, newer; at != NONE; at = newer) {
        struct recent_entry *sample = &samples->entries[at];

        newer = sample->newer;
        if (word_is_sampled(density, sample->tag[1]))
            continue;
        --*living_of(density, sample->value);
        recent_drop(samples, sample);
    }
    counts_scale(density, 7.0 / 8);
}

void density_sample(struct density *density, struct key key, unsigned class, bool asked)
{
    struct recent_entry *sample;

    if (!is_sampled(density, key))
        return;
    sample = recent_find(&density->samples, key);
    if (sample && !asked)
        return;
    if (sample) {
        unsigned was = sample->value >> 16;
        unsigned bucket = bucket_of(age_of(density, (uint16_t)sample->value));

        density->hits[was][bucket]++;
        for (unsigned b = 0; b <= bucket; b++)
            density->exposed[was][b]++;
        --*living_of(density, sample->value);
        sample->value = sample_value(class, density->epoch);
        recent_touch(&density->samples, sample);
    } else {
        sample = recent_add(&density->samples, key, sample_value(class, density->epoch));
    }
    ++*living_of(density, sample->value);
    while (density->samples.count > density->samples_max)
        samples_thin(density);
}

/* -- learning ---------------------------------------------------------------------------------- */

/* Compute how many samples were exposed to each bucket of ages: those that ended, and living ones,
 * which count half in their present bucket. */
static void exposures(const struct density *density, unsigned class, double exposed[BUCKETS])
{
    double in[BUCKETS] = {0}, older = 0;

    for (unsigned age = 0; age < EPOCHS && age <= density->epoch; age++)
        in[bucket_of(age)] += density->living[class][(density->epoch - age) % EPOCHS];
    for (unsigned b = BUCKETS; b-- > 0; older += in[b])
        exposed[b] = density->exposed[class][b] + older + in[b] / 2;
}

/* Compute the chance of a hit in each bucket for all classes together. Where little is known it
 * continues from the next younger bucket as 1 / age. */
static void chances_of_all(const struct density *density, double exposed[CLASSES][BUCKETS],
                           double chance[BUCKETS])
{
    double rate = PRIOR_HITS / width(0), at = middle(0);

    for (unsigned b = 0; b < BUCKETS; b++) {
        double hits = 0, seen = 0, prior = rate * width(b) * at / middle(b);

        for (unsigned class = 0; class < CLASSES; class++) {
            hits += density->hits[class][b];
            seen += exposed[class][b];
        }
        if (prior > 0.9)
            prior = 0.9;
        chance[b] = (hits + PRIOR_ALL * prior) / (seen + PRIOR_ALL);
        rate = chance[b] / width(b);
        at = middle(b);
    }
}

static double clamp(double value, double low, double high)
{
    return value < low ? low : value > high ? high : value;
}

/* Compute the same for one class. Where little is known, the ratio to all classes is that of the
 * next younger bucket. */
static void chances_of_class(const double hits[BUCKETS], const double exposed[BUCKETS],
                             const double all[BUCKETS], double chance[BUCKETS])
{
    double deviation = 1;

    for (unsigned b = 0; b < BUCKETS; b++) {
        double prior = clamp(all[b] * deviation, 0, 0.95);

        chance[b] = clamp((hits[b] + PRIOR_CLASS * prior) / (exposed[b] + PRIOR_CLASS), 0, 1);
        deviation = clamp(chance[b] / all[b], 1 / DEVIATION_MAX, DEVIATION_MAX);
    }
}

/* Return the hits per epoch in which a place is kept, if it is kept for the best time. */
static float density_from(const double chance[BUCKETS], unsigned bucket)
{
    double lives = 1, hits = 0, epochs = 0, best = 0;

    for (unsigned b = bucket; b < BUCKETS; b++) {
        hits += lives * chance[b];
        epochs += lives * width(b) * (1 - chance[b] / 2);
        lives *= 1 - chance[b];
        if (hits / epochs > best)
            best = hits / epochs;
    }
    return (float)best;
}

/* The cells of one class and bucket, which have the same worth, the oldest first. */
struct group {
    float worth;
    uint8_t class, bucket;
};

static int group_compare(const void *left, const void *right)
{
    const struct group *a = left, *b = right;

    if (a->worth != b->worth)
        return a->worth < b->worth ? -1 : 1;
    if (a->bucket != b->bucket)
        return a->bucket > b->bucket ? -1 : 1;
    return (int)a->class - (int)b->class;
}

static void cell_append(struct density *density, unsigned *rank, unsigned cell, float worth)
{
    density->order[*rank] = (uint16_t)cell;
    density->rank[cell] = (uint16_t)(*rank)++;
    density->worth[cell] = worth;
}

static void cells_order(struct density *density, struct group *groups)
{
    unsigned rank = 0;

    qsort(groups, CLASSES * BUCKETS, sizeof(*groups), group_compare);
    for (const struct group *group = groups; group < groups + CLASSES * BUCKETS; group++) {
        unsigned first = group->class * CELLS_OF_CLASS;

        if (group->bucket == BUCKETS - 1)
            cell_append(density, &rank, first + ANCIENT, group->worth);
        for (unsigned age = edges[group->bucket + 1]; age-- > edges[group->bucket];)
            cell_append(density, &rank, first + (density->epoch - age) % EPOCHS, group->worth);
    }
    density->cells = rank;
}

void density_learn(struct density *density)
{
    double exposed[CLASSES][BUCKETS], all[BUCKETS], chance[BUCKETS];
    struct group groups[CLASSES * BUCKETS];

    for (unsigned class = 0; class < CLASSES; class++)
        exposures(density, class, exposed[class]);
    chances_of_all(density, exposed, all);
    for (unsigned class = 0; class < CLASSES; class++) {
        chances_of_class(density->hits[class], exposed[class], all, chance);
        for (unsigned b = 0; b < BUCKETS; b++)
            groups[class * BUCKETS + b] =
                (struct group){density_from(chance, b), (uint8_t)class, (uint8_t)b};
    }
    cells_order(density, groups);
}

/* -- what the tier asks for -------------------------------------------------------------------- */

void density_age(struct density *density)
{
    struct recent *samples = &density->samples;

    density->epoch++;
    counts_scale(density, 1 - 1.0 / MEMORY_EPOCHS);
    while (samples->oldest != NONE) {
        struct recent_entry *oldest = &samples->entries[samples->oldest];

        if ((uint16_t)(density->epoch - oldest->value) < EPOCHS)
            break;
        sample_expire(density, oldest);
    }
}

/* Estimate the uses of a batch's blocks from the markers behind them: uses[i] for each. */
void density_foresee(struct density *density, const struct batch *batch, int64_t *uses)
{
    int64_t at = batch->n ? batch->positions[batch->n - 1] + 1 : 0;
    uint32_t most = 0;

    for (size_t i = batch->n; i-- > 0;) {
        struct key key = key_at(batch->keys, batch->positions[i]);

        while (at > batch->positions[i]) {
            const struct recent_entry *marker =
                recent_find(&density->markers, key_at(batch->keys, --at));

            if (marker && marker->value > most)
                most = marker->value;
        }
        uses[i] = most;
        if (!batch->group)
            density_sample(density, key, density_class_of(most, is_last(batch, i)), false);
    }
}

void density_class(const struct density *density, struct place *place, uint32_t uses, bool last)
{
    place->uses = (uint8_t)uses;
    place->class = (uint8_t)density_class_of(uses, last);
    place->epoch = (uint16_t)density->epoch;
}

void density_forget(const struct density *density, struct place *place)
{
    place->class = 0;
    place->epoch = (uint16_t)(density->epoch - EPOCHS);
}

/* Return how many hits per epoch a block is worth that is stored now. */
float density_of_new(const struct density *density, uint32_t uses, bool last)
{
    return density->worth[density_class_of(uses, last) * CELLS_OF_CLASS + density->epoch % EPOCHS];
}

const char *density_check(const struct density *density)
{
    uint64_t living = 0;

    for (unsigned class = 0; class < CLASSES; class++)
        for (unsigned epoch = 0; epoch < EPOCHS; epoch++)
            living += density->living[class][epoch];
    return living == density->samples.count ? NULL : "the sample counts do not match the samples";
}
