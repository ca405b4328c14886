// Which path linear, its deltas and their sum take, as linear/linear.cu chooses it. The fast paths are the emulated
// kernels themselves, over plans without rows; the general ones are stand-ins that say that they were called.
#include "emulator.h"
#include "linear/linear.cu"

#include "check.h"
#include "emulated.h"
#include "polylora/cpu.h"

namespace polylora {
namespace {

/// What was called of the general paths, in order.
std::string called;

cudaError_t note(const char* what) {
  called += (called.empty() ? "" : " ") + std::string(what);
  return cudaSuccess;
}

}  // namespace

namespace cuda {

cudaError_t shrink_general_path(const LoraParams&, cudaStream_t) { return note("shrink"); }
cudaError_t expand_general_path(const LoraParams&, cudaStream_t) { return note("expand"); }
cudaError_t embedding_general_path(const EmbeddingParams&, cudaStream_t) { return note("embedding"); }
cudaError_t moe_linear(const LoraParams&, cudaStream_t) { return note("moe"); }
cudaError_t moe_scratch(const LoraParams&, int64_t&) { return note("moe"); }

}  // namespace cuda

namespace testing {
namespace {

/// A call on plain memory, of rows without an adapter.
class Call {
 public:
  Call(int64_t rows, int64_t k, std::vector<int32_t> widths, int64_t groups = 8)
      : ids_(static_cast<size_t>(rows), -1),
        plan_(4 * plan_layout(rows, groups, 0).words),
        table_(groups * static_cast<int64_t>(widths.size() * sizeof(SliceEntry))),
        memory_(1 << 20),
        scratch_(8 << 20) {
    cpu::plan(PlanParams{reinterpret_cast<int32_t*>(plan_.data()), ids_.data(), false, rows, groups}, serial);
    p.dtype = DType::kBFloat16;
    p.rows = rows;
    p.k = p.x_stride = k;
    p.x = p.y = memory_.data();
    p.v_width = static_cast<int32_t>(16 * widths.size());
    p.scratch = scratch_.data();
    p.plan = plan_view(reinterpret_cast<int32_t*>(plan_.data()), rows, groups, 0);
    p.slices.table = reinterpret_cast<const SliceEntry*>(table_.data());
    p.slices.groups = static_cast<int32_t>(groups);
    p.slices.col_stride = 1;
    for (int32_t width : widths) {
      const int s = p.slices.count++;
      p.slices.width[s] = width;
      p.slices.col[s] = p.y_stride;
      p.y_stride += width;
      p.slices.a[s] = p.slices.b[s] = memory_.data();
      p.slices.a_stride[s] = k;
      p.slices.a_rows[s] = p.slices.b_elements[s] = 64;
    }
  }

  /// Under a forced path: how many kernels were launched, a c for each that was in clusters, then what was called of
  /// the general paths.
  template <typename Op>
  std::string run(const char* path, Op op) {
    called.clear();
    cuda::launches.clear();
    emulator::grids().clear();
    emulator::options().previous_grid = nullptr;
    setenv("POLYLORA_PATH", path, 1);
    const cudaError_t error = op(p);
    unsetenv("POLYLORA_PATH");
    if (error != cudaSuccess) return error == cudaErrorNotSupported ? "not supported" : "another error";
    std::string what = std::to_string(cuda::launches.size());
    for (const cuda::LaunchShape& shape : cuda::launches) what += shape.cluster > 1 ? "c" : "";
    return what + (called.empty() ? "" : " ") + called;
  }

  void* odd() const { return memory_.data() + 2; }

  LoraParams p{};

 private:
  std::vector<int32_t> ids_;
  GuardedBytes plan_, table_, memory_, scratch_;
};

std::string deltas(Call& call, const char* path = "") {
  return call.run(path, [](const LoraParams& p) { return cuda::linear_delta(p, nullptr); });
}
std::string linear(Call& call, const char* path = "") {
  return call.run(path, [](const LoraParams& p) { return cuda::linear(p, nullptr); });
}

void expect(const char* what, const std::string& got, const char* want) {
  CHECK(got == want, "%s: %s, want %s", what, got.c_str(), want);
}

// Two launches of decode, or -0 and then what linear takes.
void deltas_by_shape() {
  Call fast(9, 64, {64, 32});
  expect("few rows", deltas(fast), "2");
  expect("few rows, cluster forced", deltas(fast, "cluster"), "2");
  expect("few rows, general forced", deltas(fast, "general"), "1 shrink expand");
  Call most(1024, 64, {64, 32}), many(1025, 64, {64, 32});
  expect("1024 rows of rank 16", deltas(most), "2");
  expect("many rows", deltas(many), "2c");  // -0, and wide
  for (const std::vector<int32_t>& widths : {std::vector<int32_t>{4, 4}, {12}, {1}, {64, 20}}) {
    Call narrow(9, 64, widths);
    expect("widths that are no multiples of 8", deltas(narrow), "1 shrink expand");
  }
  Call odd_delta(9, 64, {64}), odd_b(9, 64, {64}), odd_a(9, 64, {64}), odd_k(9, 60, {64});
  odd_delta.p.y = odd_delta.odd();
  odd_b.p.slices.b[0] = odd_b.odd();
  odd_a.p.slices.a[0] = odd_a.odd();
  for (Call* call : {&odd_delta, &odd_b, &odd_a, &odd_k}) {
    expect("what is unaligned", deltas(*call), "1 shrink expand");
  }
  Call nothing(0, 64, {64}), no_groups(9, 64, {64}, 0);
  expect("no rows", deltas(nothing), "0");
  expect("no groups", deltas(no_groups), "0");
}

void linear_by_rows() {
  Call few(64, 64, {64, 32}), full(64, 64, {64, 32}, 4), each(128, 64, {64, 32}, 64), fewer(48, 64, {64, 32}, 3);
  Call nine(72, 64, {64, 32}), wide(48, 64, {8192, 8192}, 3), less(23, 64, {8192, 8192}, 2);
  Call mixed(2048, 64, {64, 32}, 64), most(1024, 64, {64, 32}, 4), more(1025, 64, {64, 32}, 4);
  Call ranks(513, 64, {64, 32}, 4), groups(480, 64, {64, 32}, 15), one_less(480, 64, {64, 32}, 14);
  ranks.p.v_width = 64;
  groups.p.v_width = one_less.p.v_width = 128;
  expect("64 rows of 8 groups", linear(few), "1c");
  expect("64 rows of 4 groups, whose tiles are full", linear(full), "2");
  expect("72 rows of 8 groups", linear(nine), "2");
  expect("48 rows of 3 groups", linear(fewer), "1c");
  expect("48 rows of 3 groups, many outputs", linear(wide), "2");
  expect("23 rows of 2 groups, many outputs", linear(less), "1c");
  expect("2048 rows of 64 groups, whose short runs are decode's", linear(mixed), "2c");
  expect("128 rows of 64 groups", linear(each), "1");
  expect("1024 rows of rank 16", linear(most), "2");
  expect("1025 rows of rank 16", linear(more), "1c");
  expect("513 rows of rank 32", linear(ranks), "1c");
  expect("480 rows of rank 64, a group for every 32 rows", linear(groups), "2");
  expect("480 rows of rank 64, a group less", linear(one_less), "1c");
  expect("64 rows of 4 groups, cluster forced", linear(full, "cluster"), "1c");
}

// By the mma path: shrink, the sum of its planes where there are three or more, expand.
void parts_of_mma() {
  Call call(257, 768, {4544, 64}, 1), slots(600, 768, {4544, 64}, 16);
  call.p.v_width = slots.p.v_width = 258;
  expect("many ranks and outputs", linear(call), "1c");
  cuda::emulated_device.sms = 9;  // 3 parts of K, of 3 tiles
  expect("three parts", linear(call, "mma"), "3");
  cuda::emulated_device.sms = 8;
  expect("two parts", linear(call, "mma"), "2");
  cuda::emulated_device.sms = 41;  // 5 tiles, or some more: clusters of 5 and 4
  expect("16 adapters, whose short runs are decode's", linear(slots), "2cc");
  cuda::emulated_device.sms = 132;
}

// Wide tiles left over by clusters of two have a launch of their own.
void tiles_left_over() {
  cuda::emulated_device.sms = 8;  // 4 clusters of two
  Call four(512, 512, {64, 32}, 1), five(513, 512, {64, 32}, 1), seven(897, 512, {64, 32}, 1);
  Call five_probably(513, 512, {64, 32}, 2), eight(1024, 512, {64, 32}, 1), short_k(513, 256, {64, 32}, 1);
  Call slots(1900, 512, {64, 32}, 64), wide_v(513, 512, {64, 32}, 1);
  wide_v.p.v_width = 256;
  expect("4 tiles", linear(four, "wide"), "1c");
  expect("5 tiles", linear(five, "wide"), "2cc");
  expect("5 tiles of many ranks", linear(wide_v, "wide"), "2cc");
  expect("5 or 6 tiles", linear(five_probably, "wide"), "2cc");
  expect("7 tiles, of which each of the last 3 has a cluster of two", linear(seven, "wide"), "1c");
  expect("8 tiles", linear(eight, "wide"), "1c");
  expect("a K of four chunks", linear(short_k, "wide"), "1c");
  // the second may start once all before the first is done, and ends after it; so after decode's
  const auto check_order = [](const char* what, size_t launches) {
    const std::vector<emulator::GridOrder>& grids = emulator::grids();
    CHECK(grids.size() == launches && !grids[0].starts_next_before_wait, "%s: the next starts early", what);
    for (size_t i = 0; i < grids.size(); ++i) CHECK(!grids[i].ends_before_wait, "%s: launch %zu ends early", what, i);
  };
  expect("5 tiles, again", linear(five, "wide"), "2cc");
  check_order("5 tiles", 2);
  expect("64 slots, whose short runs are decode's", linear(slots), "3cc");
  check_order("64 slots", 3);
  expect("4 tiles, again", linear(four, "wide"), "1c");
  CHECK(emulator::grids()[0].starts_next_before_wait, "a launch alone lets the next start at once");
  setenv("POLYLORA_BATCH_INVARIANT", "1", 1);
  expect("batch-invariant", linear(five, "wide"), "1c");
  unsetenv("POLYLORA_BATCH_INVARIANT");
  cuda::emulated_device.sms = 132;
}

void sums_by_shape() {
  const auto sum = [](Call& call, const void* delta, int64_t stride, const char* path = "") {
    return call.run(path, [&](const LoraParams& p) { return cuda::add_delta({p, delta, stride}, nullptr); });
  };
  Call call(9, 64, {64, 32});
  for (const char* path : {"", "general"}) expect("aligned", sum(call, call.p.x, 96, path), "1");
  expect("odd deltas", sum(call, call.odd(), 97), "1");
  call.p.slices.col[1] = 65;
  expect("odd columns", sum(call, call.p.x, 96), "1");
  Call nothing(0, 64, {64});
  expect("no rows", sum(nothing, nothing.p.x, 64), "0");
}

}  // namespace
}  // namespace testing
}  // namespace polylora

int main() {
  polylora::testing::deltas_by_shape();
  polylora::testing::linear_by_rows();
  polylora::testing::parts_of_mma();
  polylora::testing::tiles_left_over();
  polylora::testing::sums_by_shape();
  return polylora::testing::report();
}
