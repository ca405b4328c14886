// The command line of the benchmarks. No CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cases.h"
#include "stats.h"

namespace polylora::bench {

struct Options {
  Op op = Op::kLinear;
  std::string preset;                  // empty: quick, or chain with --chain, unless there are explicit cases
  std::vector<std::string> filters;    // a case runs when its name contains any of them
  std::vector<std::string> cases;      // explicit ones, as text until the op is known
  std::vector<std::string> paths;      // values of POLYLORA_PATH; empty: the environment's
  std::vector<std::string> baselines;  // naive, cutlass
  std::string cublas;                  // library to load; empty: the usual names
  bool fp16 = false;                   // else bf16
  bool idle = false;
  bool chain = false;
  bool json = false;
  bool calibrate = true;
  bool list = false;
  bool help = false;
  int reps = 15;
  double min_ms = 20;
};

inline std::string usage(const std::string& program, bool embedding) {
  std::string text = "usage: " + program + " [options]\n\n";
  text += embedding ? "Times the embedding op: y += scale * A[:, token] B^T, A looked up by token id.\n"
                    : "Times y += scale * (x A^T) B^T and its halves; --op plan: the plan of a step.\n";
  text += R"(Every case is checked against a naive kernel first. Columns: us a call, the floor of this device and of the
documented H100, the ratios to them, the error ||result - reference|| / ||delta||.

what to run
)";
  if (!embedding) text += "  --op linear|shrink|expand|plan  default linear\n";
  text += embedding ? "  --preset quick|issue|full       default quick\n"
                    : "  --preset quick|issue|chain|full default quick; chain with --chain\n";
  text += "  --case KEY=VALUE,...            instead of a preset, repeatable:\n";
  text += embedding ? "                                    vocab=128256,n=4096,r=16,m=16[,a=16][,layout=rank|token]\n"
                    : "                                    k=4096,n=4096+1024+1024,r=16,m=16[,a=16]\n";
  text += R"(                                    r=8-64: adapters of rank 8, 16, 32, 64 in turn; a: distinct adapters;
                                    slots=: groups of the plan; order=interleaved|segments|serving; name=
  --filter TEXT                   only cases whose name contains TEXT; repeatable: any of them
  --idle                          the same shapes with no adapter on any row
  --dtype bf16|fp16               default bf16
  --list                          print the cases and their H100 floors, run nothing (needs no GPU)

against what
  --path NAME                     auto (unsets POLYLORA_PATH), cluster, wide, mma, general (set it); repeatable:
                                    each case with each
)";
  if (embedding) {
    text += "  --baseline naive                times that too\n";
  } else {
    text +=
        R"(  --baseline naive|cutlass        times that too; repeatable. cutlass: two grouped GEMMs, rows sorted by adapter
  --chain                         what the op adds to a chain of cuBLAS GEMMs, each followed by it
  --cublas FILE                   the cuBLAS to load (default: libcublas.so.13, .so.12, .so)
)";
  }
  text += R"(
how
  --reps N                        replays at least, default 15
  --min-ms MS                     time measured at least, a case, default 20
  --no-calibrate                  take the documented H100 for the floor, measure nothing of this device
  --json                          JSON lines instead of tables
  --help

exit codes: 0 all right; 1 a result was wrong or a call failed; 2 bad usage; 3 no GPU
)";
  return text;
}

/// `arguments` without the program's name. Throws UsageError.
inline Options parse_options(const std::vector<std::string>& arguments, bool embedding) {
  Options options;
  if (embedding) options.op = Op::kEmbedding;
  size_t at = 0;
  std::string flag;
  std::string inline_value;
  bool has_inline_value = false;
  const auto value = [&]() -> std::string {
    if (has_inline_value) {
      has_inline_value = false;
      return inline_value;
    }
    if (at == arguments.size()) throw UsageError(flag + " needs a value");
    return arguments[at++];
  };
  const auto one_of = [&](const std::string& text, const std::vector<std::string>& known) {
    std::string list;
    for (const std::string& name : known) {
      if (text == name) return text;
      list += (list.empty() ? "" : ", ") + name;
    }
    throw UsageError(flag + " must be one of " + list + ", got '" + text + "'");
  };
  while (at < arguments.size()) {
    flag = arguments[at++];
    const size_t equals = flag.find('=');
    has_inline_value = flag.rfind("--", 0) == 0 && equals != std::string::npos;
    if (has_inline_value) {
      inline_value = flag.substr(equals + 1);
      flag.resize(equals);
    }
    if (flag == "--help" || flag == "-h") {
      options.help = true;
    } else if (flag == "--op" && !embedding) {
      const std::string name = one_of(value(), {"linear", "shrink", "expand", "plan"});
      for (const Op op : {Op::kLinear, Op::kShrink, Op::kExpand, Op::kPlan}) {
        if (name == op_name(op)) options.op = op;
      }
    } else if (flag == "--preset") {
      options.preset = embedding ? one_of(value(), {"quick", "issue", "full"})
                                 : one_of(value(), {"quick", "issue", "chain", "full"});
    } else if (flag == "--case") {
      options.cases.push_back(value());
    } else if (flag == "--filter") {
      options.filters.push_back(value());
    } else if (flag == "--path") {
      options.paths.push_back(one_of(value(), {"auto", "cluster", "wide", "mma", "general"}));
    } else if (flag == "--baseline") {
      options.baselines.push_back(one_of(
          value(), embedding ? std::vector<std::string>{"naive"} : std::vector<std::string>{"naive", "cutlass"}));
    } else if (flag == "--dtype") {
      options.fp16 = one_of(value(), {"bf16", "fp16"}) == "fp16";
    } else if (flag == "--cublas" && !embedding) {
      options.cublas = value();
    } else if (flag == "--chain" && !embedding) {
      options.chain = true;
    } else if (flag == "--idle") {
      options.idle = true;
    } else if (flag == "--json") {
      options.json = true;
    } else if (flag == "--no-calibrate") {
      options.calibrate = false;
    } else if (flag == "--list") {
      options.list = true;
    } else if (flag == "--reps") {
      options.reps = static_cast<int>(parse_integer(value(), flag, 1, 100000));
    } else if (flag == "--min-ms") {
      const std::string text = value();
      char* end = nullptr;
      options.min_ms = std::strtod(text.c_str(), &end);
      if (text.empty() || *end != '\0' || !(options.min_ms >= 0 && options.min_ms <= 1e6)) {
        throw UsageError("--min-ms must be a number from 0 to 1000000, got '" + text + "'");
      }
    } else {
      throw UsageError("unknown option '" + flag + "' (--help lists them)");
    }
    if (has_inline_value) throw UsageError(flag + " takes no value");
  }
  if (options.chain && options.op != Op::kLinear && options.op != Op::kExpand) {
    throw UsageError("--chain is for --op linear and --op expand");
  }
  if (!options.baselines.empty() && options.op != Op::kLinear && options.op != Op::kEmbedding) {
    throw UsageError("--baseline is for whole ops, not for --op " + std::string(op_name(options.op)));
  }
  for (const std::string& baseline : options.baselines) {
    if (baseline == "cutlass" && options.fp16) {
      throw UsageError("--baseline cutlass is for bf16 linears");
    }
  }
  if (options.idle && (options.chain || options.op == Op::kPlan)) {
    throw UsageError("--idle goes with neither --chain nor --op plan");
  }
  return options;
}

/// The cases that the options name. Throws UsageError.
inline std::vector<Case> select_cases(const Options& options) {
  std::vector<Case> cases;
  for (const std::string& text : options.cases) cases.push_back(parse_case(text, options.op));
  if (!options.preset.empty() || options.cases.empty()) {
    const std::string preset = !options.preset.empty() ? options.preset : options.chain ? "chain" : "quick";
    for (const Case& c : preset_cases(preset, options.op)) cases.push_back(c);
  }
  std::vector<Case> selected;
  for (Case& c : cases) {
    c.idle = options.idle;
    bool kept = options.filters.empty();
    for (const std::string& filter : options.filters) kept = kept || c.name().find(filter) != std::string::npos;
    if (kept) selected.push_back(c);
  }
  if (selected.empty()) throw UsageError("no case is left: --list without --filter names them all");
  return selected;
}

}  // namespace polylora::bench
