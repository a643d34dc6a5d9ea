// The CUDA kernels. Arrays are on the device, outputs are float unless arguments.h says otherwise. A call puts kernels
// on `stream` (a cudaStream_t) of the current device and returns: it allocates nothing and waits for nothing, so it can
// be captured in a graph. Every sum has one order, so the same call gives the same bits on every device.
//
// `scratch` holds as many floats as the function named after the op says, and is free once the stream has passed.
// A launch that fails throws std::runtime_error.
#pragma once

#include "../arguments.h"

namespace noisepolicy::cuda {

// Why no kernel can run on this machine; empty where one can.
const char* device_problem();

int64_t gaussian_sample_scratch(const Gaussian& policy);
void gaussian_sample(const Gaussian& policy, uint64_t seed, uint64_t offset, float* latents, float* log_prob,
                     float* scratch, void* stream);

// latents (batch, channels * extents), coefficients (batch, channels * bands) = policy.size. Throws
// std::invalid_argument for more than kMaxBands bands on the last axis.
constexpr int64_t kMaxBands = 2048;
int64_t spectral_sample_scratch(const Gaussian& policy, const Spectrum& spectrum);
void spectral_sample(const Gaussian& policy, const Spectrum& spectrum, uint64_t seed, uint64_t offset, float* latents,
                     float* coefficients, float* log_prob, float* scratch, void* stream);

int64_t gaussian_log_prob_scratch(const Gaussian& policy);
void gaussian_log_prob(const Gaussian& policy, const float* latents, float* log_prob, float* scratch, void* stream);

int64_t ppo_clip_loss_scratch(const Gaussian& policy);
void ppo_clip_loss(const Gaussian& policy, const float* latents, const float* old_log_prob, const float* advantages,
                   float clip_range, float kl_coef, const PpoForward& out, float* scratch, void* stream);

// Gradients of sum(grad_log_prob * log_prob + grad_kl * kl_to_prior), weights (batch,).
int64_t gaussian_backward_scratch(const Gaussian& policy);
void gaussian_backward(const Gaussian& policy, const float* latents, const float* grad_log_prob, const float* grad_kl,
                       const GaussianGradients& out, float* scratch, void* stream);

}  // namespace noisepolicy::cuda
