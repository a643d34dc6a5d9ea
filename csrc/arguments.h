// What every kernel, on the CPU and on a GPU, is told of its tensors. All arrays are dense, row-major.
#pragma once

#include <cstdint>

namespace noisepolicy {

enum class Storage : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A diagonal Gaussian. `mean` is (batch, size); `log_std` is (batch, log_std_size), one value for each run of
// size / log_std_size elements: every element has its own (log_std_size = size), or a channel, or a row.
struct Gaussian {
  const void* mean;
  const void* log_std;
  Storage storage;  // of both
  int64_t batch, size, log_std_size;
};

// Low band of a channel's separable orthonormal DCT: axis i has extent[i] elements and bands[i] frequencies, and
// basis[i] is (bands[i], extent[i]), float. Images have extent[0] = bands[0] = 1.
struct Spectrum {
  int64_t channels;
  int64_t extent[3], bands[3];
  const float* basis[3];
};

// What ppo_clip_loss writes, all float.
struct PpoForward {
  float* totals;         // (3,) the loss, approx_kl, clip_fraction
  float* log_prob;       // (batch,)
  float* ratio;          // (batch,)
  float* kl_to_prior;    // (batch,)
  float* grad_log_prob;  // (batch,) d loss / d log_prob
};

// What gaussian_backward writes; the first two in the policy's storage. grad_latents may be null.
struct GaussianGradients {
  void* mean;      // (batch, size)
  void* log_std;   // (batch, log_std_size)
  float* latents;  // (batch, size)
};

}  // namespace noisepolicy
