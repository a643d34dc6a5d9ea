// The formulas of a diagonal Gaussian, per element; host and device. Rows and reductions belong to the kernels.
//
// With noise e = (x - mean) / std:   log N(x) = -e^2 / 2 - log_std - log(2 pi) / 2
#pragma once

#include "philox.h"

namespace noisepolicy {

constexpr float kHalfLogTwoPi = 0.918938533204672742f;

// The noise that takes `mean` to `value`.
NP_HD float standardize(float value, float mean, float log_std) { return (value - mean) * expf(-log_std); }

// log N(value; mean, std^2), given the standardized value.
NP_HD float log_density(float noise, float log_std) { return -0.5f * noise * noise - log_std - kHalfLogTwoPi; }

// d log_density / d mean and / d log_std.
NP_HD float log_density_grad_mean(float noise, float log_std) { return noise * expf(-log_std); }
NP_HD float log_density_grad_log_std(float noise) { return noise * noise - 1.0f; }

// KL(N(mean, std^2), N(0, 1)) in nats. Its gradients are mean and std^2 - 1.
NP_HD float kl_to_standard(float mean, float log_std) {
  return 0.5f * (mean * mean + expf(2.0f * log_std) - 1.0f) - log_std;
}

}  // namespace noisepolicy
