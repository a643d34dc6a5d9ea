// noisepolicy._C.cuda. Tensors arrive as addresses and sizes, the stream as an address; noisepolicy/ops/cuda.py owns
// and checks them. Needs no CUDA headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "kernels.h"

namespace py = pybind11;

namespace noisepolicy {
namespace {

using Address = uintptr_t;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// (mean, log_std, storage, batch, size, log_std_size)
using GaussianFields = std::array<int64_t, 6>;

Gaussian make_gaussian(const GaussianFields& fields) {
  const auto [mean, log_std, storage, batch, size, log_std_size] = fields;
  return {pointer<void>(mean), pointer<void>(log_std), static_cast<Storage>(storage), batch, size, log_std_size};
}

// (channels, extents, bands, addresses of the bases)
using SpectrumFields = std::array<int64_t, 10>;

Spectrum make_spectrum(const SpectrumFields& fields) {
  Spectrum spectrum{fields[0], {}, {}, {}};
  for (int axis = 0; axis < 3; ++axis) {
    spectrum.extent[axis] = fields[1 + axis];
    spectrum.bands[axis] = fields[4 + axis];
    spectrum.basis[axis] = pointer<const float>(fields[7 + axis]);
  }
  return spectrum;
}

}  // namespace

// Called by csrc/bindings.cpp.
void bind_cuda(py::module_& parent) {
  using namespace cuda;
  py::module_ m = parent.def_submodule("cuda", "CUDA kernels; called through noisepolicy.ops.");
  m.def("device_problem", &device_problem);

  m.def("gaussian_sample_scratch",
        [](GaussianFields policy) { return gaussian_sample_scratch(make_gaussian(policy)); });
  m.def(
      "gaussian_sample",
      [](GaussianFields policy, uint64_t seed, uint64_t offset, Address latents, Address log_prob, Address scratch,
         Address stream) {
        gaussian_sample(make_gaussian(policy), seed, offset, pointer<float>(latents), pointer<float>(log_prob),
                        pointer<float>(scratch), pointer<void>(stream));
      },
      ReleaseGil());

  m.def("spectral_sample_scratch", [](GaussianFields policy, SpectrumFields spectrum) {
    return spectral_sample_scratch(make_gaussian(policy), make_spectrum(spectrum));
  });
  m.def(
      "spectral_sample",
      [](GaussianFields policy, SpectrumFields spectrum, uint64_t seed, uint64_t offset, Address latents,
         Address coefficients, Address log_prob, Address scratch, Address stream) {
        spectral_sample(make_gaussian(policy), make_spectrum(spectrum), seed, offset, pointer<float>(latents),
                        pointer<float>(coefficients), pointer<float>(log_prob), pointer<float>(scratch),
                        pointer<void>(stream));
      },
      ReleaseGil());

  m.def("gaussian_log_prob_scratch",
        [](GaussianFields policy) { return gaussian_log_prob_scratch(make_gaussian(policy)); });
  m.def(
      "gaussian_log_prob",
      [](GaussianFields policy, Address latents, Address log_prob, Address scratch, Address stream) {
        gaussian_log_prob(make_gaussian(policy), pointer<const float>(latents), pointer<float>(log_prob),
                          pointer<float>(scratch), pointer<void>(stream));
      },
      ReleaseGil());

  m.def("ppo_clip_loss_scratch", [](GaussianFields policy) { return ppo_clip_loss_scratch(make_gaussian(policy)); });
  m.def(
      "ppo_clip_loss",
      [](GaussianFields policy, Address latents, Address old_log_prob, Address advantages, float clip_range,
         float kl_coef, Address totals, Address log_prob, Address ratio, Address kl_to_prior, Address grad_log_prob,
         Address scratch, Address stream) {
        const PpoForward out = {pointer<float>(totals), pointer<float>(log_prob), pointer<float>(ratio),
                                pointer<float>(kl_to_prior), pointer<float>(grad_log_prob)};
        ppo_clip_loss(make_gaussian(policy), pointer<const float>(latents), pointer<const float>(old_log_prob),
                      pointer<const float>(advantages), clip_range, kl_coef, out, pointer<float>(scratch),
                      pointer<void>(stream));
      },
      ReleaseGil());

  m.def("gaussian_backward_scratch",
        [](GaussianFields policy) { return gaussian_backward_scratch(make_gaussian(policy)); });
  m.def(
      "gaussian_backward",
      [](GaussianFields policy, Address latents, Address grad_log_prob, Address grad_kl, Address grad_mean,
         Address grad_log_std, Address grad_latents, Address scratch, Address stream) {
        const GaussianGradients out = {pointer<void>(grad_mean), pointer<void>(grad_log_std),
                                       pointer<float>(grad_latents)};
        gaussian_backward(make_gaussian(policy), pointer<const float>(latents), pointer<const float>(grad_log_prob),
                          pointer<const float>(grad_kl), out, pointer<float>(scratch), pointer<void>(stream));
      },
      ReleaseGil());
}

}  // namespace noisepolicy
