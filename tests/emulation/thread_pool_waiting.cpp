// Prints the processor time in microseconds that a short call takes with its waiting: thread_pool_waiting THREADS.
// The pauses between calls are far longer than a thread may spin.
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "cpu/parallel.h"

double used_us() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return 1e6 * static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

int main(int, char** arguments) {
  constexpr int kNumCalls = 300;
  const int num_threads = std::atoi(arguments[1]);
  const double before = used_us();
  for (int call = 0; call < kNumCalls; ++call) {
    noisepolicy::cpu::parallel_for(num_threads, 1, num_threads, [](int64_t, int64_t) {});
    usleep(2000);
  }
  std::printf("%f\n", (used_us() - before) / kNumCalls);
}
