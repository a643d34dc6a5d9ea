#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

namespace noisepolicy::cpu {
namespace {

constexpr int64_t kPiecesAPart = 8;

void pause_briefly() {
#ifdef NOISEPOLICY_X86
  __builtin_ia32_pause();
#endif
}

// Waits for what another thread is about to do, a few tens of microseconds at most; returns whether it came.
template <typename Condition>
bool came_soon(Condition condition) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + std::chrono::microseconds(40);
  do {
    for (int i = 0; i < 64; ++i) {
      if (condition()) return true;
      pause_briefly();
    }
  } while (Clock::now() < end);
  return false;
}

// CPUs that this thread may run on.
int num_cpus() {
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

// Threads are started when first wanted. Between calls that follow at once they look for work, which is sooner than
// being woken; then they sleep, so that they do not steal time from the frozen model's own threads. Where there are more
// threads than CPUs they sleep at once: the thread that they wait for needs the CPU.
class Pool {
 public:
  using Job = std::function<void()>;

  // Runs the job here and on `num_helpers` helpers.
  void run(int num_helpers, const Job& job) {
    const bool can_spin = num_helpers < num_cpus();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < num_helpers) {
        const int index = static_cast<int>(threads_.size());
        threads_.emplace_back([this, index, start = generation_.load()] { work(index, start); });
      }
      job_ = &job;
      wanted_ = num_helpers;
      can_spin_ = can_spin;
      unfinished_ = num_helpers;
      ++generation_;
    }
    wake_.notify_all();
    job();
    if (can_spin && came_soon([this] { return unfinished_ == 0; })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return unfinished_ == 0; });
  }

 private:
  void work(int index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= wanted_) continue;
      const Job& job = *job_;
      const bool can_spin = can_spin_;
      lock.unlock();
      job();
      if (--unfinished_ == 0) {
        lock.lock();  // the caller has either not looked yet or is asleep
        done_.notify_one();
        lock.unlock();
      }
      if (can_spin) came_soon([&] { return generation_ != seen; });
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const Job* job_ = nullptr;
  int wanted_ = 0;
  bool can_spin_ = false;
  std::atomic<int> unfinished_{0};
  std::atomic<uint64_t> generation_{0};
};

// Never destroyed: its threads wait until the process ends. A forked child has none of them and gets a new pool.
Pool* pool = nullptr;
std::mutex* pool_in_use = new std::mutex;

void forget_pool() {
  pool = nullptr;
  pool_in_use = new std::mutex;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int num_threads, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t parts = std::min<int64_t>(num_threads, count / std::max<int64_t>(grain, 1));
  // A second caller, from another Python thread, works alone.
  std::unique_lock<std::mutex> lock(*pool_in_use, std::defer_lock);
  if (parts < 2 || !lock.try_lock()) {
    if (count > 0) body(0, count);
    return;
  }
  if (pool == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    static_cast<void>(registered);
    pool = new Pool;
  }
  // In pieces that each thread takes as it comes to them: a helper wakes later than the caller begins.
  const int64_t piece = std::max(grain, count / (parts * kPiecesAPart));
  std::atomic<int64_t> next{0};
  pool->run(static_cast<int>(parts) - 1, [&] {
    for (int64_t begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < count;) {
      body(begin, std::min(begin + piece, count));
    }
  });
}

}  // namespace noisepolicy::cpu
