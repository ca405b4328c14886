// How many pools of adapters and how many routings calls rotate among, so that each finds its weights cold, and that
// all of it fits the device. As python/polylora/bench/moe_problem.py has it. No CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "moe_cases.h"
#include "rotation.h"

namespace polylora::bench {

/// The adapters of one half together take at least this many times the L2, so that pairs drawn at random are cold.
inline constexpr int64_t kPoolL2s = 8;

/// Routings at most: what is left warm beyond is less than a tenth.
inline constexpr int64_t kMaxRoutings = 512;

struct MoePools {
  int64_t pools = 0;  // 0: the device has no room for one
  bool cold = true;   // false: fewer than it takes
};

inline MoePools moe_pools(const MoeCase& c, bool with_base, int64_t l2_bytes, int64_t free_bytes) {
  const int64_t half = c.groups() * std::min(c.up_bytes(), c.down_bytes());
  const int64_t wanted = (kPoolL2s * l2_bytes + half - 1) / half;
  const int64_t base = with_base ? c.model.experts * c.model.base_bytes() : 0;
  const auto share = static_cast<int64_t>(kMemoryShare * static_cast<double>(free_bytes));
  const int64_t room = std::max<int64_t>(0, (share - base - c.buffer_bytes()) / c.pool_bytes());
  return {std::min(wanted, room), room >= wanted};
}

struct MoeRotation {
  int64_t layers = 2;    // routings that forwards take turns through: base and adapters pass through the L2
  int64_t routings = 2;  // those that ops alone take turns through: A and B of one half do
};

/// Of calls that hit as many (adapter, expert) pairs and experts.
inline MoeRotation moe_rotation(const MoeCase& c, int64_t groups_hit, int64_t experts_hit, int64_t l2_bytes) {
  const int64_t cold_bytes = kColdL2s * l2_bytes;
  const auto enough = [&](int64_t bytes) {
    return std::max<int64_t>(2, std::min(1 + cold_bytes / std::max<int64_t>(1, bytes), kMaxRoutings));
  };
  MoeRotation rotation;
  rotation.layers = enough(groups_hit * (c.up_bytes() + c.down_bytes()) + experts_hit * c.model.base_bytes());
  rotation.routings = std::max(rotation.layers, enough(groups_hit * std::min(c.up_bytes(), c.down_bytes())));
  return rotation;
}

}  // namespace polylora::bench
