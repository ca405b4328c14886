// The first half of embedding for wide tiles: v, looked up by token, as 16-bit operands for expand_wide.cu.
//
// A wide tile is shared by many blocks, and where A is [ranks, vocabulary] every element of v is a sector of its own:
// looked up in each of them, v would be as many sectors as y. Here each is looked up once, eight threads a row.
#include "linear/paths.h"
#include "linear/v_source.cuh"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kThreadsARow = 8;
constexpr int kRows = kThreads / kThreadsARow;

struct LookupTask {
  LinearTask linear;
  TokenSource tokens;
  const int32_t* row_group;  // [rows]
  Operands operands;         // looked up
};

__global__ void __launch_bounds__(kThreads) embedding_lookup(const __grid_constant__ LookupTask params) {
  const LinearTask& task = params.linear;
  // after the wait: what the kernel before wrote may be read by the next without one
  ptx::wait_for_previous_grid();
  ptx::launch_next_grid();
  const int row = static_cast<int>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / kThreadsARow;
  const int s = static_cast<int>(blockIdx.y);
  if (row >= task.rows) return;
  const int4 head = ptx::load_fresh16(task.header);
  const int group = ptx::load_fresh4(params.row_group + row);
  const int64_t token = token_of(params.tokens, row);
  const bool fits = head.x == kPlanVersionValue && head.y == task.rows && head.z == task.groups;
  if (!fits || group < 0 || group >= task.groups || token < 0) return;
  const LinearSlice& slice = task.slice[s];
  const SliceEntry entry = task.table[int64_t{group} * task.slices + s];
  const int64_t a_rows_used = task.a_rows_used > 0 ? task.a_rows_used : entry.rank;
  if (!entry_fits(entry, a_rows_used, slice.a_rows, slice.width, slice.b_elements, task.v_width) ||
      entry.rank > slice.max_rank) {
    return;
  }
  const Lookup lookup(slice, entry.a_row, entry.rank, params.tokens.token_major);
  uint16_t* to = params.operands.row(task, s, row);
#pragma unroll 2
  for (int r = static_cast<int>(threadIdx.x) % kThreadsARow * 4; r < entry.rank; r += kThreadsARow * 4) {
    *reinterpret_cast<uint2*>(to + r) = lookup.load(token, r);
  }
}

}  // namespace

cudaError_t embedding_lookup_path(const EmbeddingParams& e, cudaStream_t stream) {
  const LoraParams& p = e.lora;
  LookupTask params{linear_task(p), token_source(e), p.plan.row_group, lookup_operands(e)};
  set_lookup(params.linear, e);
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(divide_up(p.rows, kRows)), static_cast<unsigned>(p.slices.count));
  shape.threads = kThreads;
  shape.overlap = true;
  return launch<&embedding_lookup>(device, shape, params, stream);
}

}  // namespace polylora::cuda
