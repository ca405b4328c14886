// linear, shrink, expand and embedding: the fastest path that serves the call.
//
//   cluster  decode in one launch, 16-bit, aligned, 9.0 and later: linear_cluster.cu
//   wide     prefill in one launch, 16-bit, aligned, 9.0: linear_wide.cu, embedding_wide.cu
//   mma      as a device of 8.0 runs it, decode: shrink_narrow.cu, expand_narrow.cu; prefill: shrink_wide.cu,
//            add_planes.cu, expand_wide.cu
//   general  everything: *_general.cu
//
// shrink on its own and embedding know wide, mma and general; expand mma and general, and so do deltas of decode and
// what adds them (add_delta.cu).
//
// POLYLORA_PATH forces one (common/choose.h); POLYLORA_BATCH_INVARIANT=1 takes one whose order of sums is the same for
// all batch sizes. Both are read at every call. Halves of MoE: moe/moe.cu.
#include "common/choose.h"
#include "linear/narrow.cuh"
#include "linear/paths.h"
#include "linear/wide.cuh"
#include "moe/paths.h"
#include "polylora/cuda.h"

namespace polylora::cuda {
namespace {

// Decode with as many bytes of weights as this is a stream, which two launches of independent blocks bring faster than
// clusters, whose blocks wait for each other. H100, 32 adapters of rank 64, 64 rows, cluster and mma in us: 75 MB of
// qkv 32.1 and 32.9, 75 MB of down 35.4 and 32.6, 84 MB of qkvz 39.8 and 35.5; 38 MB (16 rows) of qkv 18.7 and
// 19.0, of down 19.7 and 19.2, 42 MB of qkvz 21.1 and 20.4.
constexpr int64_t kHeavyBytes = int64_t{32} << 20;

// Where most runs have more than 8 rows, clusters read each weight twice, and wait for each other; the two launches
// take a tile of 16 at once. H200, r16, 16 rows an adapter, behind a GEMM of the base, cluster and mma, us: 64 rows of
// qkv 8.1 and 6.9, o 6.5 and 6.6, gate_up 16.5 and 9.0, down 7.0 and 7.5; 96 rows 8.4 and 7.6, 6.5 and 6.4, 11.4
// and 12.1, 7.9 and 8.1; 128 rows 9.2 and 8.0, 8.4 and 7.1, 20.1 and 13.4, 13.2 and 8.8. 9 rows an adapter, 72 rows:
// qkv 8.8 and 7.4, gate_up 16.9 and 10.6, down 11.7 and 7.6. With 8 rows an adapter clusters are as good or better.
// Fewer rows than 64: 48 rows of 4 adapters 7.8 and 6.3, 14.3 and 7.7, 6.8 and 7.2, 24 of 2 6.0 and 6.0, 12.7 and 6.8,
// 6.0 and 7.0, 12 of one 5.7 and 6.0, 7.1 and 6.4, 5.2 and 6.9: much is won where outputs are as many as gate_up's.
constexpr int64_t kFullTilesRows = 64;
constexpr int64_t kFullTilesRowsOfManyOutputs = 24;
constexpr int64_t kManyOutputs = 16384;

// Adapters from which on short runs of a longer batch are worth launches of their own.
constexpr int64_t kManyAdapters = 16;

// Whether the short runs of a call go to decode's kernels, and the others by `path`.
bool splits_runs(const LoraParams& params, Path path) {
  return (path == Path::kMma || path == Path::kWide) && params.slices.groups >= kManyAdapters &&
         narrow_shrink_serves(params) && !is_forced("wide") && !batch_invariant() && !is_few(params);
}

cudaError_t choose_linear(const LoraParams& params, Path& path) {
  const bool cluster = is_few(params) && cluster_path_serves(params);
  const bool wide = wide_shrink_serves(params) && wide_expand_serves(params);
  const bool many_outputs = sum_of_widths(params.slices) >= kManyOutputs;
  const bool full_tiles = params.plan.runs == Runs::kAll &&
                          params.rows >= (many_outputs ? kFullTilesRowsOfManyOutputs : kFullTilesRows) &&
                          params.rows > params.slices.groups * int64_t{kTileRows / 2};
  const bool heavy =
      cluster && narrow_shrink_serves(params) && (decode_weight_bytes(params) >= kHeavyBytes || full_tiles);
  return choose({{cluster, wide, wide, true}}, {{true, true, true, true}}, path, heavy ? Path::kMma : Path::kCluster);
}

// Deltas alone: kMma, decode's two launches, or what linear takes, added to -0. Beside a GEMM clusters, whose blocks
// have to stand at once, come after it.
cudaError_t choose_delta(const LoraParams& params, Path& path) {
  path = Path::kGeneral;
  if (!is_few(params) || !narrow_shrink_serves(params) || !wide_expand_serves(params)) return cudaSuccess;
  return choose({{false, false, true, true}}, {{false, false, true, true}}, path);
}

cudaError_t choose_shrink(const LoraParams& params, Path& path) {
  const bool wide = wide_shrink_serves(params);
  return choose({{false, wide, wide, true}}, {{false, true, true, true}}, path);
}

// Whether A is looked up once for each block that shares a job, in one launch, rather than once a row: jobs of 8 or 16
// rows, or clusters (9.0), or two launches. H200, 4 adapters, jobs and clusters, us: 4096 outputs r16, 512 rows 4.6 and
// 7.7, 1024 6.6 and 10.5, 2048 11.0 and 12.9 (of 32 adapters 11.7 and 19.4), 4096 26.6 and 27.6, 8192 49.4 and 49.1;
// r64 8.2 and 10.3, 13.2 and 15.1, 21.3 and 20.0 (26.4 and 28.9), 57.8 and 39.0. 2048 outputs r16, 512 rows 4.2 and
// 6.7, 2048 6.7 and 9.8, 4096 11.6 and 14.4; r64 6.1 and 8.5, 13.8 and 15.4, 27.2 and 26.5.
bool is_short_lookup(const EmbeddingParams& params) {
  constexpr int64_t kLookupRows = 2048;
  constexpr int64_t kLookupRanks = 4096 * 16;  // of all rows
  const int64_t rows = params.lora.rows;
  return (rows <= kLookupRows || rows * embedding_rank(params) <= kLookupRanks) && !batch_invariant();
}

cudaError_t choose_embedding(const EmbeddingParams& params, Path& path) {
  const bool wide = wide_embedding_serves(params);
  return choose({{false, wide, wide, true}}, {{false, true, true, true}}, path,
                is_short_lookup(params) ? Path::kMma : Path::kWide);
}

// How the mma path shares K.
struct MmaSplit {
  bool narrow;
  int parts;
};
cudaError_t mma_split(const LoraParams& params, MmaSplit& split) {
  split.narrow = is_few(params) && narrow_shrink_serves(params);
  return split.narrow ? narrow_parts(params, false, split.parts) : mma_parts(params, split.parts);
}

cudaError_t scratch_of(const LoraParams& params, Path path, int64_t& bytes) {
  bytes = 0;
  if (path == Path::kCluster) return cudaSuccess;
  if (path == Path::kWide) return wide_scratch(params, bytes);
  if (path == Path::kGeneral) {
    bytes = v_bytes(params);
    return cudaSuccess;
  }
  MmaSplit split{};
  const cudaError_t error = mma_split(params, split);
  bytes = split.narrow ? narrow_plane_bytes(params, split.parts) : plane_bytes(params, split.parts, params.rows);
  return error;
}

cudaError_t launch_linear(const LoraParams& params, Path path, cudaStream_t stream) {
  if (path == Path::kCluster) return linear_cluster_path(params, stream);
  if (path == Path::kWide) return linear_wide_path(params, stream);
  if (path == Path::kMma) {
    MmaSplit split{};
    cudaError_t error = mma_split(params, split);
    if (error != cudaSuccess) return error;
    if (!split.narrow) return linear_mma_path(params, split.parts, kPartsToAdd, [] {}, stream);
    error = shrink_narrow_path(params, split.parts, stream);
    return error == cudaSuccess ? expand_narrow_path(params, split.parts, stream) : error;
  }
  return linear_general_path(params, stream);
}

// A call in two parts, which may run side by side: its short runs by decode's path, and the others.
struct TwoParts {
  LoraParams short_part, long_part;
  Path short_path;
  int64_t short_bytes;  // of scratch; the other part's comes behind
};
cudaError_t split_call(const LoraParams& params, TwoParts& parts) {
  parts.short_part = parts.long_part = params;
  parts.short_part.plan = short_runs(params.plan);
  parts.long_part.plan = long_runs(params.plan);
  cudaError_t error = choose_linear(parts.short_part, parts.short_path);
  if (error == cudaSuccess) error = scratch_of(parts.short_part, parts.short_path, parts.short_bytes);
  parts.short_bytes = divide_up(parts.short_bytes, 16) * 16;
  return error;
}

}  // namespace

cudaError_t linear_general_path(const LoraParams& params, cudaStream_t stream) {
  const LoraParams with_v = with_v_in_scratch(params);
  const cudaError_t error = shrink_general_path(with_v, stream);
  return error == cudaSuccess ? expand_general_path(with_v, stream) : error;
}

bool batch_invariant() { return is_set(getenv("POLYLORA_BATCH_INVARIANT"), "1"); }

cudaError_t linear_scratch(const LoraParams& params, int64_t& bytes) {
  bytes = 0;
  if (adds_nothing(params)) return cudaSuccess;
  if (is_moe(params)) return moe_scratch(params, bytes);
  Path path;
  cudaError_t error = choose_linear(params, path);
  if (error != cudaSuccess) return error;
  if (!splits_runs(params, path)) return scratch_of(params, path, bytes);
  TwoParts parts{};
  error = split_call(params, parts);
  if (error == cudaSuccess) error = scratch_of(parts.long_part, path, bytes);
  bytes += parts.short_bytes;
  return error;
}

cudaError_t linear(const LoraParams& params, cudaStream_t stream) {
  if (adds_nothing(params)) return cudaSuccess;
  if (is_moe(params)) return moe_linear(params, stream);
  Path path;
  cudaError_t error = choose_linear(params, path);
  if (error != cudaSuccess) return error;
  if (!splits_runs(params, path)) return launch_linear(params, path, stream);
  TwoParts parts{};
  error = split_call(params, parts);
  if (parts.short_bytes > 0) parts.long_part.scratch = static_cast<char*>(params.scratch) + parts.short_bytes;
  if (error == cudaSuccess) error = launch_linear(parts.short_part, parts.short_path, stream);
  return error == cudaSuccess ? launch_linear(parts.long_part, path, stream) : error;
}

cudaError_t linear_delta_scratch(const LoraParams& params, int64_t& bytes) {
  bytes = 0;
  if (adds_nothing(params)) return cudaSuccess;
  Path path;
  cudaError_t error = choose_delta(params, path);
  if (error != cudaSuccess) return error;
  if (path != Path::kMma) return linear_scratch(params, bytes);
  int parts = 0;
  error = narrow_parts(params, true, parts);
  bytes = narrow_plane_bytes(params, parts);
  return error;
}

cudaError_t linear_delta(const LoraParams& params, cudaStream_t stream) {
  if (adds_nothing(params)) return cudaSuccess;
  Path path;
  cudaError_t error = choose_delta(params, path);
  if (error != cudaSuccess) return error;
  if (path != Path::kMma) {
    error = clear_deltas_path(params, stream);
    return error == cudaSuccess ? linear(params, stream) : error;
  }
  int parts = 0;
  error = narrow_parts(params, true, parts);
  if (error == cudaSuccess) error = shrink_narrow_path(params, parts, stream);
  return error == cudaSuccess ? expand_deltas_narrow_path(params, parts, stream) : error;
}

cudaError_t add_delta(const AddDeltaParams& params, cudaStream_t stream) {
  if (adds_nothing(params.lora)) return cudaSuccess;
  Path path;
  const cudaError_t error =
      choose({{false, false, add_delta_serves(params), true}}, {{false, false, true, true}}, path);
  if (error != cudaSuccess) return error;
  return (path == Path::kMma ? add_delta_path : add_delta_general_path)(params, stream);
}

cudaError_t shrink_scratch(const LoraParams& params, int64_t& bytes) {
  bytes = 0;
  if (adds_nothing(params)) return cudaSuccess;
  Path path;
  cudaError_t error = choose_shrink(params, path);
  if (error != cudaSuccess || path == Path::kGeneral) return error;
  if (path == Path::kWide) return wide_scratch(params, bytes);
  int parts = 0;
  error = mma_parts(params, parts);
  if (parts > 1) bytes = plane_bytes(params, parts, params.rows);
  return error;
}

cudaError_t shrink(const LoraParams& params, cudaStream_t stream) {
  if (adds_nothing(params)) return cudaSuccess;
  Path path;
  cudaError_t error = choose_shrink(params, path);
  if (error != cudaSuccess) return error;
  if (path == Path::kWide) return linear_wide_path(params, stream);
  if (path == Path::kGeneral) return shrink_general_path(params, stream);
  int parts = 0;
  error = mma_parts(params, parts);
  if (error == cudaSuccess) error = shrink_mma_path(params, parts > 1 ? parts : 0, stream);
  return error == cudaSuccess && parts > 1 ? add_planes_to_v_path(params, parts, stream) : error;
}

cudaError_t expand(const LoraParams& params, cudaStream_t stream) {
  if (adds_nothing(params)) return cudaSuccess;
  Path path;
  const cudaError_t error =
      choose({{false, false, wide_expand_serves(params), true}}, {{false, false, true, true}}, path);
  if (error != cudaSuccess) return error;
  if (path == Path::kGeneral) return expand_general_path(params, stream);
  return (is_few(params) ? expand_narrow_path : expand_wide_path)(params, 0, stream);
}

cudaError_t embedding_scratch(const EmbeddingParams& params, int64_t& bytes) {
  bytes = 0;
  if (adds_nothing(params.lora)) return cudaSuccess;
  Path path;
  const cudaError_t error = choose_embedding(params, path);
  if (error == cudaSuccess && path == Path::kMma && !is_short_lookup(params)) mma_embedding_scratch(params, bytes);
  return error;
}

cudaError_t embedding(const EmbeddingParams& params, cudaStream_t stream) {
  if (adds_nothing(params.lora)) return cudaSuccess;
  Path path;
  const cudaError_t error = choose_embedding(params, path);
  if (error != cudaSuccess) return error;
  if (path == Path::kGeneral) return embedding_general_path(params, stream);
  if (path == Path::kWide) return embedding_wide_path(params, stream);
  return (is_short_lookup(params) ? embedding_narrow_path : embedding_mma_path)(params, stream);
}

}  // namespace polylora::cuda
