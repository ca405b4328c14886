// The command line of bench_moe. No CUDA.
#pragma once

#include <string>
#include <vector>

#include "arguments.h"
#include "moe_cases.h"

namespace polylora::bench {

/// Where the ops stand in the forward; as `polylora bench moe --seams` has it.
enum class Seams { kBeside, kFused, kAdded };
inline constexpr const char* kSeamNames[] = {"beside", "fused", "added"};

inline const char* seams_name(Seams seams) { return kSeamNames[static_cast<int>(seams)]; }

struct MoeOptions : CommonOptions {
  std::vector<Seams> seams;  // of a case, one after the other
  bool base = true;          // false: the ops alone, without a base layer
};

inline std::string moe_usage() {
  return std::string(R"(usage: bench_moe [options]

Times what LoRA adds to the forward of an MoE layer: the forward with it minus the forward without, the same base GEMMs
(CUTLASS) in both, replayed in turn; the plan is in it, once a layer. Then the ops alone. Every case is checked against
naive kernels first. Columns: us of the base's forward; us added (median, quartiles); the floor (weights of the
(adapter, expert) pairs hit, once, from this device's cold memory) and the ratio to it; the same weights at 3 TB/s and
the bar that is aimed at on an H100; the largest error ||result - reference|| / ||reference|| of an (adapter, expert).

what to run
  --preset quick|issue|full|check default quick
  --case 'MODEL rRANK MTOKENS'    instead of a preset, repeatable: 'qwen35-35b r16 M64', or with the shape of the
                                    experts for a model: 'moe:2048x512,e256,k8,silu,gated r16 M64'
  --filter TEXT                   only cases whose name contains TEXT; repeatable: any of them
  --list                          print the cases, weights and floors of an H100, run nothing (needs no GPU)

how the layer is put together
  --seams NAME,...                beside (default): deltas on a second stream beside the base's GEMMs, then moe_act and
                                    moe_reduce; fused: moe_gate_up_act and moe_down_reduce after them; added:
                                    moe_gate_up_ and moe_down_ before the base's own activation and sum
  --base cutlass|none             none: the ops alone, on random values in the place of the base's
  --path NAME                     auto (unsets POLYLORA_PATH), mma, general (set it); repeatable: each case with each
)") + kCommonUsage;
}

/// `words` without the program's name. Throws UsageError.
inline MoeOptions parse_moe_options(const std::vector<std::string>& words) {
  MoeOptions options;
  Arguments arguments(words);
  while (arguments.next()) {
    if (take_common(arguments, {"quick", "issue", "full", "check"}, {"auto", "mma", "general"}, options)) continue;
    if (arguments.is("--seams")) {
      for (const std::string& name : arguments.some_of({"beside", "fused", "added"})) {
        for (const Seams seams : {Seams::kBeside, Seams::kFused, Seams::kAdded}) {
          if (name == seams_name(seams)) options.seams.push_back(seams);
        }
      }
    } else if (arguments.is("--base")) {
      options.base = arguments.one_of({"cutlass", "none"}) == "cutlass";
    } else {
      throw UsageError("unknown option '" + arguments.flag() + "' (--help lists them)");
    }
  }
  if (options.seams.empty()) options.seams = {Seams::kBeside};
  for (const Seams seams : options.seams) {
    if (seams == Seams::kAdded && !options.base)
      throw UsageError("--seams added needs a base, which --base none is not");
  }
  return options;
}

/// The cases that the options name. Throws UsageError.
inline std::vector<MoeCase> select_moe_cases(const MoeOptions& options) {
  std::vector<MoeCase> cases;
  for (const std::string& text : options.cases) cases.push_back(parse_moe_case(text));
  if (!options.preset.empty() || options.cases.empty()) {
    const std::string usual = options.check ? "check" : "quick";
    const std::vector<MoeCase> preset = moe_preset_cases(options.preset.empty() ? usual : options.preset);
    cases.insert(cases.end(), preset.begin(), preset.end());
  }
  return filtered(cases, options.filters);
}

}  // namespace polylora::bench
