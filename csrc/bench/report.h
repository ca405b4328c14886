// What is printed: aligned tables, or JSON lines; each line as soon as it is known.
#pragma once

#include <string>
#include <vector>

#include "cases.h"
#include "device_report.h"
#include "options.h"
#include "timing.h"

namespace polylora::bench {

/// One case with one implementation.
struct Row {
  Case shape;
  std::string path;
  Timing timing;       // chain: of what the op adds
  double base_us = 0;  // chain only
  double error = 0;
  bool cold = true;  // false: too few weight sets to keep them cold
};

class Report : public DeviceReport {
 public:
  Report(const Options& options, const Device& device);

  void begin(const std::vector<Case>& cases, const std::vector<std::string>& paths);
  void add(const Row& row);
  void add_checked(const Case& c, const std::string& path, double error) const;
  void add_not_served(const Case& c, const std::string& path) const;
  void add_too_large(const Case& c, const std::string& path) const;
  void add_failure(const Case& c, const std::string& path, const std::string& why) const;
  void end() const;

  /// --list: the cases and their floors, nothing measured.
  static void list(const Options& options, const std::vector<Case>& cases);

 private:
  struct Measured {
    Regime regime;
    std::string path;
    double ratio;
    double ratio_h100;
  };

  Options options_;
  DeviceLimits h100_;
  int name_width_ = 4;
  int path_width_ = 4;
  std::vector<Measured> measured_;
};

}  // namespace polylora::bench
