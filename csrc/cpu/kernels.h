// The CPU kernels. Outputs are float unless arguments.h says otherwise; the same call gives the same bits for any
// number of threads. Each throws std::invalid_argument where log_std holds NaN.
#pragma once

#include "../arguments.h"

namespace noisepolicy::cpu {

void gaussian_sample(const Gaussian& policy, uint64_t seed, uint64_t offset, int num_threads, float* latents,
                     float* log_prob);

// latents (batch, channels * extents), coefficients (batch, channels * bands) = policy.size.
void spectral_sample(const Gaussian& policy, const Spectrum& spectrum, uint64_t seed, uint64_t offset, int num_threads,
                     float* latents, float* coefficients, float* log_prob);

void gaussian_log_prob(const Gaussian& policy, const float* latents, int num_threads, float* log_prob);

// `gradients`, of the loss, may be null.
void ppo_clip_loss(const Gaussian& policy, const float* latents, const float* old_log_prob, const float* advantages,
                   float clip_range, float kl_coef, int num_threads, const PpoForward& out,
                   const GaussianGradients* gradients);

// Gradients of sum(grad_log_prob * log_prob + grad_kl * kl_to_prior), weights (batch,).
void gaussian_backward(const Gaussian& policy, const float* latents, const float* grad_log_prob, const float* grad_kl,
                       int num_threads, const GaussianGradients& out);

const char* instruction_set();

// For benchmarks: the bare cost of `count` random words, and of the arithmetic of the loss and its gradients for
// `count` elements, on data that stays in the first cache. Returns a value that depends on it.
uint32_t bare_words(int64_t count);
double bare_loss(int64_t count);

}  // namespace noisepolicy::cpu
