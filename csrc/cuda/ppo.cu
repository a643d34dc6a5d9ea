// The clipped PPO loss on a GPU: rows are summed over the grid, then one block does what is left, a few numbers a row.
#include "device.h"
#include "kernels.h"

namespace noisepolicy::cuda {
namespace {

constexpr int kNumTotals = 3;

// Minimum and clamp are written out: fminf and fmaxf would drop a NaN, which must reach the loss.
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    objective_kernel(const float* __restrict__ old_log_prob, const float* __restrict__ advantages, int64_t batch,
                     float clip_range, float kl_coef, PpoForward out) {
  const float divisor = batch ? static_cast<float>(batch) : 1.0f;
  const float low = 1.0f - clip_range, high = 1.0f + clip_range;
  float totals[kNumTotals] = {0.0f, 0.0f, 0.0f};
  for (int64_t row = threadIdx.x; row < batch; row += kThreads) {
    const float log_ratio = out.log_prob[row] - old_log_prob[row], ratio = expf(log_ratio);
    const float unclipped = ratio * advantages[row];
    const float clipped = (ratio < low ? low : ratio > high ? high : ratio) * advantages[row];
    out.ratio[row] = ratio;
    // Where the clipped branch is the smaller one the ratio has no gradient.
    out.grad_log_prob[row] = unclipped <= clipped ? -unclipped / divisor : 0.0f;
    totals[0] += kl_coef * out.kl_to_prior[row] - (unclipped > clipped ? clipped : unclipped);
    totals[1] += ratio - 1.0f - log_ratio;
    totals[2] += fabsf(ratio - 1.0f) > clip_range ? 1.0f : 0.0f;
  }
  __shared__ float warps[kNumTotals][kThreads / kWarp];
  for (int i = 0; i < kNumTotals; ++i) {
    const float sum = warp_sum(totals[i]);
    if (lane_index() == 0) warps[i][threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kNumTotals) {
    float sum = 0.0f;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += warps[threadIdx.x][warp];
    out.totals[threadIdx.x] = sum / divisor;
  }
}

}  // namespace

void ppo_clip_loss(const Gaussian& policy, const float* latents, const float* old_log_prob, const float* advantages,
                   float clip_range, float kl_coef, const PpoForward& out, float* scratch, void* stream) {
  density_rows(policy, latents, out.log_prob, out.kl_to_prior, scratch, stream);
  NP_LAUNCH(objective_kernel, 1, kThreads, stream, old_log_prob, advantages, policy.batch, clip_range, kl_coef, out);
  check_launch("ppo_clip_loss");
}

}  // namespace noisepolicy::cuda
