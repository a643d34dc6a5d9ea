// The clipped PPO loss of a Gaussian policy with its KL to the prior and both gradients: reduce a row, then write it.
#include <algorithm>

#include "../gaussian_math.h"
#include "kernels.h"

namespace noisepolicy::cpu {

void ppo_clip_loss(const Gaussian& policy, const float* latents, const float* old_log_prob, const float* advantages,
                   float clip_range, float kl_coef, const PpoOutputs& out) {
  gaussian_log_prob(policy, latents, out.log_prob);
  dispatch_storage(policy.storage, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const T* mean = static_cast<const T*>(policy.mean);
    const T* log_std = static_cast<const T*>(policy.log_std);
    const int64_t run = policy.size / std::max<int64_t>(policy.log_std_size, 1);
    for (int64_t row = 0; row < policy.batch; ++row) {
      const float ratio = expf(out.log_prob[row] - old_log_prob[row]), advantage = advantages[row];
      const float clipped_ratio = std::min(std::max(ratio, 1.0f - clip_range), 1.0f + clip_range);
      const float unclipped = ratio * advantage, clipped = clipped_ratio * advantage;
      out.ratio[row] = ratio;
      out.objective[row] = std::min(unclipped, clipped);
      // The loss is the mean over rows; where the clipped branch is the smaller one the ratio has no gradient.
      const float grad_log_prob = unclipped <= clipped ? -unclipped / static_cast<float>(policy.batch) : 0.0f;
      const float grad_kl = kl_coef / static_cast<float>(policy.batch);

      double kl = 0.0;
      for (int64_t group = 0; group < policy.log_std_size; ++group) {
        const float group_log_std = to_float(log_std[row * policy.log_std_size + group]);
        const float variance = expf(2.0f * group_log_std);
        double grad_group = 0.0;
        for (int64_t i = row * policy.size + group * run, end = i + run; i < end; ++i) {
          const float m = to_float(mean[i]), noise = standardize(latents[i], m, group_log_std);
          kl += kl_to_standard(m, group_log_std);
          out.grad_mean[i] = grad_log_prob * log_density_grad_mean(noise, group_log_std) + grad_kl * m;
          grad_group += grad_log_prob * log_density_grad_log_std(noise) + grad_kl * (variance - 1.0f);
        }
        out.grad_log_std[row * policy.log_std_size + group] = static_cast<float>(grad_group);
      }
      out.kl_to_prior[row] = static_cast<float>(kl);
    }
  });
}

}  // namespace noisepolicy::cpu
