// A case in device memory: weights in as many sets as it takes to keep them cold, activations, rows, the plan.
#pragma once

#include <cstdint>
#include <vector>

#include "cases.h"
#include "device.h"
#include "polylora/params.h"

namespace polylora::bench {

/// Where call number i finds what: weights of set i mod sets, x and y of copy i mod copies.
class Problem {
 public:
  struct Options {
    DType dtype = DType::kBFloat16;
    bool equal_scales = false;     // one scale for all adapters, for a baseline that takes only one
    bool activations_hot = false;  // one copy of x and y whatever their size: a base GEMM writes y before each call
  };

  Problem(const Case& c, Op op, const Options& options, const Device& device, cudaStream_t stream);

  const Case& shape() const { return case_; }
  Op op() const { return op_; }
  DType dtype() const { return options_.dtype; }
  int64_t sets() const { return sets_; }
  int64_t copies() const { return copies_; }
  bool cold() const { return cold_; }

  /// Calls after which everything comes round again.
  int64_t period() const;

  /// The arguments of call number `call`. Valid for linear, shrink and expand.
  LoraParams lora_params(int64_t call) const;
  EmbeddingParams embedding_params(int64_t call) const;
  PlanParams plan_params() const;

  /// The scratch that the path in force wants. Throws what run() would where that path does not serve.
  void reserve();

  /// y as it was: calls add to it, and thousands of deltas would drown the next one in rounding.
  void reset(cudaStream_t stream);

  /// The call itself: the op under test.
  cudaError_t run(int64_t call, cudaStream_t stream) const;

  // what checks and baselines read
  const std::vector<SliceEntry>& table() const { return table_host_; }       // [slots, slices], of every set
  const std::vector<int32_t>& row_adapters() const { return rows_host_; }    // [rows]
  const int32_t* row_adapters_device() const { return ids_.as<int32_t>(); }  // [rows]
  const int32_t* token_ids(int64_t call) const;                              // [rows]
  char* x(int64_t call) const;                                               // [rows, k]
  char* y(int64_t call) const;                                               // [rows, width]
  float* v(int64_t call) const;                                              // [rows, v_width]
  int64_t v_width() const { return v_width_; }

 private:
  void lay_out();
  void allocate(const Device& device);
  void fill(cudaStream_t stream);
  LoraParams fill_params(int64_t call) const;
  bool v_given() const { return op_ == Op::kShrink || op_ == Op::kExpand; }

  Case case_;
  Op op_;
  Options options_;
  int64_t v_width_ = 0;
  int64_t sets_ = 1;
  int64_t copies_ = 1;
  bool cold_ = true;

  std::vector<SliceEntry> table_host_;
  std::vector<int32_t> rows_host_;
  int64_t a_rows_ = 0;       // of a set
  int64_t a_pitch_ = 0;      // elements
  int64_t b_elements_ = 0;   // of a set
  int64_t a_set_bytes_ = 0;  // what follows in bytes, with alignment
  int64_t b_set_bytes_ = 0;  //
  int64_t table_bytes_ = 0;  //
  int64_t ids_bytes_ = 0;    //
  int64_t x_bytes_ = 0;      //
  int64_t y_bytes_ = 0;      //
  int64_t v_bytes_ = 0;      //
  DeviceBuffer a_;           // [sets]
  DeviceBuffer b_;           // [sets]
  DeviceBuffer table_;       // [sets]
  DeviceBuffer token_ids_;   // [sets], embedding only
  DeviceBuffer x_;           // [copies]
  DeviceBuffer y_;           // [copies]
  DeviceBuffer v_;           // [copies], of the halves
  DeviceBuffer scratch_;     //
  DeviceBuffer ids_;         //
  DeviceBuffer plan_;        //
};

}  // namespace polylora::bench
