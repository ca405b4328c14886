// Which MoE layers are measured, and what of them is read: names, models, presets and bars are those of
// python/polylora/bench/moe_cases.py. No CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "polylora/params.h"
#include "stats.h"

namespace polylora::bench {

/// Adapters.
inline constexpr int32_t kMoeSlots = 8;

/// Tokens from which on there are segments, and how many.
inline constexpr int64_t kSegmentedRows = 2048;
inline constexpr int32_t kSegments = 4;

/// What an H100 streams: the yardstick of the bars.
inline constexpr double kYardstickTbps = 3.0;

/// swiglu_oai's, as the ops take them by default.
inline constexpr float kActAlpha = 1.702f;
inline constexpr float kActLimit = 7.f;

/// The routed experts of a layer.
struct Experts {
  std::string name;          // of the model, or the shape
  int64_t hidden = 0;        // H: width of the layer's input and output (a latent MoE's latent width)
  int64_t inner = 0;         // I: width of an expert
  int32_t experts = 0;       // E
  int32_t top_k = 0;         // experts a token
  std::string act = "silu";  // silu, relu2 or swiglu_oai
  bool gated = true;         // gate and up, or up alone
  bool interleaved = false;  // gate and up alternate in the columns

  int64_t slices() const { return gated ? 2 : 1; }

  /// The base weights of one expert.
  int64_t base_bytes() const { return (slices() + 1) * inner * hidden * kElementBytes; }

  Activation activation() const {
    if (act == "relu2") return Activation::kRelu2;
    return act == "swiglu_oai" ? Activation::kSwigluOai : Activation::kSilu;
  }
};

inline const std::vector<Experts>& moe_models() {
  static const std::vector<Experts> models = {
      {"qwen35-35b", 2048, 512, 256, 8, "silu", true, false},
      {"nemotron3-super", 1024, 2688, 512, 22, "relu2", false, false},
      {"qwen35-397b", 4096, 1024, 512, 10, "silu", true, false},
      {"kimi-k25", 7168, 2048, 384, 8, "silu", true, false},
      {"gptoss-120b", 2880, 2880, 128, 4, "swiglu_oai", true, true},
  };
  return models;
}

/// `rows` tokens through `model` with kMoeSlots adapters of `rank`.
struct MoeCase {
  Experts model;
  int32_t rank = 0;
  int64_t rows = 0;

  std::string name() const { return model.name + " r" + std::to_string(rank) + " M" + std::to_string(rows); }

  Regime regime() const { return regime_of_rows(rows); }

  /// (token, expert) pairs.
  int64_t pairs() const { return rows * model.top_k; }

  int64_t groups() const { return int64_t{kMoeSlots} * model.experts; }

  /// A and B of one adapter in one expert: of gate and up, and of down.
  int64_t up_bytes() const { return rank * model.slices() * (model.hidden + model.inner) * kElementBytes; }
  int64_t down_bytes() const { return rank * (model.inner + model.hidden) * kElementBytes; }

  /// A and B of all adapters in all experts.
  int64_t pool_bytes() const { return groups() * (up_bytes() + down_bytes()); }

  /// x, out, and what lies between the stages: x by pairs, y1 and its delta, h, y2 and its delta.
  int64_t buffer_bytes() const {
    const int64_t of_pairs = model.hidden + 2 * model.slices() * model.inner + model.inner + 2 * model.hidden;
    return (pairs() * of_pairs + 2 * rows * model.hidden) * kElementBytes;
  }

  /// The adapter of a token. `turn`: the adapters, moved on by so many.
  int32_t slot_of(int64_t row, int64_t turn) const {
    if (rows < kSegmentedRows) return static_cast<int32_t>((row + turn) % kMoeSlots);
    int64_t segment = row * kSegments / rows;
    // segment i begins at i * rows / kSegments, rounded down
    while (segment + 1 < kSegments && (segment + 1) * rows / kSegments <= row) ++segment;
    return static_cast<int32_t>((segment + turn) % kMoeSlots);
  }
};

/// us to read so many bytes of weights at kYardstickTbps.
inline double yardstick_us(double weight_bytes) { return weight_bytes / (kYardstickTbps * kTbpsToBytesPerUs); }

/// Whole layers: the weights that a call hits, once, from cold HBM.
inline double moe_floor_us(const DeviceLimits& limits, double weight_bytes) {
  return floor_us(limits, {weight_bytes, 0, 0});
}

// ---- from text

/// A model's name, or "moe:2048x512,e256,k8,silu,gated,interleaved" (the last two where they hold).
inline Experts parse_experts(const std::string& text) {
  std::string names;
  for (const Experts& model : moe_models()) {
    if (model.name == text) return model;
    names += ", " + model.name;
  }
  const UsageError refused(
      "a model must be moe:HxI,eE,kK,ACT[,gated[,interleaved]] with ACT of silu, relu2, "
      "swiglu_oai, or one of" +
      names.substr(1) + ", got '" + text + "'");
  std::vector<std::string> parts = split(text, ',');
  if (text.rfind("moe:", 0) != 0 || parts.size() < 4 || parts.size() > 6) throw refused;
  const std::vector<std::string> widths = split(parts[0].substr(4), 'x');
  if (widths.size() != 2 || parts[1].empty() || parts[1][0] != 'e' || parts[2].empty() || parts[2][0] != 'k') {
    throw refused;
  }
  Experts model;
  model.name = text;
  model.hidden = parse_integer(widths[0], "hidden size", 1, 1 << 20);
  model.inner = parse_integer(widths[1], "the experts' width", 1, 1 << 20);
  model.experts = static_cast<int32_t>(parse_integer(parts[1].substr(1), "experts", 1, 1 << 15));
  model.top_k = static_cast<int32_t>(parse_integer(parts[2].substr(1), "experts a token", 1, model.experts));
  model.act = parts[3];
  model.gated = parts.size() > 4 && parts[4] == "gated";
  model.interleaved = parts.size() > 5 && parts[5] == "interleaved";
  const bool known = model.act == "silu" || model.act == "relu2" || model.act == "swiglu_oai";
  if (!known || (parts.size() > 4 && !model.gated) || (parts.size() > 5 && !model.interleaved)) throw refused;
  if (model.act == "swiglu_oai" && !model.gated) throw UsageError(text + ": swiglu_oai must be gated");
  return model;
}

/// "qwen35-35b r16 M16".
inline MoeCase parse_moe_case(const std::string& text) {
  std::vector<std::string> words;
  for (const std::string& word : split(text, ' ')) {
    if (!word.empty()) words.push_back(word);
  }
  if (words.size() != 3 || words[1][0] != 'r' || words[2][0] != 'M') {
    throw UsageError("a case must look like 'qwen35-35b r16 M16', got '" + text + "'");
  }
  MoeCase c;
  c.model = parse_experts(words[0]);
  c.rank = static_cast<int32_t>(parse_integer(words[1].substr(1), "rank", 1, kMaxRank));
  c.rows = parse_integer(words[2].substr(1), "rows", 1, 1 << 20);
  return c;
}

// ---- named cases

/// us that the ops may add on an H100, of the cases of the preset "issue".
struct MoeBar {
  std::string name;
  double us;
};

inline const std::vector<MoeBar>& moe_bars() {
  static const std::vector<MoeBar> bars = {
      {"qwen35-35b r16 M1", 5},           {"qwen35-35b r16 M16", 12.5},      {"qwen35-35b r16 M64", 42},
      {"qwen35-35b r16 M256", 125},       {"qwen35-35b r16 M2048", 150},     {"qwen35-35b r64 M1", 6.5},
      {"qwen35-35b r64 M16", 44.5},       {"qwen35-35b r64 M64", 158},       {"qwen35-35b r64 M256", 445},
      {"qwen35-35b r64 M2048", 420},      {"nemotron3-super r16 M1", 6},     {"nemotron3-super r16 M16", 31},
      {"nemotron3-super r16 M64", 108},   {"nemotron3-super r16 M256", 300}, {"nemotron3-super r16 M2048", 260},
      {"nemotron3-super r64 M1", 11},     {"nemotron3-super r64 M16", 117},  {"nemotron3-super r64 M64", 415},
      {"nemotron3-super r64 M256", 1100},
  };
  return bars;
}

/// 0: the case has none.
inline double moe_bar_us(const MoeCase& c) {
  for (const MoeBar& bar : moe_bars()) {
    if (bar.name == c.name()) return bar.us;
  }
  return 0;
}

/// quick, issue, full, or check: small ones, for what times nothing.
inline std::vector<MoeCase> moe_preset_cases(const std::string& preset) {
  std::vector<MoeCase> cases;
  if (preset == "issue") {
    for (const MoeBar& bar : moe_bars()) cases.push_back(parse_moe_case(bar.name));
  } else if (preset == "quick") {
    for (const int64_t rows : {1, 16, 64, 256}) cases.push_back({moe_models()[0], 16, rows});
  } else if (preset == "check") {
    for (const char* model :
         {"moe:256x128,e8,k2,silu,gated", "moe:128x192,e4,k3,relu2", "moe:128x64,e4,k2,swiglu_oai,gated,interleaved"}) {
      for (const char* call : {" r16 M1", " r16 M20", " r40 M20", " r16 M150", " r16 M600"}) {
        cases.push_back(parse_moe_case(std::string(model) + call));
      }
    }
  } else {
    for (const Experts& model : moe_models()) {
      for (const int32_t rank : {16, 64}) {
        for (const int64_t rows : {1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16384}) {
          cases.push_back({model, rank, rows});
        }
      }
    }
  }
  return cases;
}

}  // namespace polylora::bench
