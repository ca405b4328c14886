// What bench_moe prints: a row a case with its ops below it, or JSON lines.
#pragma once

#include <string>
#include <vector>

#include "device_report.h"
#include "moe_lora.h"
#include "moe_options.h"
#include "timing.h"

namespace polylora::bench {

/// One case with one path and one way to put the layer together.
struct MoeRow {
  MoeCase shape;
  std::string path;
  Seams seams;
};

/// What was measured of it.
struct MoeFound {
  double weight_bytes = 0;  // of the (adapter, expert) pairs that a call hits
  double error = 0;
  int64_t pools = 0;
  int64_t layers = 0;  // routings of the forward
  bool cold = true;
  bool has_base = true;
  AddedTiming layer;  // with a base
  struct Op {
    std::string name;
    Timing timing;
    Traffic traffic;
  };
  std::vector<Op> ops;
};

class MoeReport : public DeviceReport {
 public:
  MoeReport(const MoeOptions& options, const Device& device) : DeviceReport(device, options.json), options_(options) {}

  void begin(const std::vector<MoeCase>& cases, const std::vector<std::string>& paths);
  void add(const MoeRow& row, const MoeFound& found);
  void add_checked(const MoeRow& row, double error) const;
  void add_not_served(const MoeRow& row, const std::string& why) const;
  void add_too_large(const MoeRow& row) const;
  void add_failure(const MoeRow& row, const std::string& why) const;
  void end() const;

  /// --list: the cases and their floors, nothing measured. Weights are those of the routings that would be drawn.
  static void list(const MoeOptions& options, const std::vector<MoeCase>& cases);

 private:
  struct Measured {
    MoeRow row;
    double ratio;
  };

  std::string head_of(const MoeRow& row) const;
  std::string json_of(const char* kind, const MoeRow& row) const;
  void add_json(const MoeRow& row, const MoeFound& found) const;
  void add_line(const MoeRow& row, const MoeFound& found) const;

  MoeOptions options_;
  int name_width_ = 4;
  int path_width_ = 4;
  std::vector<Measured> measured_;
};

}  // namespace polylora::bench
