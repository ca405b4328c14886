// Adds the planes of v that blocks of shrink wrote, each over its part of K, in their order.
//
// A block takes 16 rows of a wide tile; a thread 4 ranks of a row at a time, all planes of them in flight together.
#include "linear/shrink_wide.cuh"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;

struct AddTask {
  LinearTask planes;
  LinearTask sum;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) add_planes_kernel(const __grid_constant__ AddTask both) {
  const LinearTask& task = both.planes;
  struct Item {
    SliceEntry entry[kMaxSlices];
    int32_t rank[kMaxSlices];
    int32_t packed_col[kMaxSlices];
    uint32_t first;
  };
  Item& item = *reinterpret_cast<Item*>(ptx::dynamic_smem());
  ptx::launch_next_grid();  // shrink has waited for all that came before it
  const int32_t* head = task.header;
  const int index = blockIdx.x / (kWideTileRows / kRows);
  const bool fits = ptx::load_fresh4(head + kPlanVersion) == kPlanVersionValue &&
                    ptx::load_fresh4(head + kPlanRows) == task.rows &&
                    ptx::load_fresh4(head + kPlanGroups) == task.groups;
  const int tiles = fits ? min(ptx::load_fresh4(head + kPlanWideTiles), task.max_tiles) : 0;
  const Tile tile = task.tile[min(index, task.max_tiles - 1)];
  const int first_row = blockIdx.x % (kWideTileRows / kRows) * kRows;
  const int rows = index < tiles ? min(tile.rows - first_row, kRows) : 0;
  if (rows > 0) {
    if (static_cast<int>(threadIdx.x) < task.slices) {
      const LinearSlice& slice = task.slice[threadIdx.x];
      const SliceEntry entry = task.table[int64_t{tile.group} * task.slices + threadIdx.x];
      const bool good = entry_fits(entry, entry.rank, slice.a_rows, slice.width, slice.b_elements, task.v_width);
      item.entry[threadIdx.x] = entry;
      item.rank[threadIdx.x] = good ? entry.rank : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) item.first = pack_columns(item.entry, item.rank, task.slices, item.packed_col);
    __syncthreads();
  }
  ptx::wait_for_previous_grid();
  if (rows <= 0) return;

  for (int s = 0; s < task.slices; ++s) {
    if ((item.first >> s & 1) == 0) continue;
    const int rank = item.rank[s];
    const int quads = PackedV::columns(rank) / 4;
#pragma unroll 1
    for (int e = threadIdx.x; e < rows * quads; e += kThreads) {
      const int row = first_row + e / quads;
      const int r = e % quads * 4;
      const int64_t pos = tile.pos + row;
      const float* from = static_cast<const float*>(task.v) + pos * task.v_stride + item.packed_col[s] + r;
      float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll 8
      for (int i = 1; i < task.planes; ++i) add(sum, *reinterpret_cast<const float4*>(from + i * task.v_plane));
      if (both.sum.v_form == VForm::kPacked) {
        T* to = static_cast<T*>(both.sum.v) + pos * both.sum.v_stride + item.packed_col[s] + PackedV::place(r);
        *reinterpret_cast<uint32_t*>(to) = pack(sum.x, sum.y, T{});
        *reinterpret_cast<uint32_t*>(to + 8) = pack(sum.z, sum.w, T{});
      } else {
        float* to =
            static_cast<float*>(both.sum.v) + int64_t{task.order[pos]} * both.sum.v_stride + item.entry[s].v_col + r;
        if (r < rank) to[0] = sum.x;
        if (r + 1 < rank) to[1] = sum.y;
        if (r + 2 < rank) to[2] = sum.z;
        if (r + 3 < rank) to[3] = sum.w;
      }
    }
  }
}

}  // namespace

cudaError_t add_planes(const LinearTask& planes, const LinearTask& sum, DType dtype, const Device& device,
                       cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(planes.max_tiles * (kWideTileRows / kRows)));
  shape.threads = kThreads;
  shape.smem_bytes = 1024;
  shape.overlap = true;
  const AddTask both{planes, sum};
  return dtype == DType::kBFloat16 ? launch<&add_planes_kernel<__nv_bfloat16>, 1024>(device, shape, both, stream)
                                   : launch<&add_planes_kernel<__half>, 1024>(device, shape, both, stream);
}

}  // namespace polylora::cuda
