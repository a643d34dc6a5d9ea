// The CPU kernels. All arrays are dense, row-major; outputs are float.
//
// `mean` is (batch, size). `log_std` is (batch, log_std_size), one value for each run of size / log_std_size
// elements: all of them (log_std_size = size), per channel, or one per row.
#pragma once

#include <cstdint>

#include "../storage.h"

namespace noisepolicy::cpu {

struct Gaussian {
  const void* mean;
  const void* log_std;
  Storage storage;  // of both
  int64_t batch, size, log_std_size;
};

// Low band of a channel's separable orthonormal DCT: axis i has extent[i] elements and bands[i] frequencies, and
// basis[i] is (bands[i], extent[i]). Images have extent[0] = bands[0] = 1.
struct Spectrum {
  int64_t channels;
  int64_t extent[3], bands[3];
  const float* basis[3];
};

struct PpoOutputs {
  float* log_prob;      // (batch,)
  float* ratio;         // (batch,)
  float* kl_to_prior;   // (batch,)
  float* objective;     // (batch,) clipped surrogate, to be maximised
  float* grad_mean;     // (batch, size) of the loss
  float* grad_log_std;  // (batch, log_std_size) of the loss
};

void gaussian_sample(const Gaussian& policy, uint64_t seed, uint64_t offset, float* latents, float* log_prob);

// latents (batch, channels * extents), coefficients (batch, channels * bands) = policy.size.
void spectral_sample(const Gaussian& policy, const Spectrum& spectrum, uint64_t seed, uint64_t offset, float* latents,
                     float* coefficients, float* log_prob);

void gaussian_log_prob(const Gaussian& policy, const float* latents, float* log_prob);

// Gradients of sum(grad_output * log_prob); any of the outputs may be null.
void gaussian_log_prob_backward(const Gaussian& policy, const float* latents, const float* grad_output,
                                float* grad_latents, float* grad_mean, float* grad_log_std);

void ppo_clip_loss(const Gaussian& policy, const float* latents, const float* old_log_prob, const float* advantages,
                   float clip_range, float kl_coef, const PpoOutputs& out);

}  // namespace noisepolicy::cpu
