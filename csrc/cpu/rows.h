// From rows of any storage to blocks of float.
#pragma once

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "parallel.h"

namespace noisepolicy::cpu {

constexpr int64_t kGrain = 16384;  // elements a thread is woken for

// A dense array of a storage type, read and written a block at a time.
class StoredArray {
 public:
  StoredArray(const void* data, Storage storage) : data_(data), storage_(storage) {}

  float at(int64_t i) const {
    float value;
    read(i, 1, &value);
    return value;
  }

  // Elements [i, i + count) in float: in place where they are, else through `buffer`.
  const float* view(int64_t i, int64_t count, float* buffer) const {
    if (storage_ == Storage::kFloat32) return static_cast<const float*>(data_) + i;
    read(i, count, buffer);
    return buffer;
  }

 private:
  void read(int64_t i, int64_t count, float* out) const {
    switch (storage_) {
      case Storage::kFloat32:
        std::copy_n(static_cast<const float*>(data_) + i, count, out);
        break;
      case Storage::kFloat16:
        block_kernels().from_half(static_cast<const Half*>(data_) + i, count, out);
        break;
      case Storage::kBFloat16:
        block_kernels().from_bfloat16(static_cast<const BFloat16*>(data_) + i, count, out);
        break;
    }
  }

  const void* data_;
  Storage storage_;
};

// Where float results for elements from i on are to be computed, and the way back to storage.
class StoredOutput {
 public:
  StoredOutput(void* data, Storage storage) : data_(data), storage_(storage) {}

  float* target(int64_t i, float* buffer) const {
    return storage_ == Storage::kFloat32 ? static_cast<float*>(data_) + i : buffer;
  }

  void commit(int64_t i, int64_t count, const float* values) const {
    if (storage_ == Storage::kFloat16) block_kernels().to_half(values, count, static_cast<Half*>(data_) + i);
    if (storage_ == Storage::kBFloat16) block_kernels().to_bfloat16(values, count, static_cast<BFloat16*>(data_) + i);
  }

  void put(int64_t i, float value) const {
    if (storage_ == Storage::kFloat32) static_cast<float*>(data_)[i] = value;
    commit(i, 1, &value);
  }

 private:
  void* data_;
  Storage storage_;
};

// The policy's rows as blocks. A block lies in one run of equal log_std, or each of its elements has its own.
class Rows {
 public:
  struct Block {
    int64_t row, begin, count;  // elements [begin, begin + count) of the row
    int64_t run;                // which log_std, where shared
  };

  explicit Rows(const Gaussian& policy)
      : mean_(policy.mean, policy.storage),
        log_std_(policy.log_std, policy.storage),
        size_(policy.size),
        log_std_size_(policy.log_std_size),
        is_shared_(policy.log_std_size != policy.size),
        runs_(is_shared_ ? std::max<int64_t>(policy.log_std_size, 1) : 1),
        run_size_(policy.size / runs_),
        blocks_in_run_((run_size_ + kBlock - 1) / kBlock) {}

  bool is_shared() const { return is_shared_; }
  int64_t blocks_in_run() const { return blocks_in_run_; }
  int64_t blocks_in_row() const { return runs_ * blocks_in_run_; }
  int64_t grain() const { return kGrain / std::min(kBlock, std::max<int64_t>(run_size_, 1)); }

  // Blocks are numbered through all rows, in order.
  Block block(int64_t number) const {
    const int64_t run = number / blocks_in_run_, begin = number % blocks_in_run_ * kBlock;
    return {run / runs_, run % runs_ * run_size_ + begin, std::min(kBlock, run_size_ - begin), run};
  }

  // `mean_buffer` and `log_std_buffer` hold kBlock floats each.
  BlockView view(const Block& block, float* mean_buffer, float* log_std_buffer) const {
    const int64_t first = block.row * size_ + block.begin;
    const float* mean = mean_.view(first, block.count, mean_buffer);
    if (is_shared_) return {block.count, mean, nullptr, log_std_.at(block.run)};
    return {block.count, mean, log_std_.view(first, block.count, log_std_buffer), 0.0f};
  }

  // Calls body(block) for the blocks of elements [begin, end) of a row.
  template <typename Body>
  void for_range(int64_t row, int64_t begin, int64_t end, Body body) const {
    while (begin < end) {
      const int64_t run = begin / run_size_;
      const int64_t count = std::min({kBlock, end - begin, (run + 1) * run_size_ - begin});
      body(Block{row, begin, count, row * runs_ + run});
      begin += count;
    }
  }

 private:
  StoredArray mean_, log_std_;
  int64_t size_, log_std_size_;
  bool is_shared_;
  int64_t runs_, run_size_, blocks_in_run_;
};

// Throws std::invalid_argument if a row's log-density is NaN because its log_std is.
void check_log_std(const Gaussian& policy, const float* log_prob);

}  // namespace noisepolicy::cpu
