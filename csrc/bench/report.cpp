#include "report.h"

#include <algorithm>

#include "json.h"
#include "stats.h"

namespace polylora::bench {
namespace {

std::string case_json(const Case& c, const Options& options) {
  std::string text = format("\"case\": %s, \"op\": \"%s\", \"dtype\": \"%s\", \"k\": %lld, \"n\": %s, \"ranks\": %s, ",
                            quoted(c.name()).c_str(), op_name(options.op), options.fp16 ? "fp16" : "bf16",
                            static_cast<long long>(c.k), json_list(c.widths).c_str(), json_list(c.ranks).c_str());
  text += format("\"rows\": %lld, \"adapters\": %d, \"slots\": %d, \"order\": \"%s\", \"idle\": %s",
                 static_cast<long long>(c.rows), c.adapters, c.slots, order_name(c.order), json_bool(c.idle));
  if (c.vocab > 0) {
    text += format(", \"vocab\": %lld, \"layout\": \"%s\"", static_cast<long long>(c.vocab),
                   c.token_major ? "token" : "rank");
  }
  return text;
}

}  // namespace

Report::Report(const Options& options, const Device& device)
    : DeviceReport(device, options.json), options_(options), h100_(h100_limits()) {}

void Report::begin(const std::vector<Case>& cases, const std::vector<std::string>& paths) {
  if (options_.json) return;
  // a baseline may sort the rows of a case, which its name says
  for (const Case& c : cases) name_width_ = std::max(name_width_, static_cast<int>(c.name().size()));
  const bool sorts = std::find(paths.begin(), paths.end(), "cutlass") != paths.end();
  name_width_ += sorts ? 7 : 0;
  for (const std::string& path : paths) path_width_ = std::max(path_width_, static_cast<int>(path.size()));
  print("");
  std::string head = format("%-*s  %-*s  ", name_width_, "case", path_width_, "path");
  if (options_.check) return print(head + "    error");
  if (options_.chain)
    head += "  base us     added       min       max";
  else
    head += "       us       min       max";
  print(head + "     floor  ratio  H100 floor  ratio     error");
}

void Report::add(const Row& row) {
  const Traffic traffic = traffic_of(row.shape, options_.op);
  const double floor = floor_us(limits(), traffic);
  const double floor_h100 = floor_us(h100_, traffic);
  const double ratio = row.timing.median / floor;
  const double ratio_h100 = row.timing.median / floor_h100;
  if (row.timing.median > 0) measured_.push_back({regime_of(row.shape), row.path, ratio, ratio_h100});
  if (options_.json) {
    std::string text =
        format("{\"kind\": \"%s\", \"device\": %s, ", options_.chain ? "chain" : "case", quoted(device().name).c_str());
    text += case_json(row.shape, options_) + format(", \"path\": %s, ", quoted(row.path).c_str());
    if (options_.chain) text += format("\"base_us\": %.4f, ", row.base_us);
    text += timing_json(row.timing) + ", ";
    text += format("\"floor_us\": %.4f, \"floor_h100_us\": %.4f, \"ratio\": %.4f, \"ratio_h100\": %.4f, ", floor,
                   floor_h100, ratio, ratio_h100);
    text += format("\"weight_bytes\": %.0f, \"activation_bytes\": %.0f, \"error\": %.3e, \"cold\": %s}",
                   traffic.weights, traffic.moved, row.error, json_bool(row.cold));
    return print(text);
  }
  std::string line = format("%-*s  %-*s  ", name_width_, row.shape.name().c_str(), path_width_, row.path.c_str());
  if (options_.chain) line += format("%9.2f ", row.base_us);
  line += format("%9.2f %9.2f %9.2f", row.timing.median, row.timing.min, row.timing.max);
  line += format(" %9.2f %6.2f %11.2f %6.2f %9.1e", floor, ratio, floor_h100, ratio_h100, row.error);
  print(line + (row.cold ? "" : "  (weights warm)"));
}

void Report::add_checked(const Case& c, const std::string& path, double error) const {
  if (options_.json) {
    print(format("{\"kind\": \"checked\", \"device\": %s, ", quoted(device().name).c_str()) + case_json(c, options_) +
          format(", \"path\": %s, \"error\": %.3e}", quoted(path).c_str(), error));
  } else {
    print(format("%-*s  %-*s  %9.1e", name_width_, c.name().c_str(), path_width_, path.c_str(), error));
  }
}

void Report::add_not_served(const Case& c, const std::string& path) const {
  if (options_.json) {
    print(format("{\"kind\": \"not_served\", \"device\": %s, ", quoted(device().name).c_str()) +
          case_json(c, options_) + format(", \"path\": %s}", quoted(path).c_str()));
  } else {
    print(format("%-*s  %-*s  not served", name_width_, c.name().c_str(), path_width_, path.c_str()));
  }
}

void Report::add_too_large(const Case& c, const std::string& path) const {
  if (options_.json) {
    print(format("{\"kind\": \"too_large\", \"device\": %s, ", quoted(device().name).c_str()) + case_json(c, options_) +
          format(", \"path\": %s}", quoted(path).c_str()));
  } else {
    print(format("%-*s  %-*s  left out: it does not fit the device's memory", name_width_, c.name().c_str(),
                 path_width_, path.c_str()));
  }
}

void Report::add_failure(const Case& c, const std::string& path, const std::string& why) const {
  if (options_.json) {
    print(format("{\"kind\": \"failure\", \"device\": %s, ", quoted(device().name).c_str()) + case_json(c, options_) +
          format(", \"path\": %s, \"failure\": %s}", quoted(path).c_str(), quoted(why).c_str()));
  } else {
    print(format("%-*s  %-*s  FAILED: ", name_width_, c.name().c_str(), path_width_, path.c_str()) + why);
  }
}

void Report::end() const {
  std::vector<std::string> paths;
  for (const Measured& m : measured_) {
    if (std::find(paths.begin(), paths.end(), m.path) == paths.end()) paths.push_back(m.path);
  }
  if (!options_.json && !paths.empty()) print("\ngeometric mean of the ratios to the floor (to the H100's)");
  for (const std::string& path : paths) {
    std::string line = format("  %-*s", path_width_, path.c_str());
    std::string json = format("{\"kind\": \"summary\", \"device\": %s, \"op\": \"%s\", \"path\": %s",
                              quoted(device().name).c_str(), op_name(options_.op), quoted(path).c_str());
    for (const Regime regime : {Regime::kSmall, Regime::kDecode, Regime::kPrefill, Regime::kLmHead}) {
      std::vector<double> ratios;
      std::vector<double> ratios_h100;
      for (const Measured& m : measured_) {
        if (m.path != path || m.regime != regime) continue;
        ratios.push_back(m.ratio);
        ratios_h100.push_back(m.ratio_h100);
      }
      if (ratios.empty()) continue;
      const char* name = kRegimeNames[static_cast<int>(regime)];
      const double mean = geometric_mean(ratios);
      const double mean_h100 = geometric_mean(ratios_h100);
      line += format("   %s: %.2f (%.2f) of %zu", name, mean, mean_h100, ratios.size());
      json += format(", \"%s\": {\"ratio\": %.4f, \"ratio_h100\": %.4f, \"cases\": %zu}", name, mean, mean_h100,
                     ratios.size());
    }
    print(options_.json ? json + "}" : line);
  }
}

void Report::list(const Options& options, const std::vector<Case>& cases) {
  int width = 4;
  for (const Case& c : cases) width = std::max(width, static_cast<int>(c.name().size()));
  if (!options.json) print(format("%-*s  weights MB  x+y MB  H100 floor", width, "case"));
  for (const Case& c : cases) {
    const Traffic traffic = traffic_of(c, options.op);
    const double floor = floor_us(h100_limits(), traffic);
    if (options.json) {
      print("{\"kind\": \"listed\", " + case_json(c, options) +
            format(", \"weight_bytes\": %.0f, \"activation_bytes\": %.0f, \"floor_h100_us\": %.4f}", traffic.weights,
                   traffic.moved, floor));
    } else {
      print(format("%-*s  %10.2f  %6.2f  %10.2f", width, c.name().c_str(), traffic.weights / 1e6, traffic.moved / 1e6,
                   floor));
    }
  }
}

}  // namespace polylora::bench
