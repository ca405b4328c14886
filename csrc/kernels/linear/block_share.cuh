// What a block of a cluster takes of a wide item: of the passes over x, and of the outputs.
#pragma once

#include "linear/wide.cuh"

namespace polylora::cuda {

/// Passes over x of an item, one after the other, as one walk that the blocks of a cluster share evenly. So a block has
/// a part of K of one pass, or of neighbouring ones; a pass has neighbouring blocks, of which each writes a plane.
struct PassShares {
  int passes;  // one at least
  int chunks;  // of K, a pass
  int parts;

  /// The first of the blocks that have a part of pass `pass`, and past the last of them. Of few chunks, the part may be
  /// empty.
  __device__ __forceinline__ int first_part(int pass) const { return pass * parts / passes; }
  __device__ __forceinline__ int end_part(int pass) const { return ((pass + 1) * parts + passes - 1) / passes; }
  __device__ __forceinline__ int planes(int pass) const { return end_part(pass) - first_part(pass); }
  /// The most planes that a pass has.
  __device__ __forceinline__ int most_planes() const {
    const int over = parts % passes;
    if (over == 0) return parts / passes;
    return min(parts / passes + (passes % over == 0 ? 1 : 2), parts);
  }

  /// The first pass that block `part` has a part of.
  __device__ __forceinline__ int first_pass(int part) const { return passes * part / parts; }
};

/// In shared memory: found once an item, by a warp or two, since divisions and what follows from them would be a
/// thousand instructions for each warp, between shrink and expand, where everybody waits.
struct alignas(16) BlockShare {
  // chunks of K: of all passes as one walk; or of every pass
  int32_t begin, end;
  int32_t first_pass, last_pass;  // of the walk's
  int32_t first_plane;            // the block's plane of the first; of the others it is the first plane
  int32_t most_planes;            // of a pass
  // units of each slice's outputs; count 0: none
  int32_t first_unit[kMaxSlices], units[kMaxSlices];
  uint8_t planes[kMaxRankTiles];  // of a rank tile: the same for the ranks of a pass

  /// The part of K, by one warp: from `begin` to `end` of the walk over all passes, and the first and the last of
  /// these. `passes`: one where every pass is shared alike.
  __device__ __forceinline__ void set_k(const LinearTask& task, int passes, int part, int parts, int lane) {
    const PassShares shares{passes, chunks_of_k(task), parts};
    const int past = lane % 2;  // begin and end, first and last pass: a lane each, one division
    const int of_all = (lane < 2 ? passes * shares.chunks : passes) * (part + past) - (lane == 3 ? 1 : 0);
    const int share = of_all / parts;
    if (lane == 0) begin = share;
    if (lane == 1) end = share;
    if (lane == 2) first_pass = share;
    if (lane == 3) last_pass = share;
  }

  /// The planes, where passes of kTilesOfPass rank tiles are one walk, and the outputs; another warp.
  template <int kTilesOfPass>
  __device__ __forceinline__ void set_others(const LinearTask& task, const WideItem& item, int part, int parts,
                                             int lane) {
    if constexpr (kTilesOfPass > 0) {
      const PassShares shares{passes_of<kTilesOfPass>(item), chunks_of_k(task), parts};
      if (lane == 0) {
        first_plane = part - shares.first_part(shares.first_pass(part));
        most_planes = shares.most_planes();
      }
#pragma unroll 1
      for (int tile = lane; tile < item.rank_tiles; tile += 32) {
        planes[tile] = static_cast<uint8_t>(shares.planes(tile / kTilesOfPass));
      }
    }
    set_units(task, item, part, parts, lane);
  }

  template <int kTilesOfPass>
  __device__ __forceinline__ static int passes_of(const WideItem& item) {
    return (item.rank_tiles + kTilesOfPass - 1) / kTilesOfPass;
  }

  /// The chunks of pass `pass` of a walk over passes of `chunks`.
  __device__ __forceinline__ Part chunks_of(int pass, int chunks) const {
    return {min(max(begin - pass * chunks, 0), chunks), min(max(end - pass * chunks, 0), chunks)};
  }

 private:
  // A lane a slice; units of all slices, times the blocks, are far from 2^31. Where the group has all slices, and the
  // host gave each blocks of its own (share_by_slices), these share it; else all share all of them, in which beginning
  // another slice counts as kSliceUnits.
  __device__ __forceinline__ void set_units(const LinearTask& task, const WideItem& item, int part, int parts,
                                            int lane) {
    const bool real = lane < task.slices && item.rank[min(lane, kMaxSlices - 1)] > 0;
    const int s = min(lane, task.slices - 1);
    const int own_units = real ? (task.slice[s].width + kUnitN - 1) / kUnitN : 0;
    const int cost = real ? own_units + kSliceUnits : 0;
    int sum = cost;
#pragma unroll
    for (int step = 1; step < kMaxSlices; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += before;
    }
    const int all = __shfl_sync(0xffffffffu, sum, kMaxSlices - 1) - kSliceUnits;
    const int present = __popc(__ballot_sync(0xffffffffu, real));
    int first = 0, past = 0;
    if (present == task.slices && task.first_part[present] == parts) {
      const int index = part - task.first_part[s], own = task.first_part[s + 1] - task.first_part[s];
      if (index >= 0 && index < own) first = own_units * index / own, past = own_units * (index + 1) / own;
    } else {
      first = max(all * part / parts - (sum - cost), 0);
      past = min(all * (part + 1) / parts - (sum - cost), own_units);
    }
    if (lane < kMaxSlices) {
      first_unit[lane] = first;
      units[lane] = real ? max(past - first, 0) : 0;
    }
  }
};

}  // namespace polylora::cuda
