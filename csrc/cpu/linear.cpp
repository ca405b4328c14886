// shrink, expand and deltas on the CPU, dense and MoE: blocks of rows of one group, in parallel over (block, ranks) and
// (block, output columns). Parts never split a sum.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "polylora/cpu.h"
#include "rows.h"

namespace polylora::cpu {
namespace {

/// Ranks of one unit of shrink.
constexpr int32_t kUnitRanks = 16;

/// One piece of shrink: some ranks of one slice of a block.
struct ShrinkUnit {
  RowBlock block;
  int32_t slice;
  int32_t j;
  int32_t ranks;
};

std::vector<ShrinkUnit> shrink_units(const LoraParams& params, int64_t* operations) {
  std::vector<ShrinkUnit> units;
  for (const RowBlock& block : active_blocks(params.plan)) {
    for (int32_t slice = 0; slice < params.slices.count; ++slice) {
      const SliceEntry& entry = entry_of(params.slices, block.group, slice);
      if (!present(entry) || !owns_v(params.slices, block.group, slice)) continue;
      for (int32_t j = 0; j < entry.rank; j += kUnitRanks) {
        units.push_back({block, slice, j, std::min(kUnitRanks, entry.rank - j)});
      }
      *operations += block.count * entry.rank * params.k;
    }
  }
  return units;
}

/// A piece of a slice's outputs.
struct Columns {
  int32_t slice;
  int32_t n;
  int32_t count;
};

std::vector<Columns> column_units(const SliceSet& slices) {
  std::vector<Columns> units;
  for (int32_t slice = 0; slice < slices.count; ++slice) {
    for (int32_t n = 0; n < slices.width[slice]; n += kUnitCols) {
      units.push_back({slice, n, std::min(kUnitCols, slices.width[slice] - n)});
    }
  }
  return units;
}

int64_t expand_operations(const SliceSet& slices, const std::vector<RowBlock>& blocks) {
  int64_t operations = 0;
  for (const RowBlock& block : blocks) {
    for (int32_t slice = 0; slice < slices.count; ++slice) {
      const int64_t rank = std::max(entry_of(slices, block.group, slice).rank, 0);
      operations += block.count * rank * slices.width[slice];
    }
  }
  return operations;
}

/// y[row, ...] += acc of `cols` outputs from output `n` of the slice.
void add_to_row(const LoraParams& params, const Kernels& kernel, int64_t row, int32_t slice, int32_t n, int32_t cols,
                const float* acc) {
  const int64_t stride = params.slices.col_stride;
  const int64_t at = row * params.y_stride + params.slices.col[slice] + n * stride;
  void* y = element_at(params.y, at, kernel.element_size);
  if (stride == 1) {
    kernel.add_to(y, acc, cols);
    return;
  }
  float part[kProductCols];  // room for any element type
  gather(part, y, stride, cols, kernel.element_size);
  kernel.add_to(part, acc, cols);
  scatter(y, stride, part, cols, kernel.element_size);
}

/// Whether any of the deltas is not -0, which leaves even the bits of a NaN.
bool adds_something(const float* delta, int32_t cols) {
  return std::any_of(delta, delta + cols, [](float value) { return value != 0.0f || !std::signbit(value); });
}

}  // namespace

void shrink(const LoraParams& params, const ParallelFor& parallel_for) {
  const Kernels& kernel = kernels(params.dtype);
  int64_t operations = 0;
  const std::vector<ShrinkUnit> units = shrink_units(params, &operations);
  if (units.empty()) return;
  const auto body = [&](int64_t begin, int64_t end) {
    const void* x[kBlockRows];
    float* v[kBlockRows];
    for (int64_t at = begin; at < end; ++at) {
      const ShrinkUnit& unit = units[static_cast<size_t>(at)];
      const SliceEntry& entry = entry_of(params.slices, unit.block.group, unit.slice);
      for (int32_t r = 0; r < unit.block.count; ++r) {
        const int64_t row = unit.block.rows[r];
        x[r] = element_at(params.x, x_row_of(params, row) * params.x_stride, kernel.element_size);
        v[r] = params.v + row * params.v_stride + entry.v_col + unit.j;
      }
      const int64_t a_stride = params.slices.a_stride[unit.slice];
      const int64_t a_row = static_cast<int64_t>(entry.a_row) + unit.j;
      const void* a = element_at(params.slices.a[unit.slice], a_row * a_stride, kernel.element_size);
      kernel.dot(x, unit.block.count, a, a_stride, unit.ranks, params.k, v);
    }
  };
  const int64_t count = static_cast<int64_t>(units.size());
  parallel_for(count, grain_for(count, operations), body);
}

void expand_blocks(const LoraParams& params, const std::vector<RowBlock>& blocks, const LoadV& load_v,
                   const ParallelFor& parallel_for) {
  const Kernels& kernel = kernels(params.dtype);
  const std::vector<Columns> columns = column_units(params.slices);
  const int64_t units = static_cast<int64_t>(blocks.size() * columns.size());
  if (units == 0) return;
  const auto body = [&](int64_t begin, int64_t end) {
    BlockProduct product(params, load_v);
    const int64_t pieces = static_cast<int64_t>(columns.size());
    int64_t last_block = -1;
    int32_t last_slice = -1;
    bool adds = false;
    for (int64_t at = begin; at < end; ++at) {
      const RowBlock& block = blocks[static_cast<size_t>(at / pieces)];
      const Columns& piece = columns[static_cast<size_t>(at % pieces)];
      if (at / pieces != last_block || piece.slice != last_slice) {
        adds = product.start(block, piece.slice);
        last_block = at / pieces;
        last_slice = piece.slice;
      }
      if (!adds) continue;
      for (int32_t n = piece.n; n < piece.n + piece.count; n += kProductCols) {
        const int32_t cols = std::min(kProductCols, piece.n + piece.count - n);
        const float* acc = product.columns(n, cols);
        for (int32_t r = 0; r < block.count; ++r) {
          add_to_row(params, kernel, block.rows[r], piece.slice, n, cols, acc + r * kProductCols);
        }
      }
    }
  };
  parallel_for(units, grain_for(units, expand_operations(params.slices, blocks)), body);
}

void expand(const LoraParams& params, const ParallelFor& parallel_for) {
  expand_blocks(params, active_blocks(params.plan), load_from(params), parallel_for);
}

void delta(const LoraParams& params, float absent, const ParallelFor& parallel_for) {
  const Kernels& kernel = kernels(params.dtype);
  const int64_t width = sum_of_widths(params.slices);
  float nothing[kProductCols];
  std::fill(std::begin(nothing), std::end(nothing), absent);
  for (const RowBlock& block : active_blocks(params.plan)) {
    for (int32_t r = 0; r < block.count; ++r) {
      for (int64_t n = 0; n < width; n += kProductCols) {
        const int64_t at = block.rows[r] * params.y_stride + n;
        const int32_t cols = static_cast<int32_t>(std::min<int64_t>(kProductCols, width - n));
        kernel.store(element_at(params.y, at, kernel.element_size), nothing, cols);
      }
    }
  }
  expand(params, parallel_for);
}

void add_delta(const AddDeltaParams& params, const ParallelFor& parallel_for) {
  const LoraParams& lora = params.lora;
  const Kernels& kernel = kernels(lora.dtype);
  const std::vector<Columns> columns = column_units(lora.slices);
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (lora.plan.row_group[row] < 0) continue;
      int64_t at = row * params.delta_stride;
      for (const Columns& piece : columns) {
        for (int32_t n = piece.n; n < piece.n + piece.count; n += kProductCols) {
          const int32_t cols = std::min(kProductCols, piece.n + piece.count - n);
          float delta[kProductCols];
          std::fill_n(delta, cols, -0.0f);
          kernel.accumulate(delta, element_at(params.delta, at, kernel.element_size), 1.0f, nullptr, cols);
          at += cols;
          if (adds_something(delta, cols)) add_to_row(lora, kernel, row, piece.slice, n, cols, delta);
        }
      }
    }
  };
  constexpr int64_t kOperationsPerOutput = 4;
  parallel_for(lora.rows, grain_for(lora.rows, lora.rows * sum_of_widths(lora.slices) * kOperationsPerOutput), body);
}

}  // namespace polylora::cpu
