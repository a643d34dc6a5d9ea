// The inner loops: each takes a block of at most kBlock elements of one row. Every instruction set compiles its own
// (blocks.cpp); rows, threads and storage are the callers' business.
#pragma once

#include "../storage.h"

namespace noisepolicy::cpu {

constexpr int64_t kBlock = 1024;  // sums inside a block are float, between blocks double

// Noise is made for whole vectors of counters, and a block may begin inside a counter's four.
constexpr int64_t kNoisePadding = 64 + 4;

// A block of the policy in float. Either each element has its own log_std, or all share one.
struct BlockView {
  int64_t count;
  const float* mean;
  const float* log_std;  // null where shared
  float shared_log_std;
};

struct BlockTerms {
  double log_prob, kl_to_prior;
};

struct BlockGradients {
  float* mean;
  float* log_std;  // null where shared: the sum is returned
  float* latents;  // may be null
};

// A table of `bands` weights for each place of an axis, padded to kBandTile columns: (extent, kBandTile).
constexpr int kBandTile = 8;

struct BlockKernels {
  const char* name;
  // `count` normals from the first of `counter` on, at most kBlock + 3; may write kNoisePadding more.
  void (*normals)(uint64_t seed, uint64_t counter, int64_t count, float* out);
  // What sampling cannot do without, for the benchmark to compare with: a block's random words, in no useful order.
  void (*words)(uint64_t seed, uint64_t counter, int64_t count, uint32_t* out);
  // out = mean + std * noise; returns the log-density. `out` may be `noise`.
  double (*shift_and_scale)(const BlockView& view, const float* noise, float* out);
  double (*log_prob)(const BlockView& view, const float* values);
  // The same log-density to the bit, and KL to the prior.
  BlockTerms (*terms)(const BlockView& view, const float* values);
  // Gradients of grad_log_prob * log_prob + grad_kl * kl_to_prior; returns the sum of d / d log_std where shared.
  double (*backward)(const BlockView& view, const float* values, float grad_log_prob, float grad_kl,
                     const BlockGradients& out);
  // out[v, x] = sum_y weights[y, v] plane[y, x], for kBandTile bands v.
  void (*analyse)(const float* plane, int64_t height, int64_t width, const float* weights, float* out);
  // plane[y, x] += sum_v weights[y, v] field[v, x]
  void (*synthesise)(const float* field, int64_t height, int64_t width, const float* weights, float* plane);
  float (*dot)(const float* a, const float* b, int64_t count);
  void (*from_half)(const Half* source, int64_t count, float* out);
  void (*to_half)(const float* source, int64_t count, Half* out);
  void (*from_bfloat16)(const BFloat16* source, int64_t count, float* out);
  void (*to_bfloat16)(const float* source, int64_t count, BFloat16* out);
};

// What this processor runs fastest. The environment variable NOISEPOLICY_CPU (portable, avx2, avx512) chooses less.
const BlockKernels& block_kernels();

}  // namespace noisepolicy::cpu
