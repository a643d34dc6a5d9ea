// Many short calls with changing numbers of threads, pauses in which they fall asleep, and callers side by side.
#include <unistd.h>

#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

void add_one(std::vector<int>& values, int num_threads) {
  const auto size = static_cast<int64_t>(values.size());
  noisepolicy::cpu::parallel_for(size, 10, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++values[i];
  });
}

bool calls_add_up(int num_calls) {
  std::vector<int> values(1000, 0);
  for (int call = 1; call <= num_calls; ++call) {
    add_one(values, 1 + call % 5);
    if (call % 200 == 0) usleep(1000);
    for (int value : values) {
      if (value != call) return false;
    }
  }
  return true;
}

int main() {
  bool first = false, second = false;
  std::thread beside([&] { second = calls_add_up(1000); });
  first = calls_add_up(1000);
  beside.join();
  const bool is_right = first && second && calls_add_up(1000);
  std::puts(is_right ? "every element was visited once a call" : "an element was missed or visited twice");
  return is_right ? 0 : 1;
}
