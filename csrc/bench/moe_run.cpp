#include "moe_run.h"

#include <cstdio>
#include <functional>
#include <memory>

#include "guard.h"
#include "moe_base.h"
#include "moe_lora.h"
#include "moe_options.h"
#include "moe_problem.h"
#include "moe_report.h"
#include "moe_verify.h"
#include "progress.h"

namespace polylora::bench {
namespace {

// A case on the device, and its base where there is one.
struct Layer {
  Layer(const MoeCase& c, bool with_base, const Device& device, cudaStream_t stream)
      : problem(c, with_base, device, stream), base(with_base ? std::make_unique<MoeBase>(problem) : nullptr) {}

  MoeProblem problem;
  std::unique_ptr<MoeBase> base;
};

class MoeRunner {
 public:
  MoeRunner(const MoeOptions& options, const Device& device)
      : options_(options), device_(device), report_(options, device), paths_(paths_or_default(options.paths)) {
    device_.l2_bytes = l2_that_counts(options, device.l2_bytes);
  }

  int run(const std::vector<MoeCase>& cases) {
    report_.print_device();
    if (options_.calibrate) {
      progress_.say("calibrating");
      report_.print_calibration(calibrate(device_, stream_));
    }
    report_.begin(cases, paths_);
    for (size_t i = 0; i < cases.size(); ++i) {
      progress_.say(format("case %zu of %zu: %s", i + 1, cases.size(), cases[i].name().c_str()));
      run_case(cases[i]);
    }
    report_.end();
    return all_right_ ? kExitOk : kExitFailed;
  }

 private:
  using Rows = std::vector<MoeRow>;  // of one case

  void run_case(const MoeCase& c) {
    Rows rows;
    for (const std::string& path : paths_) {
      for (const Seams seams : options_.seams) rows.push_back({c, path, seams});
    }
    if (options_.base && !MoeBase::serves(c)) {
      for (const MoeRow& row : rows) {
        report_.add_not_served(row, "the base takes hidden sizes and widths that are multiples of 8");
      }
      return;
    }
    std::unique_ptr<Layer> layer;
    guarded(rows, [&] { layer = make_layer(rows); });
    if (!layer) return;
    for (const MoeRow& row : rows) {
      guarded({row}, [&] { measure(*layer, row); });
    }
  }

  // What one case cannot do ends that case, for all `rows`; a CUDA error that stays with the context ends the run.
  void guarded(const Rows& rows, const std::function<void()>& body) {
    const Ending ending = run_guarded(rows[0].path, body);
    for (const MoeRow& row : rows) {
      if (ending.how == Ending::kNotServed) report_.add_not_served(row, "");
      if (ending.how == Ending::kTooLarge) report_.add_too_large(row);
    }
    if (ending.how != Ending::kFailed) return;
    fail(rows, ending.why);
    check_context();
  }

  void fail(const Rows& rows, const std::string& why) {
    all_right_ = false;
    for (const MoeRow& row : rows) report_.add_failure(row, why);
  }

  // Null where the base is wrong.
  std::unique_ptr<Layer> make_layer(const Rows& rows) {
    auto layer = std::make_unique<Layer>(rows[0].shape, options_.base, device_, stream_);
    if (!layer->base) return layer;
    progress_.say("  checking the base");
    const Verdict verdict = verify_base(layer->problem, *layer->base, stream_);
    if (verdict.failure.empty()) return layer;
    fail(rows, verdict.failure);
    return nullptr;
  }

  // A wrong result has no speed.
  void measure(const Layer& layer, const MoeRow& row) {
    set_path(row.path);
    MoeLora lora(layer.problem, layer.base.get(), row.seams);
    lora.reserve();
    const std::string doing = options_.check ? ": checking" : ": checking, then timing";
    progress_.say(std::string("  ") + seams_name(row.seams) + ", path " + row.path + doing);
    const Verdict verdict = verify_lora(layer.problem, lora, stream_);
    if (!verdict.failure.empty()) return fail({row}, verdict.failure);
    if (options_.check) return report_.add_checked(row, verdict.error);
    MoeFound found = time_layer(layer, lora);
    found.error = verdict.error;
    report_.add(row, found);
  }

  MoeFound time_layer(const Layer& layer, MoeLora& lora) {
    const MoeProblem& problem = layer.problem;
    const TimingOptions timing{options_.reps, options_.min_ms};
    MoeFound found;
    found.weight_bytes = problem.up_weight_bytes() + problem.down_weight_bytes();
    found.pools = problem.pools();
    found.layers = problem.layers();
    found.cold = problem.cold();
    found.has_base = layer.base != nullptr;
    if (layer.base) {
      const int64_t layers = problem.layers();
      found.layer =
          time_added([&](int64_t i, cudaStream_t s) { lora.forward(i % layers, s); },
                     [&](int64_t i, cudaStream_t s) { layer.base->forward(i % layers, s); }, layers, timing, stream_);
    }
    for (const MoeOp& op : lora.alone(stream_)) {
      found.ops.push_back({op.name, time_calls(op.run, problem.routings(), timing, stream_), op.traffic});
    }
    return found;
  }

  MoeOptions options_;
  Device device_;
  Stream stream_;
  MoeReport report_;
  Progress progress_;
  std::vector<std::string> paths_;
  bool all_right_ = true;
};

}  // namespace

int bench_moe_main(int argc, char** argv) {
  return guarded_main("bench_moe", [&] {
    const MoeOptions options = parse_moe_options(std::vector<std::string>(argv + 1, argv + argc));
    if (options.help) {
      std::printf("%s", moe_usage().c_str());
      return kExitOk;
    }
    const std::vector<MoeCase> cases = select_moe_cases(options);
    if (options.list) {
      MoeReport::list(options, cases);
      return kExitOk;
    }
    if (options.base && !has_cutlass()) {
      throw UsageError(
          "built without CUTLASS, which the base's GEMMs are of: docs/benchmarks.md says how to build with "
          "it; --base none times the ops alone");
    }
    return MoeRunner(options, device_or_throw()).run(cases);
  });
}

}  // namespace polylora::bench
