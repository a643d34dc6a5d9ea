// Runs every CUDA op on arrays of exactly the size it may touch, for the sanitizers, and prints a checksum of each
// result, which must not depend on the order of threads.
#include <cstdio>
#include <memory>
#include <vector>

#include "cuda/kernels.h"
#include "storage.h"

using namespace noisepolicy;

namespace {

// On the heap by itself, so that the element after the last is out of bounds. `lead` elements before the first put it
// at an address that is no multiple of 16.
template <typename T>
class Array {
 public:
  Array(int64_t size, int lead = 0) : size_(size), lead_(lead), data_(new T[size + lead]()) {}
  T* get() { return data_.get() + lead_; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  int lead_;
  std::unique_ptr<T[]> data_;
};

template <typename T>
Array<T> values(int64_t size, float scale, int lead = 0) {
  Array<T> array(size, lead);
  for (int64_t i = 0; i < size; ++i)
    from_float(scale * static_cast<float>((i * 7919) % 101 - 50) / 50.0f, array.get()[i]);
  return array;
}

uint64_t checksum = 14695981039346656037u;

template <typename T>
void add(Array<T>& array) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(array.get());
  for (size_t i = 0; i < array.size() * sizeof(T); ++i) checksum = (checksum ^ bytes[i]) * 1099511628211u;
}

template <typename T>
constexpr Storage storage_of() {
  return sizeof(T) == sizeof(float) ? Storage::kFloat32 : Storage::kBFloat16;
}

template <typename T>
void run_gaussian(int64_t batch, int64_t size, int64_t log_std_size, int lead) {
  Array<T> mean = values<T>(batch * size, 1.0f, lead), log_std = values<T>(batch * log_std_size, 0.3f, lead);
  const Gaussian policy = {mean.get(), log_std.get(), storage_of<T>(), batch, size, log_std_size};
  Array<float> latents(batch * size, lead), log_prob(batch);
  {
    Array<float> scratch(cuda::gaussian_sample_scratch(policy));
    cuda::gaussian_sample(policy, 3, ~0ull - 1, latents.get(), log_prob.get(), scratch.get(), nullptr);
    add(latents);
    add(log_prob);
  }
  {
    Array<float> scratch(cuda::gaussian_log_prob_scratch(policy));
    cuda::gaussian_log_prob(policy, latents.get(), log_prob.get(), scratch.get(), nullptr);
    add(log_prob);
  }
  for (int64_t row = 0; row < batch; ++row) log_prob.get()[row] += 0.1f * static_cast<float>(row % 7 - 3);
  Array<float> advantages = values<float>(batch, 1.0f), ratio(batch), kl_to_prior(batch), grad_log_prob(batch);
  Array<float> totals(3), density(batch);
  {
    Array<float> scratch(cuda::ppo_clip_loss_scratch(policy));
    const PpoForward out = {totals.get(), density.get(), ratio.get(), kl_to_prior.get(), grad_log_prob.get()};
    cuda::ppo_clip_loss(policy, latents.get(), log_prob.get(), advantages.get(), 0.2f, 0.1f, out, scratch.get(),
                        nullptr);
    for (Array<float>* result : {&totals, &density, &ratio, &kl_to_prior, &grad_log_prob}) add(*result);
  }
  Array<T> grad_mean(batch * size, lead), grad_log_std(batch * log_std_size, lead);
  Array<float> grad_latents(batch * size, lead), scratch(cuda::gaussian_backward_scratch(policy));
  cuda::gaussian_backward(policy, latents.get(), advantages.get(), ratio.get(),
                          {grad_mean.get(), grad_log_std.get(), grad_latents.get()}, scratch.get(), nullptr);
  add(grad_mean);
  add(grad_log_std);
  add(grad_latents);
}

void run_spectral(int64_t batch, Spectrum spectrum, int64_t log_std_size) {
  int64_t size = spectrum.channels, latent_size = spectrum.channels;
  std::vector<Array<float>> bases;
  for (int axis = 0; axis < 3; ++axis) {
    size *= spectrum.bands[axis];
    latent_size *= spectrum.extent[axis];
    bases.push_back(values<float>(spectrum.bands[axis] * spectrum.extent[axis], 0.5f));
    spectrum.basis[axis] = bases.back().get();
  }
  if (log_std_size == 0) log_std_size = size;
  Array<float> mean = values<float>(batch * size, 1.0f), log_std = values<float>(batch * log_std_size, 0.3f);
  const Gaussian policy = {mean.get(), log_std.get(), Storage::kFloat32, batch, size, log_std_size};
  Array<float> latents(batch * latent_size), coefficients(batch * size), log_prob(batch);
  Array<float> scratch(cuda::spectral_sample_scratch(policy, spectrum));
  cuda::spectral_sample(policy, spectrum, 3, 1, latents.get(), coefficients.get(), log_prob.get(), scratch.get(),
                        nullptr);
  add(latents);
  add(coefficients);
  add(log_prob);
}

}  // namespace

int main() {
  for (int64_t size : {1, 4, 5, 127, 1025}) {
    run_gaussian<float>(3, size, size, 0);
    run_gaussian<float>(3, size, size, 1);
    run_gaussian<BFloat16>(3, size, 1, 1);
  }
  run_gaussian<float>(0, 5, 5, 0);
  run_gaussian<float>(3, 35, 5, 0);
  run_gaussian<BFloat16>(3, 1030, 2, 0);
  run_gaussian<float>(700, 3, 3, 0);                  // more rows than one block of the loss has threads
  run_spectral(5, {4, {1, 8, 8}, {1, 8, 8}, {}}, 0);  // more slabs than blocks
  run_spectral(2, {2, {1, 40, 64}, {1, 4, 8}, {}}, 2);
  run_spectral(3, {3, {1, 5, 7}, {1, 2, 3}, {}}, 1);
  run_spectral(1, {1, {3, 70, 33}, {3, 2, 5}, {}}, 0);
  run_spectral(1, {1, {1, 2, 1027}, {1, 2, 5}, {}}, 0);
  std::printf("%016llx\n", static_cast<unsigned long long>(checksum));
}
