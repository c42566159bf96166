/* What a load or an export does for every block, without Python in between: which blocks are zero, sealing, opening.
 *
 * The cipher is Intel's ipsec-mb (intel-ipsec-mb.h); here is only the loop around it. Its caller, native.py, says how
 * long each buffer is, and `count_blocks` whether the runs lie in them: nothing else that a disk could have chosen is
 * looked at but the bytes themselves.
 */

#include <intel-ipsec-mb.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "numbers on the disk are little-endian, and are copied here as they are"
#endif

enum { BLOCK = 4096, TAG = 16, NONCE = 12, RUN = 12, MOST_AAD = 24 };

typedef struct {
    size_t key_bytes;      /* 16 or 32 */
    size_t key_step;       /* 0 if all blocks have one key, else key_bytes */
    const uint8_t *keys;   /* one, or one behind the other */
    uint64_t first;        /* the first block's nonce */
    uint64_t nonce_step;   /* 1, or 0 for one nonce for all, where each has its own key */
    size_t aad_bytes;      /* associated data: a block's number, u64, and zeros */
    const uint8_t *runs;   /* of numbers: the first, u64, and how many, u32, one behind the other */
    size_t run_count;
    uint64_t base;         /* the number of the first block of the buffer of plaintexts */
} blocks;

typedef struct {
    const blocks *all;
    size_t run, done;      /* in the list of runs, and in this run */
    size_t index;          /* of all */
    struct gcm_key_data schedule;
    struct gcm_context_data context;
    uint8_t nonce[NONCE], aad[MOST_AAD];
    size_t place;          /* of the plaintext */
} walk;

static IMB_MGR *manager;

/* Once a process, before all else. 0 where this processor has no instructions for AES. */
static int ready(void)
{
    if (manager == NULL) {
        IMB_MGR *found = alloc_mb_mgr(0);

        if (found == NULL)
            return 0;
        init_mb_mgr_auto(found, NULL);
        if (imb_get_errno(found) != 0 || !(found->features & IMB_FEATURE_AESNI) ||
            !(found->features & IMB_FEATURE_PCLMULQDQ)) {
            free_mb_mgr(found);
            return 0;
        }
        manager = found;
    }
    return 1;
}

static uint64_t run_first(const blocks *all, size_t run)
{
    uint64_t value;

    memcpy(&value, all->runs + run * RUN, sizeof value);
    return value;
}

static uint32_t run_length(const blocks *all, size_t run)
{
    uint32_t value;

    memcpy(&value, all->runs + run * RUN + 8, sizeof value);
    return value;
}

/* How many blocks the runs are, at most `room`; SIZE_MAX if some lie outside a buffer of `plain_blocks`, or are more. */
static size_t count_blocks(const blocks *all, size_t plain_blocks, size_t room)
{
    size_t count = 0;

    for (size_t run = 0; run < all->run_count; run++) {
        uint64_t place = run_first(all, run) - all->base;
        uint32_t length = run_length(all, run);

        if (run_first(all, run) < all->base || place > plain_blocks || length > plain_blocks - place ||
            length > room - count)
            return SIZE_MAX;
        count += length;
    }
    return count;
}

/* Go on to the next block; 0 behind the last. */
static int next(walk *at)
{
    const blocks *all = at->all;
    uint64_t number, nonce;

    while (at->run < all->run_count && at->done == run_length(all, at->run)) {
        at->run++;
        at->done = 0;
    }
    if (at->run == all->run_count)
        return 0;
    number = run_first(all, at->run) + at->done;
    nonce = all->first + all->nonce_step * at->index;
    memcpy(at->aad, &number, sizeof number);
    memcpy(at->nonce, &nonce, sizeof nonce);
    at->place = number - all->base;
    if (at->index == 0 || all->key_step != 0) {
        const uint8_t *key = all->keys + at->index * all->key_step;

        if (all->key_bytes == 32)
            IMB_AES256_GCM_PRE(manager, key, &at->schedule);
        else
            IMB_AES128_GCM_PRE(manager, key, &at->schedule);
    }
    at->done++;
    at->index++;
    return 1;
}

static void begin(walk *at, const blocks *all)
{
    memset(at, 0, sizeof *at);
    at->all = all;
}

/* Ciphertexts one behind the other, as they lie on the disk; tags apart. */
static void seal(const blocks *all, const uint8_t *plain, uint8_t *sealed, uint8_t *tags)
{
    walk at;

    for (begin(&at, all); next(&at); sealed += BLOCK, tags += TAG) {
        const uint8_t *from = plain + at.place * BLOCK;

        if (all->key_bytes == 32)
            IMB_AES256_GCM_ENC(manager, &at.schedule, &at.context, sealed, from, BLOCK, at.nonce, at.aad,
                               all->aad_bytes, tags, TAG);
        else
            IMB_AES128_GCM_ENC(manager, &at.schedule, &at.context, sealed, from, BLOCK, at.nonce, at.aad,
                               all->aad_bytes, tags, TAG);
    }
    imb_clear_mem(&at, sizeof at);
}

/* How many blocks before the first whose tag does not verify. What that would have been is wiped. */
static size_t unseal(const blocks *all, const uint8_t *sealed, const uint8_t *tags, size_t tag_step, uint8_t *plain)
{
    walk at;
    size_t good = 0;

    for (begin(&at, all); next(&at); sealed += BLOCK, tags += tag_step, good++) {
        uint8_t *into = plain + at.place * BLOCK, tag[TAG], differ = 0;

        if (all->key_bytes == 32)
            IMB_AES256_GCM_DEC(manager, &at.schedule, &at.context, into, sealed, BLOCK, at.nonce, at.aad,
                               all->aad_bytes, tag, TAG);
        else
            IMB_AES128_GCM_DEC(manager, &at.schedule, &at.context, into, sealed, BLOCK, at.nonce, at.aad,
                               all->aad_bytes, tag, TAG);
        for (int byte = 0; byte < TAG; byte++)
            differ |= (uint8_t)(tag[byte] ^ tags[byte]);
        if (differ != 0) {
            memset(into, 0, BLOCK);
            break;
        }
    }
    imb_clear_mem(&at, sizeof at);
    return good;
}

/* The runs of blocks that are not zero, as `blocks.runs` has them; returns how many. `runs` has room for one for each
 * two blocks. */
static size_t data_runs(const uint8_t *plain, size_t count, uint64_t base, uint8_t *runs)
{
    size_t found = 0, start = 0;

    for (size_t block = 0; block <= count; block++) {
        const uint8_t *bytes = plain + block * BLOCK;

        if (block < count && (bytes[0] != 0 || memcmp(bytes, bytes + 1, BLOCK - 1) != 0))
            continue;
        if (block > start) {
            uint64_t first = base + start;
            uint32_t length = (uint32_t)(block - start);

            memcpy(runs + found * RUN, &first, sizeof first);
            memcpy(runs + found * RUN + 8, &length, sizeof length);
            found++;
        }
        start = block + 1;
    }
    return found;
}

/* How many of the entries name blocks that follow each other on the disk, the first included. */
static size_t following(const uint8_t *entries, size_t step, size_t count)
{
    uint64_t first, raw;
    size_t found = 0;

    for (; found < count; found++) {
        memcpy(&raw, entries + found * step, sizeof raw);
        if (found == 0)
            first = raw;
        else if (raw != first + found)
            break;
    }
    return found;
}
