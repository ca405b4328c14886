#include "problem.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "hash.h"
#include "polylora/cuda.h"
#include "rotation.h"

namespace polylora::bench {
namespace {

constexpr int64_t kAlign = 256;

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Seeds of what is filled.
enum Seed : uint64_t { kSeedA = 11, kSeedB, kSeedX, kSeedY, kSeedV, kSeedTokens };

}  // namespace

Problem::Problem(const Case& c, Op op, const Options& options, const Device& device, cudaStream_t stream)
    : case_(c), op_(op), options_(options) {
  rows_host_.resize(static_cast<size_t>(c.rows));
  for (int64_t row = 0; row < c.rows; ++row) rows_host_[static_cast<size_t>(row)] = c.adapter_of(row);
  ids_ = upload(rows_host_, "group ids");
  plan_ = DeviceBuffer(plan_layout(c.rows, c.slots, 0).words * int64_t{sizeof(int32_t)}, "plan");
  if (op != Op::kPlan) {
    lay_out();
    allocate(device);
    fill(stream);
  }
  check(cuda::plan(plan_params(), stream), "plan");
  check(cudaStreamSynchronize(stream), "plan");
}

// A ragged arena: adapter after adapter, slice after slice, each as large as its rank. Slots without rows stay empty.
void Problem::lay_out() {
  const auto slices = static_cast<int64_t>(case_.widths.size());
  const bool embedding = op_ == Op::kEmbedding;
  v_width_ = case_.v_width();
  a_pitch_ = !embedding ? case_.k : case_.token_major ? case_.max_rank() : case_.vocab;
  table_host_.assign(static_cast<size_t>(case_.slots * slices), SliceEntry{});
  for (int32_t g = 0; g < case_.adapters; ++g) {
    for (int64_t s = 0; s < slices; ++s) {
      SliceEntry& entry = table_host_[static_cast<size_t>(g * slices + s)];
      entry.rank = case_.rank_of(g);
      entry.a_row = static_cast<int32_t>(a_rows_);
      entry.v_col = static_cast<int32_t>(s * case_.max_rank());
      entry.b_stride = case_.b_pitch > 0 ? case_.b_pitch : entry.rank;
      entry.b_offset = b_elements_;
      entry.scale = options_.equal_scales ? 0.75f : 0.5f + 0.125f * static_cast<float>(g % 5);
      a_rows_ += embedding && case_.token_major ? case_.vocab : entry.rank;
      // parts start where 16-byte loads can, as a pool would have it
      b_elements_ += (int64_t{entry.b_stride} * case_.widths[static_cast<size_t>(s)] + 7) / 8 * 8;
    }
  }
}

void Problem::allocate(const Device& device) {
  const Traffic traffic = traffic_of(case_, op_);
  a_set_bytes_ = op_ == Op::kExpand ? 0 : aligned(a_rows_ * a_pitch_ * kElementBytes);
  b_set_bytes_ = op_ == Op::kShrink ? 0 : aligned(b_elements_ * kElementBytes);
  table_bytes_ = aligned(static_cast<int64_t>(table_host_.size() * sizeof(SliceEntry)));
  ids_bytes_ = op_ == Op::kEmbedding ? aligned(case_.rows * int64_t{sizeof(int32_t)}) : 0;
  x_bytes_ = op_ == Op::kExpand || op_ == Op::kEmbedding ? 0 : aligned(case_.rows * case_.k * kElementBytes);
  y_bytes_ = op_ == Op::kShrink ? 0 : aligned(case_.rows * case_.width() * kElementBytes);
  v_bytes_ = v_given() ? aligned(case_.rows * v_width_ * int64_t{sizeof(float)}) : 0;

  RotationNeeds needs;
  needs.needed = traffic.weights;
  needs.set_bytes = a_set_bytes_ + b_set_bytes_ + table_bytes_ + ids_bytes_;
  needs.copy_bytes = x_bytes_ + y_bytes_ + v_bytes_;
  // larger ones come from HBM, as the floor says
  needs.hot = traffic.footprint <= kHotBytes || options_.activations_hot;
  const Rotation rotation = rotate(needs, device.l2_bytes, free_bytes());
  sets_ = rotation.sets;
  copies_ = rotation.copies;
  cold_ = rotation.cold;

  a_ = DeviceBuffer(sets_ * a_set_bytes_, "A");
  b_ = DeviceBuffer(sets_ * b_set_bytes_, "B");
  table_ = DeviceBuffer(sets_ * table_bytes_, "slice table");
  token_ids_ = DeviceBuffer(sets_ * ids_bytes_, "token ids");
  x_ = DeviceBuffer(copies_ * x_bytes_, "x");
  y_ = DeviceBuffer(copies_ * y_bytes_, "y");
  v_ = DeviceBuffer(copies_ * v_bytes_, "v");
}

// x and v of deviation 1, A and B such that the delta has about that of y: an error cannot hide behind y.
void Problem::fill(cudaStream_t stream) {
  const DType dtype = options_.dtype;
  const double a_deviation = op_ == Op::kEmbedding ? 1.0 : 1.0 / std::sqrt(static_cast<double>(case_.k));
  const double b_deviation = 1.0 / std::sqrt(static_cast<double>(case_.max_rank()));
  fill_random(a_.as<void>(), a_.bytes() / kElementBytes, dtype, a_deviation, kSeedA, stream);
  fill_random(b_.as<void>(), b_.bytes() / kElementBytes, dtype, b_deviation, kSeedB, stream);
  fill_random(x_.as<void>(), x_.bytes() / kElementBytes, dtype, 1, kSeedX, stream);
  reset(stream);
  fill_random(v_.as<void>(), v_.bytes() / int64_t{sizeof(float)}, DType::kFloat32, 1, kSeedV, stream);

  std::vector<char> tables(static_cast<size_t>(sets_ * table_bytes_));
  const auto* entries = reinterpret_cast<const char*>(table_host_.data());
  for (int64_t set = 0; set < sets_; ++set) {
    std::copy(entries, entries + table_host_.size() * sizeof(SliceEntry), tables.begin() + set * table_bytes_);
  }
  copy_to_device(table_.as<void>(), tables, "slice table");
  if (op_ != Op::kEmbedding) return;
  std::vector<int32_t> ids(static_cast<size_t>(sets_ * ids_bytes_ / int64_t{sizeof(int32_t)}));
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<int32_t>(hash(kSeedTokens, i) % static_cast<uint64_t>(case_.vocab));
  }
  copy_to_device(token_ids_.as<void>(), ids, "token ids");
}

void Problem::reserve() {
  int64_t bytes = 0;
  if (op_ == Op::kLinear) check(cuda::linear_scratch(lora_params(0), bytes), "scratch");
  if (op_ == Op::kShrink) check(cuda::shrink_scratch(lora_params(0), bytes), "scratch");
  if (op_ == Op::kEmbedding) check(cuda::embedding_scratch(embedding_params(0), bytes), "scratch");
  if (bytes > scratch_.bytes()) scratch_ = DeviceBuffer(bytes, "scratch");
}

void Problem::reset(cudaStream_t stream) {
  fill_random(y_.as<void>(), y_.bytes() / kElementBytes, options_.dtype, 1, kSeedY, stream);
}

int64_t Problem::period() const { return std::lcm(sets_, copies_); }

const int32_t* Problem::token_ids(int64_t call) const {
  return reinterpret_cast<const int32_t*>(token_ids_.at(call % sets_ * ids_bytes_));
}
char* Problem::x(int64_t call) const { return x_.at(call % copies_ * x_bytes_); }
char* Problem::y(int64_t call) const { return y_.at(call % copies_ * y_bytes_); }
float* Problem::v(int64_t call) const { return reinterpret_cast<float*>(v_.at(call % copies_ * v_bytes_)); }

// The one place that fills LoraParams.
LoraParams Problem::fill_params(int64_t call) const {
  const int64_t set = call % sets_;
  LoraParams p{};
  p.dtype = options_.dtype;
  p.rows = case_.rows;
  p.plan = plan_view(plan_.as<int32_t>(), case_.rows, case_.slots, 0);
  p.slices.table = reinterpret_cast<const SliceEntry*>(table_.at(set * table_bytes_));
  p.slices.groups = case_.slots;
  p.slices.count = static_cast<int32_t>(case_.widths.size());
  p.slices.col_stride = 1;
  int64_t col = 0;
  for (int32_t s = 0; s < p.slices.count; ++s) {
    p.slices.a[s] = op_ == Op::kExpand ? nullptr : a_.at(set * a_set_bytes_);
    p.slices.a_stride[s] = a_pitch_;
    p.slices.a_rows[s] = op_ == Op::kExpand ? -1 : a_rows_;
    p.slices.b[s] = op_ == Op::kShrink ? nullptr : b_.at(set * b_set_bytes_);
    p.slices.b_elements[s] = op_ == Op::kShrink ? -1 : b_elements_;
    p.slices.width[s] = case_.widths[static_cast<size_t>(s)];
    p.slices.col[s] = col;
    col += case_.widths[static_cast<size_t>(s)];
  }
  if (op_ != Op::kEmbedding) {
    p.v = v_given() ? v(call) : nullptr;
    p.v_stride = v_width_;
    p.v_width = static_cast<int32_t>(v_width_);
  } else {
    p.v_width = INT32_MAX;
  }
  if (x_bytes_ > 0) {
    p.k = case_.k;
    p.x = x(call);
    p.x_stride = case_.k;
  }
  if (y_bytes_ > 0) {
    p.y = y(call);
    p.y_stride = case_.width();
  }
  p.scratch = scratch_.as<void>();
  return p;
}

LoraParams Problem::lora_params(int64_t call) const { return fill_params(call); }

EmbeddingParams Problem::embedding_params(int64_t call) const {
  EmbeddingParams e{};
  e.lora = fill_params(call);
  e.token_ids = token_ids(call);
  e.vocab = case_.vocab;
  e.token_major = case_.token_major;
  e.token_stride = case_.token_major ? a_pitch_ : 1;
  e.rank_stride = case_.token_major ? 1 : a_pitch_;
  for (int32_t& cols : e.a_cols) cols = case_.token_major ? static_cast<int32_t>(a_pitch_) : 0;
  return e;
}

PlanParams Problem::plan_params() const {
  PlanParams p{};
  p.plan = plan_.as<int32_t>();
  p.group_ids = ids_.as<void>();
  p.rows = case_.rows;
  p.groups = case_.slots;
  return p;
}

cudaError_t Problem::run(int64_t call, cudaStream_t stream) const {
  switch (op_) {
    case Op::kLinear:
      return cuda::linear(lora_params(call), stream);
    case Op::kShrink:
      return cuda::shrink(lora_params(call), stream);
    case Op::kExpand:
      return cuda::expand(lora_params(call), stream);
    case Op::kEmbedding:
      return cuda::embedding(embedding_params(call), stream);
    default:
      return cuda::plan(plan_params(), stream);
  }
}

}  // namespace polylora::bench
