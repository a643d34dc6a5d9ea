// Sampling and log-density of the Gaussian policy, portable loops. Row sums are kept in double.
#include <algorithm>
#include <vector>

#include "../gaussian_math.h"
#include "kernels.h"

namespace noisepolicy::cpu {
namespace {

// Writes the standard normals of one row. The last quad may be cut.
void fill_noise(uint64_t seed, uint64_t first_counter, int64_t size, float* out) {
  for (int64_t begin = 0; begin < size; begin += 4) {
    const Float4 normals = normal4(seed, first_counter + static_cast<uint64_t>(begin / 4));
    const float values[4] = {normals.x, normals.y, normals.z, normals.w};
    std::copy(values, values + std::min<int64_t>(4, size - begin), out + begin);
  }
}

uint64_t row_counter(uint64_t offset, int64_t row, int64_t size) {
  return offset + static_cast<uint64_t>(row) * static_cast<uint64_t>((size + 3) / 4);
}

// Turns a row of noise into a row of the policy's samples in place and returns its log-density.
template <typename T>
double shift_and_scale(const Gaussian& policy, int64_t row, float* values) {
  const T* mean = static_cast<const T*>(policy.mean) + row * policy.size;
  const T* log_std = static_cast<const T*>(policy.log_std) + row * policy.log_std_size;
  const int64_t run = policy.size / std::max<int64_t>(policy.log_std_size, 1);
  double total = 0.0;
  for (int64_t group = 0; group < policy.log_std_size; ++group) {
    const float group_log_std = to_float(log_std[group]), std = expf(group_log_std);
    for (int64_t d = group * run; d < (group + 1) * run; ++d) {
      total += log_density(values[d], group_log_std);
      values[d] = to_float(mean[d]) + std * values[d];
    }
  }
  return total;
}

// out[o, j, i] = sum_k matrix(j, k) in[o, k, i]: one axis of a separable transform.
// Analysis takes matrix = basis (bands, extent), synthesis its transpose.
void transform_axis(const float* in, int64_t outer, int64_t in_size, int64_t inner, const float* basis,
                    int64_t out_size, bool is_synthesis, float* out) {
  std::fill(out, out + outer * out_size * inner, 0.0f);
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t j = 0; j < out_size; ++j) {
      float* target = out + (o * out_size + j) * inner;
      for (int64_t k = 0; k < in_size; ++k) {
        const float weight = is_synthesis ? basis[k * out_size + j] : basis[j * in_size + k];
        const float* source = in + (o * in_size + k) * inner;
        for (int64_t i = 0; i < inner; ++i) target[i] += weight * source[i];
      }
    }
  }
}

// The low-band transform of one channel, with its workspace.
class ChannelTransform {
 public:
  explicit ChannelTransform(const Spectrum& spectrum)
      : s_(spectrum),
        first_(s_.extent[0] * s_.extent[1] * s_.extent[2]),
        second_(first_.size()) {}

  void analyse(const float* channel, float* coefficients) {
    const int64_t *n = s_.extent, *b = s_.bands;
    transform_axis(channel, n[0] * n[1], n[2], 1, s_.basis[2], b[2], false, first_.data());
    transform_axis(first_.data(), n[0], n[1], b[2], s_.basis[1], b[1], false, second_.data());
    transform_axis(second_.data(), 1, n[0], b[1] * b[2], s_.basis[0], b[0], false, coefficients);
  }

  void add_synthesis(const float* coefficients, float* channel) {
    const int64_t *n = s_.extent, *b = s_.bands;
    transform_axis(coefficients, 1, b[0], b[1] * b[2], s_.basis[0], n[0], true, first_.data());
    transform_axis(first_.data(), n[0], b[1], b[2], s_.basis[1], n[1], true, second_.data());
    transform_axis(second_.data(), n[0] * n[1], b[2], 1, s_.basis[2], n[2], true, first_.data());
    for (size_t i = 0; i < first_.size(); ++i) channel[i] += first_[i];
  }

 private:
  const Spectrum& s_;
  std::vector<float> first_, second_;
};

}  // namespace

void gaussian_sample(const Gaussian& policy, uint64_t seed, uint64_t offset, float* latents, float* log_prob) {
  dispatch_storage(policy.storage, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    for (int64_t row = 0; row < policy.batch; ++row) {
      float* values = latents + row * policy.size;
      fill_noise(seed, row_counter(offset, row, policy.size), policy.size, values);
      log_prob[row] = static_cast<float>(shift_and_scale<T>(policy, row, values));
    }
  });
}

void spectral_sample(const Gaussian& policy, const Spectrum& spectrum, uint64_t seed, uint64_t offset, float* latents,
                     float* coefficients, float* log_prob) {
  const int64_t channel_size = spectrum.extent[0] * spectrum.extent[1] * spectrum.extent[2];
  const int64_t row_size = spectrum.channels * channel_size;
  const int64_t band_size = spectrum.bands[0] * spectrum.bands[1] * spectrum.bands[2];
  ChannelTransform transform(spectrum);
  std::vector<float> difference(policy.size);
  dispatch_storage(policy.storage, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    for (int64_t row = 0; row < policy.batch; ++row) {
      float* values = latents + row * row_size;
      float* action = coefficients + row * policy.size;
      fill_noise(seed, row_counter(offset, row, row_size), row_size, values);
      for (int64_t c = 0; c < spectrum.channels; ++c) {
        transform.analyse(values + c * channel_size, action + c * band_size);
      }
      std::copy(action, action + policy.size, difference.begin());
      log_prob[row] = static_cast<float>(shift_and_scale<T>(policy, row, action));
      // What is added is action - noise: exactly zero where the policy is the prior, so the latents keep their bits.
      for (int64_t k = 0; k < policy.size; ++k) difference[k] = action[k] - difference[k];
      for (int64_t c = 0; c < spectrum.channels; ++c) {
        transform.add_synthesis(difference.data() + c * band_size, values + c * channel_size);
      }
    }
  });
}

void gaussian_log_prob(const Gaussian& policy, const float* latents, float* log_prob) {
  dispatch_storage(policy.storage, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const T* mean = static_cast<const T*>(policy.mean);
    const T* log_std = static_cast<const T*>(policy.log_std);
    const int64_t run = policy.size / std::max<int64_t>(policy.log_std_size, 1);
    for (int64_t row = 0; row < policy.batch; ++row) {
      double total = 0.0;
      for (int64_t d = 0; d < policy.size; ++d) {
        const int64_t i = row * policy.size + d;
        const float group_log_std = to_float(log_std[row * policy.log_std_size + d / run]);
        total += log_density(standardize(latents[i], to_float(mean[i]), group_log_std), group_log_std);
      }
      log_prob[row] = static_cast<float>(total);
    }
  });
}

void gaussian_log_prob_backward(const Gaussian& policy, const float* latents, const float* grad_output,
                                float* grad_latents, float* grad_mean, float* grad_log_std) {
  dispatch_storage(policy.storage, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const T* mean = static_cast<const T*>(policy.mean);
    const T* log_std = static_cast<const T*>(policy.log_std);
    const int64_t run = policy.size / std::max<int64_t>(policy.log_std_size, 1);
    for (int64_t row = 0; row < policy.batch; ++row) {
      for (int64_t group = 0; group < policy.log_std_size; ++group) {
        const float group_log_std = to_float(log_std[row * policy.log_std_size + group]);
        double total = 0.0;
        for (int64_t i = row * policy.size + group * run, end = i + run; i < end; ++i) {
          const float noise = standardize(latents[i], to_float(mean[i]), group_log_std);
          const float grad = grad_output[row] * log_density_grad_mean(noise, group_log_std);
          total += log_density_grad_log_std(noise);
          if (grad_mean) grad_mean[i] = grad;
          if (grad_latents) grad_latents[i] = -grad;
        }
        if (grad_log_std) grad_log_std[row * policy.log_std_size + group] = static_cast<float>(grad_output[row] * total);
      }
    }
  });
}

}  // namespace noisepolicy::cpu
