// How many weight sets and copies of x and y calls rotate among, so that each finds cold what it would find cold in a
// model, and that all of it fits the device. No CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

namespace polylora::bench {

inline constexpr int64_t kColdL2s = 3;        // sizes of the L2 that must pass before something is met again
inline constexpr double kMemoryShare = 0.75;  // of the free memory; what checks and baselines allocate fits the rest
inline constexpr int64_t kMaxSets = 8192;

/// A case in bytes.
struct RotationNeeds {
  double needed = 0;       // weights that a call reads
  int64_t set_bytes = 0;   // a weight set with its table, as allocated
  int64_t copy_bytes = 0;  // x, y and v of a call, as allocated
  bool hot = true;         // x and y are to stay in the L2
};

struct Rotation {
  int64_t sets = 1;
  int64_t copies = 1;
  bool cold = true;  // false: fewer sets than that takes
};

/// x and y stay where they are while hot, as between layers; else their copies alone are `kColdL2s` L2s. Weights come
/// in as many sets as make what passes that much; x and y from HBM push weights out as well. Fewer where memory ends,
/// one at least.
inline Rotation rotate(const RotationNeeds& needs, int64_t l2_bytes, int64_t free_bytes) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t cold_bytes = kColdL2s * l2_bytes;
  Rotation rotation;
  if (!needs.hot) rotation.copies = std::max<int64_t>(1, divide_up(cold_bytes, needs.copy_bytes));
  const auto needed = static_cast<int64_t>(needs.needed);
  const int64_t passing = needed + (needs.hot ? 0 : needs.copy_bytes);
  const int64_t wanted = needed == 0 ? 1 : std::max({int64_t{2}, rotation.copies, divide_up(cold_bytes, passing)});
  const auto share = static_cast<int64_t>(kMemoryShare * static_cast<double>(free_bytes));
  const int64_t room = (share - rotation.copies * needs.copy_bytes) / std::max<int64_t>(1, needs.set_bytes);
  rotation.sets = std::max<int64_t>(1, std::min({wanted, kMaxSets, room}));
  rotation.cold = rotation.sets == wanted;
  return rotation;
}

}  // namespace polylora::bench
