// The least time a device needs for a case: docs/benchmarks.md says how it is defined. No CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace polylora::bench {

/// What a device does with so many bytes in one kernel of a captured graph, one graph node included.
struct DeviceLimits {
  std::string name;
  double node_us = 0;                 // empty kernel, 128 blocks
  double node_pdl_us = 0;             // the same with programmatic dependent launch; 0: the device has none
  std::vector<double> mib;            // [sizes] MiB, ascending
  std::vector<double> read_cold_us;   // [sizes] read from HBM
  std::vector<double> read_hot_us;    // [sizes] read again and again
  std::vector<double> write_cold_us;  // [sizes] read and written in place, HBM
  std::vector<double> write_hot_us;   // [sizes] the same, again and again
  double read_tbps = 0;               // of the largest size
  double write_tbps = 0;              // of the largest size, counting both ways
};

inline constexpr double kMiB = 1024.0 * 1024.0;
inline constexpr double kHotTbps = 6.5;           // x and y that the layers around just touched, from L2
inline constexpr double kHotBytes = 30e6;         // x and y up to which they are taken to be there
inline constexpr double kLargeStartUs = 1.2;      // start of a kernel that streams: node, first loads, last stores
inline constexpr double kTbpsToBytesPerUs = 1e6;  //

/// H100 80GB HBM3, 132 SMs, 50 MB L2, CUDA 13.0: the card that floors are compared on across documents.
inline DeviceLimits h100_limits() {
  DeviceLimits limits;
  limits.name = "H100 80GB HBM3 (documented)";
  limits.node_us = 0.95;
  limits.node_pdl_us = 0.64;
  limits.mib = {0.125, 0.5, 1, 2, 4, 8, 16, 32, 64, 256};
  limits.read_cold_us = {1.34, 1.59, 1.76, 2.16, 2.85, 4.17, 7.16, 12.6, 23.3, 86.9};
  limits.read_hot_us = {1.22, 1.30, 1.39, 1.55, 1.81, 2.38, 3.49, 5.84, 23.0, 86.4};
  limits.write_cold_us = {1.42, 1.85, 2.16, 2.96, 4.38, 7.21, 13.1, 24.8, 49.2, 188};
  limits.write_hot_us = {1.23, 1.33, 1.47, 1.77, 2.31, 3.57, 5.92, 12.4, 48.3, 188};
  limits.read_tbps = 3.09;
  limits.write_tbps = 2.85;
  return limits;
}

/// Time for `bytes` between the measured sizes; below the smallest its time (a load's latency does not shrink), above
/// the largest in proportion.
inline double interpolate_us(const std::vector<double>& mib, const std::vector<double>& us, double bytes) {
  const double size = bytes / kMiB;
  if (mib.empty()) return 0;
  if (size <= mib.front()) return us.front();
  for (size_t i = 1; i < mib.size(); ++i) {
    if (size <= mib[i]) return us[i - 1] + (us[i] - us[i - 1]) * (size - mib[i - 1]) / (mib[i] - mib[i - 1]);
  }
  return us.back() * size / mib.back();
}

/// What a call must move, whatever the kernel.
struct Traffic {
  double weights = 0;    // bytes of adapter weights, each once
  double footprint = 0;  // bytes of x and y (and v where it is an argument)
  double moved = 0;      // the same, y twice: it is read and written
};

/// Weights once from cold HBM, one graph node included, then x and y: from L2 where they fit, else all from HBM.
inline double floor_us(const DeviceLimits& limits, const Traffic& traffic) {
  if (traffic.footprint <= kHotBytes) {
    const double start =
        traffic.weights > 0 ? interpolate_us(limits.mib, limits.read_cold_us, traffic.weights) : limits.node_us;
    return start + traffic.moved / (kHotTbps * kTbpsToBytesPerUs);
  }
  return kLargeStartUs + traffic.weights / (limits.read_tbps * kTbpsToBytesPerUs) +
         traffic.moved / (limits.write_tbps * kTbpsToBytesPerUs);
}

}  // namespace polylora::bench
