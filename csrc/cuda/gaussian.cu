// Sampling, log-density and their gradients on a GPU.
#include <type_traits>

#include "device.h"
#include "kernels.h"

namespace noisepolicy::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    sample_kernel(const T* __restrict__ mean, const T* __restrict__ log_std, int64_t batch, int64_t size,
                  int64_t log_std_size, int64_t run, uint64_t seed, uint64_t offset, float* __restrict__ latents,
                  float* __restrict__ sums) {
  const int64_t chunks = num_chunks(size), quads = (size + 3) / 4;
  for (int64_t piece = warp_index(); piece < batch * chunks; piece += num_warps()) {
    const int64_t row = piece / chunks, chunk = piece - row * chunks;
    float sum = 0.0f;
#pragma unroll 1
    for (int i = 0; i < kQuadsPerLane; ++i) {
      const int64_t quad = (chunk * kQuadsPerLane + i) * kWarp + lane_index(), first = 4 * quad;
      const int count = count4(first, size);
      if (count <= 0) break;
      const Quad noise = draw4(seed, offset + static_cast<uint64_t>(row * quads + quad));
      const Quad m = load4(mean + row * size + first, count);
      const Quad s = load_log_std(log_std + row * log_std_size, first, count, run);
      Quad value;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        value.v[k] = m.v[k] + expf(s.v[k]) * noise.v[k];
        if (k < count) sum += log_density(noise.v[k], s.v[k]);
      }
      store4(value, latents + row * size + first, count);
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) sums[piece] = sum;
  }
}

template <typename T, bool kWithKl>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    density_kernel(const T* __restrict__ mean, const T* __restrict__ log_std, const float* __restrict__ latents,
                   int64_t batch, int64_t size, int64_t log_std_size, int64_t run, float* __restrict__ sums,
                   float* __restrict__ kl_sums) {
  const int64_t chunks = num_chunks(size);
  for (int64_t piece = warp_index(); piece < batch * chunks; piece += num_warps()) {
    const int64_t row = piece / chunks, chunk = piece - row * chunks;
    float sum = 0.0f, kl_sum = 0.0f;
    for (int i = 0; i < kQuadsPerLane; ++i) {
      const int64_t first = 4 * ((chunk * kQuadsPerLane + i) * kWarp + lane_index());
      const int count = count4(first, size);
      if (count <= 0) break;
      const Quad x = load4(latents + row * size + first, count);
      const Quad m = load4(mean + row * size + first, count);
      const Quad s = load_log_std(log_std + row * log_std_size, first, count, run);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k >= count) break;
        sum += log_density(standardize(x.v[k], m.v[k], s.v[k]), s.v[k]);
        if (kWithKl) kl_sum += kl_to_standard(m.v[k], s.v[k]);
      }
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) sums[piece] = sum;
    if (kWithKl) {
      kl_sum = warp_sum(kl_sum);
      if (lane_index() == 0) kl_sums[piece] = kl_sum;
    }
  }
}

// kIsFull: every element has its own log_std, and a segment is a row. Otherwise a segment is a run of elements with one
// log_std, whose gradient is a sum.
template <typename T, bool kIsFull>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_kernel(const T* __restrict__ mean, const T* __restrict__ log_std, const float* __restrict__ latents,
                    const float* __restrict__ grad_log_prob, const float* __restrict__ grad_kl, int64_t num_segments,
                    int64_t segments_per_row, int64_t size, T* __restrict__ grad_mean, T* __restrict__ grad_log_std,
                    float* __restrict__ grad_latents, float* __restrict__ sums) {
  const int64_t chunks = num_chunks(size);
  for (int64_t piece = warp_index(); piece < num_segments * chunks; piece += num_warps()) {
    const int64_t segment = piece / chunks, chunk = piece - segment * chunks, row = segment / segments_per_row;
    const float weight = grad_log_prob[row], kl_weight = grad_kl[row];
    const float shared_log_std = kIsFull ? 0.0f : to_float(log_std[segment]);
    float sum = 0.0f;
    for (int i = 0; i < kQuadsPerLane; ++i) {
      const int64_t first = 4 * ((chunk * kQuadsPerLane + i) * kWarp + lane_index());
      const int count = count4(first, size);
      if (count <= 0) break;
      const int64_t place = segment * size + first;
      const Quad x = load4(latents + place, count), m = load4(mean + place, count);
      Quad s = {{shared_log_std, shared_log_std, shared_log_std, shared_log_std}};
      if (kIsFull) s = load4(log_std + place, count);
      Quad of_mean, of_log_std, of_latents;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float noise = standardize(x.v[k], m.v[k], s.v[k]);
        const float of_value = weight * log_density_grad_mean(noise, s.v[k]);
        of_mean.v[k] = of_value + kl_weight * m.v[k];
        of_log_std.v[k] = weight * log_density_grad_log_std(noise) + kl_weight * (expf(2.0f * s.v[k]) - 1.0f);
        of_latents.v[k] = -of_value;
        if (!kIsFull && k < count) sum += of_log_std.v[k];
      }
      store4(of_mean, grad_mean + place, count);
      if (kIsFull) store4(of_log_std, grad_log_std + place, count);
      if (grad_latents != nullptr) store4(of_latents, grad_latents + place, count);
    }
    if (!kIsFull) {
      sum = warp_sum(sum);
      if (lane_index() == 0) sums[piece] = sum;
    }
  }
}

// A row of one chunk has its sum at once.
int64_t row_scratch(const Gaussian& policy) {
  const int64_t chunks = num_chunks(policy.size);
  return chunks == 1 ? 0 : policy.batch * chunks;
}

}  // namespace

int64_t gaussian_sample_scratch(const Gaussian& policy) { return row_scratch(policy); }
int64_t gaussian_log_prob_scratch(const Gaussian& policy) { return row_scratch(policy); }
int64_t ppo_clip_loss_scratch(const Gaussian& policy) { return 2 * row_scratch(policy); }

int64_t gaussian_backward_scratch(const Gaussian& policy) {
  if (policy.log_std_size == policy.size) return 0;
  return policy.batch * policy.log_std_size * num_chunks(run_length(policy));
}

void gaussian_sample(const Gaussian& policy, uint64_t seed, uint64_t offset, float* latents, float* log_prob,
                     float* scratch, void* stream) {
  const int64_t chunks = num_chunks(policy.size), pieces = policy.batch * chunks;
  float* sums = chunks == 1 ? log_prob : scratch;
  dispatch_storage(policy.storage, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    NP_LAUNCH((sample_kernel<T>), num_blocks(pieces, kThreads / kWarp), kThreads, stream,
              static_cast<const T*>(policy.mean), static_cast<const T*>(policy.log_std), policy.batch, policy.size,
              policy.log_std_size, run_length(policy), seed, offset, latents, sums);
  });
  if (chunks > 1) sum_rows(scratch, policy.batch, chunks, log_prob, policy.batch, nullptr, stream);
  check_launch("gaussian_sample");
}

void density_rows(const Gaussian& policy, const float* latents, float* log_prob, float* kl_to_prior, float* scratch,
                  void* stream) {
  const int64_t chunks = num_chunks(policy.size), pieces = policy.batch * chunks;
  float* sums = chunks == 1 ? log_prob : scratch;
  float* kl_sums = chunks == 1 ? kl_to_prior : scratch + pieces;
  dispatch_storage(policy.storage, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto kernel) {
      NP_LAUNCH(kernel, num_blocks(pieces, kThreads / kWarp), kThreads, stream, static_cast<const T*>(policy.mean),
                static_cast<const T*>(policy.log_std), latents, policy.batch, policy.size, policy.log_std_size,
                run_length(policy), sums, kl_sums);
    };
    kl_to_prior != nullptr ? launch(density_kernel<T, true>) : launch(density_kernel<T, false>);
  });
  const int64_t num_rows = kl_to_prior != nullptr ? 2 * policy.batch : policy.batch;
  if (chunks > 1) sum_rows(scratch, num_rows, chunks, log_prob, policy.batch, kl_to_prior, stream);
}

void gaussian_log_prob(const Gaussian& policy, const float* latents, float* log_prob, float* scratch, void* stream) {
  density_rows(policy, latents, log_prob, nullptr, scratch, stream);
  check_launch("gaussian_log_prob");
}

void gaussian_backward(const Gaussian& policy, const float* latents, const float* grad_log_prob, const float* grad_kl,
                       const GaussianGradients& out, float* scratch, void* stream) {
  const bool is_full = policy.log_std_size == policy.size;
  const int64_t segments_per_row = is_full ? 1 : policy.log_std_size;
  const int64_t segments = policy.batch * segments_per_row, size = is_full ? policy.size : run_length(policy);
  const int64_t pieces = segments * num_chunks(size);
  dispatch_storage(policy.storage, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto kernel) {
      NP_LAUNCH(kernel, num_blocks(pieces, kThreads / kWarp), kThreads, stream, static_cast<const T*>(policy.mean),
                static_cast<const T*>(policy.log_std), latents, grad_log_prob, grad_kl, segments, segments_per_row,
                size, static_cast<T*>(out.mean), static_cast<T*>(out.log_std), out.latents, scratch);
    };
    is_full ? launch(backward_kernel<T, true>) : launch(backward_kernel<T, false>);
  });
  if (!is_full) sum_rows(scratch, segments, num_chunks(size), out.log_std, policy.storage, stream);
  check_launch("gaussian_backward");
}

}  // namespace noisepolicy::cuda
