// Splits a range over threads that wait between calls.
#pragma once

#include <cstdint>
#include <functional>

namespace noisepolicy::cpu {

// Calls body(begin, end) on contiguous pieces of [0, count), on this thread and at most num_threads - 1 others, and
// returns when all are done. Which piece runs where must not change a result. A thread is not woken for less than
// `grain`.
void parallel_for(int64_t count, int64_t grain, int num_threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace noisepolicy::cpu
