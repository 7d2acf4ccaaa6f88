/* i, f, o = sigmoid, g = tanh of what a gate is given; c = f c' + i g; h = o tanh(c). ops/lstm.py says more.
 *
 * One time step of one row: gates (4, n) in the order i, f, g, o become what they are after sigmoid and tanh. */
INLINE void lstm_cell(size n, element *gates, const float *sums, const float *before, float *c, float *h) {
    for (size k = 0; k < n; k += W) {
        const size some = n - k;
        vf gate[4];
        for (int q = 0; q < 4; q++) {
            vf x = load_some(gates + q * n + k, some, 0) + load_some(sums + q * n + k, some, 0);
            gate[q] = q == 2 ? vtanh(x) : sigmoid(x);
            store_some(gates + q * n + k, some, gate[q]);
        }
        vf cell = FMA(gate[1], load_some(before + k, some, 0), gate[0] * gate[2]);
        store_some(c + k, some, cell);
        store_some(h + k, some, gate[3] * vtanh(cell));
    }
}

#ifndef ELEMENT
/* One time step by itself, of units whose products somebody else has: gates and sums (batch, 4, n), the others
 * (batch, n). */
void EXPORT(lstm_step)(
    size batch, size n, float *gates, const float *sums, const float *before, float *c, float *h) {
    for (size b = 0; b < batch; b++)
        lstm_cell(n, gates + 4 * b * n, sums + 4 * b * n, before + b * n, c + b * n, h + b * n);
}
#endif

/* pre (batch, length, 4, width) becomes the gates; h and c (batch, length, width). h0 and c0 may be absent: zeros. */
void EXPORT(lstm_forward)(
    const struct recurrence *r, const element *h0, const element *c0, element *pre, element *h, element *c,
    float *work) {
    const struct desk d = desk_of(r, work);
    const struct walk w = pack_forward(r, d.packed);
    const size n = r->width;
    for (size t = 0; t < r->length; t++) {
        for (size b = 0; b < r->batch; b++) d.rows[b] = state_before(r, &d, h, h0, d.h, b, t);
        multiply_step(r, &w, &d, 4 * n);
        for (size b = 0; b < r->batch; b++) {
            const size at = b * r->length + t;
            const float *before = state_before(r, &d, c, c0, d.c, b, t);
            float *cell = state_at(r, c, d.c, b, t), *state = state_at(r, h, d.h, b, t);
            lstm_cell(n, pre + 4 * at * n, d.sums + b * d.row, before, cell, state);
            give_back(n, cell, c + at * n), give_back(n, state, h + at * n);
        }
    }
}

/* One row at one step: gates become the gradient of what they were given. dc comes from the step behind and goes to the
 * one before; dh = dy + sums. */
INLINE void lstm_cell_backward(
    size n, const element *dy, const float *sums, const element *before, const element *c, float *gates,
    float *dc_row) {
    for (size k = 0; k < n; k += W) {
        const size some = n - k;
        vf i = load_some(gates + k, some, 0), f = load_some(gates + n + k, some, 0);
        vf g = load_some(gates + 2 * n + k, some, 0), o = load_some(gates + 3 * n + k, some, 0);
        vf dh = load_some(dy + k, some, 0) + load_some(sums + k, some, 0), s = vtanh(load_some(c + k, some, 0));
        vf dc = FMA(dh * o, FMA(-s, s, splat(1)), load_some(dc_row + k, some, 0));
        store_some(gates + k, some, dc * g * (i * (1.0f - i)));
        store_some(gates + n + k, some, dc * load_some(before + k, some, 0) * (f * (1.0f - f)));
        store_some(gates + 2 * n + k, some, dc * i * FMA(-g, g, splat(1)));
        store_some(gates + 3 * n + k, some, dh * s * (o * (1.0f - o)));
        store_some(dc_row + k, some, dc * f);
    }
}

#ifndef ELEMENT
/* gates (batch, 4, n), the others (batch, n). */
void EXPORT(lstm_step_backward)(
    size batch, size n, const float *dy, const float *sums, const float *before, const float *c, float *gates,
    float *dc) {
    for (size b = 0; b < batch; b++)
        lstm_cell_backward(
            n, dy + b * n, sums + b * n, before + b * n, c + b * n, gates + 4 * b * n, dc + b * n);
}
#endif

/* gates (batch, length, 4, width), as forward left them, become the gradient of pre. The state before is zeros. */
void EXPORT(lstm_backward)(
    const struct recurrence *r, const element *dy, element *gates, const element *c, float *work) {
    const struct desk d = desk_of(r, work);
    const struct walk w = pack_backward(r, d.packed);
    const size n = r->width;
    memset(d.sums, 0, (size_t)(r->batch * d.row) * sizeof *d.sums);
    for (size t = r->length - 1; t >= 0; t--) {
        for (size b = 0; b < r->batch; b++) {
            const size at = b * r->length + t;
            const element *before = stored_before(r, &d, c, b, t);
            float *row = widened(4 * n, gates + 4 * at * n, d.given + b * d.row);
            d.rows[b] = row;
            lstm_cell_backward(n, dy + at * n, d.sums + b * d.row, before, c + at * n, row, d.carried + b * n);
            give_back(4 * n, row, gates + 4 * at * n);
        }
        if (t > 0) multiply_step(r, &w, &d, n);
        for (size b = 0; b < r->batch; b++)
            if (begins(r, b, t)) {
                memset(d.carried + b * n, 0, (size_t)n * sizeof *d.carried);
                memset(d.sums + b * d.row, 0, (size_t)n * sizeof *d.sums);
            }
    }
}
