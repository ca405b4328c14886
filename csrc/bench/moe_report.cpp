#include "moe_report.h"

#include <algorithm>

#include "json.h"
#include "moe_routing.h"
#include "stats.h"

namespace polylora::bench {
namespace {

constexpr int kSeamsWidth = 6;

std::string case_json(const MoeCase& c) {
  const Experts& m = c.model;
  return format(
      "\"case\": %s, \"regime\": \"%s\", \"model\": %s, \"hidden\": %lld, \"inner\": %lld, \"experts\": %d, "
      "\"top_k\": %d, \"act\": \"%s\", \"gated\": %s, \"interleaved\": %s, \"rank\": %d, \"rows\": %lld, "
      "\"slots\": %d, \"bar_us\": %s",
      quoted(c.name()).c_str(), kRegimeNames[static_cast<int>(c.regime())], quoted(m.name).c_str(),
      static_cast<long long>(m.hidden), static_cast<long long>(m.inner), m.experts, m.top_k, m.act.c_str(),
      json_bool(m.gated), json_bool(m.interleaved), c.rank, static_cast<long long>(c.rows), kMoeSlots,
      moe_bar_us(c) > 0 ? format("%g", moe_bar_us(c)).c_str() : "null");
}

// Nothing added has no ratio: no mean counts it.
std::string ratio_json(double us, double floor) { return us > 0 ? format("%.4f", us / floor) : "null"; }

int name_width(const std::vector<MoeCase>& cases) {
  int width = 4;
  for (const MoeCase& c : cases) width = std::max(width, static_cast<int>(c.name().size()));
  return width;
}

std::string bar_text(const MoeCase& c) { return moe_bar_us(c) > 0 ? format("%.1f", moe_bar_us(c)) : "-"; }

}  // namespace

void MoeReport::begin(const std::vector<MoeCase>& cases, const std::vector<std::string>& paths) {
  if (options_.json) return;
  name_width_ = name_width(cases);
  for (const std::string& path : paths) path_width_ = std::max(path_width_, static_cast<int>(path.size()));
  print("");
  std::string head = format("%-*s  %-*s  %-*s  ", name_width_, "case", path_width_, "path", kSeamsWidth, "seams");
  if (options_.check) return print(head + "    error");
  head += "weights MB";
  const char* layer = "   base us     added       low      high     floor  ratio  at 3 TB/s     bar";
  print(head + (options_.base ? layer : "") + "     error");
}

std::string MoeReport::head_of(const MoeRow& row) const {
  return format("%-*s  %-*s  %-*s  ", name_width_, row.shape.name().c_str(), path_width_, row.path.c_str(), kSeamsWidth,
                seams_name(row.seams));
}

std::string MoeReport::json_of(const char* kind, const MoeRow& row) const {
  return format("{\"kind\": \"%s\", \"device\": %s, %s, \"path\": %s, \"seams\": \"%s\"", kind,
                quoted(device().name).c_str(), case_json(row.shape).c_str(), quoted(row.path).c_str(),
                seams_name(row.seams));
}

void MoeReport::add(const MoeRow& row, const MoeFound& found) {
  const double floor = moe_floor_us(limits(), found.weight_bytes);
  if (found.has_base && found.layer.added.median > 0) measured_.push_back({row, found.layer.added.median / floor});
  if (options_.json) return add_json(row, found);
  add_line(row, found);
}

void MoeReport::add_json(const MoeRow& row, const MoeFound& found) const {
  const std::string of_case =
      format(", \"pools\": %lld, \"cold\": %s", static_cast<long long>(found.pools), json_bool(found.cold));
  if (found.has_base) {
    const double us = found.layer.added.median;
    const double floor = moe_floor_us(limits(), found.weight_bytes);
    std::string text = json_of("moe", row) + of_case;
    text += format(
        ", \"base\": \"cutlass\", \"routings\": %lld, \"base_us\": %.4f, %s, \"low_us\": %.4f, "
        "\"high_us\": %.4f, ",
        static_cast<long long>(found.layers), found.layer.base, timing_json(found.layer.added).c_str(), found.layer.low,
        found.layer.high);
    text +=
        format("\"weight_bytes\": %.0f, \"floor_us\": %.4f, \"at_3tbps_us\": %.4f, \"ratio\": %s, \"error\": %.3e}",
               found.weight_bytes, floor, yardstick_us(found.weight_bytes), ratio_json(us, floor).c_str(), found.error);
    print(text);
  }
  for (const MoeFound::Op& op : found.ops) {
    const double floor = floor_us(limits(), op.traffic);
    print(json_of("moe_op", row) + of_case +
          format(", \"op\": %s, %s, \"weight_bytes\": %.0f, \"activation_bytes\": %.0f, \"floor_us\": %.4f, "
                 "\"ratio\": %s, \"error\": %.3e}",
                 quoted(op.name).c_str(), timing_json(op.timing).c_str(), op.traffic.weights, op.traffic.moved, floor,
                 ratio_json(op.timing.median, floor).c_str(), found.error));
  }
}

void MoeReport::add_line(const MoeRow& row, const MoeFound& found) const {
  const double floor = moe_floor_us(limits(), found.weight_bytes);
  std::string line = head_of(row) + format("%10.1f", found.weight_bytes / 1e6);
  if (found.has_base) {
    const AddedTiming& t = found.layer;
    line += format(" %9.2f %9.2f %9.2f %9.2f %9.2f %6.2f %10.2f %7s", t.base, t.added.median, t.low, t.high, floor,
                   t.added.median / floor, yardstick_us(found.weight_bytes), bar_text(row.shape).c_str());
  }
  print(line + format(" %9.1e", found.error) + (found.cold ? "" : "  (weights warm)"));
  for (const MoeFound::Op& op : found.ops) {
    const double op_floor = floor_us(limits(), op.traffic);
    print(format("  %-16s %9.2f us alone %9.2f floor %6.2f ratio", op.name.c_str(), op.timing.median, op_floor,
                 op.timing.median / op_floor) +
          (op.traffic.weights > 0 ? format(" %9.1f MB of weights", op.traffic.weights / 1e6) : ""));
  }
}

void MoeReport::add_checked(const MoeRow& row, double error) const {
  print(options_.json ? json_of("checked", row) + format(", \"error\": %.3e}", error)
                      : head_of(row) + format("%9.1e", error));
}

void MoeReport::add_not_served(const MoeRow& row, const std::string& why) const {
  if (options_.json) return print(json_of("not_served", row) + format(", \"detail\": %s}", quoted(why).c_str()));
  print(head_of(row) + "not served" + (why.empty() ? "" : ": " + why));
}

void MoeReport::add_too_large(const MoeRow& row) const {
  if (options_.json) return print(json_of("too_large", row) + "}");
  print(head_of(row) + "left out: it does not fit the device's memory");
}

void MoeReport::add_failure(const MoeRow& row, const std::string& why) const {
  if (options_.json) return print(json_of("failure", row) + format(", \"failure\": %s}", quoted(why).c_str()));
  print(head_of(row) + "FAILED: " + why);
}

// By path and seams, in the order in which they first came.
void MoeReport::end() const {
  std::vector<MoeRow> kinds;
  const auto same = [](const MoeRow& a, const MoeRow& b) { return a.path == b.path && a.seams == b.seams; };
  for (const Measured& m : measured_) {
    const auto is_kind = [&](const MoeRow& kind) { return same(kind, m.row); };
    if (std::none_of(kinds.begin(), kinds.end(), is_kind)) kinds.push_back(m.row);
  }
  if (!options_.json && !kinds.empty()) print("\nadded time over the floor, geometric means");
  for (const MoeRow& kind : kinds) {
    std::string line = format("  %-*s  %-*s", path_width_, kind.path.c_str(), kSeamsWidth, seams_name(kind.seams));
    std::string json =
        format("{\"kind\": \"summary\", \"device\": %s, \"op\": \"moe\", \"path\": %s, \"seams\": \"%s\"",
               quoted(device().name).c_str(), quoted(kind.path).c_str(), seams_name(kind.seams));
    for (const Regime regime : {Regime::kSmall, Regime::kDecode, Regime::kPrefill}) {
      std::vector<double> ratios;
      for (const Measured& m : measured_) {
        if (same(m.row, kind) && m.row.shape.regime() == regime) ratios.push_back(m.ratio);
      }
      if (ratios.empty()) continue;
      const char* name = kRegimeNames[static_cast<int>(regime)];
      const double mean = geometric_mean(ratios);
      line += format("   %s: %.2f of %zu", name, mean, ratios.size());
      json += format(", \"%s\": {\"ratio\": %.4f, \"cases\": %zu}", name, mean, ratios.size());
    }
    print(options_.json ? json + "}" : line);
  }
}

void MoeReport::list(const MoeOptions& options, const std::vector<MoeCase>& cases) {
  const int width = name_width(cases);
  if (!options.json) print(format("%-*s  weights MB  base MB  H100 floor  at 3 TB/s     bar", width, "case"));
  for (const MoeCase& c : cases) {
    const MoeRouting routing = RoutingDealer(c, 1, kRoutingSeed).next();
    const auto weights = static_cast<double>(routing.groups_hit() * (c.up_bytes() + c.down_bytes()));
    const auto base = static_cast<double>(routing.experts_hit() * c.model.base_bytes());
    const double floor = moe_floor_us(h100_limits(), weights);
    if (options.json) {
      print("{\"kind\": \"listed\", " + case_json(c) +
            format(", \"weight_bytes\": %.0f, \"base_bytes\": %.0f, \"floor_h100_us\": %.4f, \"at_3tbps_us\": %.4f}",
                   weights, base, floor, yardstick_us(weights)));
    } else {
      print(format("%-*s  %10.1f  %7.0f  %10.2f  %9.2f  %6s", width, c.name().c_str(), weights / 1e6, base / 1e6, floor,
                   yardstick_us(weights), bar_text(c).c_str()));
    }
  }
}

}  // namespace polylora::bench
