// Memory that the allocator has just got from the system is mapped a page at a time, as it is first written; for large
// outputs that takes longer than computing them.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace noisepolicy::cpu {

// Asks for huge pages, for large arrays, where the system has them on request. Memory that is already mapped stays as it is.
inline void expect_writes(void* data, int64_t num_bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kLarge = int64_t{1} << 22;
  constexpr uintptr_t kPage = 4096;
  if (data == nullptr || num_bytes < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(num_bytes)) / kPage * kPage;
  // A hint: a system without huge pages refuses it and nothing is lost.
  static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#else
  static_cast<void>(data);
  static_cast<void>(num_bytes);
#endif
}

}  // namespace noisepolicy::cpu
