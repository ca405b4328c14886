// What the tests of emulated kernels share.
#pragma once

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/launch.cuh"
#include "polylora/params.h"
#include "reference.h"

namespace polylora::testing {

using emulator::GuardedBytes;

/// Elements of a dtype in guarded memory, NaN until set.
class Array {
 public:
  Array(DType dtype, int64_t count) : dtype_(dtype), bytes_(new GuardedBytes(count * size_of(dtype))) {}

  void set(int64_t at, double value) {
    const uint32_t bits = encode(round_to(value, dtype_), dtype_);
    std::memcpy(bytes_->data() + at * size_of(dtype_), &bits, static_cast<size_t>(size_of(dtype_)));
  }
  double get(int64_t at) const {
    uint32_t bits = 0;
    std::memcpy(&bits, bytes_->data() + at * size_of(dtype_), static_cast<size_t>(size_of(dtype_)));
    return decode(bits, dtype_);
  }
  unsigned char* data() const { return bytes_->data(); }
  int64_t size() const { return bytes_->size(); }
  std::vector<unsigned char> copy() const { return {data(), data() + bytes_->size()}; }
  void restore(const std::vector<unsigned char>& from) { std::copy(from.begin(), from.end(), data()); }

 private:
  DType dtype_;
  std::unique_ptr<GuardedBytes> bytes_;
};

/// About normal: mean 0, variance 1.
inline double normal(Random& random) {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += random.uniform();
  return sum;
}

/// How far a sum of v B^T may stray whose terms' sizes add up to `sizes`: v is rounded to the dtype.
inline double delta_error(DType dtype, double sizes) {
  return 1.1 * (dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11) * sizes;
}

/// How far rounding to the dtype may take `value`.
inline double rounding_error(DType dtype, double value) {
  return 1.01 * (dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11) * std::fabs(value) + 1e-7;
}

/// The case that runs now: what a kernel that touches the end of an array, or waits for ever, dies in.
inline std::string running;

inline void name_running() {
  if (!running.empty()) std::printf("in: %s\n", running.c_str());
  std::fflush(stdout);
}

inline void name_running_at_death() {
  static const bool once = [] {
    std::atexit(name_running);  // deadlocks
    const auto name_and_die = [](int signal) {
      name_running();
      std::signal(signal, SIG_DFL);
      std::raise(signal);
    };
    std::signal(SIGSEGV, name_and_die);
    std::signal(SIGABRT, name_and_die);
    return true;
  }();
  (void)once;
}

/// What a call's grid has written is NaN until the next one has waited for it.
inline void hide_until_waited(const GuardedBytes& bytes) {
  const auto written = std::make_shared<std::vector<unsigned char>>(bytes.data(), bytes.data() + bytes.size());
  std::memset(bytes.data(), 0xff, written->size());
  emulator::options().previous_grid = [written, data = bytes.data()] {
    std::copy(written->begin(), written->end(), data);
    written->clear();  // once: later grids write there
  };
}

/// Runs `path` on the problem, on other seeds of the emulator and with or without stale inputs before: every time right
/// and every time the same bits.
template <typename Problem>
void check_runs(const std::string& what, cudaError_t (*path)(Problem&), Problem& problem, int runs) {
  name_running_at_death();
  std::vector<unsigned char> first;
  for (int i = 0; i < runs; ++i) {
    running = what + ", run " + std::to_string(i);
    problem.spoil(std::hash<std::string>()(what) + static_cast<uint64_t>(i), i % 2 == 1);
    CHECK(path(problem) == cudaSuccess, "%s", what.c_str());
    const auto bits = problem.check(what + (i % 2 == 1 ? ", stale before" : ""));
    if (i == 0) first = bits;
    CHECK(bits == first, "%s: other bits in run %d", what.c_str(), i);
  }
  running.clear();
}

}  // namespace polylora::testing
