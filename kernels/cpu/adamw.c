/* One pass over parameter, gradient and both moments. `working`: a copy of the parameter for the layers, or absent. */
void EXPORT(adamw_update)(
    size n, float *p, const float *gradient, float *m, float *v, float scale, float beta1, float beta2,
    float one_less_beta1, float one_less_beta2, float root, float epsilon, float rate, float shrink,
    element *working) {
    for (size i = 0; i < n; i += W) {
        size some = n - i;
        vf g = load_some(gradient + i, some, 0) * scale;
        vf first = FMA(load_some(m + i, some, 0), splat(beta1), g * one_less_beta1);
        vf second = FMA(load_some(v + i, some, 0), splat(beta2), g * g * one_less_beta2);
        vf step = first / FMA(SQRT(second), splat(root), splat(epsilon)) * rate;
        store_some(m + i, some, first);
        store_some(v + i, some, second);
        const vf moved = FMA(load_some(p + i, some, 0), splat(shrink), -step);
        store_some(p + i, some, moved);
        if (working) store_some(working + i, some, moved);
    }
}
