/* r, z = sigmoid of what a gate is given; m = h' u_n + bias; n = tanh(pre_n + r m); h = n + z (h' - n).
 * ops/gru.py says more.
 *
 * One time step of one row: gates (3, width) in the order r, z, n become what they are after sigmoid and tanh. */
INLINE void gru_cell(
    size width, element *gates, const float *sums, const element *bias, const float *before, element *m, float *h) {
    for (size k = 0; k < width; k += W) {
        const size some = width - k;
        element *at = gates + k;
        vf r = sigmoid(load_some(at, some, 0) + load_some(sums + k, some, 0));
        vf z = sigmoid(load_some(at + width, some, 0) + load_some(sums + width + k, some, 0));
        vf product = load_some(sums + 2 * width + k, some, 0) + load_some(bias + k, some, 0);
        vf n = vtanh(FMA(r, product, load_some(at + 2 * width, some, 0)));
        store_some(at, some, r);
        store_some(at + width, some, z);
        store_some(at + 2 * width, some, n);
        store_some(m + k, some, product);
        store_some(h + k, some, FMA(z, load_some(before + k, some, 0) - n, n));
    }
}

#ifndef ELEMENT
/* One time step by itself, of units whose products somebody else has: gates and sums (batch, 3, n), bias (n), the others
 * (batch, n). */
void EXPORT(gru_step)(
    size batch, size n, float *gates, const float *sums, const float *bias, const float *before, float *m, float *h) {
    for (size b = 0; b < batch; b++)
        gru_cell(n, gates + 3 * b * n, sums + 3 * b * n, bias, before + b * n, m + b * n, h + b * n);
}
#endif

/* pre (batch, length, 3, width) becomes the gates; m and h (batch, length, width). h0 may be absent: zeros. */
void EXPORT(gru_forward)(
    const struct recurrence *r, const element *bias, const element *h0, element *pre, element *h, element *m,
    float *work) {
    const struct desk d = desk_of(r, work);
    const struct walk w = pack_forward(r, d.packed);
    const size n = r->width;
    for (size t = 0; t < r->length; t++) {
        for (size b = 0; b < r->batch; b++) d.rows[b] = state_before(r, &d, h, h0, d.h, b, t);
        multiply_step(r, &w, &d, 3 * n);
        for (size b = 0; b < r->batch; b++) {
            const size at = b * r->length + t;
            float *state = state_at(r, h, d.h, b, t);
            gru_cell(n, pre + 3 * at * n, d.sums + b * d.row, bias, d.rows[b], m + at * n, state);
            give_back(n, state, h + at * n);
        }
    }
}

/* One row at one step: gates and m become the gradients of what they were given and of m, `row` (3, width) those of
 * h' u, and `carried` the gradient of h' that went past the product; dh = dy + carried. */
INLINE void gru_cell_backward(
    size width, const element *dy, const element *before, element *gates, element *m, float *row, float *carried) {
    for (size k = 0; k < width; k += W) {
        const size some = width - k;
        element *at = gates + k;
        vf r = load_some(at, some, 0), z = load_some(at + width, some, 0), n = load_some(at + 2 * width, some, 0);
        vf dh = load_some(dy + k, some, 0) + load_some(carried + k, some, 0);
        vf dn = dh * (1.0f - z) * FMA(-n, n, splat(1));
        vf dr = dn * load_some(m + k, some, 0) * (r * (1.0f - r));
        vf dz = dh * (load_some(before + k, some, 0) - n) * (z * (1.0f - z));
        store_some(at, some, dr);
        store_some(at + width, some, dz);
        store_some(at + 2 * width, some, dn);
        store_some(m + k, some, dn * r);
        store_some(row + k, some, dr);
        store_some(row + width + k, some, dz);
        store_some(row + 2 * width + k, some, dn * r);
        store_some(carried + k, some, dh * z);
    }
}

#ifndef ELEMENT
/* gates and row (batch, 3, n), the others (batch, n). */
void EXPORT(gru_step_backward)(
    size batch, size n, const float *dy, const float *before, float *gates, float *m, float *row, float *carried) {
    for (size b = 0; b < batch; b++)
        gru_cell_backward(
            n, dy + b * n, before + b * n, gates + 3 * b * n, m + b * n, row + 3 * b * n, carried + b * n);
}
#endif

/* gates (batch, length, 3, width) and m, as forward left them, become the gradients of pre and of m. The state before
 * is zeros. */
void EXPORT(gru_backward)(
    const struct recurrence *r, const element *dy, element *gates, const element *h, element *m, float *work) {
    const struct desk d = desk_of(r, work);
    const struct walk w = pack_backward(r, d.packed);
    const size n = r->width;
    for (size t = r->length - 1; t >= 0; t--) {
        for (size b = 0; b < r->batch; b++) {
            const size at = b * r->length + t;
            float *row = d.given + b * d.row;
            const element *before = stored_before(r, &d, h, b, t);
            d.rows[b] = row;
            gru_cell_backward(n, dy + at * n, before, gates + 3 * at * n, m + at * n, row, d.carried + b * n);
        }
        if (t > 0) multiply_step(r, &w, &d, n);
        for (size b = 0; b < r->batch && t > 0; b++) {
            float *carried = d.carried + b * n, *sums = d.sums + b * d.row;
            if (begins(r, b, t))
                memset(carried, 0, (size_t)n * sizeof *carried);
            else
                for (size k = 0; k < n; k++) carried[k] += sums[k];
        }
    }
}
