// What this device does at best, measured: the tables that floors are made of.
#pragma once

#include "device.h"
#include "floor.h"

namespace polylora::bench {

/// An empty kernel of so many blocks as a graph node, us.
struct EmptyKernel {
  int blocks = 0;
  double plain_us = 0;
  double pdl_us = 0;  // with programmatic dependent launch; 0: the device has none
};

struct Calibration {
  DeviceLimits limits;
  std::vector<EmptyKernel> empty;
};

Calibration calibrate(const Device& device, cudaStream_t stream);

}  // namespace polylora::bench
