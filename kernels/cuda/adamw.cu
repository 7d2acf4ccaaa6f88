// AdamW in one pass over parameter, gradient and both moments: mlm_mpi/optim/adamw.py.
#include "flat.cuh"

struct Update {
    float *p;
    const float *gradient;
    float *m, *v;
    bf16 *working;  // p rounded, for the products of the next step; or null
    float scale, beta1, beta2, one_less_beta1, one_less_beta2, root, epsilon, rate, shrink;

    template <int N> __device__ __forceinline__ void at(int64_t i) const {
        auto weight = load<N>(p + i), first = load<N>(m + i), second = load<N>(v + i), g = load<N>(gradient + i);
        for (int k = 0; k < N; k++) {
            float slope = g.at[k] * scale;
            first.at[k] = first.at[k] * beta1 + slope * one_less_beta1;
            second.at[k] = second.at[k] * beta2 + slope * slope * one_less_beta2;
            float step = first.at[k] / (sqrtf(second.at[k]) * root + epsilon) * rate;
            weight.at[k] = weight.at[k] * shrink - step;
        }
        store(m + i, first);
        store(v + i, second);
        store(p + i, weight);
        if (working) store(working + i, weight);
    }
};

extern "C" __global__ void adamw_update(
    float *p, const float *gradient, float *m, float *v, bf16 *working, float scale, float beta1, float beta2,
    float one_less_beta1, float one_less_beta2, float root, float epsilon, float rate, float shrink, int64_t size) {
    over_elements(size, Update{p, gradient, m, v, working, scale, beta1, beta2, one_less_beta1, one_less_beta2, root,
                               epsilon, rate, shrink});
}
