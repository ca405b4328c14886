// What the host tests share: a check that counts, a small random generator, ways to run a ParallelFor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

namespace polylora::testing {

inline int64_t passed = 0;
inline int64_t failed = 0;

/// The rest of the line describes the failure, printf style. Only the first failures are printed.
#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (condition) {                                                       \
      ++polylora::testing::passed;                                         \
    } else if (++polylora::testing::failed <= 20) {                        \
      std::printf("%s:%d: %s is false: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                            \
      std::printf("\n");                                                   \
    }                                                                      \
  } while (false)

/// Prints the last line; the exit code of main.
inline int report() {
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed), static_cast<long long>(failed));
  return failed == 0 ? 0 : 1;
}

/// splitmix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  /// In [low, high].
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }

  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }

  bool chance(double probability) { return uniform() < probability; }

 private:
  uint64_t state_;
};

using Body = std::function<void(int64_t, int64_t)>;

inline void serial(int64_t n, int64_t, const Body& body) {
  if (n > 0) body(0, n);
}

/// Parts of one item, last first.
inline void reversed(int64_t n, int64_t, const Body& body) {
  for (int64_t i = n; i-- > 0;) body(i, i + 1);
}

/// Three threads, parts of three items.
inline void threaded(int64_t n, int64_t, const Body& body) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 3; ++t) {
    threads.emplace_back([n, t, &body] {
      for (int64_t at = t * 3; at < n; at += 9) body(at, std::min(at + 3, n));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace polylora::testing
