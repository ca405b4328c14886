#include "device_report.h"

#include "json.h"
#include "stats.h"

namespace polylora::bench {
namespace {

std::string version(int cuda) { return format("%d.%d", cuda / 1000, cuda % 1000 / 10); }

}  // namespace

std::string timing_json(const Timing& timing) {
  return format("\"us\": %.4f, \"us_min\": %.4f, \"us_max\": %.4f, \"calls\": %lld, \"replays\": %lld", timing.median,
                timing.min, timing.max, static_cast<long long>(timing.calls), static_cast<long long>(timing.replays));
}

void DeviceReport::print_device() const {
  if (json_) return;  // every line names it
  print(format("%s, %d SMs, compute capability %d.%d, %.0f MB L2; CUDA runtime %s, driver %s", device_.name.c_str(),
               device_.sms, device_.major, device_.minor, static_cast<double>(device_.l2_bytes) / kMiB,
               version(device_.runtime).c_str(), version(device_.driver).c_str()));
}

void DeviceReport::print_calibration(const Calibration& calibration) {
  const DeviceLimits& limits = calibration.limits;
  limits_ = limits;
  if (json_) {
    print(
        format("{\"kind\": \"calibration\", \"device\": %s, \"sms\": %d, \"l2_bytes\": %lld, \"node_us\": %.3f, "
               "\"node_pdl_us\": %.3f, \"mib\": %s, \"read_cold_us\": %s, \"read_hot_us\": %s, "
               "\"write_cold_us\": %s, \"write_hot_us\": %s, \"read_tbps\": %.3f, \"write_tbps\": %.3f}",
               quoted(device_.name).c_str(), device_.sms, static_cast<long long>(device_.l2_bytes), limits.node_us,
               limits.node_pdl_us, json_list(limits.mib).c_str(), json_list(limits.read_cold_us).c_str(),
               json_list(limits.read_hot_us).c_str(), json_list(limits.write_cold_us).c_str(),
               json_list(limits.write_hot_us).c_str(), limits.read_tbps, limits.write_tbps));
    return;
  }
  print("\nempty kernel as a graph node, us      plain     PDL");
  for (const EmptyKernel& empty : calibration.empty) {
    const std::string pdl = empty.pdl_us > 0 ? format("%.2f", empty.pdl_us) : "-";
    print(format("  %d blocks %31.2f %7s", empty.blocks, empty.plain_us, pdl.c_str()));
  }
  print("\nbytes in one kernel, us   read cold  read hot  in place cold  in place hot");
  for (size_t i = 0; i < limits.mib.size(); ++i) {
    print(format("  %7.3f MB %23.2f %9.2f %14.2f %13.2f", limits.mib[i], limits.read_cold_us[i], limits.read_hot_us[i],
                 limits.write_cold_us[i], limits.write_hot_us[i]));
  }
  print(
      format("  largest: read %.2f TB/s, in place %.2f TB/s counting both ways", limits.read_tbps, limits.write_tbps));
}

}  // namespace polylora::bench
