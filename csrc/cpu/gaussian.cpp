// Sampling, log-density, the PPO loss and their gradients: blocks over threads, then sums in a fixed order.
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "rows.h"

namespace noisepolicy::cpu {

void check_log_std(const Gaussian& policy, const float* log_prob) {
  const StoredArray log_std(policy.log_std, policy.storage);
  for (int64_t row = 0; row < policy.batch; ++row) {
    if (!std::isnan(log_prob[row])) continue;
    for (int64_t i = row * policy.log_std_size; i < (row + 1) * policy.log_std_size; ++i) {
      if (std::isnan(log_std.at(i))) {
        throw std::invalid_argument("log_std must not hold NaN, found in row " + std::to_string(row));
      }
    }
  }
}

void gaussian_sample(const Gaussian& policy, uint64_t seed, uint64_t offset, int num_threads, float* latents,
                     float* log_prob) {
  const BlockKernels& kernels = block_kernels();
  const Rows rows(policy);
  const int64_t per_row = rows.blocks_in_row();
  const uint64_t row_counters = static_cast<uint64_t>((policy.size + 3) / 4);
  std::vector<double> partial(policy.batch * per_row);
  parallel_for(policy.batch * per_row, rows.grain(), num_threads, [&](int64_t begin, int64_t end) {
    float mean[kBlock], log_std[kBlock], noise[kBlock + kNoisePadding];
    for (int64_t number = begin; number < end; ++number) {
      const Rows::Block block = rows.block(number);
      // A run may begin inside a counter's four.
      const int64_t skipped = block.begin % 4;
      const uint64_t counter = offset + static_cast<uint64_t>(block.row) * row_counters + block.begin / 4;
      kernels.normals(seed, counter, skipped + block.count, noise);
      partial[number] = kernels.shift_and_scale(rows.view(block, mean, log_std), noise + skipped,
                                                latents + block.row * policy.size + block.begin);
    }
  });
  for (int64_t row = 0; row < policy.batch; ++row) {
    double total = 0.0;
    for (int64_t i = row * per_row; i < (row + 1) * per_row; ++i) total += partial[i];
    log_prob[row] = static_cast<float>(total);
  }
  check_log_std(policy, log_prob);
}

void gaussian_log_prob(const Gaussian& policy, const float* latents, int num_threads, float* log_prob) {
  const BlockKernels& kernels = block_kernels();
  const Rows rows(policy);
  const int64_t per_row = rows.blocks_in_row();
  std::vector<double> partial(policy.batch * per_row);
  parallel_for(policy.batch * per_row, rows.grain(), num_threads, [&](int64_t begin, int64_t end) {
    float mean[kBlock], log_std[kBlock];
    for (int64_t number = begin; number < end; ++number) {
      const Rows::Block block = rows.block(number);
      partial[number] =
          kernels.log_prob(rows.view(block, mean, log_std), latents + block.row * policy.size + block.begin);
    }
  });
  for (int64_t row = 0; row < policy.batch; ++row) {
    double total = 0.0;
    for (int64_t i = row * per_row; i < (row + 1) * per_row; ++i) total += partial[i];
    log_prob[row] = static_cast<float>(total);
  }
  check_log_std(policy, log_prob);
}

void ppo_clip_loss(const Gaussian& policy, const float* latents, const float* old_log_prob, const float* advantages,
                   float clip_range, float kl_coef, int num_threads, const PpoForward& out) {
  const BlockKernels& kernels = block_kernels();
  const Rows rows(policy);
  const int64_t per_row = rows.blocks_in_row();
  std::vector<BlockTerms> partial(policy.batch * per_row);
  parallel_for(policy.batch * per_row, rows.grain(), num_threads, [&](int64_t begin, int64_t end) {
    float mean[kBlock], log_std[kBlock];
    for (int64_t number = begin; number < end; ++number) {
      const Rows::Block block = rows.block(number);
      partial[number] =
          kernels.terms(rows.view(block, mean, log_std), latents + block.row * policy.size + block.begin);
    }
  });
  const double divisor = static_cast<double>(std::max<int64_t>(policy.batch, 1));
  double loss = 0.0, approx_kl = 0.0, num_clipped = 0.0;
  for (int64_t row = 0; row < policy.batch; ++row) {
    BlockTerms total{0.0, 0.0};
    for (int64_t i = row * per_row; i < (row + 1) * per_row; ++i) {
      total.log_prob += partial[i].log_prob;
      total.kl_to_prior += partial[i].kl_to_prior;
    }
    out.log_prob[row] = static_cast<float>(total.log_prob);
    out.kl_to_prior[row] = static_cast<float>(total.kl_to_prior);
    const float log_ratio = out.log_prob[row] - old_log_prob[row], ratio = expf(log_ratio), advantage = advantages[row];
    const float clipped_ratio = std::min(std::max(ratio, 1.0f - clip_range), 1.0f + clip_range);
    const float unclipped = ratio * advantage, clipped = clipped_ratio * advantage;
    out.ratio[row] = ratio;
    // Where the clipped branch is the smaller one the ratio has no gradient.
    out.grad_log_prob[row] = unclipped <= clipped ? -unclipped / static_cast<float>(policy.batch) : 0.0f;
    loss += static_cast<double>(kl_coef * out.kl_to_prior[row] - std::min(unclipped, clipped));
    approx_kl += static_cast<double>(ratio - 1.0f - log_ratio);
    num_clipped += std::abs(ratio - 1.0f) > clip_range;
  }
  out.totals[0] = static_cast<float>(loss / divisor);
  out.totals[1] = static_cast<float>(approx_kl / divisor);
  out.totals[2] = static_cast<float>(num_clipped / divisor);
  check_log_std(policy, out.log_prob);
}

void gaussian_backward(const Gaussian& policy, const float* latents, const float* grad_log_prob, const float* grad_kl,
                       int num_threads, const GaussianGradients& out) {
  const BlockKernels& kernels = block_kernels();
  const Rows rows(policy);
  const StoredOutput grad_mean(out.mean, policy.storage), grad_log_std(out.log_std, policy.storage);
  const int64_t num_blocks = policy.batch * rows.blocks_in_row();
  std::vector<double> partial(rows.is_shared() ? num_blocks : 0);
  parallel_for(num_blocks, rows.grain(), num_threads, [&](int64_t begin, int64_t end) {
    float mean[kBlock], log_std[kBlock], mean_result[kBlock], log_std_result[kBlock];
    for (int64_t number = begin; number < end; ++number) {
      const Rows::Block block = rows.block(number);
      const int64_t first = block.row * policy.size + block.begin;
      const BlockGradients gradients{grad_mean.target(first, mean_result),
                                     rows.is_shared() ? nullptr : grad_log_std.target(first, log_std_result),
                                     out.latents ? out.latents + first : nullptr};
      const double total = kernels.backward(rows.view(block, mean, log_std), latents + first,
                                            grad_log_prob[block.row], grad_kl[block.row], gradients);
      grad_mean.commit(first, block.count, gradients.mean);
      if (rows.is_shared()) {
        partial[number] = total;
      } else {
        grad_log_std.commit(first, block.count, gradients.log_std);
      }
    }
  });
  if (!rows.is_shared()) return;
  for (int64_t run = 0; run < policy.batch * policy.log_std_size; ++run) {
    double total = 0.0;
    for (int64_t i = 0; i < rows.blocks_in_run(); ++i) total += partial[run * rows.blocks_in_run() + i];
    grad_log_std.put(run, static_cast<float>(total));
  }
}

}  // namespace noisepolicy::cpu
