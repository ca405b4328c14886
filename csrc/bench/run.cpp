#include "run.h"

#include <algorithm>
#include <cstdio>
#include <memory>

#include "beside.h"
#include "chain.h"
#include "grouped_baseline.h"
#include "grouped_gemm.h"
#include "guard.h"
#include "naive.h"
#include "options.h"
#include "report.h"
#include "verify.h"

namespace polylora::bench {
namespace {

class Runner {
 public:
  Runner(const Options& options, const Device& device)
      : options_(options), device_(device), report_(options, device), paths_(paths_or_default(options.paths)) {
    device_.l2_bytes = l2_that_counts(options, device.l2_bytes);
  }

  int run(const std::vector<Case>& cases) {
    report_.print_device();
    if (options_.chain) cublas_ = std::make_unique<Cublas>(options_.cublas, stream_);
    if (options_.calibrate) report_.print_calibration(calibrate(device_, stream_));
    std::vector<std::string> columns = paths_;
    columns.insert(columns.end(), options_.baselines.begin(), options_.baselines.end());
    report_.begin(cases, columns);
    for (const Case& c : cases) {
      run_paths(c);
      for (const std::string& baseline : options_.baselines) run_baseline(c, baseline);
    }
    report_.end();
    return all_right_ ? kExitOk : kExitFailed;
  }

 private:
  Problem::Options problem_options() const {
    Problem::Options options;
    options.dtype = options_.fp16 ? DType::kFloat16 : DType::kBFloat16;
    options.activations_hot = options_.chain;
    return options;
  }

  void run_paths(const Case& c) {
    std::unique_ptr<Problem> problem;
    for (const std::string& path : paths_) {
      guarded(c, path, [&] {
        if (!problem) problem = std::make_unique<Problem>(c, options_.op, problem_options(), device_, stream_);
        set_path(path);
        problem->reserve();
        measure(*problem, path, [&](int64_t call, cudaStream_t stream) { return problem->run(call, stream); });
      });
    }
  }

  void run_baseline(Case c, const std::string& name) {
    if (name == "cutlass") c.order = RowOrder::kSegments;
    set_path("auto");  // of what takes the library's ops apart
    guarded(c, name, [&] {
      Problem::Options options = problem_options();
      options.equal_scales = name == "cutlass";
      Problem problem(c, options_.op, options, device_, stream_);
      if (name == "cutlass") {
        if (!GroupedBaseline::serves(problem)) return report_.add_not_served(c, name);
        const GroupedBaseline cutlass(problem);
        measure(problem, name, [&](int64_t call, cudaStream_t stream) {
          cutlass.run(call, stream);
          return cudaSuccess;
        });
      } else if (name == "beside") {
        const Beside beside(problem);
        measure(
            problem, name, [&](int64_t call, cudaStream_t stream) { return beside.run(call, stream); },
            [&](int64_t call, cudaStream_t stream, const auto& gemm) { beside.run_beside(call, stream, gemm); });
      } else {
        const NaiveBaseline naive(problem);
        measure(problem, name, [&](int64_t call, cudaStream_t stream) { return naive.run(call, stream); });
      }
    });
  }

  template <typename Body>
  void guarded(const Case& c, const std::string& path, Body&& body) {
    const Ending ending = run_guarded(path, body);
    if (ending.how == Ending::kNotServed) report_.add_not_served(c, path);
    if (ending.how == Ending::kTooLarge) report_.add_too_large(c, path);
    if (ending.how != Ending::kFailed) return;
    all_right_ = false;
    report_.add_failure(c, path, ending.why);
    check_context();
  }

  // `layer`: of a chain; without one the op comes after the GEMM.
  void measure(Problem& problem, const std::string& path, const Implementation& run, Layer layer = nullptr) {
    if (!layer) layer = after_gemm(run);
    const Case& c = problem.shape();
    const TimingOptions timing{options_.reps, options_.min_ms};
    problem.reset(stream_);
    Verdict verdict = verify(problem, run, stream_);
    std::unique_ptr<Chain> chain;
    if (verdict.failure.empty() && options_.chain) {
      chain = std::make_unique<Chain>(problem, *cublas_, device_, stream_);
      verdict = chain->verify_chain(layer, stream_);
    }
    if (!verdict.failure.empty()) {  // a wrong result has no speed
      all_right_ = false;
      return report_.add_failure(c, path, verdict.failure);
    }
    if (options_.check) return report_.add_checked(c, path, verdict.error);
    Row row;
    row.shape = c;
    row.path = path;
    row.error = verdict.error;
    row.cold = problem.cold();
    if (chain) {
      const AddedTiming t = chain->time(layer, timing, stream_);
      row.base_us = t.base;
      row.timing = t.added;
    } else {
      const auto call = [&](int64_t i, cudaStream_t stream) { check(run(i, stream), "call of " + c.name()); };
      row.timing = time_calls(call, problem.period(), timing, stream_);
    }
    report_.add(row);
  }

  Options options_;
  Device device_;
  Stream stream_;
  Report report_;
  std::unique_ptr<Cublas> cublas_;
  std::vector<std::string> paths_;
  bool all_right_ = true;
};

}  // namespace

int bench_main(int argc, char** argv, bool embedding) {
  const std::string program = embedding ? "bench_embedding" : "bench_linear";
  return guarded_main(program, [&] {
    const Options options = parse_options(std::vector<std::string>(argv + 1, argv + argc), embedding);
    if (options.help) {
      std::printf("%s", usage(program, embedding).c_str());
      return kExitOk;
    }
    const std::vector<Case> cases = select_cases(options);
    if (options.list) {
      Report::list(options, cases);
      return kExitOk;
    }
    const auto& baselines = options.baselines;
    if (std::find(baselines.begin(), baselines.end(), "cutlass") != baselines.end() && !has_cutlass()) {
      throw UsageError("--baseline cutlass: built without CUTLASS: docs/benchmarks.md says how to build with it");
    }
    return Runner(options, device_or_throw()).run(cases);
  });
}

}  // namespace polylora::bench
