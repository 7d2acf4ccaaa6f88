/* out (n) = the sum of `leaves` arrays in the order of a tree: after leaf i the two newest sums become one, merges[i]
 * times. Every leaf is read from memory once, out written once; sums in between lie in L1. out may be a leaf. */
#define HEIGHT 32  /* most sums at a time: one more than the levels of the tree */
#define CHUNK 1024 /* a page */

static void add_chunk(size n, const float *x, const float *y, float *to) {
    const size whole = n - n % W;
    for (size i = 0; i < whole; i += W) store(to + i, load(x + i) + load(y + i));
    if (whole < n) store_some(to + whole, n - whole, load_some(x + whole, n - whole, 0) + load_some(y + whole, n - whole, 0));
}

void EXPORT(sums_tree)(size n, size leaves, const float *const *leaf, const int32_t *merges, float *out) {
    float own[HEIGHT][CHUNK];
    for (size at = 0; at < n; at += CHUNK) {
        const size some = least(CHUNK, n - at);
        const float *sums[HEIGHT];
        int count = 0;
        for (size i = 0; i < leaves; i++) {
            sums[count++] = leaf[i] + at;
            for (int32_t merge = 0; merge < merges[i]; merge++) {
                count--;
                float *to = i == leaves - 1 && count == 1 ? out + at : own[count];
                add_chunk(some, sums[count - 1], sums[count], to);
                sums[count - 1] = to;
            }
        }
        if (leaves == 1) memmove(out + at, sums[0], (size_t)some * sizeof *out);
    }
}
#undef HEIGHT
#undef CHUNK
