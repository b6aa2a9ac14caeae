/* Greedy longest match over bytes: from the left, always the longest token of the vocabulary that fits.
 *
 * The tokens form a trie in one flat array of 64-bit cells (a double array). The child of a node for byte c is
 * cell[base + c], and it exists when that cell's label is c; no two nodes share a base, so the label is proof
 * enough. A node costs eight bytes and a step along the text costs one load.
 *
 *   bits 0..30  base   where the node's children begin; 0 for a leaf
 *   bits 31..54 token  id of the token that ends at this node; 0 for none (id 0 is never produced from text)
 *   bits 55..63 label  the byte that leads here, or 256 for an empty cell
 *
 * Cells 0..255 stay empty, so that a leaf's base of 0 leads nowhere. Plain C ABI for ctypes, nothing from Python.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BASE_MASK 0x7fffffffull
#define TOKEN_SHIFT 31
#define TOKEN_MASK (0xffffffull << TOKEN_SHIFT)
#define LABEL_SHIFT 55
#define EMPTY (256ull << LABEL_SHIFT)
#define MOST_TRIES 256

enum { OUT_OF_MEMORY = -1, CELLS_TOO_FEW = -2 };

/* The loader refuses a library that was built from another version of these sources. */
int rwkv_text_version(void) { return 2; }

typedef struct {
    int64_t low, high, depth, cell; /* tokens [low, high) share their first `depth` bytes and hang below `cell` */
} Node;

typedef struct {
    uint64_t *cells;
    int64_t n_cells, past_used;
    int64_t first_free, frontier; /* nodes with many children search from the frontier, which only moves forward */
    int32_t *next, *previous;     /* doubly linked list of the empty cells; n_cells ends it */
    uint8_t *base_used;
} Builder;

static void take(Builder *b, int64_t cell) {
    int64_t before = b->previous[cell], after = b->next[cell];
    if (before < 0)
        b->first_free = after;
    else
        b->next[before] = (int32_t)after;
    if (after < b->n_cells)
        b->previous[after] = (int32_t)before;
    if (b->frontier == cell)
        b->frontier = after;
    if (cell >= b->past_used)
        b->past_used = cell + 1;
}

static int fits(const Builder *b, int64_t base, const uint8_t *labels, int n_labels) {
    if (b->base_used[base])
        return 0;
    for (int k = 0; k < n_labels; k++)
        if (b->cells[base + labels[k]] != EMPTY)
            return 0;
    return 1;
}

/* A base whose cells for all labels are empty, or CELLS_TOO_FEW. An only child goes into the first gap. Where
 * MOST_TRIES gaps were too narrow the frontier passes them by, so that a build takes time linear in the cells. */
static int64_t find_base(Builder *b, const uint8_t *labels, int n_labels) {
    int64_t free_cell = n_labels == 1 ? b->first_free : b->frontier;
    for (int tries = 1; free_cell < b->n_cells; tries++) {
        int64_t base = free_cell - labels[0];
        if (base + 256 <= b->n_cells && fits(b, base, labels, n_labels))
            return base;
        free_cell = b->next[free_cell];
        if (tries % MOST_TRIES == 0) {
            if (free_cell < b->frontier)
                free_cell = b->frontier;
            else
                b->frontier = free_cell;
        }
    }
    return CELLS_TOO_FEW;
}

/* Give `node` its children, pushing those that have children of their own. Returns the new stack height or an error. */
static int64_t expand(Builder *b, const uint8_t *bytes, const int64_t *starts, const int32_t *ids, Node node,
                      Node *stack, int64_t height) {
    uint8_t labels[256];
    int64_t lows[257];
    int n_labels = 0;
    for (int64_t t = node.low; t < node.high; t++) {
        uint8_t label = bytes[starts[t] + node.depth];
        if (n_labels == 0 || labels[n_labels - 1] != label) {
            labels[n_labels] = label;
            lows[n_labels++] = t;
        }
    }
    lows[n_labels] = node.high;
    int64_t base = find_base(b, labels, n_labels);
    if (base < 0)
        return base;
    b->base_used[base] = 1;
    b->cells[node.cell] = (b->cells[node.cell] & ~BASE_MASK) | (uint64_t)base;
    for (int k = 0; k < n_labels; k++) {
        Node child = {lows[k], lows[k + 1], node.depth + 1, base + labels[k]};
        uint64_t token = 0;
        if (starts[child.low + 1] - starts[child.low] == child.depth)
            token = (uint64_t)ids[child.low++];
        take(b, child.cell);
        b->cells[child.cell] = (uint64_t)labels[k] << LABEL_SHIFT | token << TOKEN_SHIFT;
        if (child.low < child.high)
            stack[height++] = child;
    }
    return height;
}

/* Build the trie of `n_tokens` >= 1 distinct non-empty tokens, sorted as bytes: token t is
 * bytes[starts[t] .. starts[t + 1]) and has id ids[t] > 0. Writes at most `n_cells` (512 or more) cells, the root in
 * cell 256, and returns how many are in use, or OUT_OF_MEMORY, or CELLS_TOO_FEW. */
int64_t rwkv_trie_build(const uint8_t *bytes, const int64_t *starts, const int32_t *ids, int64_t n_tokens,
                        uint64_t *cells, int64_t n_cells) {
    Builder b = {cells, n_cells, 256, 256, 256, NULL, NULL, NULL};
    b.next = malloc((size_t)n_cells * sizeof *b.next);
    b.previous = malloc((size_t)n_cells * sizeof *b.previous);
    b.base_used = calloc((size_t)n_cells, 1);
    Node *stack = malloc((size_t)n_tokens * sizeof *stack); /* pending ranges are disjoint and not empty */
    int64_t height = OUT_OF_MEMORY;
    if (b.next && b.previous && b.base_used && stack) {
        for (int64_t i = 0; i < n_cells; i++) {
            cells[i] = EMPTY;
            b.next[i] = (int32_t)(i + 1);
            b.previous[i] = i == 256 ? -1 : (int32_t)(i - 1);
        }
        take(&b, 256);
        cells[256] = 0;
        stack[0] = (Node){0, n_tokens, 0, 256};
        height = 1;
        while (height > 0) {
            Node node = stack[--height];
            height = expand(&b, bytes, starts, ids, node, stack, height);
        }
        cells[256] |= EMPTY; /* the root is nobody's child */
    }
    free(b.next);
    free(b.previous);
    free(b.base_used);
    free(stack);
    if (height < 0)
        return height;
    /* every base in use must be readable for all 256 bytes */
    return b.past_used + 255 < n_cells ? b.past_used + 255 : n_cells;
}

/* Write the ids of text[0 .. n) to `out` (room for n) and return their number; -1 - p where no token fits at byte p. */
#define DEFINE_ENCODE(NAME, ID)                                                                    \
    int64_t NAME(const uint64_t *cells, const uint8_t *text, int64_t n, ID *out) {                 \
        const uint64_t root = cells[256] & BASE_MASK;                                              \
        int64_t position = 0, count = 0;                                                           \
        while (position < n) {                                                                     \
            uint64_t base = root, longest = 0;                                                     \
            int64_t end = position;                                                                \
            for (int64_t i = position; i < n;) {                                                   \
                const uint8_t byte = text[i++];                                                    \
                const uint64_t cell = cells[base + byte];                                          \
                if (cell >> LABEL_SHIFT != byte)                                                   \
                    break;                                                                         \
                if (cell & TOKEN_MASK) {                                                           \
                    longest = cell;                                                                \
                    end = i;                                                                       \
                }                                                                                  \
                base = cell & BASE_MASK;                                                           \
            }                                                                                      \
            if (end == position)                                                                   \
                return -1 - position;                                                              \
            out[count++] = (ID)((longest & TOKEN_MASK) >> TOKEN_SHIFT);                            \
            position = end;                                                                        \
        }                                                                                          \
        return count;                                                                              \
    }

DEFINE_ENCODE(rwkv_encode_uint16, uint16_t)
DEFINE_ENCODE(rwkv_encode_int32, int32_t)

/* Write the bytes of ids[0 .. n) to `out`, or only count them where it is NULL; returns their number. The token of id t
 * is bytes[spans[2 t]] .. with length spans[2 t + 1]; an id outside 0 .. n_spans - 1 has no bytes. */
int64_t rwkv_decode(const uint8_t *bytes, const int64_t *spans, int64_t n_spans, const int64_t *ids, int64_t n,
                    uint8_t *out) {
    int64_t total = 0;
    for (int64_t k = 0; k < n; k++) {
        if (ids[k] < 0 || ids[k] >= n_spans)
            continue;
        const int64_t *span = spans + 2 * ids[k];
        if (out)
            memcpy(out + total, bytes + span[0], (size_t)span[1]);
        total += span[1];
    }
    return total;
}

/* Write value + 1 for each whitespace-separated decimal of text[0 .. n) to `out` (room for n / 2 + 1) and return
 * their number; -1 - p where the word that begins at byte p is anything but digits of a value <= max_value. */
#define DEFINE_INTEGERS(NAME, ID)                                                                  \
    int64_t NAME(const uint8_t *text, int64_t n, uint64_t max_value, ID *out) {                    \
        int64_t position = 0, count = 0;                                                           \
        for (;;) {                                                                                 \
            while (position < n && is_space(text[position]))                                       \
                position++;                                                                        \
            if (position == n)                                                                     \
                return count;                                                                      \
            const int64_t start = position;                                                        \
            uint64_t value = 0;                                                                    \
            do {                                                                                   \
                const uint8_t digit = (uint8_t)(text[position++] - '0');                           \
                if (digit > 9)                                                                     \
                    return -1 - start;                                                             \
                value = value * 10 + digit;                                                        \
                if (value > max_value)                                                             \
                    return -1 - start;                                                             \
            } while (position < n && !is_space(text[position]));                                   \
            out[count++] = (ID)(value + 1);                                                        \
        }                                                                                          \
    }

static inline int is_space(uint8_t byte) { return byte == ' ' || (byte >= '\t' && byte <= '\r'); }

DEFINE_INTEGERS(rwkv_integers_uint16, uint16_t)
DEFINE_INTEGERS(rwkv_integers_int32, int32_t)
