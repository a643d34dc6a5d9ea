// The device, the size of a grid, and the second stage of every row sum.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "device.h"
#include "kernels.h"

namespace noisepolicy::cuda {
namespace {

constexpr int64_t kBlocksPerProcessor = 16;

// A warp adds the partial sums of a row, in double: log-densities are large, and what is left of two of them small.
template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    sum_rows_kernel(const float* __restrict__ partials, int64_t num_rows, int64_t num_partials, T* __restrict__ first,
                    int64_t num_first, T* __restrict__ second) {
  for (int64_t row = warp_index(); row < num_rows; row += num_warps()) {
    double sum = 0.0;
    for (int64_t i = lane_index(); i < num_partials; i += kWarp) sum += partials[row * num_partials + i];
    sum = warp_sum(sum);
    if (lane_index() == 0) from_float(static_cast<float>(sum), row < num_first ? first[row] : second[row - num_first]);
  }
}

template <typename T>
void launch_sum_rows(const float* partials, int64_t num_rows, int64_t num_partials, T* first, int64_t num_first,
                     T* second, void* stream) {
  NP_LAUNCH((sum_rows_kernel<T>), num_blocks(num_rows, kThreads / kWarp), kThreads, stream, partials, num_rows,
            num_partials, first, num_first, second);
}

}  // namespace

const char* device_problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count == 0 ? "no CUDA device" : "";
}

int64_t num_blocks(int64_t num_pieces, int pieces_per_block) {
  int device = 0, num_processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t num_needed = (num_pieces + pieces_per_block - 1) / pieces_per_block;
  return std::clamp<int64_t>(num_needed, 1, kBlocksPerProcessor * num_processors);
}

void sum_rows(const float* partials, int64_t num_rows, int64_t num_partials, float* first, int64_t num_first,
              float* second, void* stream) {
  launch_sum_rows(partials, num_rows, num_partials, first, num_first, second, stream);
}

void sum_rows(const float* partials, int64_t num_rows, int64_t num_partials, void* out, Storage storage, void* stream) {
  dispatch_storage(storage, [&](auto* type) {
    auto* rows = static_cast<decltype(type)>(out);
    launch_sum_rows(partials, num_rows, num_partials, rows, num_rows, rows, stream);
  });
}

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace noisepolicy::cuda
