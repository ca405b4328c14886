// embedding on the CPU: expand over the rows whose token A knows, with v looked up instead of multiplied.
#include <vector>

#include "convert.h"
#include "polylora/cpu.h"
#include "rows.h"

namespace polylora::cpu {
namespace {

int64_t token_of(const EmbeddingParams& params, int64_t row) {
  return params.ids_are_int64 ? static_cast<const int64_t*>(params.token_ids)[row]
                              : static_cast<const int32_t*>(params.token_ids)[row];
}

template <class T>
LoadV look_up_from(const EmbeddingParams& params) {
  return [&params](int64_t row, int32_t slice, float* v) {
    const LoraParams& lora = params.lora;
    const SliceEntry& entry = entry_of(lora.slices, lora.plan.row_group[row], slice);
    const T* a = static_cast<const T*>(lora.slices.a[slice]) + entry.a_row * lora.slices.a_stride[slice] +
                 token_of(params, row) * params.token_stride;
    for (int64_t j = 0; j < entry.rank; ++j) v[j] = to_float(a[j * params.rank_stride]);
  };
}

LoadV look_up(const EmbeddingParams& params) {
  switch (params.lora.dtype) {
    case DType::kBFloat16:
      return look_up_from<BFloat16>(params);
    case DType::kFloat16:
      return look_up_from<Float16>(params);
    case DType::kFloat32:
      break;
  }
  return look_up_from<float>(params);
}

}  // namespace

void embedding(const EmbeddingParams& params, const ParallelFor& parallel_for) {
  // a block with unknown tokens is copied without them; `known` owns those rows
  std::vector<std::vector<int32_t>> known;
  std::vector<RowBlock> blocks;
  for (const RowBlock& block : active_blocks(params.lora.plan)) {
    std::vector<int32_t> rows;
    for (int32_t r = 0; r < block.count; ++r) {
      const int64_t token = token_of(params, block.rows[r]);
      if (token >= 0 && token < params.vocab) rows.push_back(block.rows[r]);
    }
    if (rows.empty()) continue;
    blocks.push_back({block.group, rows.data(), static_cast<int32_t>(rows.size())});
    known.push_back(std::move(rows));  // the elements stay where blocks points
  }
  expand_blocks(params.lora, blocks, look_up(params), parallel_for);
}

}  // namespace polylora::cpu
