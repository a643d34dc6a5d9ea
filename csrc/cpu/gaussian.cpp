// Sampling, log-density, the PPO loss and their gradients: blocks over threads, then sums in a fixed order.
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "pages.h"
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
  expect_writes(latents, policy.batch * policy.size * sizeof(float));
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

namespace {

float clipped_objective(float ratio, float clip_range, float advantage) {
  return std::min(std::max(ratio, 1.0f - clip_range), 1.0f + clip_range) * advantage;
}

// Gradients of grad_log_prob * log_prob + grad_kl * kl_to_prior for blocks of a policy.
class Backward {
 public:
  Backward(const Gaussian& policy, const Rows& rows, const float* latents, const GaussianGradients& out)
      : rows_(rows),
        size_(policy.size),
        latents_(latents),
        grad_latents_(out.latents),
        grad_mean_(out.mean, policy.storage),
        grad_log_std_(out.log_std, policy.storage),
        num_runs_(rows.is_shared() ? policy.batch * policy.log_std_size : 0),
        partial_(num_runs_ * rows.blocks_in_run()) {
    const int64_t item = policy.storage == Storage::kFloat32 ? 4 : 2;
    expect_writes(out.mean, policy.batch * policy.size * item);
    expect_writes(out.log_std, policy.batch * policy.log_std_size * item);
    expect_writes(out.latents, policy.batch * policy.size * sizeof(float));
  }

  // Blocks [begin, end) of one row; from the last, which was read last and is still in a cache.
  void write(int64_t begin, int64_t end, float grad_log_prob, float grad_kl) {
    float mean[kBlock], log_std[kBlock], mean_result[kBlock], log_std_result[kBlock];
    for (int64_t number = end; number-- > begin;) {
      const Rows::Block block = rows_.block(number);
      const int64_t first = block.row * size_ + block.begin;
      const BlockGradients gradients{grad_mean_.target(first, mean_result),
                                     rows_.is_shared() ? nullptr : grad_log_std_.target(first, log_std_result),
                                     grad_latents_ ? grad_latents_ + first : nullptr};
      const double total = block_kernels().backward(rows_.view(block, mean, log_std), latents_ + first, grad_log_prob,
                                                    grad_kl, gradients);
      grad_mean_.commit(first, block.count, gradients.mean);
      if (rows_.is_shared()) {
        partial_[number] = total;
      } else {
        grad_log_std_.commit(first, block.count, gradients.log_std);
      }
    }
  }

  // A shared log_std has the sum of its elements' gradients; once all blocks are written.
  void finish() const {
    auto first = partial_.begin();
    for (int64_t run = 0; run < num_runs_; ++run) {
      const auto last = first + rows_.blocks_in_run();
      grad_log_std_.put(run, static_cast<float>(std::accumulate(first, last, 0.0)));
      first = last;
    }
  }

 private:
  const Rows& rows_;
  int64_t size_;
  const float* latents_;
  float* grad_latents_;
  StoredOutput grad_mean_, grad_log_std_;
  int64_t num_runs_;
  std::vector<double> partial_;
};

}  // namespace

void ppo_clip_loss(const Gaussian& policy, const float* latents, const float* old_log_prob, const float* advantages,
                   float clip_range, float kl_coef, int num_threads, const PpoForward& out,
                   const GaussianGradients* gradients) {
  const BlockKernels& kernels = block_kernels();
  const Rows rows(policy);
  const int64_t per_row = rows.blocks_in_row();
  const float grad_kl = kl_coef / static_cast<float>(policy.batch);
  std::vector<BlockTerms> partial(policy.batch * per_row);
  Backward backward(policy, rows, latents, gradients ? *gradients : GaussianGradients{});

  const auto reduce = [&](int64_t begin, int64_t end) {
    float mean[kBlock], log_std[kBlock];
    for (int64_t number = begin; number < end; ++number) {
      const Rows::Block block = rows.block(number);
      partial[number] = kernels.terms(rows.view(block, mean, log_std), latents + block.row * policy.size + block.begin);
    }
  };
  const auto finish_row = [&](int64_t row) {
    BlockTerms total{0.0, 0.0};
    for (int64_t i = row * per_row; i < (row + 1) * per_row; ++i) {
      total.log_prob += partial[i].log_prob;
      total.kl_to_prior += partial[i].kl_to_prior;
    }
    out.log_prob[row] = static_cast<float>(total.log_prob);
    out.kl_to_prior[row] = static_cast<float>(total.kl_to_prior);
    out.ratio[row] = expf(out.log_prob[row] - old_log_prob[row]);
    // Where the clipped branch is the smaller one the ratio has no gradient.
    const float unclipped = out.ratio[row] * advantages[row];
    const bool is_active = unclipped <= clipped_objective(out.ratio[row], clip_range, advantages[row]);
    out.grad_log_prob[row] = is_active ? -unclipped / static_cast<float>(policy.batch) : 0.0f;
  };
  // A row is read again for its gradients while it is still in a cache: rows over threads, or a row's blocks if there
  // are fewer rows than threads.
  const int row_threads = policy.batch >= num_threads ? num_threads : 1, block_threads = num_threads / row_threads;
  const int64_t row_grain = (kGrain + policy.size - 1) / std::max<int64_t>(policy.size, 1);
  parallel_for(policy.batch, row_grain, row_threads, [&](int64_t first_row, int64_t last_row) {
    for (int64_t row = first_row; row < last_row; ++row) {
      const int64_t first = row * per_row;
      parallel_for(per_row, rows.grain(), block_threads,
                   [&](int64_t begin, int64_t end) { reduce(first + begin, first + end); });
      finish_row(row);
      if (!gradients) continue;
      parallel_for(per_row, rows.grain(), block_threads, [&](int64_t begin, int64_t end) {
        backward.write(first + begin, first + end, out.grad_log_prob[row], grad_kl);
      });
    }
  });
  if (gradients) backward.finish();

  const double divisor = static_cast<double>(std::max<int64_t>(policy.batch, 1));
  double loss = 0.0, approx_kl = 0.0, num_clipped = 0.0;
  for (int64_t row = 0; row < policy.batch; ++row) {
    const float ratio = out.ratio[row], unclipped = ratio * advantages[row];
    const float objective = std::min(unclipped, clipped_objective(ratio, clip_range, advantages[row]));
    loss += static_cast<double>(kl_coef * out.kl_to_prior[row] - objective);
    approx_kl += static_cast<double>(ratio - 1.0f - (out.log_prob[row] - old_log_prob[row]));
    num_clipped += std::abs(ratio - 1.0f) > clip_range;
  }
  out.totals[0] = static_cast<float>(loss / divisor);
  out.totals[1] = static_cast<float>(approx_kl / divisor);
  out.totals[2] = static_cast<float>(num_clipped / divisor);
  check_log_std(policy, out.log_prob);
}

void gaussian_backward(const Gaussian& policy, const float* latents, const float* grad_log_prob, const float* grad_kl,
                       int num_threads, const GaussianGradients& out) {
  const Rows rows(policy);
  const int64_t per_row = rows.blocks_in_row();
  Backward backward(policy, rows, latents, out);
  parallel_for(policy.batch * per_row, rows.grain(), num_threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / per_row, row_end = std::min(end, (row + 1) * per_row);
      backward.write(begin, row_end, grad_log_prob[row], grad_kl[row]);
      begin = row_end;
    }
  });
  backward.finish();
}

}  // namespace noisepolicy::cpu
