// Random bits from a seed and a counter, the same on host and device.
#pragma once

#include <cstdint>

#include "polylora/plan_layout.h"

namespace polylora::bench {

/// splitmix64 of (seed, counter).
POLYLORA_HD inline uint64_t hash(uint64_t seed, uint64_t counter) {
  uint64_t z = seed * 0xd1342543de82ef95u + (counter + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace polylora::bench
