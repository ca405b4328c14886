// The command line of the benchmarks. No CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "arguments.h"
#include "cases.h"
#include "stats.h"

namespace polylora::bench {

struct Options : CommonOptions {
  Op op = Op::kLinear;
  std::vector<std::string> baselines;  // naive, cutlass, beside
  std::string cublas;                  // library to load; empty: the usual names
  bool fp16 = false;                   // else bf16
  bool idle = false;
  bool chain = false;
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
  text += embedding ? "  --preset quick|issue|full|check default quick\n"
                    : "  --preset quick|issue|chain|full|check\n"
                      "                                  default quick; chain with --chain\n";
  text += "  --case KEY=VALUE,...            instead of a preset, repeatable:\n";
  text += embedding ? "                                    vocab=128256,n=4096,r=16,m=16[,a=16][,layout=rank|token]\n"
                    : "                                    k=4096,n=4096+1024+1024,r=16,m=16[,a=16]\n";
  text += R"(                                    r=8-64: adapters of rank 8, 16, 32, 64 in turn; a: distinct adapters;
                                    slots=: groups of the plan; pitch=: of B in a pool of more ranks;
                                    order=interleaved|segments|serving; name=
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
        R"(  --baseline naive|cutlass|beside times that too; repeatable. cutlass: two grouped GEMMs, rows sorted by
                                    adapter; beside, with --chain: deltas on another stream while the GEMM runs, then
                                    their sum
  --chain                         what the op adds to a chain of cuBLAS GEMMs, each followed by it
  --cublas FILE                   the cuBLAS to load (default: libcublas.so.13, .so.12, .so)
)";
  }
  text += kCommonUsage;
  return text;
}

/// `words` without the program's name. Throws UsageError.
inline Options parse_options(const std::vector<std::string>& words, bool embedding) {
  using Names = std::vector<std::string>;
  const Names presets =
      embedding ? Names{"quick", "issue", "full", "check"} : Names{"quick", "issue", "chain", "full", "check"};
  Options options;
  if (embedding) options.op = Op::kEmbedding;
  Arguments arguments(words);
  while (arguments.next()) {
    if (take_common(arguments, presets, {"auto", "cluster", "wide", "mma", "general"}, options)) continue;
    if (arguments.is("--op") && !embedding) {
      const std::string name = arguments.one_of({"linear", "shrink", "expand", "plan"});
      for (const Op op : {Op::kLinear, Op::kShrink, Op::kExpand, Op::kPlan}) {
        if (name == op_name(op)) options.op = op;
      }
    } else if (arguments.is("--baseline")) {
      options.baselines.push_back(arguments.one_of(embedding ? Names{"naive"} : Names{"naive", "cutlass", "beside"}));
    } else if (arguments.is("--dtype")) {
      options.fp16 = arguments.one_of({"bf16", "fp16"}) == "fp16";
    } else if (arguments.is("--cublas") && !embedding) {
      options.cublas = arguments.value();
    } else if (arguments.is("--chain") && !embedding) {
      options.chain = true;
    } else if (arguments.is("--idle")) {
      options.idle = true;
    } else {
      throw UsageError("unknown option '" + arguments.flag() + "' (--help lists them)");
    }
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
    if (baseline == "beside" && !options.chain) throw UsageError("--baseline beside is for --chain");
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
    const std::string usual = options.check ? "check" : options.chain ? "chain" : "quick";
    const std::string preset = options.preset.empty() ? usual : options.preset;
    for (const Case& c : preset_cases(preset, options.op)) cases.push_back(c);
  }
  for (Case& c : cases) c.idle = options.idle;
  return filtered(cases, options.filters);
}

}  // namespace polylora::bench
