// Which path MoE's ops take, as moe/moe.cu chooses it, and what it does itself. The general path is a stand-in here
// that says that it was called; the runtime's memsets are stand-ins with the device's limits.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "check.h"
#include "emulated.h"
#include "moe/paths.h"
#include "polylora/cuda.h"

namespace polylora {
namespace {

/// What was called, in order.
std::string called;

constexpr size_t kMaxPitch = INT32_MAX;  // cudaDevAttrMaxPitch

cudaError_t note(const char* what) {
  called += (called.empty() ? "" : " ") + std::string(what);
  return cudaSuccess;
}

}  // namespace

namespace cuda {

/// POLYLORA_BATCH_INVARIANT, as tests set it.
bool invariant = false;
bool batch_invariant() { return invariant; }

cudaError_t linear_general_path(const LoraParams&, cudaStream_t) { return note("linear"); }
cudaError_t shrink_general_path(const LoraParams&, cudaStream_t) { return note("shrink"); }
cudaError_t expand_general_path(const LoraParams&, cudaStream_t) { return note("expand"); }
cudaError_t gate_up_act_general_path(const GateUpActParams&, cudaStream_t) { return note("act"); }
cudaError_t down_reduce_general_path(const DownReduceParams&, cudaStream_t) { return note("reduce"); }

}  // namespace cuda
}  // namespace polylora

extern "C" cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return polylora::note("memset");
}

extern "C" cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  if (pitch > polylora::kMaxPitch || width > pitch) return cudaErrorInvalidValue;
  for (size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(to) + row * pitch, value, width);
  return polylora::note("memset2d");
}

namespace polylora::testing {
namespace {

/// What a call says under a forced path: `done` of it, or its error's name.
template <typename Call, typename Done>
std::string under(const char* path, Call call, Done done) {
  setenv("POLYLORA_PATH", path, 1);
  const cudaError_t error = call();
  unsetenv("POLYLORA_PATH");
  switch (error) {
    case cudaSuccess:
      return done();
    case cudaErrorNotSupported:
      return "not supported";
    default:
      return error == cudaErrorInvalidValue ? "invalid value" : "another error";
  }
}

/// What an op called under a forced path, or its error's name.
template <typename Op, typename Params>
std::string run(const char* path, Op op, const Params& params) {
  called.clear();
  return under(path, [&] { return op(params, nullptr); }, [] { return called; });
}

/// The bytes of scratch that an op asks for, or its error's name.
template <typename Scratch, typename Params>
std::string ask(const char* path, Scratch scratch, const Params& params) {
  int64_t bytes = -1;
  return under(path, [&] { return scratch(params, bytes); }, [&] { return std::to_string(bytes) + " bytes"; });
}

/// A call that has nothing to stream: the seams' own work is left.
LoraParams without_groups() {
  LoraParams p{};
  p.dtype = DType::kBFloat16;
  p.rows = 8;
  p.k = p.x_stride = p.y_stride = 64;
  p.slices.count = p.slices.col_stride = 1;
  p.slices.width[0] = 64;
  return p;
}

void forced_paths_of_seams_without_groups() {
  GateUpActParams g{};
  g.lora = without_groups();
  g.h_stride = 64;
  DownReduceParams d{};
  d.lora = without_groups();
  d.out_stride = 64;
  d.tokens = 4;
  d.top_k = 2;
  const struct {
    const char* path;
    const char *act, *reduce;
  } wanted[] = {
      {"", "act", "reduce"},
      {"general", "act", "reduce"},
      {"mma", "not supported", "not supported"},
      {"wide", "not supported", "not supported"},
      {"no such path", "invalid value", "invalid value"},
  };
  for (const auto& want : wanted) {
    std::string got = run(want.path, cuda::gate_up_act, g);
    CHECK(got == want.act, "gate_up_act, path '%s': %s, want %s", want.path, got.c_str(), want.act);
    got = run(want.path, cuda::down_reduce, d);
    CHECK(got == want.reduce, "down_reduce, path '%s': %s, want %s", want.path, got.c_str(), want.reduce);
  }
}

/// Nothing to write: an op does nothing and asks for no scratch, whatever path is forced.
void seams_without_outputs() {
  GateUpActParams no_rows{};
  no_rows.lora = without_groups();
  no_rows.lora.slices.groups = 1;
  no_rows.lora.v_width = 16;
  no_rows.h_stride = 64;
  GateUpActParams no_width = no_rows;
  no_rows.lora.rows = 0;
  no_width.lora.slices.width[0] = 0;
  DownReduceParams no_tokens{};
  no_tokens.lora = no_rows.lora;
  no_tokens.out_stride = 64;
  no_tokens.top_k = 2;
  DownReduceParams no_columns = no_tokens;
  no_columns.tokens = 4;
  no_columns.lora = no_width.lora;
  for (const char* path : {"", "general", "mma", "wide"}) {
    const auto check = [&](const char* what, const std::string& asked, const std::string& did) {
      CHECK(asked == "0 bytes" && did.empty(), "%s, path '%s': asks for %s, calls '%s'", what, path, asked.c_str(),
            did.c_str());
    };
    for (const auto* g : {&no_rows, &no_width}) {
      check("gate_up_act", ask(path, cuda::gate_up_act_scratch, *g), run(path, cuda::gate_up_act, *g));
    }
    for (const auto* d : {&no_tokens, &no_columns}) {
      check("down_reduce", ask(path, cuda::down_reduce_scratch, *d), run(path, cuda::down_reduce, *d));
    }
  }
}

/// Up to which rows a dense MLP's gate and up go by the kernels for few: the scratch that is asked for tells.
void few_rows_without_experts() {
  const auto check = [](int64_t rows, int32_t v_width, bool few) {
    GateUpActParams g{};
    LoraParams& p = g.lora;
    p = without_groups();
    p.rows = rows;
    p.x_div = 1;
    p.y_stride = 128;
    p.v_width = v_width;
    p.slices.groups = 8;
    p.slices.count = 2;
    p.slices.width[1] = p.slices.col[1] = 64;
    p.slices.a_stride[0] = p.slices.a_stride[1] = p.k;
    p.plan.max_tiles = 8 + rows / 16;
    g.h_stride = 64;
    int64_t asked = -1, narrow = -1, stream = -1;
    CHECK(cuda::gate_up_act_scratch(g, asked) == cudaSuccess && cuda::act_narrow_scratch(g, narrow) == cudaSuccess &&
              cuda::moe_gate_up_act_scratch(g, stream) == cudaSuccess && narrow != stream,
          "%lld rows", (long long)rows);
    CHECK(asked == (few ? narrow : stream), "%lld rows, v of %d: %lld bytes; of few rows %lld, streams %lld",
          (long long)rows, v_width, (long long)asked, (long long)narrow, (long long)stream);
  };
  for (int32_t v_width : {48, 64, 128, 512}) {
    for (int64_t rows : {1, 256, 257, 1024}) check(rows, v_width, true);
    check(1025, v_width, false);
    cuda::invariant = true;
    check(256, v_width, false);
    cuda::invariant = false;
  }
}

/// Which kernels make the deltas of few pairs: their launches tell, over a plan without rows, and the scratch.
void deltas_of_few_pairs() {
  constexpr int64_t kGroups = 96;
  const auto check = [](const std::string& what, bool few, auto&& change) {
    LoraParams p = without_groups();
    p.x_div = 10;
    p.rows = 30;
    p.k = p.x_stride = 128;
    p.v_width = 48;
    p.slices.groups = kGroups;
    p.slices.count = 2;
    p.slices.width[1] = p.slices.col[1] = 64;
    p.y_stride = 128;
    change(p);
    const int64_t pairs = p.row_map != nullptr ? p.rows : 0;
    const auto zeros = [](int64_t bytes) { return emulator::GuardedBytes((bytes + 15) / 16 * 16, 0); };
    const emulator::GuardedBytes plan = zeros(plan_layout(p.rows, kGroups, pairs).words * 4),
                                 table = zeros(kGroups * 64);
    const emulator::GuardedBytes x = zeros(p.rows * p.x_stride * 2), y = zeros(p.rows * p.y_stride * 2),
                                 v = zeros(p.rows * p.v_width * 4);
    p.plan = plan_view(reinterpret_cast<const int32_t*>(plan.data()), p.rows, kGroups, pairs);
    p.slices.table = reinterpret_cast<const SliceEntry*>(table.data());
    p.x = x.data();
    p.y = y.data();
    p.v = reinterpret_cast<float*>(v.data());
    p.v_stride = p.v_width;
    for (int s = 0; s < 2; ++s) {
      p.slices.a[s] = p.slices.b[s] = x.data();
      p.slices.a_stride[s] = p.k;
    }
    int64_t asked = -1, narrow = -1, stream = -1;
    CHECK(cuda::moe_delta_scratch(p, asked) == cudaSuccess && cuda::few_deltas_scratch(p, narrow) == cudaSuccess &&
              cuda::moe_deltas_scratch(p, stream) == cudaSuccess && narrow != stream,
          "%s", what.c_str());
    CHECK(asked == (few ? narrow : stream), "%s: %lld bytes; of few pairs %lld, streams %lld", what.c_str(),
          (long long)asked, (long long)narrow, (long long)stream);
    const emulator::GuardedBytes scratch(asked);
    p.scratch = scratch.data();
    cuda::launches.clear();
    CHECK(cuda::moe_delta(p, nullptr) == cudaSuccess, "%s", what.c_str());
    const std::vector<cuda::LaunchShape>& did = cuda::launches;
    CHECK(did.size() == (p.v_of_x ? 1 : 2) && did.back().overlap, "%s: %zu launches", what.c_str(), did.size());
    // shrink of few pairs alone waits for the plan: its blocks shall not stand before a GEMM's
    if (!p.v_of_x) CHECK(did.front().overlap == !few, "%s: other kernels", what.c_str());
  };
  const float weight[33] = {};
  const int32_t map[33] = {};
  check("three tokens of ten", true, [](LoraParams&) {});
  check("32 pairs", true, [](LoraParams& p) { p.rows = 32; });
  check("33 pairs", false, [](LoraParams& p) { p.rows = 33; });
  check("down", true, [&](LoraParams& p) {
    p.x_div = 0;
    p.row_weight = weight;
  });
  check("down without weights", false, [](LoraParams& p) { p.x_div = 0; });
  check("v given", false, [](LoraParams& p) { p.v_of_x = true; });
  check("a row map", false, [&](LoraParams& p) { p.row_map = map; });
  check("K that is no multiple of 32", false, [](LoraParams& p) { p.k = p.x_stride = 72; });
  cuda::invariant = true;
  check("batch-invariant", false, [](LoraParams&) {});
  cuda::invariant = false;
}

/// Zeros in the deltas of two slices, and in nothing between their rows; by what.
void zeroed_deltas(const std::string& what, int64_t rows, int64_t pitch, const std::string& want) {
  constexpr int64_t kWidth = 24 + 7;
  LoraParams p{};
  p.dtype = DType::kFloat32;  // which the general path alone serves
  p.rows = rows;
  p.slices.groups = 1;
  p.slices.count = 2;
  p.slices.col_stride = 1;
  p.slices.width[0] = 24;
  p.slices.width[1] = 7;
  const int64_t elements = (rows - 1) * pitch + kWidth;
  const size_t bytes = static_cast<size_t>(elements) * sizeof(float);  // of which few are ever touched
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::printf("skipped: deltas %s: no %zu bytes of address space\n", what.c_str(), bytes);
    return;
  }
  p.y = memory;
  p.y_stride = pitch;
  auto* values = static_cast<float*>(memory);
  const auto each = [&](auto&& visit) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t columns = row + 1 < rows ? std::min(pitch, kWidth + 9) : kWidth;
      for (int64_t n = 0; n < columns; ++n) visit(row, n, values[row * pitch + n]);
    }
  };
  each([](int64_t, int64_t, float& value) { value = 1.f; });
  const std::string got = run("", cuda::moe_delta, p);
  CHECK(got == want, "%s: %s, want %s", what.c_str(), got.c_str(), want.c_str());
  each([&](int64_t row, int64_t n, float value) {
    CHECK(value == (n < kWidth ? 0.f : 1.f), "%s: row %lld column %lld is %g", what.c_str(), (long long)row,
          (long long)n, value);
  });
  munmap(memory, bytes);
}

void deltas_before_they_are_made() {
  zeroed_deltas("contiguous", 5, 31, "memset linear");
  zeroed_deltas("one row", 1, 3, "memset linear");
  zeroed_deltas("apart", 5, 40, "memset2d linear");
  zeroed_deltas("as far apart as can be", 3, kMaxPitch / 4, "memset2d linear");
  zeroed_deltas("farther", 3, kMaxPitch / 4 + 1, "memset memset memset linear");
}

}  // namespace
}  // namespace polylora::testing

int main() {
  polylora::testing::forced_paths_of_seams_without_groups();
  polylora::testing::seams_without_outputs();
  polylora::testing::few_rows_without_experts();
  polylora::testing::deltas_of_few_pairs();
  polylora::testing::deltas_before_they_are_made();
  return polylora::testing::report();
}
