// The public ops. Everything is in place and says so; sizes that may come from a shape are SymInt.
// Docstrings and fakes: python/polylora/ops.py. Argument rules: docs/ops.md.
//
// polylora_meta has the same ops for tensors without data, which do nothing but check: the fakes call them.
#include <torch/csrc/stable/library.h>

namespace {

constexpr const char* kSchemas[] = {
    "plan(Tensor(a!) plan, Tensor group_ids, SymInt num_groups) -> ()",
    "moe_plan(Tensor(a!) plan, Tensor topk_ids, Tensor token_slots, SymInt num_slots, SymInt num_experts, "
    "Tensor? expert_map=None, Tensor? row_map=None) -> ()",
    "shrink(Tensor(a!) v, Tensor x, Tensor[] a, Tensor table, Tensor plan) -> ()",
    "expand_(Tensor(a!) y, Tensor v, Tensor[] b, Tensor table, Tensor plan, SymInt[] widths, SymInt[] cols) -> ()",
    "linear_(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, Tensor table, Tensor plan, SymInt[] widths, "
    "SymInt[] cols, SymInt v_width) -> ()",
    "linear_delta(Tensor(a!) delta, Tensor x, Tensor[] a, Tensor[] b, Tensor table, Tensor plan, SymInt[] widths, "
    "SymInt v_width) -> ()",
    "add_delta_(Tensor(a!) y, Tensor delta, Tensor table, Tensor plan, SymInt[] widths, SymInt[] cols) -> ()",
    "embedding_(Tensor(a!) y, Tensor token_ids, Tensor[] a, Tensor[] b, Tensor table, Tensor plan, "
    "SymInt[] widths, SymInt[] cols, SymInt vocab, bool token_major=False) -> ()",
    "moe_gate_up_(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, Tensor table, Tensor plan, SymInt[] widths, "
    "SymInt[] cols, SymInt v_width, SymInt top_k, SymInt col_stride=1, Tensor? row_map=None) -> ()",
    "moe_down_(Tensor(a!) y, Tensor h, Tensor[] a, Tensor[] b, Tensor table, Tensor plan, Tensor topk_weights, "
    "SymInt[] widths, SymInt[] cols, SymInt v_width, Tensor? row_map=None) -> ()",
    "moe_gate_up_act(Tensor(a!) h, Tensor y1, Tensor x, Tensor[] a, Tensor[] b, Tensor table, Tensor plan, "
    "SymInt[] widths, SymInt[] cols, SymInt v_width, SymInt top_k, int act, float alpha=1.702, float limit=7.0, "
    "SymInt col_stride=1, Tensor? row_map=None) -> ()",
    "moe_down_reduce(Tensor(a!) out, Tensor y2, Tensor h, Tensor[] a, Tensor[] b, Tensor table, Tensor plan, "
    "Tensor topk_weights, SymInt[] widths, SymInt[] cols, SymInt v_width, Tensor? row_map=None, "
    "bool y2_weighted=False) -> ()",
    "moe_delta(Tensor(a!) delta, Tensor x, Tensor[] a, Tensor[] b, Tensor table, Tensor plan, SymInt[] widths, "
    "SymInt v_width, SymInt top_k=0, Tensor? topk_weights=None, Tensor? row_map=None, Tensor? v=None) -> ()",
    "moe_act(Tensor(a!) h, Tensor y1, Tensor delta, Tensor table, Tensor plan, SymInt[] widths, SymInt[] cols, "
    "int act, float alpha=1.702, float limit=7.0, SymInt col_stride=1, SymInt mapped_pairs=0) -> ()",
    "moe_reduce(Tensor(a!) out, Tensor y2, Tensor delta, Tensor table, Tensor plan, Tensor topk_weights, "
    "SymInt[] widths, SymInt[] cols, Tensor? row_map=None, bool y2_weighted=False) -> ()",
};

void define_ops(torch::stable::detail::StableLibrary& m) {
  for (const char* schema : kSchemas) m.def(schema);
}

}  // namespace

STABLE_TORCH_LIBRARY(polylora, m) { define_ops(m); }
STABLE_TORCH_LIBRARY(polylora_meta, m) { define_ops(m); }
