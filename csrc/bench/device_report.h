// What a run says of the device before its cases, and of times.
#pragma once

#include "calibrate.h"
#include "device.h"
#include "floor.h"
#include "timing.h"

namespace polylora::bench {

/// The fields of a JSON line that tell a time.
std::string timing_json(const Timing& timing);

class DeviceReport {
 public:
  DeviceReport(const Device& device, bool json) : device_(device), limits_(h100_limits()), json_(json) {}

  void print_device() const;
  void print_calibration(const Calibration& calibration);

  /// Of this device, or the documented ones where it was not calibrated.
  const DeviceLimits& limits() const { return limits_; }
  const Device& device() const { return device_; }

 private:
  Device device_;
  DeviceLimits limits_;
  bool json_;
};

}  // namespace polylora::bench
