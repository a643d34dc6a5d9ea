// White noise whose low DCT band is the policy's: a channel at a time, while it is in cache.
#include "kernels.h"
#include "pages.h"
#include "rows.h"

namespace noisepolicy::cpu {
namespace {

int64_t padded(int64_t bands) { return (bands + kBandTile - 1) / kBandTile * kBandTile; }

// The basis of the two axes of a frame, padded with zeros to whole tiles of bands.
class PlaneTransform {
 public:
  explicit PlaneTransform(const Spectrum& spectrum)
      : height_(spectrum.extent[1]),
        width_(spectrum.extent[2]),
        rows_(spectrum.bands[1]),
        columns_(spectrum.bands[2]),
        column_basis_(padded(columns_) * width_) {
    std::copy_n(spectrum.basis[2], columns_ * width_, column_basis_.data());
    for (int64_t tile = 0; tile < rows_; tile += kBandTile) {
      std::vector<float> weights(height_ * kBandTile);
      for (int64_t v = tile; v < std::min(rows_, tile + kBandTile); ++v) {
        for (int64_t y = 0; y < height_; ++y) weights[y * kBandTile + v - tile] = spectrum.basis[1][v * height_ + y];
      }
      row_weights_.push_back(std::move(weights));
    }
  }

  int64_t workspace_size() const { return kBandTile * width_ + padded(columns_) * kBandTile; }

  // coefficients (rows, columns) of a plane (height, width).
  void analyse(const float* plane, float* workspace, float* coefficients) const {
    const BlockKernels& kernels = block_kernels();
    for (size_t tile = 0; tile < row_weights_.size(); ++tile) {
      kernels.analyse(plane, height_, width_, row_weights_[tile].data(), workspace);
      const int64_t first = static_cast<int64_t>(tile) * kBandTile, count = std::min<int64_t>(kBandTile, rows_ - first);
      for (int64_t v = 0; v < count; ++v) {
        for (int64_t u = 0; u < columns_; ++u) {
          coefficients[(first + v) * columns_ + u] =
              kernels.dot(workspace + v * width_, column_basis_.data() + u * width_, width_);
        }
      }
    }
  }

  // Adds the picture of the coefficients to the plane; where they are all zero the plane keeps its bits.
  void add_synthesis(const float* coefficients, float* workspace, float* plane) const {
    const BlockKernels& kernels = block_kernels();
    float* field = workspace;
    float* weights = workspace + kBandTile * width_;
    for (size_t tile = 0; tile < row_weights_.size(); ++tile) {
      const int64_t first = static_cast<int64_t>(tile) * kBandTile, count = std::min<int64_t>(kBandTile, rows_ - first);
      std::fill_n(field, kBandTile * width_, 0.0f);
      for (int64_t begin = 0; begin < columns_; begin += kBandTile) {
        std::fill_n(weights, kBandTile * kBandTile, 0.0f);
        for (int64_t v = 0; v < count; ++v) {
          std::copy_n(coefficients + (first + v) * columns_ + begin, std::min<int64_t>(kBandTile, columns_ - begin),
                      weights + v * kBandTile);
        }
        kernels.synthesise(column_basis_.data() + begin * width_, count, width_, weights, field);
      }
      kernels.synthesise(field, height_, width_, row_weights_[tile].data(), plane);
    }
  }

 private:
  int64_t height_, width_, rows_, columns_;
  std::vector<float> column_basis_;              // (padded columns, width)
  std::vector<std::vector<float>> row_weights_;  // a tile of bands each: (height, kBandTile)
};

// out[t, i] = sum_f matrix[t, f] in[f, i]; the matrix is the basis (bands, extent) or, to go back, its transpose.
void transform_frames(const float* in, int64_t in_frames, int64_t size, const float* basis, int64_t out_frames,
                      bool is_synthesis, float* out) {
  std::fill_n(out, out_frames * size, 0.0f);
  for (int64_t t = 0; t < out_frames; ++t) {
    for (int64_t f = 0; f < in_frames; ++f) {
      const float weight = is_synthesis ? basis[f * out_frames + t] : basis[t * in_frames + f];
      for (int64_t i = 0; i < size; ++i) out[t * size + i] += weight * in[f * size + i];
    }
  }
}

}  // namespace

void spectral_sample(const Gaussian& policy, const Spectrum& spectrum, uint64_t seed, uint64_t offset, int num_threads,
                     float* latents, float* coefficients, float* log_prob) {
  const BlockKernels& kernels = block_kernels();
  const Rows rows(policy);
  const PlaneTransform transform(spectrum);
  const int64_t frames = spectrum.extent[0], frame_bands = spectrum.bands[0];
  const int64_t plane_size = spectrum.extent[1] * spectrum.extent[2], channel_size = frames * plane_size;
  const int64_t plane_bands = spectrum.bands[1] * spectrum.bands[2], band_size = frame_bands * plane_bands;
  const int64_t row_size = spectrum.channels * channel_size;
  const uint64_t row_counters = static_cast<uint64_t>((row_size + 3) / 4);
  std::vector<double> partial(policy.batch * spectrum.channels);

  const auto sample_channel = [&](int64_t row, int64_t channel, float* noise, float* by_frame, float* low_band,
                                  float* workspace) {
    float* values = latents + row * row_size + channel * channel_size;
    for (int64_t begin = 0; begin < channel_size; begin += kBlock) {
      const int64_t count = std::min(kBlock, channel_size - begin), place = channel * channel_size + begin;
      const uint64_t counter = offset + static_cast<uint64_t>(row) * row_counters + place / 4;
      kernels.normals(seed, counter, place % 4 + count, noise);
      std::copy_n(noise + place % 4, count, values + begin);
    }
    for (int64_t f = 0; f < frames; ++f) {
      transform.analyse(values + f * plane_size, workspace, by_frame + f * plane_bands);
    }
    transform_frames(by_frame, frames, plane_bands, spectrum.basis[0], frame_bands, false, low_band);

    float* action = coefficients + row * policy.size + channel * band_size;
    float mean[kBlock], log_std[kBlock];
    double total = 0.0;
    rows.for_range(row, channel * band_size, (channel + 1) * band_size, [&](const Rows::Block& block) {
      const int64_t first = block.begin - channel * band_size;
      total += kernels.shift_and_scale(rows.view(block, mean, log_std), low_band + first, action + first);
    });
    partial[row * spectrum.channels + channel] = total;

    // What is added is action - noise: exactly zero where the policy is the prior.
    for (int64_t i = 0; i < band_size; ++i) low_band[i] = action[i] - low_band[i];
    transform_frames(low_band, frame_bands, plane_bands, spectrum.basis[0], frames, true, by_frame);
    for (int64_t f = 0; f < frames; ++f) {
      transform.add_synthesis(by_frame + f * plane_bands, workspace, values + f * plane_size);
    }
  };

  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(channel_size, 1), 1);
  expect_writes(latents, policy.batch * row_size * sizeof(float));
  parallel_for(policy.batch * spectrum.channels, grain, num_threads, [&](int64_t begin, int64_t end) {
    std::vector<float> noise(kBlock + kNoisePadding), by_frame(frames * plane_bands), low_band(band_size);
    std::vector<float> workspace(transform.workspace_size());
    for (int64_t task = begin; task < end; ++task) {
      sample_channel(task / spectrum.channels, task % spectrum.channels, noise.data(), by_frame.data(), low_band.data(),
                     workspace.data());
    }
  });
  for (int64_t row = 0; row < policy.batch; ++row) {
    double total = 0.0;
    for (int64_t c = 0; c < spectrum.channels; ++c) total += partial[row * spectrum.channels + c];
    log_prob[row] = static_cast<float>(total);
  }
  check_log_std(policy, log_prob);
}

}  // namespace noisepolicy::cpu
