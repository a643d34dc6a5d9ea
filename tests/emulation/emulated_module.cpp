// The product's CUDA bindings as a module of their own, over kernels compiled for the CPU.
#include "cuda/bindings.cpp"

PYBIND11_MODULE(emulated_module, m) { noisepolicy::bind_cuda(m); }
