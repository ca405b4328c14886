// The fused seams of a mixture of experts on the CPU: gate_up_act (delta, then the activation) and down_reduce (delta,
// then the weighted sum over a token's experts). And the same taken apart: moe_act, moe_reduce.
#include <algorithm>
#include <vector>

#include "polylora/cpu.h"
#include "rows.h"

namespace polylora::cpu {
namespace {

/// `cols` outputs of y from output `n` of a slice, contiguous: in place, or copied to `part`.
const void* row_part(const LoraParams& params, int32_t element_size, int64_t row, int32_t slice, int32_t n,
                     int32_t cols, void* part) {
  const int64_t stride = params.slices.col_stride;
  const int64_t at = row * params.y_stride + params.slices.col[slice] + n * stride;
  const void* y = element_at(static_cast<const void*>(params.y), at, element_size);
  if (stride == 1) return y;
  gather(part, y, stride, cols, element_size);
  return part;
}

/// The plan's blocks, then the rows without an adapter.
std::vector<RowBlock> all_blocks(const PlanView& plan, const std::vector<int32_t>& base) {
  std::vector<RowBlock> blocks = active_blocks(plan);
  for (size_t at = 0; at < base.size(); at += kBlockRows) {
    const int32_t count = static_cast<int32_t>(std::min<size_t>(kBlockRows, base.size() - at));
    blocks.push_back({kNoAdapter, base.data() + at, count});
  }
  return blocks;
}

/// Tokens whose pairs are reduced together: their rows sorted by group, so that each group's B is converted once.
struct TokenBlock {
  int64_t token;
  int64_t tokens;
  std::vector<int32_t> rows;      // active rows by group
  std::vector<RowBlock> blocks;   // of `rows`, one a group
  std::vector<int32_t> pair_row;  // [tokens * top_k] row of y of a pair, -1 where it has none
  std::vector<int32_t> pair_at;   // [tokens * top_k] index into `rows`, -1 without an adapter
};

/// Pairs of one block of tokens: their fp32 deltas of kProductCols columns stay in the second-level cache.
constexpr int64_t kBlockPairs = 512;

int32_t row_of_pair(const DownReduceParams& params, int64_t pair) {
  const PlanView& plan = params.lora.plan;
  const int32_t row = plan.pair_pos != nullptr ? plan.pair_pos[pair] : static_cast<int32_t>(pair);
  return row < 0 || plan.row_group[row] == kNoRow ? -1 : row;
}

TokenBlock token_block(const DownReduceParams& params, int64_t token, int64_t tokens) {
  TokenBlock block{token, tokens, {}, {}, {}, {}};
  const int32_t* row_group = params.lora.plan.row_group;
  const int64_t pairs = tokens * params.top_k;
  std::vector<int32_t> active;  // pairs with an adapter, to be sorted by group
  for (int64_t at = 0; at < pairs; ++at) {
    const int32_t row = row_of_pair(params, token * params.top_k + at);
    block.pair_row.push_back(row);
    if (row >= 0 && row_group[row] >= 0) active.push_back(static_cast<int32_t>(at));
  }
  const auto group_of = [&](int32_t at) { return row_group[block.pair_row[static_cast<size_t>(at)]]; };
  std::stable_sort(active.begin(), active.end(),
                   [&](int32_t left, int32_t right) { return group_of(left) < group_of(right); });
  block.pair_at.assign(static_cast<size_t>(pairs), -1);
  for (int32_t at : active) {
    block.pair_at[static_cast<size_t>(at)] = static_cast<int32_t>(block.rows.size());
    block.rows.push_back(block.pair_row[static_cast<size_t>(at)]);
  }
  for (size_t at = 0; at < block.rows.size();) {
    const int32_t group = row_group[block.rows[at]];
    size_t end = at;
    while (end < block.rows.size() && row_group[block.rows[end]] == group) ++end;
    block.blocks.push_back({group, block.rows.data() + at, static_cast<int32_t>(end - at)});
    at = end;
  }
  return block;
}

std::vector<TokenBlock> token_blocks(const DownReduceParams& params) {
  std::vector<TokenBlock> blocks;
  const int64_t step = std::max<int64_t>(1, kBlockPairs / std::max(params.top_k, 1));
  for (int64_t token = 0; token < params.tokens; token += step) {
    blocks.push_back(token_block(params, token, std::min(step, params.tokens - token)));
  }
  return blocks;
}

/// Deltas of a block's active rows, weighted; row i of the block's `rows` at delta + i * kProductCols.
class BlockDelta {
 public:
  BlockDelta(const LoraParams& params, const LoadV& load_v, const TokenBlock& block) : block_(block) {
    for (const RowBlock& rows : block.blocks) {
      products_.emplace_back(params, load_v);
      adds_.push_back(products_.back().start(rows, 0));
    }
    delta_.resize(block.rows.size() * kProductCols);
  }

  void columns(int32_t n, int32_t cols) {
    for (size_t i = 0; i < products_.size(); ++i) {
      const int64_t at = block_.blocks[i].rows - block_.rows.data();
      if (adds_[i]) products_[i].columns(n, cols, delta_.data() + at * kProductCols);
    }
  }

  /// Delta of the block's pair `at`, null where it has none.
  const float* of_pair(int64_t at, const LoraParams& params) const {
    const int32_t index = block_.pair_at[static_cast<size_t>(at)];
    if (index < 0) return nullptr;
    const int32_t group = params.plan.row_group[block_.rows[static_cast<size_t>(index)]];
    if (!present(entry_of(params.slices, group, 0))) return nullptr;
    return delta_.data() + static_cast<int64_t>(index) * kProductCols;
  }

 private:
  const TokenBlock& block_;
  std::vector<BlockProduct> products_;
  std::vector<char> adds_;
  std::vector<float> delta_;
};

/// Outputs [n, n + cols) of a token. Its pairs come in their order: row_of(pair), -1 where it has none, and
/// add(sum, pair, row, y2, weight of y2).
template <class RowOf, class Add>
void reduce_token(const DownReduceParams& params, const Kernels& kernel, int64_t token, int32_t n, int32_t cols,
                  const RowOf& row_of, const Add& add) {
  float sum[kProductCols] = {};
  float part[kProductCols];
  for (int64_t j = 0; j < params.top_k; ++j) {
    const int64_t pair = token * params.top_k + j;
    const int32_t row = row_of(pair);
    if (row < 0) continue;
    const float weight = params.y_weighted ? 1.0f : params.lora.row_weight[pair];
    add(sum, pair, row, row_part(params.lora, kernel.element_size, row, 0, n, cols, part), weight);
  }
  kernel.store(element_at(params.out, token * params.out_stride + n, kernel.element_size), sum, cols);
}

void reduce_columns(const DownReduceParams& params, const Kernels& kernel, const TokenBlock& block,
                    const BlockDelta& delta, int32_t n, int32_t cols) {
  const int64_t first = block.token * params.top_k;  // pair of the block
  const auto row_of = [&](int64_t pair) { return block.pair_row[static_cast<size_t>(pair - first)]; };
  const auto add = [&](float* sum, int64_t pair, int32_t, const void* y2, float weight) {
    kernel.accumulate(sum, y2, weight, delta.of_pair(pair - first, params.lora), cols);
  };
  for (int64_t token = block.token; token < block.token + block.tokens; ++token) {
    reduce_token(params, kernel, token, n, cols, row_of, add);
  }
}

}  // namespace

void gate_up_act(const GateUpActParams& params, const ParallelFor& parallel_for) {
  const LoraParams& lora = params.lora;
  const Kernels& kernel = kernels(lora.dtype);
  const LoadV load_v = load_from(lora);
  const std::vector<int32_t> base = base_rows(lora.plan, lora.rows);
  const std::vector<RowBlock> blocks = all_blocks(lora.plan, base);
  const int32_t width = lora.slices.width[0];
  const bool gated = lora.slices.count == 2;
  const int64_t pieces = (width + kUnitCols - 1) / kUnitCols;
  const int64_t units = static_cast<int64_t>(blocks.size()) * pieces;
  if (units == 0) return;
  const auto body = [&](int64_t begin, int64_t end) {
    BlockProduct gate(lora, load_v);
    BlockProduct up(lora, load_v);
    bool gate_adds = false, up_adds = false;
    int64_t last_block = -1;
    float gate_part[kProductCols];  // room for any element type
    float up_part[kProductCols];
    for (int64_t at = begin; at < end; ++at) {
      const RowBlock& block = blocks[static_cast<size_t>(at / pieces)];
      if (at / pieces != last_block) {
        gate_adds = block.group >= 0 && gate.start(block, 0);
        up_adds = gated && block.group >= 0 && up.start(block, 1);
        last_block = at / pieces;
      }
      const int32_t first = static_cast<int32_t>(at % pieces) * kUnitCols;
      const int32_t last = std::min(first + kUnitCols, width);
      for (int32_t n = first; n < last; n += kProductCols) {
        const int32_t cols = std::min(kProductCols, last - n);
        const float* gate_acc = gate_adds ? gate.columns(n, cols) : nullptr;
        const float* up_acc = up_adds ? up.columns(n, cols) : nullptr;
        for (int32_t r = 0; r < block.count; ++r) {
          const int64_t row = block.rows[r];
          const void* g = row_part(lora, kernel.element_size, row, 0, n, cols, gate_part);
          const void* u = gated ? row_part(lora, kernel.element_size, row, 1, n, cols, up_part) : nullptr;
          kernel.activate(element_at(params.h, row * params.h_stride + n, kernel.element_size), g,
                          gate_acc != nullptr ? gate_acc + r * kProductCols : nullptr, u,
                          up_acc != nullptr ? up_acc + r * kProductCols : nullptr, cols, params.act, params.alpha,
                          params.limit);
        }
      }
    }
  };
  constexpr int64_t kOperationsPerOutput = 64;  // the activation and, about, the product
  parallel_for(units, grain_for(units, lora.rows * width * kOperationsPerOutput), body);
}

void down_reduce(const DownReduceParams& params, const ParallelFor& parallel_for) {
  const Kernels& kernel = kernels(params.lora.dtype);
  const LoadV load_v = load_from(params.lora);
  const std::vector<TokenBlock> blocks = token_blocks(params);
  const int32_t width = params.lora.slices.width[0];
  const int64_t pieces = (width + kUnitCols - 1) / kUnitCols;
  const int64_t units = static_cast<int64_t>(blocks.size()) * pieces;
  if (units == 0) return;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const TokenBlock& block = blocks[static_cast<size_t>(at / pieces)];
      BlockDelta delta(params.lora, load_v, block);
      // All pieces of the block that fall into this part.
      const int64_t block_end = std::min(end, (at / pieces + 1) * pieces);
      const int32_t first = static_cast<int32_t>(at % pieces) * kUnitCols;
      const int32_t last = static_cast<int32_t>(std::min<int64_t>(first + (block_end - at) * kUnitCols, width));
      for (int32_t n = first; n < last; n += kProductCols) {
        const int32_t cols = std::min(kProductCols, last - n);
        delta.columns(n, cols);
        reduce_columns(params, kernel, block, delta, n, cols);
      }
      at = block_end;
    }
  };
  constexpr int64_t kOperationsPerOutput = 64;
  parallel_for(units, grain_for(units, params.tokens * params.top_k * width * kOperationsPerOutput), body);
}

void moe_act(const GateUpActParams& params, const ParallelFor& parallel_for) {
  const LoraParams& lora = params.lora;
  const Kernels& kernel = kernels(lora.dtype);
  const int32_t width = lora.slices.width[0];
  const int32_t slices = lora.slices.count;
  const auto body = [&](int64_t begin, int64_t end) {
    float y_part[2][kProductCols];  // room for any element type
    for (int64_t row = begin; row < end; ++row) {
      const int32_t group = lora.plan.row_group[row];
      if (group == kNoRow) continue;
      for (int32_t n = 0; n < width; n += kProductCols) {
        const int32_t cols = std::min(kProductCols, width - n);
        const void* y[2] = {};
        float delta[2][kProductCols] = {};
        for (int32_t s = 0; s < slices; ++s) {
          y[s] = row_part(lora, kernel.element_size, row, s, n, cols, y_part[s]);
          const int64_t at = row * params.delta_stride + int64_t{s} * width + n;
          if (group >= 0) {
            kernel.accumulate(delta[s], element_at(params.delta, at, kernel.element_size), 1.0f, nullptr, cols);
          }
        }
        kernel.activate(element_at(params.h, row * params.h_stride + n, kernel.element_size), y[0],
                        group >= 0 ? delta[0] : nullptr, y[1], group >= 0 && slices > 1 ? delta[1] : nullptr, cols,
                        params.act, params.alpha, params.limit);
      }
    }
  };
  constexpr int64_t kOperationsPerOutput = 32;
  parallel_for(lora.rows, grain_for(lora.rows, lora.rows * width * kOperationsPerOutput), body);
}

void moe_reduce(const DownReduceParams& params, const ParallelFor& parallel_for) {
  const LoraParams& lora = params.lora;
  const Kernels& kernel = kernels(lora.dtype);
  const int32_t width = lora.slices.width[0];
  const auto row_of = [&](int64_t pair) { return row_of_pair(params, pair); };
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int32_t n = 0; n < width; n += kProductCols) {
        const int32_t cols = std::min(kProductCols, width - n);
        reduce_token(params, kernel, token, n, cols, row_of,
                     [&](float* sum, int64_t, int32_t row, const void* y2, float weight) {
                       kernel.accumulate(sum, y2, weight, nullptr, cols);
                       if (lora.plan.row_group[row] < 0) return;
                       const int64_t at = row * params.delta_stride + n;
                       const void* delta = element_at(params.delta, at, kernel.element_size);
                       kernel.accumulate(sum, delta, 1.0f, nullptr, cols);
                     });
      }
    }
  };
  constexpr int64_t kOperationsPerOutput = 4;
  const int64_t operations = params.tokens * params.top_k * width * kOperationsPerOutput;
  parallel_for(params.tokens, grain_for(params.tokens, operations), body);
}

}  // namespace polylora::cpu
