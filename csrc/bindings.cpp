// The Python module noisepolicy._C. Tensors arrive as addresses and sizes, so one build serves every torch version;
// noisepolicy/ops owns the tensors and has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/kernels.h"
#include "philox.h"

namespace py = pybind11;

namespace noisepolicy {

void bind_cuda(py::module_& parent);  // csrc/cuda/bindings.cpp

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Gaussian make_gaussian(uintptr_t mean, uintptr_t log_std, int storage, int64_t batch, int64_t size,
                       int64_t log_std_size) {
  return {pointer<void>(mean), pointer<void>(log_std), static_cast<Storage>(storage), batch, size, log_std_size};
}

// In all of these the first six arguments are the policy's.
void gaussian_sample(uintptr_t mean, uintptr_t log_std, int storage, int64_t batch, int64_t size, int64_t log_std_size,
                     uint64_t seed, uint64_t offset, int num_threads, uintptr_t latents, uintptr_t log_prob) {
  cpu::gaussian_sample(make_gaussian(mean, log_std, storage, batch, size, log_std_size), seed, offset, num_threads,
                       pointer<float>(latents), pointer<float>(log_prob));
}

void spectral_sample(uintptr_t mean, uintptr_t log_std, int storage, int64_t batch, int64_t size, int64_t log_std_size,
                     int64_t channels, const std::array<int64_t, 3>& extent, const std::array<int64_t, 3>& bands,
                     const std::array<uintptr_t, 3>& basis, uint64_t seed, uint64_t offset, int num_threads,
                     uintptr_t latents, uintptr_t coefficients, uintptr_t log_prob) {
  Spectrum spectrum{channels, {}, {}, {}};
  for (int axis = 0; axis < 3; ++axis) {
    spectrum.extent[axis] = extent[axis];
    spectrum.bands[axis] = bands[axis];
    spectrum.basis[axis] = pointer<const float>(basis[axis]);
  }
  cpu::spectral_sample(make_gaussian(mean, log_std, storage, batch, size, log_std_size), spectrum, seed, offset,
                       num_threads, pointer<float>(latents), pointer<float>(coefficients), pointer<float>(log_prob));
}

void gaussian_log_prob(uintptr_t mean, uintptr_t log_std, int storage, int64_t batch, int64_t size,
                       int64_t log_std_size, int num_threads, uintptr_t latents, uintptr_t log_prob) {
  cpu::gaussian_log_prob(make_gaussian(mean, log_std, storage, batch, size, log_std_size),
                         pointer<const float>(latents), num_threads, pointer<float>(log_prob));
}

void ppo_clip_loss(uintptr_t mean, uintptr_t log_std, int storage, int64_t batch, int64_t size, int64_t log_std_size,
                   int num_threads, uintptr_t latents, uintptr_t old_log_prob, uintptr_t advantages, float clip_range,
                   float kl_coef, uintptr_t totals, uintptr_t log_prob, uintptr_t ratio, uintptr_t kl_to_prior,
                   uintptr_t grad_log_prob, uintptr_t grad_mean, uintptr_t grad_log_std) {
  const GaussianGradients gradients{pointer<void>(grad_mean), pointer<void>(grad_log_std), nullptr};
  cpu::ppo_clip_loss(make_gaussian(mean, log_std, storage, batch, size, log_std_size), pointer<const float>(latents),
                     pointer<const float>(old_log_prob), pointer<const float>(advantages), clip_range, kl_coef,
                     num_threads,
                     {pointer<float>(totals), pointer<float>(log_prob), pointer<float>(ratio),
                      pointer<float>(kl_to_prior), pointer<float>(grad_log_prob)},
                     grad_mean ? &gradients : nullptr);
}

void gaussian_backward(uintptr_t mean, uintptr_t log_std, int storage, int64_t batch, int64_t size,
                       int64_t log_std_size, int num_threads, uintptr_t latents, uintptr_t grad_log_prob,
                       uintptr_t grad_kl, uintptr_t grad_mean, uintptr_t grad_log_std, uintptr_t grad_latents) {
  cpu::gaussian_backward(make_gaussian(mean, log_std, storage, batch, size, log_std_size),
                         pointer<const float>(latents), pointer<const float>(grad_log_prob),
                         pointer<const float>(grad_kl), num_threads,
                         {pointer<void>(grad_mean), pointer<void>(grad_log_std), pointer<float>(grad_latents)});
}

}  // namespace
}  // namespace noisepolicy

PYBIND11_MODULE(_C, m) {
  using namespace noisepolicy;
  m.doc() = "Native kernels of noisepolicy; called through noisepolicy.ops.";
  const py::call_guard<py::gil_scoped_release> no_gil;
#ifdef NOISEPOLICY_WITH_CUDA
  bind_cuda(m);
#endif
  m.def("gaussian_sample", &gaussian_sample, no_gil);
  m.def("spectral_sample", &spectral_sample, no_gil);
  m.def("gaussian_log_prob", &gaussian_log_prob, no_gil);
  m.def("ppo_clip_loss", &ppo_clip_loss, no_gil);
  m.def("gaussian_backward", &gaussian_backward, no_gil);
  m.def("instruction_set", &cpu::instruction_set);
  m.def("bare_words", &cpu::bare_words, no_gil);
  m.def("bare_loss", &cpu::bare_loss, no_gil);
  m.def("philox4x32", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const Uint4 words = philox4x32({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
    return std::array<uint32_t, 4>{words.x, words.y, words.z, words.w};
  });
}
