// What the kernels of moe_act are told.
#pragma once

#include "moe/activate.cuh"
#include "moe/paths.h"

namespace polylora::cuda {

struct ActTask {
  const int32_t* header;
  const int32_t* row_group;
  const void* y;      // of gate, or of up alone
  const void* delta;  // slice after slice
  void* h;
  int64_t y_stride, delta_stride, h_stride;
  int64_t up_col;  // from gate's output 0
  int32_t rows, groups, pairs;
  int32_t width;
  ActivationOf act;
  bool interleaved, is_short;
};

// ---- host

inline ActTask seam_task(const GateUpActParams& g) {
  const LoraParams& p = g.lora;
  const SliceSet& slices = p.slices;
  ActTask task{};
  task.header = p.plan.header;
  task.row_group = p.plan.row_group;
  task.y = static_cast<const uint16_t*>(p.y) + slices.col[0];
  task.delta = g.delta;
  task.h = g.h;
  task.y_stride = p.y_stride;
  task.delta_stride = g.delta_stride;
  task.h_stride = g.h_stride;
  task.up_col = slices.count == 2 ? slices.col[1] - slices.col[0] : 0;
  task.rows = p.plan.rows;
  task.groups = p.plan.groups;
  task.pairs = p.plan.pairs;
  task.width = slices.width[0];
  task.act = {g.act, g.alpha, g.limit};
  task.interleaved = slices.col_stride == 2;
  task.is_short = 2 * p.rows * task.width * slices.count <= kShortDeltas;
  return task;
}

}  // namespace polylora::cuda
