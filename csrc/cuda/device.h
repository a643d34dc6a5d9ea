// What the kernels share: four elements at a time, sums over a warp and over rows, the size of a grid.
//
// A warp takes a chunk of kChunk consecutive elements of a row, so no sum within a chunk needs a barrier; a second
// kernel adds a row's chunks. Blocks step over chunks until none is left: the grid decides the speed, never the result.
#pragma once

#include "../gaussian_math.h"
#include "../storage.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define NP_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "cuda_on_cpu.h"  // tests/emulation
#endif

namespace noisepolicy::cuda {

constexpr int kThreads = 256;
constexpr int kMinBlocks = 4;  // on a processor at a time, of kThreads each: leaves 64 registers a thread
constexpr int kWarp = 32;
constexpr int kQuadsPerLane = 4;
constexpr int kChunk = 4 * kWarp * kQuadsPerLane;

struct Quad {
  float v[4];
};

template <typename T>
struct alignas(4 * sizeof(T)) Packed {
  T x, y, z, w;
};

// An empty row is one empty chunk, so that its sum is written.
NP_HD int64_t num_chunks(int64_t size) { return size > kChunk ? (size + kChunk - 1) / kChunk : 1; }

// How many elements share a log_std.
inline int64_t run_length(const Gaussian& policy) {
  return policy.log_std_size ? policy.size / policy.log_std_size : 1;
}

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }

__device__ __forceinline__ int64_t warp_index() {
  return static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
}

__device__ __forceinline__ int64_t num_warps() { return static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp); }

// How many of the four elements from `first` on are in the row.
__device__ __forceinline__ int count4(int64_t first, int64_t size) {
  const int64_t left = size - first;
  return left >= 4 ? 4 : static_cast<int>(left);
}

template <typename T>
__device__ __forceinline__ bool is_packed(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(Packed<T>) == 0;
}

// The first `count` of four elements, the rest 0: in one access where the address allows it. Rows of a size that is no
// multiple of four start anywhere.
template <typename T>
__device__ __forceinline__ Quad load4(const T* from, int count) {
  if (count == 4 && is_packed(from)) {
    const Packed<T> packed = *reinterpret_cast<const Packed<T>*>(from);
    return {{to_float(packed.x), to_float(packed.y), to_float(packed.z), to_float(packed.w)}};
  }
  Quad quad = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) quad.v[i] = to_float(from[i]);
  }
  return quad;
}

template <typename T>
__device__ __forceinline__ void store4(const Quad& quad, T* to, int count) {
  if (count == 4 && is_packed(to)) {
    Packed<T> packed;
    from_float(quad.v[0], packed.x);
    from_float(quad.v[1], packed.y);
    from_float(quad.v[2], packed.z);
    from_float(quad.v[3], packed.w);
    *reinterpret_cast<Packed<T>*>(to) = packed;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) from_float(quad.v[i], to[i]);
  }
}

// The log-stds of the four elements from `first` on; `row` has one for each `run` of elements.
template <typename T>
__device__ __forceinline__ Quad load_log_std(const T* row, int64_t first, int count, int64_t run) {
  if (run == 1) return load4(row + first, count);
  int64_t index = first / run, left = run - (first - index * run);
  float value = to_float(row[index]);
  Quad quad = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) break;
    if (left == 0) {
      value = to_float(row[++index]);
      left = run;
    }
    quad.v[i] = value;
    --left;
  }
  return quad;
}

__device__ __forceinline__ Quad draw4(uint64_t seed, uint64_t counter) {
  const Float4 normals = normal4(seed, counter);
  return {{normals.x, normals.y, normals.z, normals.w}};
}

// Complete in lane 0. Every lane of the warp must call it.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, distance);
  return value;
}

// Blocks for that many pieces of work: as many as fill the device, unless fewer will do; one where there is nothing.
int64_t num_blocks(int64_t num_pieces, int pieces_per_block);

// out[row] = sum of partials[row * num_partials ...]; rows from `num_first` on go to `second`.
void sum_rows(const float* partials, int64_t num_rows, int64_t num_partials, float* first, int64_t num_first,
              float* second, void* stream);
void sum_rows(const float* partials, int64_t num_rows, int64_t num_partials, void* out, Storage storage, void* stream);

// The log-densities of latents, and the policy's KL to the prior unless kl_to_prior is null. The sums of both ops that
// need them are the same bits, so the ratio of an unchanged policy is 1.
void density_rows(const Gaussian& policy, const float* latents, float* log_prob, float* kl_to_prior, float* scratch,
                  void* stream);

// Throws std::runtime_error where a launch has failed.
void check_launch(const char* op);

}  // namespace noisepolicy::cuda
