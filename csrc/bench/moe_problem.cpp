#include "moe_problem.h"

#include <algorithm>
#include <cmath>

namespace polylora::bench {
namespace {

// Seeds of what is filled; those of a pool's matrices follow kSeedPools.
enum Seed : uint64_t { kSeedX = 201, kSeedW13, kSeedW2, kSeedY1, kSeedY2, kSeedPools };

double inverse_root(int64_t n) { return 1 / std::sqrt(static_cast<double>(n)); }

float scale_of(int64_t slot) { return 0.5f + 0.125f * static_cast<float>(slot % 5); }

DeviceBuffer random_matrix(int64_t elements, double deviation, uint64_t seed, const char* what, cudaStream_t stream) {
  DeviceBuffer buffer(elements * kElementBytes, what);
  fill_random(buffer.as<void>(), elements, DType::kBFloat16, deviation, seed, stream);
  return buffer;
}

// A part of every routing, one behind the other.
template <typename T>
DeviceBuffer upload_parts(const std::vector<MoeRouting>& routings, std::vector<T> MoeRouting::* part, int64_t pitch,
                          const char* what) {
  std::vector<T> all(routings.size() * static_cast<size_t>(pitch));
  for (size_t i = 0; i < routings.size(); ++i) {
    const std::vector<T>& values = routings[i].*part;
    std::copy(values.begin(), values.end(), all.begin() + static_cast<int64_t>(i) * pitch);
  }
  return upload(all, what);
}

}  // namespace

MoeProblem::MoeProblem(const MoeCase& c, bool with_base, const Device& device, cudaStream_t stream)
    : case_(c), has_base_(with_base) {
  pools_needed_ = moe_pools(c, with_base, device.l2_bytes, free_bytes());
  if (pools_needed_.pools == 0) throw CudaError(cudaErrorMemoryAllocation, c.name());
  draw(device.l2_bytes);
  upload_routings();
  make_pools(stream);
  make_buffers(stream);
  check(cudaStreamSynchronize(stream), "filling the memory of " + c.name());
}

void MoeProblem::draw(int64_t l2_bytes) {
  RoutingDealer dealer(case_, pools(), kRoutingSeed);
  routings_.push_back(dealer.next());
  rotation_ = moe_rotation(case_, routings_[0].groups_hit(), routings_[0].experts_hit(), l2_bytes);
  while (static_cast<int64_t>(routings_.size()) < routings()) routings_.push_back(dealer.next());
  for (int64_t i = 0; i < layers(); ++i) groups_hit_ += static_cast<double>(routing(i).groups_hit());
  groups_hit_ /= static_cast<double>(layers());
}

void MoeProblem::upload_routings() {
  constexpr int64_t kAlign = 64;  // words: parts start where 16-byte loads can
  pitch_ = (case_.pairs() + kAlign - 1) / kAlign * kAlign;
  topk_ids_ = upload_parts(routings_, &MoeRouting::topk_ids, pitch_, "expert ids");
  topk_weights_ = upload_parts(routings_, &MoeRouting::topk_weights, pitch_, "top-k weights");
  slots_ = upload_parts(routings_, &MoeRouting::slots, pitch_, "token slots");
  row_map_ = upload_parts(routings_, &MoeRouting::row_map, pitch_, "row map");
  position_ = upload_parts(routings_, &MoeRouting::position, pitch_, "positions");
  group_ = upload_parts(routings_, &MoeRouting::group, pitch_, "groups");
}

void MoeProblem::make_pools(cudaStream_t stream) {
  const Experts& m = case_.model;
  for (int64_t i = 0; i < pools(); ++i) {
    const uint64_t seed = kSeedPools + 4 * static_cast<uint64_t>(i);
    pools_.push_back(
        {make_half(m.slices(), m.hidden, m.inner, seed, stream), make_half(1, m.inner, m.hidden, seed + 2, stream)});
  }
}

MoeProblem::Half MoeProblem::make_half(int64_t slices, int64_t k, int64_t width, uint64_t seed,
                                       cudaStream_t stream) const {
  const int64_t rank = case_.rank;
  std::vector<SliceEntry> table;
  for (int64_t group = 0; group < case_.groups(); ++group) {
    for (int64_t s = 0; s < slices; ++s) {
      SliceEntry entry{};
      entry.a_row = static_cast<int32_t>((group * slices + s) * rank);
      entry.rank = case_.rank;
      entry.v_col = static_cast<int32_t>(s * rank);
      entry.b_stride = case_.rank;
      entry.b_offset = (group * slices + s) * width * rank;
      entry.scale = scale_of(group / case_.model.experts);
      table.push_back(entry);
    }
  }
  const int64_t ranks = case_.groups() * slices * rank;
  return {random_matrix(ranks * k, inverse_root(k), seed, "A", stream),
          random_matrix(ranks * width, inverse_root(rank), seed + 1, "B", stream), upload(table, "slice table")};
}

// x of deviation 1 and weights such that every stage and its delta have about the same.
void MoeProblem::make_buffers(cudaStream_t stream) {
  const Experts& m = case_.model;
  const int64_t y1_width = m.slices() * m.inner;
  const auto matrix = [](int64_t rows, int64_t width, const char* what) {
    return DeviceBuffer(rows * width * kElementBytes, what);
  };
  x_ = random_matrix(case_.rows * m.hidden, 1, kSeedX, "x", stream);
  if (has_base_) {
    w13_ = random_matrix(m.experts * y1_width * m.hidden, inverse_root(m.hidden), kSeedW13, "w13", stream);
    w2_ = random_matrix(m.experts * m.hidden * m.inner, inverse_root(m.inner), kSeedW2, "w2", stream);
    sorted_x_ = matrix(case_.pairs(), m.hidden, "sorted x");
  }
  y1_ = matrix(case_.pairs(), y1_width, "y1");
  h_ = matrix(case_.pairs(), m.inner, "h");
  y2_ = matrix(case_.pairs(), m.hidden, "y2");
  out_ = matrix(case_.rows, m.hidden, "out");
  up_delta_ = matrix(case_.pairs(), y1_width, "delta of y1");
  down_delta_ = matrix(case_.pairs(), m.hidden, "delta of y2");
  poison(stream);
}

void MoeProblem::poison(cudaStream_t stream) const {
  for (const DeviceBuffer* buffer : {&sorted_x_, &y1_, &h_, &y2_, &out_, &up_delta_, &down_delta_}) {
    bench::poison(*buffer, stream);
  }
  if (has_base_) return;
  fill_random(y1(), y1_.bytes() / kElementBytes, DType::kBFloat16, 1, kSeedY1, stream);
  fill_random(y2(), y2_.bytes() / kElementBytes, DType::kBFloat16, 1, kSeedY2, stream);
}

RoutingView MoeProblem::view(int64_t call) const {
  const int64_t first = static_cast<int64_t>(at(call)) * pitch_;
  return {topk_ids_.as<int32_t>() + first, topk_weights_.as<float>() + first, slots_.as<int32_t>() + first,
          row_map_.as<int32_t>() + first,  position_.as<int32_t>() + first,   group_.as<int32_t>() + first};
}

MoePlanParams MoeProblem::plan_params(int64_t call, int32_t* plan) const {
  const RoutingView v = view(call);
  MoePlanParams p{};
  p.plan = plan;
  p.topk_ids = v.topk_ids;
  p.token_slots = v.slots;
  p.row_map = v.row_map;
  p.rows = case_.pairs();
  p.pairs = case_.pairs();
  p.top_k = case_.model.top_k;
  p.slots = kMoeSlots;
  p.experts = case_.model.experts;
  p.global_experts = case_.model.experts;
  return p;
}

LoraParams MoeProblem::half_params(const Half& half, int64_t slices, int64_t k, int64_t width, int64_t call,
                                   const int32_t* plan) const {
  LoraParams p{};
  p.dtype = DType::kBFloat16;
  p.rows = case_.pairs();
  p.k = k;
  p.x_stride = k;
  p.y_stride = slices * width;
  p.v_width = static_cast<int32_t>(slices * case_.rank);
  p.row_map = view(call).row_map;
  p.slices.table = half.table.as<SliceEntry>();
  p.slices.groups = static_cast<int32_t>(case_.groups());
  p.slices.count = static_cast<int32_t>(slices);
  for (int64_t s = 0; s < slices; ++s) {
    p.slices.a[s] = half.a.as<void>();
    p.slices.a_stride[s] = k;
    p.slices.a_rows[s] = case_.groups() * slices * case_.rank;
    p.slices.b[s] = half.b.as<void>();
    p.slices.b_elements[s] = case_.groups() * slices * width * case_.rank;
    p.slices.width[s] = static_cast<int32_t>(width);
    p.slices.col[s] = s * width;
  }
  p.slices.col_stride = 1;
  p.plan = plan_of(plan);
  return p;
}

LoraParams MoeProblem::up_params(int64_t call, const int32_t* plan) const {
  const Experts& m = case_.model;
  const Pool& pool = pools_[static_cast<size_t>(routing(call).pool)];
  LoraParams p = half_params(pool.up, m.slices(), m.hidden, m.inner, call, plan);
  p.x = x();
  p.x_div = m.top_k;
  p.y = y1();
  for (int64_t s = 0; s < m.slices(); ++s) p.slices.col[s] = s * slice_step();
  p.slices.col_stride = static_cast<int32_t>(col_stride());
  return p;
}

LoraParams MoeProblem::down_params(int64_t call, const int32_t* plan) const {
  const Experts& m = case_.model;
  const Pool& pool = pools_[static_cast<size_t>(routing(call).pool)];
  LoraParams p = half_params(pool.down, 1, m.inner, m.hidden, call, plan);
  p.x = h();
  p.y = y2();
  p.row_weight = view(call).topk_weights;
  return p;
}

}  // namespace polylora::bench
