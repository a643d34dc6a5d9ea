// The Python module noisepolicy._C. Tensors arrive as addresses and sizes, so one build serves every torch version;
// noisepolicy/ops/native.py owns the tensors and has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/kernels.h"
#include "philox.h"

namespace py = pybind11;

namespace noisepolicy {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cpu::Gaussian make_gaussian(uintptr_t mean, uintptr_t log_std, int storage, int64_t batch, int64_t size,
                            int64_t log_std_size) {
  return {pointer<void>(mean), pointer<void>(log_std), static_cast<Storage>(storage), batch, size, log_std_size};
}

cpu::Spectrum make_spectrum(int64_t channels, const std::array<int64_t, 3>& extent,
                            const std::array<int64_t, 3>& bands, const std::array<uintptr_t, 3>& basis) {
  cpu::Spectrum spectrum{channels, {}, {}, {}};
  for (int axis = 0; axis < 3; ++axis) {
    spectrum.extent[axis] = extent[axis];
    spectrum.bands[axis] = bands[axis];
    spectrum.basis[axis] = pointer<const float>(basis[axis]);
  }
  return spectrum;
}

}  // namespace
}  // namespace noisepolicy

PYBIND11_MODULE(_C, m) {
  using namespace noisepolicy;
  m.doc() = "Native kernels of noisepolicy; called through noisepolicy.ops.";

  py::class_<cpu::Gaussian>(m, "Gaussian")
      .def(py::init(&make_gaussian), py::arg("mean"), py::arg("log_std"), py::arg("storage"), py::arg("batch"),
           py::arg("size"), py::arg("log_std_size"));
  py::class_<cpu::Spectrum>(m, "Spectrum")
      .def(py::init(&make_spectrum), py::arg("channels"), py::arg("extent"), py::arg("bands"), py::arg("basis"));

  m.def(
      "gaussian_sample",
      [](const cpu::Gaussian& policy, uint64_t seed, uint64_t offset, uintptr_t latents, uintptr_t log_prob) {
        cpu::gaussian_sample(policy, seed, offset, pointer<float>(latents), pointer<float>(log_prob));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "spectral_sample",
      [](const cpu::Gaussian& policy, const cpu::Spectrum& spectrum, uint64_t seed, uint64_t offset,
         uintptr_t latents, uintptr_t coefficients, uintptr_t log_prob) {
        cpu::spectral_sample(policy, spectrum, seed, offset, pointer<float>(latents), pointer<float>(coefficients),
                             pointer<float>(log_prob));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "gaussian_log_prob",
      [](const cpu::Gaussian& policy, uintptr_t latents, uintptr_t log_prob) {
        cpu::gaussian_log_prob(policy, pointer<const float>(latents), pointer<float>(log_prob));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "gaussian_log_prob_backward",
      [](const cpu::Gaussian& policy, uintptr_t latents, uintptr_t grad_output, uintptr_t grad_latents,
         uintptr_t grad_mean, uintptr_t grad_log_std) {
        cpu::gaussian_log_prob_backward(policy, pointer<const float>(latents), pointer<const float>(grad_output),
                                        pointer<float>(grad_latents), pointer<float>(grad_mean),
                                        pointer<float>(grad_log_std));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "ppo_clip_loss",
      [](const cpu::Gaussian& policy, uintptr_t latents, uintptr_t old_log_prob, uintptr_t advantages,
         float clip_range, float kl_coef, uintptr_t log_prob, uintptr_t ratio, uintptr_t kl_to_prior,
         uintptr_t objective, uintptr_t grad_mean, uintptr_t grad_log_std) {
        cpu::ppo_clip_loss(policy, pointer<const float>(latents), pointer<const float>(old_log_prob),
                           pointer<const float>(advantages), clip_range, kl_coef,
                           {pointer<float>(log_prob), pointer<float>(ratio), pointer<float>(kl_to_prior),
                            pointer<float>(objective), pointer<float>(grad_mean), pointer<float>(grad_log_std)});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("philox4x32", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const Uint4 words = philox4x32({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
    return std::array<uint32_t, 4>{words.x, words.y, words.z, words.w};
  });
}
