// Which instruction set this processor runs.
#include <algorithm>
#include <cstdlib>
#include <string>

#include "blocks.h"
#include "kernels.h"

namespace noisepolicy::cpu {

namespace portable {
extern const BlockKernels kernels;
}
#ifdef NOISEPOLICY_X86
namespace avx2 {
extern const BlockKernels kernels;
}
namespace avx512 {
extern const BlockKernels kernels;
}
#endif

namespace {

const BlockKernels& choose() {
  const char* limit = std::getenv("NOISEPOLICY_CPU");
  const std::string most = limit ? limit : "avx512";
#ifdef NOISEPOLICY_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (most == "avx512" && has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    return avx512::kernels;
  }
  if (most != "portable" && has_avx2) return avx2::kernels;
#endif
  return portable::kernels;
}

}  // namespace

const BlockKernels& block_kernels() {
  static const BlockKernels& chosen = choose();
  return chosen;
}

const char* instruction_set() { return block_kernels().name; }

uint32_t bare_words(int64_t count) {
  uint32_t words[kBlock + kNoisePadding], total = 0;
  for (int64_t i = 0; i < count; i += kBlock) {
    block_kernels().words(1, static_cast<uint64_t>(i / 4), std::min(kBlock, count - i), words);
    total ^= words[0];
  }
  return total;
}

double bare_loss(int64_t count) {
  float values[kBlock], mean[kBlock], log_std[kBlock], grad_mean[kBlock], grad_log_std[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    values[i] = static_cast<float>(i) / kBlock - 0.5f;
    mean[i] = 0.5f * values[i];
    log_std[i] = -values[i];
  }
  double total = 0.0;
  for (int64_t i = 0; i < count; i += kBlock) {
    const BlockView view{std::min(kBlock, count - i), mean, log_std, 0.0f};
    total += block_kernels().terms(view, values).log_prob;
    block_kernels().backward(view, values, 0.1f, 0.1f, {grad_mean, grad_log_std, nullptr});
    total += static_cast<double>(grad_mean[0] + grad_log_std[0]);
  }
  return total;
}

}  // namespace noisepolicy::cpu
