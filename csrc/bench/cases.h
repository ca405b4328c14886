// The cases: a module's shape, its adapters and the rows of a batch. No CUDA.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "floor.h"
#include "polylora/plan_layout.h"
#include "polylora/slice_table.h"
#include "stats.h"

namespace polylora::bench {

enum class Op { kLinear, kShrink, kExpand, kEmbedding, kPlan };

inline const char* op_name(Op op) {
  constexpr const char* kNames[] = {"linear", "shrink", "expand", "embedding", "plan"};
  return kNames[static_cast<int>(op)];
}

/// Where a row's adapter comes from: row i has adapter i mod a; the rows lie in a equal segments; or, as in an engine's
/// step that mixes decode with prefill, a - 1 adapters have a row each, and the first one all the rest.
enum class RowOrder { kInterleaved, kSegments, kServing };

inline const char* order_name(RowOrder order) {
  constexpr const char* kNames[] = {"interleaved", "segments", "serving"};
  return kNames[static_cast<int>(order)];
}

/// Rows up to which a batch counts as decode.
inline constexpr int64_t kDecodeRows = 256;

/// Elements are bf16 or fp16.
inline constexpr int64_t kElementBytes = 2;

struct Case {
  std::string module;                       // name, or the shape where it has none
  int64_t k = 0;                            // input width; unused by an embedding
  std::vector<int32_t> widths;              // of the slices
  std::vector<int32_t> ranks;               // adapter g has ranks[g mod size]
  int64_t rows = 0;                         //
  int32_t adapters = 1;                     // distinct ones in the batch, at most rows
  int32_t slots = 1;                        // groups of the plan and the table; those without rows are empty
  int32_t b_pitch = 0;                      // from a row of B to the next, of a pool with room for more ranks; 0: none
  RowOrder order = RowOrder::kInterleaved;  //
  int64_t vocab = 0;                        // above 0: A is looked up by token id
  bool token_major = false;                 // A is [vocab, rank] instead of [rank, vocab]
  bool idle = false;                        // no row has an adapter

  int32_t rank_of(int64_t adapter) const { return ranks[static_cast<size_t>(adapter) % ranks.size()]; }

  int32_t max_rank() const { return *std::max_element(ranks.begin(), ranks.end()); }

  int64_t width() const {
    int64_t sum = 0;
    for (const int32_t width : widths) sum += width;
    return sum;
  }

  int32_t adapter_of(int64_t row) const {
    if (idle) return kNoAdapter;
    if (order == RowOrder::kServing) return row + 1 < adapters ? static_cast<int32_t>(row + 1) : 0;
    return static_cast<int32_t>(order == RowOrder::kSegments ? row * adapters / rows : row % adapters);
  }

  int64_t v_width() const { return static_cast<int64_t>(widths.size()) * max_rank(); }

  std::string rank_name() const {
    return ranks.size() == 1 ? std::to_string(ranks[0])
                             : std::to_string(ranks.front()) + "-" + std::to_string(ranks.back());
  }

  std::string name() const {
    std::string text = module;
    if (!ranks.empty()) text += " r" + rank_name();
    text += " M" + std::to_string(rows) + " a" + std::to_string(adapters);
    if (slots != adapters) text += " slots" + std::to_string(slots);
    if (b_pitch > 0) text += " pitch" + std::to_string(b_pitch);
    if (order == RowOrder::kSegments && rows <= kDecodeRows && adapters > 1) text += " sorted";
    if (order == RowOrder::kInterleaved && rows > kDecodeRows && adapters > 1) text += " mixed";
    if (order == RowOrder::kServing && adapters > 1) text += " serving";
    if (idle) text += " idle";
    return text;
  }
};

/// An output head: as wide as a vocabulary, few rows. The name decides, as in python/polylora/bench/cases.py.
inline bool is_lm_head(const Case& c) {
  constexpr const char kEnd[] = ".lm_head";
  constexpr size_t kLength = sizeof(kEnd) - 1;
  return c.module.size() > kLength && c.module.compare(c.module.size() - kLength, kLength, kEnd) == 0;
}

/// Regimes, reported apart.
enum class Regime { kSmall, kDecode, kPrefill, kLmHead };
inline constexpr const char* kRegimeNames[] = {"M <= 32", "M 64-256", "prefill", "lm_head"};

inline Regime regime_of_rows(int64_t rows) {
  if (rows <= 32) return Regime::kSmall;
  return rows <= kDecodeRows ? Regime::kDecode : Regime::kPrefill;
}

inline Regime regime_of(const Case& c) { return is_lm_head(c) ? Regime::kLmHead : regime_of_rows(c.rows); }

/// Bytes of adapter weights that a call of `op` needs, each once. A looked up by token id costs what memory moves for
/// it: a 32-byte sector an element where A is [rank, vocab], the sectors of one row of A where it is [vocab, rank].
inline double weight_bytes(const Case& c, Op op) {
  constexpr int64_t kSector = 32;
  if (c.idle || op == Op::kPlan) return 0;
  int64_t bytes = 0;
  for (int32_t g = 0; g < c.adapters; ++g) {
    const int64_t rank = c.rank_of(g);
    if (op == Op::kLinear || op == Op::kShrink) bytes += static_cast<int64_t>(c.widths.size()) * rank * c.k;
    if (op != Op::kShrink) bytes += c.width() * rank;
  }
  bytes *= kElementBytes;
  if (op == Op::kEmbedding) {
    for (int64_t row = 0; row < c.rows; ++row) {
      const int64_t rank = c.rank_of(c.adapter_of(row));
      const int64_t row_bytes =
          c.token_major ? (rank * kElementBytes + kSector - 1) / kSector * kSector : rank * kSector;
      bytes += row_bytes * static_cast<int64_t>(c.widths.size());
    }
  }
  return static_cast<double>(bytes);
}

/// Bytes of one weight set of `op`: all that lies in memory, an embedding's whole A among it.
inline int64_t weight_set_bytes(const Case& c, Op op) {
  const auto slices = static_cast<int64_t>(c.widths.size());
  int64_t elements = 0;
  for (int32_t g = 0; g < c.adapters; ++g) {
    const int64_t rank = c.rank_of(g);
    if (op == Op::kLinear || op == Op::kShrink) elements += slices * rank * c.k;
    if (op == Op::kEmbedding) elements += slices * rank * c.vocab;
    if (op != Op::kShrink) elements += c.width() * rank;
  }
  return elements * kElementBytes;
}

inline Traffic traffic_of(const Case& c, Op op) {
  Traffic traffic;
  traffic.weights = weight_bytes(c, op);
  if (c.idle) return traffic;
  const double rows = static_cast<double>(c.rows);
  if (op == Op::kPlan) {
    traffic.footprint = traffic.moved = rows * 3 * sizeof(int32_t);  // ids in, row_group and order out
    return traffic;
  }
  const double x = rows * static_cast<double>(c.k * kElementBytes);
  const double y = rows * static_cast<double>(c.width() * kElementBytes);
  double v = 0;
  for (int64_t row = 0; row < c.rows; ++row) v += c.rank_of(c.adapter_of(row));
  v *= static_cast<double>(c.widths.size() * sizeof(float));
  switch (op) {
    case Op::kLinear:
      traffic.footprint = x + y;
      traffic.moved = x + 2 * y;
      break;
    case Op::kShrink:
      traffic.footprint = traffic.moved = x + v;
      break;
    case Op::kExpand:
      traffic.footprint = v + y;
      traffic.moved = v + 2 * y;
      break;
    default:
      traffic.footprint = y;
      traffic.moved = 2 * y;
  }
  return traffic;
}

// ---- from text

inline int64_t parse_integer(const std::string& text, const std::string& what, int64_t low, int64_t high) {
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno != 0 || value < low || value > high) {
    throw UsageError(what + " must be an integer from " + std::to_string(low) + " to " + std::to_string(high) +
                     ", got '" + text + "'");
  }
  return value;
}

inline std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

/// "16", or "8-64": 8, 16, 32, 64 in turn over the adapters.
inline std::vector<int32_t> parse_ranks(const std::string& text) {
  const std::vector<std::string> ends = split(text, '-');
  if (ends.size() > 2) throw UsageError("r must be a rank or LOW-HIGH, got '" + text + "'");
  const auto low = static_cast<int32_t>(parse_integer(ends[0], "r", 1, kMaxRank));
  if (ends.size() == 1) return {low};
  const auto high = static_cast<int32_t>(parse_integer(ends[1], "r", low, kMaxRank));
  std::vector<int32_t> ranks;
  for (int32_t rank = low; rank < high; rank *= 2) ranks.push_back(rank);
  ranks.push_back(high);
  return ranks;
}

inline std::vector<int32_t> parse_widths(const std::string& text) {
  std::vector<int32_t> widths;
  for (const std::string& part : split(text, '+')) {
    widths.push_back(static_cast<int32_t>(parse_integer(part, "n", 1, INT32_MAX)));
  }
  if (widths.size() > static_cast<size_t>(kMaxSlices)) {
    throw UsageError("n must name at most " + std::to_string(kMaxSlices) + " slices, got '" + text + "'");
  }
  return widths;
}

/// Adapters of a batch where the case does not say: one a row up to 32 in decode, 4 segments in prefill.
inline int32_t default_adapters(int64_t rows) {
  return static_cast<int32_t>(rows <= kDecodeRows ? std::min<int64_t>(rows, 32) : 4);
}

/// "k=4096,n=4096+1024+1024,r=16,m=16,a=16" and optionally slots=, pitch=, order=interleaved|segments|serving,
/// name=; an embedding has vocab= instead of k= and optionally layout=rank|token; a plan has m=, a= and slots= alone.
inline Case parse_case(const std::string& text, Op op) {
  Case c;
  c.adapters = c.slots = 0;
  bool ordered = false;
  std::string n;
  for (const std::string& field : split(text, ',')) {
    const size_t equals = field.find('=');
    if (equals == std::string::npos) throw UsageError("a case is KEY=VALUE,..., got '" + field + "' in '" + text + "'");
    const std::string key = field.substr(0, equals);
    const std::string value = field.substr(equals + 1);
    if (key == "name") {
      c.module = value;
    } else if (key == "k") {
      c.k = parse_integer(value, key, 1, INT32_MAX);
    } else if (key == "n") {
      n = value;
      c.widths = parse_widths(value);
    } else if (key == "r") {
      c.ranks = parse_ranks(value);
    } else if (key == "m") {
      c.rows = parse_integer(value, key, 1, 1 << 24);
    } else if (key == "a") {
      c.adapters = static_cast<int32_t>(parse_integer(value, key, 1, 1 << 20));
    } else if (key == "slots") {
      c.slots = static_cast<int32_t>(parse_integer(value, key, 1, 1 << 20));
    } else if (key == "pitch") {
      c.b_pitch = static_cast<int32_t>(parse_integer(value, key, 1, 1 << 16));
    } else if (key == "vocab") {
      c.vocab = parse_integer(value, key, 1, INT32_MAX);
    } else if (key == "order" && (value == "interleaved" || value == "segments" || value == "serving")) {
      c.order = value == "segments"  ? RowOrder::kSegments
                : value == "serving" ? RowOrder::kServing
                                     : RowOrder::kInterleaved;
      ordered = true;
    } else if (key == "layout" && (value == "rank" || value == "token")) {
      c.token_major = value == "token";
    } else {
      throw UsageError("unknown field '" + field + "' in case '" + text + "'");
    }
  }
  if (c.rows == 0) throw UsageError("case '" + text + "' has no m=");
  if (op == Op::kPlan) {
    c.module = c.module.empty() ? "plan" : c.module;
    c.ranks.clear();
  } else {
    if (c.widths.empty()) throw UsageError("case '" + text + "' has no n=");
    if (c.ranks.empty()) throw UsageError("case '" + text + "' has no r=");
    if (op == Op::kEmbedding ? c.vocab == 0 : c.k == 0) {
      throw UsageError("case '" + text + "' has no " + (op == Op::kEmbedding ? "vocab=" : "k="));
    }
  }
  if (op != Op::kEmbedding && c.vocab != 0) throw UsageError("vocab= is for bench_embedding, in case '" + text + "'");
  if (c.adapters == 0) c.adapters = default_adapters(c.rows);
  c.adapters = static_cast<int32_t>(std::min<int64_t>(c.adapters, c.rows));
  if (c.slots == 0) c.slots = c.adapters;
  if (c.slots < c.adapters) throw UsageError("case '" + text + "' has fewer slots than adapters");
  if (c.b_pitch > 0 && (c.b_pitch % 8 != 0 || c.ranks.empty() || c.b_pitch < c.max_rank())) {
    throw UsageError("case '" + text + "': pitch= must be a multiple of 8 and at least the ranks");
  }
  if (!ordered) c.order = c.rows <= kDecodeRows ? RowOrder::kInterleaved : RowOrder::kSegments;
  if (c.module.empty()) {
    c.module = (op == Op::kEmbedding ? "vocab:" + std::to_string(c.vocab) : std::to_string(c.k)) + "->" + n;
    if (c.token_major) c.module += ".token_major";
  }
  return c;
}

// ---- named cases

struct Module {
  const char* name;
  int64_t k;
  std::vector<int32_t> widths;
};

/// Rows and distinct adapters of a batch.
struct Batch {
  int64_t rows;
  int32_t adapters;
};

inline Case make_case(const Module& module, std::vector<int32_t> ranks, const Batch& batch) {
  Case c;
  c.module = module.name;
  c.k = module.k;
  c.widths = module.widths;
  c.ranks = std::move(ranks);
  c.rows = batch.rows;
  c.adapters = c.slots = batch.adapters;
  c.order = batch.rows <= kDecodeRows ? RowOrder::kInterleaved : RowOrder::kSegments;
  return c;
}

inline const std::vector<Module>& issue_modules() {
  static const std::vector<Module> modules = {{"llama8b.qkv", 4096, {4096, 1024, 1024}},
                                              {"llama8b.down", 14336, {4096}},
                                              {"qwen35moe.qkvz", 2048, {2048, 2048, 4096, 4096}}};
  return modules;
}

/// nemotron3.in_proj: mamba_heads 128 of 64, 8 groups, state 128: gate, x, B, C, dt.
inline const std::vector<Module>& further_modules() {
  static const std::vector<Module> modules = {{"llama8b.o", 4096, {4096}},
                                              {"llama8b.gate_up", 4096, {14336, 14336}},
                                              {"qwen35moe.ba", 2048, {32, 32}},
                                              {"deepseek.qkv_a", 7168, {1536, 576}},
                                              {"nemotron3.in_proj", 4096, {8192, 8192, 1024, 1024, 128}}};
  return modules;
}

inline const std::vector<Module>& lm_head_modules() {
  static const std::vector<Module> modules = {{"llama8b.lm_head", 4096, {128256}},
                                              {"qwen35moe.lm_head", 2048, {248320}}};
  return modules;
}

inline void append(std::vector<Case>& cases, const std::vector<Module>& modules,
                   const std::vector<std::vector<int32_t>>& ranks, const std::vector<Batch>& batches) {
  for (const Module& module : modules) {
    for (const std::vector<int32_t>& rank : ranks) {
      for (const Batch& batch : batches) cases.push_back(make_case(module, rank, batch));
    }
  }
}

/// Small ones: rows around the borders of the kernels' rules, ranks and widths that fill no tile, slots without rows.
inline std::vector<Case> small_cases(Op op) {
  const std::vector<std::string> shapes =
      op == Op::kEmbedding ? std::vector<std::string>{"vocab=300,n=136", "vocab=300,n=64,layout=token"}
                           : std::vector<std::string>{"k=512,n=256+64+64", "k=96,n=72+40"};
  std::vector<Case> cases;
  for (const std::string& shape : shapes) {
    for (const char* batch : {"r=16,m=1", "r=16,m=12,a=1", "r=3,m=20,a=16,slots=40", "r=8-64,m=40,a=5", "r=16,m=72,a=8",
                              "r=40,m=70,a=3", "r=16,m=300,a=3", "r=8-64,m=600,a=20,order=serving"}) {
      cases.push_back(parse_case(shape + "," + batch, op));
    }
  }
  // three planes of v and more; outputs enough for mma instead of wide
  if (op != Op::kEmbedding) cases.push_back(parse_case("k=1024,n=3200,r=100,m=300,a=3", op));
  return cases;
}

inline std::vector<Case> linear_cases(const std::string& preset) {
  const std::vector<Batch> issue = {{1, 1}, {16, 16}, {64, 32}, {256, 32}, {2048, 4}, {8192, 4}};
  const std::vector<Batch> few_rows = {{1, 1}, {16, 16}, {64, 32}};
  std::vector<Case> cases;
  if (preset == "quick") {
    append(cases, {issue_modules()[0]}, {{16}, {64}}, {{1, 1}, {16, 16}, {64, 32}, {2048, 4}});
  } else if (preset == "issue") {
    append(cases, issue_modules(), {{16}, {64}}, issue);
    append(cases, lm_head_modules(), {{16}}, few_rows);
  } else if (preset == "chain") {
    append(cases, issue_modules(), {{16}, {64}}, few_rows);
  } else if (preset == "full") {
    const std::vector<std::vector<int32_t>> ranks = {{8}, {16}, {32}, {64}, {128}};
    append(cases, issue_modules(), ranks, issue);
    append(cases, further_modules(), ranks, issue);
    append(cases, issue_modules(), {{16}, {64}}, {{2048, 1}, {2048, 2}, {2048, 8}, {8192, 1}, {8192, 2}, {8192, 8}});
    append(cases, issue_modules(), {{8, 16, 32, 64}}, {{16, 16}, {64, 32}, {256, 32}, {2048, 4}});
    append(cases, lm_head_modules(), {{16}, {64}}, few_rows);
  }
  return cases;
}

inline std::vector<Case> embedding_cases(const std::string& preset) {
  struct Table {
    const char* name;
    int64_t vocab;
    int32_t width;
  };
  const std::vector<Table> tables = {{"llama8b.embed", 128256, 4096}, {"qwen35moe.embed", 248320, 2048}};
  std::vector<Batch> batches = {{1, 1}, {16, 16}, {64, 32}, {256, 32}, {2048, 4}, {8192, 4}};
  std::vector<int32_t> ranks = {16, 64};
  if (preset == "quick") {
    batches = {{1, 1}, {64, 32}, {2048, 4}};
    ranks = {16};
  } else if (preset == "full") {
    ranks = {8, 16, 32, 64, 128};
  } else if (preset != "issue") {
    return {};
  }
  std::vector<Case> cases;
  for (const Table& table : tables) {
    for (const bool token_major : {false, true}) {
      if (token_major && preset != "full") continue;
      for (const int32_t rank : ranks) {
        for (const Batch& batch : batches) {
          Case c = make_case({table.name, 0, {table.width}}, {rank}, batch);
          c.vocab = table.vocab;
          c.token_major = token_major;
          if (token_major) c.module += ".token_major";
          cases.push_back(c);
        }
      }
    }
  }
  return cases;
}

/// A plan knows neither shapes nor ranks: rows and groups alone, whatever the preset.
inline std::vector<Case> plan_cases() {
  const std::vector<Batch> batches = {{1, 1},    {16, 16},  {64, 32},    {256, 32},   {256, 256},
                                      {2048, 4}, {8192, 4}, {8192, 128}, {16384, 32}, {65536, 128}};
  std::vector<Case> cases;
  for (const Batch& batch : batches) {
    Case c = make_case({"plan", 0, {}}, {}, batch);
    cases.push_back(c);
  }
  return cases;
}

inline std::vector<Case> preset_cases(const std::string& preset, Op op) {
  std::vector<Case> cases = op == Op::kPlan        ? plan_cases()
                            : preset == "check"    ? small_cases(op)
                            : op == Op::kEmbedding ? embedding_cases(preset)
                                                   : linear_cases(preset);
  if (cases.empty()) throw UsageError("no preset '" + preset + "' for --op " + op_name(op));
  return cases;
}

}  // namespace polylora::bench
