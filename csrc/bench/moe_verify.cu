#include "moe_verify.h"

#include <algorithm>

#include "moe_wants.cuh"
#include "naive.h"
#include "plan_check.h"
#include "row_errors.h"
#include "stats.h"
#include "timing.h"

namespace polylora::bench {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kGemmRows = 64;  // of a GEMM that are compared, at most
constexpr int kReplays = 2;        // of a chain, back to back as when it is timed

// ---- comparison

// A block takes row blockIdx.x * step.
template <typename Want>
__global__ void __launch_bounds__(kThreads)
    row_errors_kernel(const Want want, const Element* got, int64_t width, int64_t step, RowError* errors) {
  __shared__ RowError of_thread[kThreads];
  const int64_t row = blockIdx.x * step;
  RowError mine{0, 0, 0, 0, 0, 0};
  double worst = -1;
  for (int64_t column = threadIdx.x; column < width; column += kThreads) {
    const double value = at(got, row * width + column);
    const double wanted = want(row, column);
    const double off = value - wanted;
    const bool finite = isfinite(off);
    mine.difference += off * off;
    mine.reference += wanted * wanted;
    mine.not_finite += finite ? 0 : 1;
    const double size = finite ? fabs(off) : INFINITY;
    if (size > worst) {
      worst = size;
      mine.worst_column = column;
      mine.got = value;
      mine.want = wanted;
    }
  }
  of_thread[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads && i < width; ++i) {
    const RowError& other = of_thread[i];
    mine.difference += other.difference;
    mine.reference += other.reference;
    mine.not_finite += other.not_finite;
    const double off = fabs(other.got - other.want);
    const double size = isfinite(off) ? off : INFINITY;
    if (!(size > worst)) continue;
    worst = size;
    mine.worst_column = other.worst_column;
    mine.got = other.got;
    mine.want = other.want;
  }
  errors[blockIdx.x] = mine;
}

// ---- the stages of a call

class Stages {
 public:
  Stages(const MoeProblem& problem, int64_t call, cudaStream_t stream)
      : problem_(problem), call_(call), stream_(stream), view_(problem.view(call)) {}

  // The largest error and the first failure so far.
  const Verdict& verdict() const { return verdict_; }

  void plan(const int32_t* plan) {
    const MoeRouting& routing = problem_.routing(call_);
    const std::string mistake = plan_mistake(download<int32_t>(plan, problem_.plan_words(), "plan"), routing.group,
                                             problem_.shape().groups(), routing.position);
    if (!mistake.empty() && verdict_.failure.empty()) verdict_.failure = "moe_plan: " + mistake;
  }

  void gate_up_gemm() {
    const GemmWant want{as(problem_.x()), as(problem_.w13()), view_.group, view_.row_map,
                        model().top_k,    model().experts,    wide(),      model().hidden};
    by_position("the base's GEMM of gate and up", want, problem_.y1(), wide(), gemm_step());
  }

  void down_gemm() {
    const GemmWant want{as(problem_.h()), as(problem_.w2()), view_.group,    nullptr,
                        model().top_k,    model().experts,   model().hidden, model().inner};
    by_position("the base's GEMM of down", want, problem_.y2(), model().hidden, gemm_step());
  }

  void up_delta() {
    by_position("moe_delta of gate and up", DeltaWant{of_up(), model().inner}, problem_.up_delta(), wide());
  }

  void down_delta() {
    Delta delta = of_down();
    delta.weight = view_.topk_weights;
    by_position("moe_delta of down", DeltaWant{delta, model().hidden}, problem_.down_delta(), model().hidden);
  }

  void gate_up_add(const char* before) {
    const AddedWant want{of_up(), as(before), wide(), problem_.slice_step(), problem_.col_stride()};
    by_position("moe_gate_up_", want, problem_.y1(), wide());
  }

  void down_add(const char* before) {
    const AddedWant want{of_down(), as(before), model().hidden, model().hidden, 1};
    by_position("moe_down_", want, problem_.y2(), model().hidden);
  }

  // `given`: a delta of moe_delta or null; `computed`: whether the op makes one itself.
  void act(const char* op, const char* given, bool computed) {
    const ActWant want{computed ? of_up() : Delta{},
                       as(given),
                       as(problem_.y1()),
                       wide(),
                       model().inner,
                       problem_.slice_step(),
                       problem_.col_stride(),
                       model().activation(),
                       model().gated};
    by_position(op, want, problem_.h(), model().inner);
  }

  void sum(const char* op, const char* given, bool computed) {
    const SumWant want{computed ? of_down() : Delta{},
                       as(given),
                       as(problem_.y2()),
                       view_.position,
                       view_.topk_weights,
                       model().hidden,
                       model().top_k};
    const int64_t rows = problem_.shape().rows;
    std::vector<int64_t> keys;
    for (int64_t token = 0; token < rows; ++token) keys.push_back(token);
    compare(op, want, problem_.out(), rows, model().hidden, 1, keys,
            [](size_t row) { return format("token %zu", row); });
  }

 private:
  const Experts& model() const { return problem_.shape().model; }
  int64_t wide() const { return model().slices() * model().inner; }
  int64_t gemm_step() const { return (problem_.shape().pairs() + kGemmRows - 1) / kGemmRows; }
  static const Element* as(const char* matrix) { return reinterpret_cast<const Element*>(matrix); }

  Delta of_up() { return delta(problem_.up_params(call_, nullptr)); }
  Delta of_down() { return delta(problem_.down_params(call_, nullptr)); }

  // v is made anew for each: the next one's comes only after this one's comparison.
  Delta delta(const LoraParams& lora) {
    const int64_t bytes = lora.rows * lora.v_width * int64_t{sizeof(double)};
    if (v_.bytes() < bytes) v_ = DeviceBuffer(bytes, "reference v");
    reference_shrink(lora, view_.group, v_.as<double>(), stream_);
    return {lora, view_.group, nullptr, v_.as<double>()};
  }

  template <typename Want>
  void by_position(const char* op, const Want& want, const char* got, int64_t width, int64_t step = 1) {
    const MoeRouting& routing = problem_.routing(call_);
    const int64_t rows = (problem_.shape().pairs() + step - 1) / step;
    std::vector<int64_t> keys;
    for (int64_t i = 0; i < rows; ++i) keys.push_back(routing.group[static_cast<size_t>(i * step)]);
    compare(op, want, got, rows, width, step, keys, [&](size_t i) {
      const auto position = static_cast<size_t>(i) * static_cast<size_t>(step);
      const int32_t pair = routing.row_map[position];
      const int32_t group = routing.group[position];
      return format("row %zu (token %d, its choice %d; adapter %d, expert %d)", position, pair / model().top_k,
                    pair % model().top_k, group / model().experts, group % model().experts);
    });
  }

  template <typename Want, typename Place>
  void compare(const char* op, const Want& want, const char* got, int64_t rows, int64_t width, int64_t step,
               const std::vector<int64_t>& keys, const Place& place) {
    const DeviceBuffer errors(rows * int64_t{sizeof(RowError)}, "comparison");
    row_errors_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream_>>>(want, as(got), width, step,
                                                                             errors.as<RowError>());
    check(cudaGetLastError(), std::string("checking ") + op);
    check(cudaStreamSynchronize(stream_), std::string("checking ") + op);
    const Verdict found = judge(op, download<RowError>(errors.as<void>(), rows, "comparison"), keys, place);
    verdict_.error = std::max(verdict_.error, found.error);
    if (verdict_.failure.empty()) verdict_.failure = found.failure;
  }

  const MoeProblem& problem_;
  int64_t call_;
  cudaStream_t stream_;
  RoutingView view_;
  DeviceBuffer v_;  // [pairs, v_width]
  Verdict verdict_;
};

Verdict check_lora(const MoeProblem& problem, const MoeLora& lora, int64_t call, cudaStream_t stream) {
  Stages stages(problem, call, stream);
  stages.plan(lora.plan());
  switch (lora.seams()) {
    case Seams::kBeside:
      stages.up_delta();
      stages.act("moe_act", problem.up_delta(), false);
      stages.down_delta();
      stages.sum("moe_reduce", problem.down_delta(), false);
      break;
    case Seams::kFused:
      stages.act("moe_gate_up_act", nullptr, true);
      stages.sum("moe_down_reduce", nullptr, true);
      break;
    case Seams::kAdded:
      stages.gate_up_add(lora.y1_before());
      stages.act("the base's activation", nullptr, false);
      stages.down_add(lora.y2_before());
      stages.sum("the base's sum", nullptr, false);
  }
  return stages.verdict();
}

}  // namespace

Verdict verify_base(const MoeProblem& problem, const MoeBase& base, cudaStream_t stream) {
  Verdict verdict;
  for (const int64_t call : {int64_t{0}, problem.layers() - 1}) {
    problem.poison(stream);
    base.forward(call, stream);
    check(cudaStreamSynchronize(stream), "the base of " + problem.shape().name());
    Stages stages(problem, call, stream);
    stages.gate_up_gemm();
    stages.act("the base's activation", nullptr, false);
    stages.down_gemm();
    stages.sum("the base's sum", nullptr, false);
    verdict.error = std::max(verdict.error, stages.verdict().error);
    if (verdict.failure.empty()) verdict.failure = stages.verdict().failure;
  }
  return verdict;
}

Verdict verify_lora(const MoeProblem& problem, MoeLora& lora, cudaStream_t stream) {
  const std::string what = std::string(seams_name(lora.seams())) + " of " + problem.shape().name();
  lora.keep_before(true);
  Verdict verdict;
  for (const bool chain : {false, true}) {
    problem.poison(stream);
    lora.poison(stream);
    if (chain) {
      const Graph graph([&](int64_t call, cudaStream_t s) { lora.forward(call, s); }, problem.layers(), stream);
      for (int i = 0; i < kReplays; ++i) graph.replay(stream);
      check(cudaStreamSynchronize(stream), what + ", in a graph");
    } else {
      lora.forward(0, stream);
      check(cudaStreamSynchronize(stream), what);
    }
    const Verdict each = check_lora(problem, lora, chain ? problem.layers() - 1 : 0, stream);
    verdict.error = std::max(verdict.error, each.error);
    if (each.failure.empty()) continue;
    verdict.failure = (chain ? "calls in a chain: " : "") + each.failure;
    break;
  }
  lora.keep_before(false);
  return verdict;
}

}  // namespace polylora::bench
