#include "moe_lora.h"

#include <algorithm>

#include "polylora/cuda.h"

namespace polylora::bench {
namespace {

// Of an op that adds a delta which is there already.
LoraParams without_weights(LoraParams p) {
  p.k = 0;
  p.x = nullptr;
  p.x_stride = 0;
  p.x_div = 0;
  p.v_width = 0;
  p.scratch = nullptr;
  for (int s = 0; s < kMaxSlices; ++s) {
    p.slices.a[s] = p.slices.b[s] = nullptr;
    p.slices.a_stride[s] = 0;
    p.slices.a_rows[s] = p.slices.b_elements[s] = -1;
  }
  return p;
}

template <typename Params>
int64_t bytes_of(cudaError_t (*ask)(const Params&, int64_t&), const Params& params, const char* what) {
  int64_t bytes = 0;
  check(ask(params, bytes), std::string("scratch of ") + what);
  return bytes;
}

void copy(const DeviceBuffer& to, const void* from, cudaStream_t stream) {
  check(cudaMemcpyAsync(to.as<void>(), from, static_cast<size_t>(to.bytes()), cudaMemcpyDeviceToDevice, stream),
        "copy of y");
}

}  // namespace

MoeLora::MoeLora(const MoeProblem& problem, const MoeBase* base, Seams seams)
    : problem_(problem),
      base_(base),
      seams_(seams),
      plan_(problem.plan_words() * int64_t{sizeof(int32_t)}, "plan"),
      plan_pitch_((problem.plan_words() + 63) / 64 * 64) {
  if (seams == Seams::kAdded) {
    ones_ = upload(std::vector<float>(static_cast<size_t>(problem.shape().pairs()), 1.f), "weights of 1");
  }
}

void MoeLora::reserve() {
  const int32_t* plan = plan_.as<int32_t>();
  int64_t bytes = 0;
  const auto want = [&](int64_t more) { bytes = std::max(bytes, more); };
  switch (seams_) {
    case Seams::kBeside:
      want(bytes_of(cuda::moe_delta_scratch, up_delta_params(0, plan), "moe_delta"));
      want(bytes_of(cuda::moe_delta_scratch, down_delta_params(0, plan), "moe_delta"));
      break;
    case Seams::kFused:
      want(bytes_of(cuda::gate_up_act_scratch, act_params(up(0, plan)), "moe_gate_up_act"));
      want(bytes_of(cuda::down_reduce_scratch, reduce_params(down(0, plan)), "moe_down_reduce"));
      break;
    case Seams::kAdded:
      want(bytes_of(cuda::linear_scratch, up(0, plan), "moe_gate_up_"));
      want(bytes_of(cuda::linear_scratch, down_add_params(0, plan), "moe_down_"));
  }
  if (bytes > scratch_.bytes()) scratch_ = DeviceBuffer(bytes, "scratch");
}

void MoeLora::keep_before(bool keep) {
  keeps_before_ = keep && seams_ == Seams::kAdded;
  if (!keeps_before_) {
    y1_before_ = DeviceBuffer();
    y2_before_ = DeviceBuffer();
    return;
  }
  const MoeCase& c = problem_.shape();
  y1_before_ = DeviceBuffer(c.pairs() * c.model.slices() * c.model.inner * kElementBytes, "y1 before");
  y2_before_ = DeviceBuffer(c.pairs() * c.model.hidden * kElementBytes, "y2 before");
}

void MoeLora::poison(cudaStream_t stream) const {
  for (const DeviceBuffer* buffer : {&plan_, &scratch_, &y1_before_, &y2_before_}) bench::poison(*buffer, stream);
}

// ---- the layer

void MoeLora::forward(int64_t call, cudaStream_t stream) const {
  if (seams_ == Seams::kBeside) return forward_beside(call, stream);
  return seams_ == Seams::kFused ? forward_fused(call, stream) : forward_added(call, stream);
}

void MoeLora::forward_beside(int64_t call, cudaStream_t stream) const {
  int32_t* plan = plan_.as<int32_t>();
  side_.fork(stream);
  make_plan(call, plan, side_);
  up_delta(call, plan, side_);
  if (base_) base_->gate_up(call, stream);
  side_.join(stream);
  act(call, plan, stream);
  side_.fork(stream);
  down_delta(call, plan, side_);
  if (base_) base_->down(call, stream);
  side_.join(stream);
  reduce(call, plan, stream);
}

void MoeLora::forward_fused(int64_t call, cudaStream_t stream) const {
  int32_t* plan = plan_.as<int32_t>();
  make_plan(call, plan, stream);
  if (base_) base_->gate_up(call, stream);
  gate_up_act(call, plan, stream);
  if (base_) base_->down(call, stream);
  down_reduce(call, plan, stream);
}

void MoeLora::forward_added(int64_t call, cudaStream_t stream) const {
  int32_t* plan = plan_.as<int32_t>();
  make_plan(call, plan, stream);
  base_->gate_up(call, stream);
  if (keeps_before_) copy(y1_before_, problem_.y1(), stream);
  gate_up_add(call, plan, stream);
  base_->act(stream);
  base_->down(call, stream);
  if (keeps_before_) copy(y2_before_, problem_.y2(), stream);
  down_add(call, plan, stream);
  base_->reduce(call, stream);
}

// ---- the ops

void MoeLora::make_plan(int64_t call, int32_t* plan, cudaStream_t stream) const {
  check(cuda::moe_plan(problem_.plan_params(call, plan), stream), "moe_plan");
}

void MoeLora::up_delta(int64_t call, const int32_t* plan, cudaStream_t stream) const {
  check(cuda::moe_delta(up_delta_params(call, plan), stream), "moe_delta of gate and up");
}

void MoeLora::act(int64_t call, const int32_t* plan, cudaStream_t stream) const {
  GateUpActParams g = act_params(without_weights(up(call, plan)));
  g.lora.row_map = nullptr;
  g.delta = problem_.up_delta();
  g.delta_stride = g.lora.y_stride;
  check(cuda::moe_act(g, stream), "moe_act");
}

void MoeLora::down_delta(int64_t call, const int32_t* plan, cudaStream_t stream) const {
  check(cuda::moe_delta(down_delta_params(call, plan), stream), "moe_delta of down");
}

void MoeLora::reduce(int64_t call, const int32_t* plan, cudaStream_t stream) const {
  DownReduceParams d = reduce_params(without_weights(down(call, plan)));
  d.delta = problem_.down_delta();
  d.delta_stride = d.lora.y_stride;
  check(cuda::moe_reduce(d, stream), "moe_reduce");
}

void MoeLora::gate_up_act(int64_t call, const int32_t* plan, cudaStream_t stream) const {
  check(cuda::gate_up_act(act_params(up(call, plan)), stream), "moe_gate_up_act");
}

void MoeLora::down_reduce(int64_t call, const int32_t* plan, cudaStream_t stream) const {
  check(cuda::down_reduce(reduce_params(down(call, plan)), stream), "moe_down_reduce");
}

void MoeLora::gate_up_add(int64_t call, const int32_t* plan, cudaStream_t stream) const {
  check(cuda::linear(up(call, plan), stream), "moe_gate_up_");
}

void MoeLora::down_add(int64_t call, const int32_t* plan, cudaStream_t stream) const {
  check(cuda::linear(down_add_params(call, plan), stream), "moe_down_");
}

// ---- their arguments

LoraParams MoeLora::up(int64_t call, const int32_t* plan) const {
  LoraParams p = problem_.up_params(call, plan);
  p.scratch = scratch_.as<void>();
  return p;
}

LoraParams MoeLora::down(int64_t call, const int32_t* plan) const {
  LoraParams p = problem_.down_params(call, plan);
  p.scratch = scratch_.as<void>();
  return p;
}

// A delta has its slices one behind the other, wherever those of y1 stand.
LoraParams MoeLora::up_delta_params(int64_t call, const int32_t* plan) const {
  LoraParams p = up(call, plan);
  p.y = problem_.up_delta();
  for (int s = 0; s < p.slices.count; ++s) p.slices.col[s] = s * problem_.shape().model.inner;
  p.slices.col_stride = 1;
  return p;
}

LoraParams MoeLora::down_delta_params(int64_t call, const int32_t* plan) const {
  LoraParams p = down(call, plan);
  p.y = problem_.down_delta();
  return p;
}

LoraParams MoeLora::down_add_params(int64_t call, const int32_t* plan) const {
  LoraParams p = down(call, plan);
  p.row_weight = ones_.as<float>();
  return p;
}

GateUpActParams MoeLora::act_params(const LoraParams& lora) const {
  const Experts& m = problem_.shape().model;
  GateUpActParams g{};
  g.lora = lora;
  g.h = problem_.h();
  g.h_stride = m.inner;
  g.act = m.activation();
  g.alpha = kActAlpha;
  g.limit = kActLimit;
  return g;
}

DownReduceParams MoeLora::reduce_params(const LoraParams& lora) const {
  const MoeCase& c = problem_.shape();
  DownReduceParams d{};
  d.lora = lora;
  d.out = problem_.out();
  d.out_stride = c.model.hidden;
  d.tokens = c.rows;
  d.top_k = c.model.top_k;
  return d;
}

// ---- alone

int32_t* MoeLora::plan_of(int64_t call) const {
  return plans_.as<int32_t>() + call % problem_.routings() * plan_pitch_;
}

std::vector<MoeOp> MoeLora::alone(cudaStream_t stream) {
  plans_ = DeviceBuffer(problem_.routings() * plan_pitch_ * int64_t{sizeof(int32_t)}, "plans");
  for (int64_t call = 0; call < problem_.routings(); ++call) make_plan(call, plan_of(call), stream);
  check(cudaStreamSynchronize(stream), "plans");

  const MoeCase& c = problem_.shape();
  const auto bytes = [](int64_t rows, int64_t width) { return static_cast<double>(rows * width * kElementBytes); };
  const double x = bytes(c.rows, c.model.hidden);
  const double y1 = bytes(c.pairs(), c.model.slices() * c.model.inner);
  const double h = bytes(c.pairs(), c.model.inner);
  const double y2 = bytes(c.pairs(), c.model.hidden);
  const double out = x;
  const double up_weights = problem_.up_weight_bytes();
  const double down_weights = problem_.down_weight_bytes();
  // expert ids and the row map in; groups, order and positions out
  const double plan = static_cast<double>(5 * c.pairs()) * sizeof(int32_t);

  std::vector<MoeOp> ops;
  using Method = void (MoeLora::*)(int64_t, const int32_t*, cudaStream_t) const;
  const auto add = [&](const char* name, Method method, const Traffic& traffic) {
    ops.push_back({name,
                   [this, method](int64_t call, cudaStream_t s) {
                     const int64_t routing = call % problem_.routings();
                     (this->*method)(routing, plan_of(routing), s);
                   },
                   traffic});
  };
  ops.push_back({"moe_plan",
                 [this](int64_t call, cudaStream_t s) {
                   const int64_t routing = call % problem_.routings();
                   make_plan(routing, plan_of(routing), s);
                 },
                 {0, plan, plan}});
  switch (seams_) {
    case Seams::kBeside:
      add("moe_delta up", &MoeLora::up_delta, {up_weights, x + y1, x + y1});
      add("moe_act", &MoeLora::act, {0, 2 * y1 + h, 2 * y1 + h});
      add("moe_delta down", &MoeLora::down_delta, {down_weights, h + y2, h + y2});
      add("moe_reduce", &MoeLora::reduce, {0, 2 * y2 + out, 2 * y2 + out});
      break;
    case Seams::kFused:
      add("moe_gate_up_act", &MoeLora::gate_up_act, {up_weights, x + y1 + h, x + y1 + h});
      add("moe_down_reduce", &MoeLora::down_reduce, {down_weights, h + y2 + out, h + y2 + out});
      break;
    case Seams::kAdded:
      add("moe_gate_up_", &MoeLora::gate_up_add, {up_weights, x + y1, x + 2 * y1});
      add("moe_down_", &MoeLora::down_add, {down_weights, h + y2, h + 2 * y2});
  }
  return ops;
}

}  // namespace polylora::bench
