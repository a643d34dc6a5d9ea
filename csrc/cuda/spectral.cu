// White noise with its low DCT band replaced, on a GPU. Noise is drawn twice from its counter and never stored: once
// to find its low band, once to be written with the difference between the policy's band and its own.
//
//   project_kernel  a block draws a slab (some lines of one frame) into shared memory: its low band along x and y
//   act_kernel      adds slabs and frames, and turns the low band into the policy's action
//   write_kernel    a block draws its slab again and adds the inverse transform of (action - low band)
//
// At the prior that difference is exactly 0, so the latents are gaussian_sample's.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "device.h"
#include "kernels.h"

namespace noisepolicy::cuda {
namespace {

constexpr int kSlabThreads = 128;
constexpr int kTile = kMaxBands + 32;  // floats; 32 lines of 64 elements, padded, are 2080
constexpr int64_t kMaxWidth = 512;     // the longest sum in one go: longer ones would lose accuracy

// How planes (one frame of one channel) are cut: into slabs of whole lines, or one line that is projected `width`
// elements at a time.
struct Slabs {
  int64_t per_row, per_plane, lines, width;
};

Slabs make_slabs(const Spectrum& spectrum) {
  Slabs slabs;
  slabs.width = std::min(spectrum.extent[2], kMaxWidth);
  const int64_t most_lines = spectrum.extent[2] > kMaxWidth ? 1 : kTile / (slabs.width | 1);
  slabs.lines = std::min(spectrum.extent[1], most_lines);
  slabs.per_plane = (spectrum.extent[1] + slabs.lines - 1) / slabs.lines;
  slabs.per_row = spectrum.channels * spectrum.extent[0] * slabs.per_plane;
  return slabs;
}

// Where a slab is, within a row unless it says otherwise.
struct Place {
  int64_t row, channel, frame, line, first;
  int lines;
};

__device__ __forceinline__ Place place_of(int64_t piece, const Spectrum& spectrum, const Slabs& slabs) {
  Place place;
  place.row = piece / slabs.per_row;
  const int64_t slab = piece - place.row * slabs.per_row, plane = slab / slabs.per_plane;
  place.channel = plane / spectrum.extent[0];
  place.frame = plane - place.channel * spectrum.extent[0];
  place.line = (slab - plane * slabs.per_plane) * slabs.lines;
  place.first = (plane * spectrum.extent[1] + place.line) * spectrum.extent[2];
  place.lines = static_cast<int>(min(slabs.lines, spectrum.extent[1] - place.line));
  return place;
}

__device__ __forceinline__ uint64_t row_counter(const Spectrum& spectrum, uint64_t offset, int64_t row) {
  const int64_t size = spectrum.channels * spectrum.extent[0] * spectrum.extent[1] * spectrum.extent[2];
  return offset + static_cast<uint64_t>(row * ((size + 3) / 4));
}

// partials[slab][v][u], u along x.
__global__ void __launch_bounds__(kSlabThreads, 2 * kMinBlocks)
    project_kernel(Spectrum spectrum, Slabs slabs, int64_t num_slabs, uint64_t seed, uint64_t offset,
                   float* __restrict__ partials) {
  __shared__ float tile[kTile];       // [line][x]; an odd pitch puts the lines of a warp in different banks
  __shared__ float projected[kTile];  // [u][line]
  const int width = static_cast<int>(slabs.width), pitch = width | 1;
  const int bands_y = static_cast<int>(spectrum.bands[1]), bands_x = static_cast<int>(spectrum.bands[2]);
  for (int64_t slab = blockIdx.x; slab < num_slabs; slab += gridDim.x) {
    const Place place = place_of(slab, spectrum, slabs);
    const uint64_t counter = row_counter(spectrum, offset, place.row);
    for (int64_t x0 = 0; x0 < spectrum.extent[2]; x0 += width) {
      const int columns = static_cast<int>(min(slabs.width, spectrum.extent[2] - x0)), count = place.lines * columns;
      const int64_t begin = place.first + x0, first_quad = begin / 4, last_quad = (begin + count - 1) / 4;
      for (int64_t quad = first_quad + threadIdx.x; quad <= last_quad; quad += kSlabThreads) {
        const Quad noise = draw4(seed, counter + static_cast<uint64_t>(quad));
        const int element = static_cast<int>(4 * quad - begin);  // negative where the slab begins within a quad
        int line = element > 0 ? element / columns : 0, x = element - line * columns;
#pragma unroll
        for (int k = 0; k < 4; ++k, ++x) {
          if (x == columns) {
            x = 0;
            ++line;
          }
          if (x >= 0 && element + k < count) tile[line * pitch + x] = noise.v[k];
        }
      }
      __syncthreads();
      for (int out = threadIdx.x; out < place.lines * bands_x; out += kSlabThreads) {
        const int line = out % place.lines, u = out / place.lines;
        const float* basis = spectrum.basis[2] + u * spectrum.extent[2] + x0;
        float sum = 0.0f;
        for (int x = 0; x < columns; ++x) sum = fmaf(basis[x], tile[line * pitch + x], sum);
        projected[out] = x0 == 0 ? sum : projected[out] + sum;
      }
      __syncthreads();
    }
    for (int out = threadIdx.x; out < bands_y * bands_x; out += kSlabThreads) {
      const int v = out / bands_x, u = out % bands_x;
      const float* basis = spectrum.basis[1] + v * spectrum.extent[1] + place.line;
      float sum = 0.0f;
      for (int line = 0; line < place.lines; ++line) sum = fmaf(basis[line], projected[u * place.lines + line], sum);
      partials[slab * bands_y * bands_x + out] = sum;
    }
  }
}

// shift = action - low band. `sums` are of log-densities, a chunk of coefficients each.
template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    act_kernel(const T* __restrict__ mean, const T* __restrict__ log_std, int64_t batch, int64_t size,
               int64_t log_std_size, int64_t run, Spectrum spectrum, Slabs slabs, const float* __restrict__ partials,
               float* __restrict__ coefficients, float* __restrict__ shift, float* __restrict__ sums) {
  const int64_t chunks = num_chunks(size), band = spectrum.bands[1] * spectrum.bands[2];
  for (int64_t piece = warp_index(); piece < batch * chunks; piece += num_warps()) {
    const int64_t row = piece / chunks, chunk = piece - row * chunks;
    float sum = 0.0f;
    for (int i = 0; i < 4 * kQuadsPerLane; ++i) {
      const int64_t k = chunk * kChunk + i * kWarp + lane_index();
      if (k >= size) break;
      const int64_t plane = k / band, channel = plane / spectrum.bands[0], t = plane - channel * spectrum.bands[0];
      const float* slab =
          partials + (row * slabs.per_row + channel * spectrum.extent[0] * slabs.per_plane) * band + (k - plane * band);
      float low = 0.0f;
      for (int64_t frame = 0; frame < spectrum.extent[0]; ++frame) {
        float of_frame = 0.0f;
        for (int64_t j = 0; j < slabs.per_plane; ++j, slab += band) of_frame += *slab;
        low = fmaf(spectrum.basis[0][t * spectrum.extent[0] + frame], of_frame, low);
      }
      const float s = to_float(log_std[row * log_std_size + k / run]);
      const float action = to_float(mean[row * size + k]) + expf(s) * low;
      coefficients[row * size + k] = action;
      shift[row * size + k] = action - low;
      sum += log_density(low, s);
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) sums[piece] = sum;
  }
}

__global__ void __launch_bounds__(kSlabThreads, 2 * kMinBlocks)
    write_kernel(Spectrum spectrum, Slabs slabs, int64_t num_slabs, uint64_t seed, uint64_t offset,
                 const float* __restrict__ shift, float* __restrict__ latents) {
  __shared__ float weights[kTile];  // [u][line]: the shift, transformed back along y and frames
  const int bands_x = static_cast<int>(spectrum.bands[2]);
  const int64_t band = spectrum.bands[1] * bands_x, extent_x = spectrum.extent[2];
  for (int64_t slab = blockIdx.x; slab < num_slabs; slab += gridDim.x) {
    const Place place = place_of(slab, spectrum, slabs);
    const float* coefficients = shift + (place.row * spectrum.channels + place.channel) * spectrum.bands[0] * band;
    for (int out = threadIdx.x; out < place.lines * bands_x; out += kSlabThreads) {
      const int line = out % place.lines, u = out / place.lines;
      float weight = 0.0f;
      for (int64_t t = 0; t < spectrum.bands[0]; ++t) {
        float of_frame = 0.0f;
        for (int64_t v = 0; v < spectrum.bands[1]; ++v) {
          const float basis = spectrum.basis[1][v * spectrum.extent[1] + place.line + line];
          of_frame = fmaf(basis, coefficients[t * band + v * bands_x + u], of_frame);
        }
        weight = fmaf(spectrum.basis[0][t * spectrum.extent[0] + place.frame], of_frame, weight);
      }
      weights[out] = weight;
    }
    __syncthreads();
    const uint64_t counter = row_counter(spectrum, offset, place.row);
    const int64_t end = place.first + place.lines * extent_x;
    float* row = latents + place.row * spectrum.channels * spectrum.extent[0] * spectrum.extent[1] * extent_x;
    for (int64_t quad = place.first / 4 + threadIdx.x; 4 * quad < end; quad += kSlabThreads) {
      Quad value = draw4(seed, counter + static_cast<uint64_t>(quad));
      const int64_t first = 4 * quad;
      if (extent_x % 4 == 0) {  // lines begin with a quad
        const int64_t line = (first - place.first) / extent_x, x = first - place.first - line * extent_x;
        Quad added = {};
        for (int u = 0; u < bands_x; ++u) {
          const Quad basis = load4(spectrum.basis[2] + u * extent_x + x, 4);
          const float weight = weights[u * place.lines + line];
#pragma unroll
          for (int k = 0; k < 4; ++k) added.v[k] = fmaf(basis.v[k], weight, added.v[k]);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) value.v[k] += added.v[k];
        store4(value, row + first, 4);
        continue;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t element = first + k - place.first;
        if (element < 0 || first + k >= end) continue;  // of the slab before or after
        const int64_t line = element / extent_x, x = element - line * extent_x;
        float added = 0.0f;
        for (int u = 0; u < bands_x; ++u) {
          added = fmaf(spectrum.basis[2][u * extent_x + x], weights[u * place.lines + line], added);
        }
        row[first + k] = value.v[k] + added;
      }
    }
    __syncthreads();  // before the next slab's weights
  }
}

// The scratch, in this order; sums only where a row has several chunks.
struct Scratch {
  int64_t partials, shift, sums;
};

Scratch scratch_sizes(const Gaussian& policy, const Spectrum& spectrum) {
  const int64_t chunks = num_chunks(policy.size);
  return {policy.batch * make_slabs(spectrum).per_row * spectrum.bands[1] * spectrum.bands[2],
          policy.batch * policy.size, chunks > 1 ? policy.batch * chunks : 0};
}

}  // namespace

int64_t spectral_sample_scratch(const Gaussian& policy, const Spectrum& spectrum) {
  const Scratch sizes = scratch_sizes(policy, spectrum);
  return sizes.partials + sizes.shift + sizes.sums;
}

void spectral_sample(const Gaussian& policy, const Spectrum& spectrum, uint64_t seed, uint64_t offset, float* latents,
                     float* coefficients, float* log_prob, float* scratch, void* stream) {
  if (spectrum.bands[2] > kMaxBands) throw std::invalid_argument("spectral_sample: too many bands on the last axis");
  const Slabs slabs = make_slabs(spectrum);
  const Scratch sizes = scratch_sizes(policy, spectrum);
  const int64_t num_slabs = policy.batch * slabs.per_row, chunks = num_chunks(policy.size);
  float *partials = scratch, *shift = partials + sizes.partials;
  float* sums = chunks == 1 ? log_prob : shift + sizes.shift;
  NP_LAUNCH(project_kernel, num_blocks(num_slabs, 1), kSlabThreads, stream, spectrum, slabs, num_slabs, seed, offset,
            partials);
  dispatch_storage(policy.storage, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    NP_LAUNCH((act_kernel<T>), num_blocks(policy.batch * chunks, kThreads / kWarp), kThreads, stream,
              static_cast<const T*>(policy.mean), static_cast<const T*>(policy.log_std), policy.batch, policy.size,
              policy.log_std_size, run_length(policy), spectrum, slabs, partials, coefficients, shift, sums);
  });
  NP_LAUNCH(write_kernel, num_blocks(num_slabs, 1), kSlabThreads, stream, spectrum, slabs, num_slabs, seed, offset,
            shift, latents);
  if (chunks > 1) sum_rows(sums, policy.batch, chunks, log_prob, policy.batch, nullptr, stream);
  check_launch("spectral_sample");
}

}  // namespace noisepolicy::cuda
