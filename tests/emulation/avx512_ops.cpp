// The CPU ops on the sixteen-lane kernels alone, as C functions.
#include "cpu/blocks.h"
#include "cpu/kernels.h"

namespace noisepolicy::cpu {

namespace avx512 {
extern const BlockKernels kernels;
}
const BlockKernels& block_kernels() { return avx512::kernels; }

}  // namespace noisepolicy::cpu

using noisepolicy::Gaussian;
using noisepolicy::Storage;

namespace {

Gaussian policy(const void* mean, const void* log_std, int storage, const int64_t* sizes) {
  return {mean, log_std, static_cast<Storage>(storage), sizes[0], sizes[1], sizes[2]};
}

}  // namespace

extern "C" {

void gaussian_sample(const void* mean, const void* log_std, int storage, const int64_t* sizes, uint64_t seed,
                     uint64_t offset, float* latents, float* log_prob) {
  noisepolicy::cpu::gaussian_sample(policy(mean, log_std, storage, sizes), seed, offset, 1, latents, log_prob);
}

void spectral_sample(const void* mean, const void* log_std, int storage, const int64_t* sizes, const int64_t* shape,
                     const float* rows, const float* columns, uint64_t seed, uint64_t offset, float* latents,
                     float* coefficients, float* log_prob) {
  const float one = 1.0f;
  const noisepolicy::Spectrum spectrum{
      shape[0], {1, shape[1], shape[2]}, {1, shape[3], shape[4]}, {&one, rows, columns}};
  noisepolicy::cpu::spectral_sample(policy(mean, log_std, storage, sizes), spectrum, seed, offset, 1, latents,
                                    coefficients, log_prob);
}

void ppo_clip_loss(const void* mean, const void* log_std, int storage, const int64_t* sizes, const float* latents,
                   const float* old_log_prob, const float* advantages, float* totals, float* rows) {
  const int64_t batch = sizes[0];
  noisepolicy::cpu::ppo_clip_loss(policy(mean, log_std, storage, sizes), latents, old_log_prob, advantages, 0.2f, 0.1f,
                                  1, {totals, rows, rows + batch, rows + 2 * batch, rows + 3 * batch}, nullptr);
}

void gaussian_backward(const void* mean, const void* log_std, int storage, const int64_t* sizes, const float* latents,
                       const float* grad_log_prob, const float* grad_kl, void* grad_mean, void* grad_log_std,
                       float* grad_latents) {
  noisepolicy::cpu::gaussian_backward(policy(mean, log_std, storage, sizes), latents, grad_log_prob, grad_kl, 1,
                                      {grad_mean, grad_log_std, grad_latents});
}

}  // extern "C"
