// The CUDA kernels of linear, run thread by thread on the CPU (emulator/emulator.h), against double precision.
//
// Every array ends at a page that faults. What no kernel may read is NaN. Until a kernel has waited for the one before
// it, plan, table, x and y hold something else: the plan and table of another step, or noise.
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <tuple>

#include "check.h"
#include "emulated.h"
#include "linear/block_share.cuh"
#include "linear/narrow.cuh"
#include "linear/paths.h"
#include "linear/wide.cuh"
#include "polylora/cpu.h"

namespace polylora::testing {
namespace {

struct Shape {
  DType dtype = DType::kBFloat16;
  int64_t rows = 5, k = 64;
  std::vector<int64_t> widths = {64};
  int groups = 3;
  std::vector<int> ranks = {16};  // of (group, slice), in turn; 0: absent
  std::string ids = "mixed";
  int64_t more_v = 0;       // columns of v beyond what the table uses
  int64_t more_stride = 0;  // of B beyond the rank
  bool odd_b = false;       // offsets and pitches of B that are no multiples of 8
  bool shared_a = false;    // one A for all slices of a group
  bool stale_is_noise = false;
  std::string lookup =
      "";  // embedding: A is looked up; "rank": [ranks, vocabulary], "token": [tokens, ranks]. k tokens
};

class Problem {
 public:
  Problem(const Shape& shape, uint64_t seed)
      : shape_(shape), random_(seed), slices_(static_cast<int>(shape.widths.size())) {
    int64_t a_rows = 3, b_elements = 8, n = 8;
    for (int s = 0; s < slices_; ++s) {
      cols_.push_back(n);
      n += shape.widths[static_cast<size_t>(s)] + 8;
    }
    y_stride_ = n;
    x_stride_ = shape.k + 8;
    a_stride_ = shape.k + 16;
    if (shape.lookup == "token") a_stride_ = *std::max_element(shape.ranks.begin(), shape.ranks.end()) + 3;
    int at_rank = 0;
    for (int g = 0; g < shape.groups; ++g) {
      int64_t v_col = 0;
      SliceEntry first{};
      for (int s = 0; s < slices_; ++s) {
        SliceEntry entry{};
        int rank = shape.ranks[static_cast<size_t>(at_rank++ % static_cast<int>(shape.ranks.size()))];
        if (shape.shared_a && first.rank > 0 && rank > 0) rank = first.rank;
        entry.rank = rank;
        entry.scale = static_cast<float>(0.5 + random_.uniform());
        if (rank == 0) {
          entry.a_row = -5;
          entry.v_col = 1 << 20;
        } else {
          entry.b_stride = static_cast<int32_t>((rank + 7) / 8 * 8 + shape.more_stride + (shape.odd_b ? 3 : 0));
          entry.b_offset = b_elements + (shape.odd_b ? 1 : 0);
          b_elements += (shape.widths[static_cast<size_t>(s)] * entry.b_stride + 15) / 8 * 8;
          if (shape.shared_a && first.rank > 0) {
            entry.a_row = first.a_row;
            entry.v_col = first.v_col;
          } else {
            entry.a_row = static_cast<int32_t>(a_rows);
            entry.v_col = static_cast<int32_t>(v_col);
            a_rows += (shape.lookup == "token" ? shape.k : rank) + 1;
            v_col += rank;
            first = entry;
          }
          v_width_ = std::max(v_width_, v_col);
        }
        table_.push_back(entry);
      }
    }
    v_width_ = std::max<int64_t>(v_width_, 1) + shape.more_v;
    a_.reset(new Array(shape.dtype, a_rows * a_stride_));
    b_.reset(new Array(shape.dtype, b_elements));
    x_.reset(new Array(shape.dtype, shape.rows * x_stride_));
    y_.reset(new Array(shape.dtype, shape.rows * y_stride_));
    a_rows_ = a_rows;
    b_elements_ = b_elements;
    for (int g = 0; g < shape.groups; ++g) {
      for (int s = 0; s < slices_; ++s) {
        const SliceEntry& entry = entry_of(g, s);
        for (int64_t j = 0; j < entry.rank; ++j) {
          for (int64_t i = 0; i < shape.k; ++i) {
            const double spread = shape.lookup.empty() ? std::sqrt(static_cast<double>(shape.k)) : 1.0;
            a_->set(a_at(entry, j, i), normal(random_) / spread);
          }
          for (int64_t i = 0; i < shape.widths[static_cast<size_t>(s)]; ++i) {
            b_->set(entry.b_offset + i * entry.b_stride + j,
                    normal(random_) / std::sqrt(static_cast<double>(entry.rank)));
          }
        }
      }
    }
    for (int64_t r = 0; r < shape.rows; ++r) ids_.push_back(make_id(r));
    tokens_.reset(new GuardedBytes(shape.rows * 8));
    for (int64_t r = 0; r < shape.rows; ++r) {
      const int64_t token =
          random_.chance(0.2) ? (random_.chance(0.5) ? -1 : shape.k) : random_.between(0, shape.k - 1);
      std::memcpy(tokens_->data() + r * 8, &token, 8);
    }
    for (int64_t r = 0; r < shape.rows; ++r) {
      for (int64_t i = 0; i < y_stride_; ++i) y_->set(r * y_stride_ + i, normal(random_));
      if (ids_[static_cast<size_t>(r)] < 0 || ids_[static_cast<size_t>(r)] >= shape.groups) continue;  // x stays NaN
      for (int64_t i = 0; i < shape.k; ++i) x_->set(r * x_stride_ + i, normal(random_));
    }
    const int64_t words = plan_layout(shape.rows, shape.groups, 0).words;
    plan_.reset(new GuardedBytes(words * 4));
    stale_plan_.reset(new GuardedBytes(words * 4));
    table_bytes_.reset(new GuardedBytes(static_cast<int64_t>(table_.size() * sizeof(SliceEntry))));
    make_plan(ids_, *plan_);
    std::vector<int32_t> other;
    for (int64_t r = 0; r < shape.rows; ++r)
      other.push_back(static_cast<int32_t>(random_.between(-1, shape.groups - 1)));
    make_plan(other, *stale_plan_);
    if (shape.stale_is_noise) {
      for (int64_t i = 0; i < words * 4; ++i) stale_plan_->data()[i] = static_cast<unsigned char>(random_.bits());
    }
    y_before_ = y_->copy();
    x_truth_ = x_->copy();
    plan_truth_ = {plan_->data(), plan_->data() + plan_->size()};
    tokens_truth_ = {tokens_->data(), tokens_->data() + tokens_->size()};
  }

  LoraParams params() {
    LoraParams p{};
    p.dtype = shape_.dtype;
    p.rows = shape_.rows;
    p.k = shape_.k;
    p.x = x_->data();
    p.x_stride = x_stride_;
    p.y = y_->data();
    p.y_stride = y_stride_;
    p.v_width = static_cast<int32_t>(v_width_);
    p.slices.table = reinterpret_cast<const SliceEntry*>(table_bytes_->data());
    p.slices.groups = shape_.groups;
    p.slices.count = slices_;
    p.slices.col_stride = 1;
    for (int s = 0; s < slices_; ++s) {
      p.slices.a[s] = a_->data();
      p.slices.a_stride[s] = a_stride_;
      p.slices.a_rows[s] = a_rows_;
      p.slices.b[s] = b_->data();
      p.slices.b_elements[s] = b_elements_;
      p.slices.width[s] = static_cast<int32_t>(shape_.widths[static_cast<size_t>(s)]);
      p.slices.col[s] = cols_[static_cast<size_t>(s)];
    }
    p.plan = plan_view(reinterpret_cast<const int32_t*>(plan_->data()), shape_.rows, shape_.groups, 0);
    return p;
  }

  EmbeddingParams embedding_params() {
    EmbeddingParams e{};
    e.lora = params();
    e.lora.x = nullptr;
    e.lora.v_width = INT32_MAX;
    e.token_ids = tokens_->data();
    e.ids_are_int64 = true;
    e.vocab = shape_.k;
    e.token_major = shape_.lookup == "token";
    for (int32_t& cols : e.a_cols) cols = e.token_major ? static_cast<int32_t>(a_cols_ < 0 ? a_stride_ : a_cols_) : 0;
    return e;
  }

  const Shape& shape() const { return shape_; }

  /// Columns that A is said to have, where it is looked up by token.
  void set_a_cols(int64_t cols) { a_cols_ = cols; }

  void set_x(int64_t row, int64_t i, double value) {
    x_->set(row * x_stride_ + i, value);
    x_truth_ = x_->copy();
  }
  void set_v_width(int64_t width) { v_width_ = width; }
  double y(int64_t row, int slice, int64_t n) const {
    return y_->get(row * y_stride_ + cols_[static_cast<size_t>(slice)] + n);
  }
  bool is_untouched() const { return y_->copy() == y_before_; }
  /// Of a row, or those of `y` that a copy of it holds.
  std::vector<unsigned char> row_of(const std::vector<unsigned char>& y, int64_t row) const {
    const int64_t bytes = y_stride_ * size_of(shape_.dtype);
    return {y.begin() + row * bytes, y.begin() + (row + 1) * bytes};
  }
  std::vector<unsigned char> y_bytes() const { return y_->copy(); }

  /// Row r stands at to[r] from here on, with its adapter where keeps[r] says so, else without one.
  void move_rows(const std::vector<int64_t>& to, const std::vector<bool>& keeps) {
    const auto moved = [&](const std::vector<unsigned char>& from, int64_t stride) {
      std::vector<unsigned char> result(from.size());
      const int64_t bytes = stride * size_of(shape_.dtype);
      for (int64_t r = 0; r < shape_.rows; ++r) {
        std::memcpy(result.data() + to[static_cast<size_t>(r)] * bytes, from.data() + r * bytes,
                    static_cast<size_t>(bytes));
      }
      return result;
    };
    x_truth_ = moved(x_truth_, x_stride_);
    y_before_ = moved(y_before_, y_stride_);
    std::vector<int32_t> ids(ids_.size());
    for (size_t r = 0; r < ids_.size(); ++r) ids[static_cast<size_t>(to[r])] = keeps[r] ? ids_[r] : -1;
    ids_ = ids;
    make_plan(ids_, *plan_);
    plan_truth_ = {plan_->data(), plan_->data() + plan_->size()};
    exact_v_.clear();
  }

  /// All inputs as another step left them, until the kernel waits for it.
  void spoil(uint64_t seed, bool stale) {
    emulator::options().seed = seed;
    const auto truth = [this] {
      std::copy(plan_truth_.begin(), plan_truth_.end(), plan_->data());
      std::memcpy(table_bytes_->data(), table_.data(), table_.size() * sizeof(SliceEntry));
      x_->restore(x_truth_);
      y_->restore(y_before_);
      std::copy(tokens_truth_.begin(), tokens_truth_.end(), tokens_->data());
    };
    truth();
    if (!stale) {
      emulator::options().previous_grid = nullptr;
      return;
    }
    std::memcpy(plan_->data(), stale_plan_->data(), static_cast<size_t>(plan_->size()));
    if (random_.chance(0.5)) {
      for (size_t i = 0; i < table_.size() * sizeof(SliceEntry); ++i) {
        table_bytes_->data()[i] = static_cast<unsigned char>(random_.bits());
      }
    }
    for (int64_t i = 0; i < shape_.rows * x_stride_; ++i) x_->set(i, 1e4);
    for (int64_t r = 0; r < shape_.rows; ++r) {  // of some rows they are what they were
      const uint64_t token = random_.chance(0.5) ? random_.bits() : static_cast<uint64_t>(random_.between(0, shape_.k));
      if (random_.chance(0.7)) std::memcpy(tokens_->data() + r * 8, &token, 8);
    }
    // before the call's first launch; what comes before a later one is that
    emulator::options().previous_grid = [truth, before = cuda::launches.size()] {
      if (cuda::launches.size() == before + 1) truth();
    };
  }

  /// Deltas are rounded before they are added.
  void round_deltas() { rounds_deltas_ = true; }

  /// Checks y; returns its bits.
  std::vector<unsigned char> check(const std::string& what) {
    Array before(shape_.dtype, shape_.rows * y_stride_);
    before.restore(y_before_);
    for (int64_t r = 0; r < shape_.rows; ++r) {
      const int64_t group = ids_[static_cast<size_t>(r)];
      for (int64_t column = 0; column < y_stride_; ++column) {
        const double base = before.get(r * y_stride_ + column);
        const double got = y_->get(r * y_stride_ + column);
        double want = base, slack = 0;
        bool written = false;
        for (int s = 0; s < slices_; ++s) {
          const int64_t n = column - cols_[static_cast<size_t>(s)];
          if (n < 0 || n >= shape_.widths[static_cast<size_t>(s)] || group < 0 || group >= shape_.groups) continue;
          const SliceEntry& entry = entry_of(static_cast<int>(group), s);
          written = entry.rank > 0 && (shape_.lookup.empty() || (token_of(r) >= 0 && token_of(r) < shape_.k));
          if (!written) continue;
          for (int64_t j = 0; j < entry.rank; ++j) {
            const double term = entry.scale * v_of(r, entry, j) * b_->get(entry.b_offset + n * entry.b_stride + j);
            want += term;
            slack += std::fabs(term);
          }
        }
        if (!written) {
          CHECK(std::memcmp(y_->data() + 2 * (r * y_stride_ + column), y_before_.data() + 2 * (r * y_stride_ + column),
                            2) == 0,
                "%s: row %lld column %lld changed", what.c_str(), (long long)r, (long long)column);
          continue;
        }
        const double of_delta = rounds_deltas_ ? rounding_error(shape_.dtype, want - base) : 0;
        const double bound = rounding_error(shape_.dtype, want) + delta_error(shape_.dtype, slack) + of_delta;
        CHECK(std::fabs(got - want) <= bound, "%s: row %lld (group %lld) column %lld: got %g, want %g, base %g",
              what.c_str(), (long long)r, (long long)group, (long long)column, got, want, base);
      }
    }
    return y_->copy();
  }

 private:
  const SliceEntry& entry_of(int group, int slice) const {
    return table_[static_cast<size_t>(group * slices_ + slice)];
  }

  int64_t a_at(const SliceEntry& entry, int64_t j, int64_t i) const {
    return shape_.lookup == "token" ? (entry.a_row + i) * a_stride_ + j : (entry.a_row + j) * a_stride_ + i;
  }

  int64_t token_of(int64_t row) const {
    int64_t token;
    std::memcpy(&token, tokens_->data() + row * 8, 8);
    return token;
  }

  double v_of(int64_t row, const SliceEntry& entry, int64_t j) {
    if (!shape_.lookup.empty()) return a_->get(a_at(entry, j, token_of(row)));
    const int64_t key = (row * a_rows_ + entry.a_row + j);
    if (exact_v_.empty()) exact_v_.assign(static_cast<size_t>(shape_.rows * a_rows_), std::nan(""));
    double& sum = exact_v_[static_cast<size_t>(key)];
    if (std::isnan(sum)) {
      sum = 0;
      for (int64_t i = 0; i < shape_.k; ++i) {
        sum += x_->get(row * x_stride_ + i) * a_->get((entry.a_row + j) * a_stride_ + i);
      }
    }
    return sum;
  }

  int32_t make_id(int64_t row) {
    if (shape_.ids == "none") return -1;
    if (shape_.ids == "one") return 0;
    if (shape_.ids == "each") return static_cast<int32_t>(row % shape_.groups);
    if (shape_.ids == "lengths") {  // 1, 2, 4, ... rows
      int32_t group = 0;
      while (row >= (int64_t{2} << group) - 1) ++group;
      return static_cast<int32_t>(group % shape_.groups);
    }
    if (shape_.ids == "segments") return static_cast<int32_t>(row * shape_.groups / shape_.rows);
    if (random_.chance(0.1)) return static_cast<int32_t>(shape_.groups + 5);
    return static_cast<int32_t>(random_.between(-1, shape_.groups - 1));
  }

  void make_plan(const std::vector<int32_t>& ids, const GuardedBytes& plan) {
    cpu::plan(PlanParams{reinterpret_cast<int32_t*>(plan.data()), ids.data(), false, shape_.rows, shape_.groups},
              serial);
  }

  Shape shape_;
  Random random_;
  int slices_;
  bool rounds_deltas_ = false;
  int64_t x_stride_, y_stride_, a_stride_, a_rows_, b_elements_, v_width_ = 0, a_cols_ = -1;
  std::vector<int64_t> cols_;
  std::vector<SliceEntry> table_;
  std::vector<int32_t> ids_;
  std::unique_ptr<Array> a_, b_, x_, y_;
  std::unique_ptr<GuardedBytes> plan_, stale_plan_, table_bytes_, tokens_;
  std::vector<unsigned char> y_before_, x_truth_, plan_truth_, tokens_truth_;
  std::vector<double> exact_v_;
};

using Path = cudaError_t (*)(Problem&);

cudaError_t cluster_of(LoraParams p) {
  return cuda::cluster_path_serves(p) ? cuda::linear_cluster_path(p, nullptr) : cudaErrorNotSupported;
}

cudaError_t wide_of(LoraParams p) {
  if (!cuda::wide_shrink_serves(p) || !cuda::wide_expand_serves(p)) return cudaErrorNotSupported;
  int64_t bytes = 0;
  cuda::wide_scratch(p, bytes);
  const GuardedBytes scratch(bytes);
  p.scratch = scratch.data();
  return cuda::linear_wide_path(p, nullptr);
}

template <bool kAdds>
cudaError_t mma_pieces(LoraParams p) {
  if (!cuda::wide_shrink_serves(p) || !cuda::wide_expand_serves(p)) return cudaErrorNotSupported;
  int parts = 0;
  cuda::mma_parts(p, parts);
  const GuardedBytes scratch(cuda::plane_bytes(p, parts, p.rows));
  p.scratch = scratch.data();
  // all else is there: the next may count on shrink's having waited
  return cuda::linear_mma_path(p, parts, kAdds ? 1 : parts + 1, [&] { hide_until_waited(scratch); }, nullptr);
}
constexpr auto mma_of = mma_pieces<false>, mma_added_of = mma_pieces<true>;

template <auto kExpand, bool kBeside>
cudaError_t narrow_launches(LoraParams p) {
  if (!cuda::narrow_shrink_serves(p) || !cuda::wide_expand_serves(p)) return cudaErrorNotSupported;
  int parts = 0;
  cuda::narrow_parts(p, kBeside, parts);
  const GuardedBytes scratch(cuda::narrow_plane_bytes(p, parts));
  p.scratch = scratch.data();
  const cudaError_t error = cuda::shrink_narrow_path(p, parts, nullptr);
  hide_until_waited(scratch);
  return error == cudaSuccess ? kExpand(p, parts, nullptr) : error;
}
constexpr auto narrow_of = narrow_launches<cuda::expand_narrow_path, false>;
constexpr auto narrow_deltas = narrow_launches<cuda::expand_deltas_narrow_path, true>;

// The deltas by themselves, into memory of NaN, and then their sum with y.
template <auto kDeltas>
cudaError_t apart_of(Problem& problem) {
  problem.round_deltas();
  LoraParams p = problem.params();
  const int64_t stride = cuda::divide_up(sum_of_widths(p.slices), 8) * 8 + 8;
  const GuardedBytes deltas(p.rows * stride * 2);
  std::memset(deltas.data(), 0xff, static_cast<size_t>(p.rows * stride * 2));
  const AddDeltaParams sum{p, deltas.data(), stride};
  if (!cuda::add_delta_serves(sum)) return cudaErrorNotSupported;
  p.y = deltas.data();
  p.y_stride = stride;
  for (int s = 0, col = 0; s < p.slices.count; col += p.slices.width[s++]) p.slices.col[s] = col;
  const cudaError_t error = kDeltas(p);
  hide_until_waited(deltas);
  return error == cudaSuccess ? cuda::add_delta_path(sum, nullptr) : error;
}

cudaError_t wide_deltas(LoraParams p) {
  const cudaError_t error = cuda::clear_deltas_path(p, nullptr);
  return error == cudaSuccess ? wide_of(p) : error;
}

template <auto kOf>
cudaError_t all_runs(Problem& problem) {
  return kOf(problem.params());
}
constexpr Path cluster = all_runs<cluster_of>, wide = all_runs<wide_of>, mma = all_runs<mma_of>,
               mma_added = all_runs<mma_added_of>, narrow = all_runs<narrow_of>, narrow_apart = apart_of<narrow_deltas>,
               wide_apart = apart_of<wide_deltas>;

// Short runs first, then the others.
template <auto kShort, auto kLong>
cudaError_t by_length(Problem& problem) {
  LoraParams p = problem.params();
  p.plan = short_runs(problem.params().plan);
  const cudaError_t error = kShort(p);
  p.plan = long_runs(problem.params().plan);
  return error == cudaSuccess ? kLong(p) : error;
}

// The public halves, v in between. `shrink`: into p.v.
template <typename Shrink>
cudaError_t halves(LoraParams p, Shrink&& shrink, decltype(&cuda::expand_wide_path) expand = cuda::expand_wide_path) {
  const int64_t v_stride = p.v_width + 1;  // rows of v begin at odd addresses
  const GuardedBytes v(p.rows * v_stride * 4);
  for (int64_t i = 0; i < p.rows * v_stride; ++i) reinterpret_cast<float*>(v.data())[i] = std::nanf("");
  p.v = reinterpret_cast<float*>(v.data());
  p.v_stride = v_stride;
  LoraParams first = p;
  first.y = nullptr;
  for (int s = 0; s < first.slices.count; ++s) {
    first.slices.b[s] = nullptr;
    first.slices.b_elements[s] = -1;
    first.slices.width[s] = 0;
  }
  cudaError_t error = shrink(first);
  hide_until_waited(v);
  LoraParams second = p;
  second.x = nullptr;
  for (int s = 0; s < second.slices.count; ++s) second.slices.a_rows[s] = -1;
  return error == cudaSuccess ? expand(second, 0, nullptr) : error;
}

cudaError_t wide_halves(Problem& problem) {
  return halves(problem.params(), [](LoraParams p) {
    int64_t bytes = 0;
    cuda::wide_scratch(p, bytes);
    const GuardedBytes scratch(bytes);
    p.scratch = scratch.data();
    return cuda::linear_wide_path(p, nullptr);
  });
}

cudaError_t mma_shrink(LoraParams p) {
  int parts = 0;
  cuda::mma_parts(p, parts);
  const GuardedBytes scratch(cuda::plane_bytes(p, parts, p.rows));
  p.scratch = scratch.data();
  const cudaError_t error = cuda::shrink_mma_path(p, parts > 1 ? parts : 0, nullptr);
  hide_until_waited(scratch);
  return error == cudaSuccess && parts > 1 ? cuda::add_planes_to_v_path(p, parts, nullptr) : error;
}

cudaError_t mma_halves(Problem& problem) { return halves(problem.params(), mma_shrink); }

cudaError_t narrow_halves(Problem& problem) { return halves(problem.params(), mma_shrink, cuda::expand_narrow_path); }

cudaError_t mma_lookup(Problem& problem) {
  EmbeddingParams e = problem.embedding_params();
  int64_t bytes = 0;
  cuda::mma_embedding_scratch(e, bytes);
  const GuardedBytes scratch(bytes);
  e.lora.scratch = scratch.data();
  return cuda::embedding_mma_path(e, nullptr);
}

cudaError_t wide_lookup(Problem& problem) { return cuda::embedding_wide_path(problem.embedding_params(), nullptr); }

cudaError_t narrow_lookup(Problem& problem) { return cuda::embedding_narrow_path(problem.embedding_params(), nullptr); }

void run(const std::string& what, Path path, const Shape& shape, int runs = 2) {
  Problem problem(shape, std::hash<std::string>()(what));
  check_runs(what, path, problem, runs);
}

// What every path must get right, at small sizes.
void any_shape(const std::string& name, Path path, int64_t k_unit) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (int64_t rows : {1, 2, 8, 9, 16, 17, 40}) {
      run(name + " rows " + std::to_string(rows), path, {dtype, rows, 256, {128, 64, 64}, 3, {16, 8, 32}}, 4);
    }
  }
  for (int rank : {1, 3, 4, 8, 12, 16, 17, 24, 31, 32, 33, 48, 64, 100, 128, 200, 256}) {
    for (int64_t rows : {6, 20}) {  // jobs of decode of 8 rows and of 16
      run(name + " rank " + std::to_string(rank), path, {DType::kBFloat16, rows, 128, {64, 8}, 2, {rank}});
    }
  }
  for (int64_t k : {8, 16, 24, 32, 40, 80, 96, 512, 520, 544}) {
    if (k % k_unit == 0) run(name + " k " + std::to_string(k), path, {DType::kBFloat16, 3, k, {64}, 2, {16}});
  }
  for (int64_t n : {8, 24, 32, 40, 56, 72, 200, 1000}) {
    run(name + " n " + std::to_string(n), path, {DType::kBFloat16, 3, 64, {n, 16}, 2, {16, 48}});
  }
  for (const char* ids : {"none", "one", "each", "segments"}) {
    Shape shape{DType::kBFloat16, 33, 64, {72, 24}, 5, {8, 40}, ids};
    run(name + " ids " + ids, path, shape, 4);
    shape.stale_is_noise = true;
    run(name + " noise before, ids " + ids, path, shape, 6);
  }
  run(name + " absent slices", path, {DType::kBFloat16, 20, 64, {64, 40, 128}, 4, {8, 0, 8, 0, 16, 0, 0, 0, 4}});
  run(name + " all absent", path, {DType::kBFloat16, 4, 64, {64, 40}, 2, {0}});
  Shape shape{DType::kBFloat16, 12, 96, {64, 40, 64}, 2, {12, 24}};
  shape.more_stride = 24;
  shape.more_v = 37;
  run(name + " pitches above the rank", path, shape);
  shape.odd_b = true;
  run(name + " odd pitches of B", path, shape);
  shape.odd_b = false;
  shape.shared_a = true;
  run(name + " one A for all slices", path, shape);
  run(name + " many groups", path, {DType::kFloat16, 64, 64, {64}, 64, {4, 8, 16}, "each"});
  run(name + " eight slices", path, {DType::kBFloat16, 9, 64, {64, 8, 72, 16, 24, 64, 32, 8}, 2, {16, 8, 4, 32, 20}});
  run(name + " many ranks of many rows", path, {DType::kBFloat16, 16, 64, {64, 64, 64, 64}, 1, {128}, "one"});
  for (int sms : {2, 5, 16}) {  // more work than blocks
    cuda::emulated_device.sms = sms;
    const std::string what = name + " on " + std::to_string(sms) + " SMs,";
    run(what + " many groups", path, {DType::kFloat16, 64, 64, {64}, 64, {4, 8, 16}, "each"}, 4);
    run(what + " some groups", path, {DType::kBFloat16, 33, 96, {200, 64}, 7, {4, 0, 32}, "mixed"}, 4);
    run(what + " one group", path, {DType::kBFloat16, 40, 64, {128, 128, 64}, 1, {64}, "one"}, 4);
  }
  cuda::emulated_device.sms = 132;
}

// Decode's two launches, of as many rows as they are given.
void many_full_tiles() {
  for (int sms : {132, 5}) {
    cuda::emulated_device.sms = sms;
    const std::string what = "narrow on " + std::to_string(sms) + " SMs, ";
    run(what + "1000 rows of one adapter", narrow, {DType::kBFloat16, 1000, 64, {72, 24}, 1, {16}, "one"});
    run(what + "600 rows of four", narrow, {DType::kFloat16, 600, 96, {200, 64}, 4, {16, 8, 0, 3}, "segments"});
    run(what + "300 rows, one adapter has most", narrow, {DType::kBFloat16, 300, 64, {64}, 9, {16, 24}, "lengths"});
  }
  cuda::emulated_device.sms = 132;
}

// Far fewer jobs than the capacities allow: the blocks without one share the others'.
void few_jobs_of_many() {
  for (int grid : {1, 2, 3, 7, 33, 64}) {
    for (int jobs = 0; jobs <= 70; ++jobs) {
      for (int units : {0, 1, 8, 9, 57}) {
        std::vector<int> done(static_cast<size_t>(jobs * units));
        for (int z = 0; z < grid; ++z) {
          const cuda::Sharing sharing = cuda::share_jobs(jobs, z, grid, units, 8);
          const cuda::Part mine = sharing.of({3, 3 + units});
          for (int job = sharing.index; job < jobs; job += grid) {
            for (int u = mine.begin; u < mine.end; ++u) ++done[static_cast<size_t>(job * units + u - 3)];
          }
        }
        CHECK(std::all_of(done.begin(), done.end(), [](int times) { return times == 1; }),
              "%d jobs, %d blocks, %d units", jobs, grid, units);
      }
    }
  }
  for (const auto& [name, path] : {std::pair<std::string, Path>{"cluster", cluster},
                                   {"narrow", narrow},
                                   {"narrow apart", narrow_apart},
                                   {"narrow halves", narrow_halves},
                                   {"narrow lookup", narrow_lookup}}) {
    cuda::emulated_device.sms = 40;  // parts of outputs with work for more than a unit a warp
    for (const auto& [rows, rank] : {std::pair<int64_t, int>{12, 16}, {70, 16}, {37, 40}}) {
      Shape shape{DType::kBFloat16, rows, 64, {2072, 520}, 40, {rank, 8}, "one"};
      if (name == "narrow lookup") shape.lookup = "token";
      const std::string what =
          name + ", " + std::to_string(rows) + " rows of one of 40 groups, rank " + std::to_string(rank);
      run(what, path, shape);
      shape.stale_is_noise = true;
      run(what + ", noise before", path, shape);
    }
    cuda::emulated_device.sms = 132;
  }
}

// Several units of outputs a warp, whose B and y are asked for before the one before is stored: of each form of expand,
// in one step over the ranks and in several, with a last unit that is not whole.
void many_units_a_warp() {
  for (const auto& [name, path] : {std::pair<std::string, Path>{"cluster", cluster},
                                   {"narrow", narrow},
                                   {"narrow apart", narrow_apart},
                                   {"narrow halves", narrow_halves}}) {
    for (int sms : {2, 5}) {
      cuda::emulated_device.sms = sms;
      for (int64_t rows : {6, 20}) {
        for (const std::vector<int>& ranks :
             {std::vector<int>{16}, {8, 24}, {32}, {40, 24}, {64}, {100, 28}, {12, 0, 7, 40}}) {
          const std::string what = name + ", units a warp on " + std::to_string(sms) + " SMs, rows " +
                                   std::to_string(rows) + ", rank " + std::to_string(ranks[0]);
          Shape shape{DType::kBFloat16, rows, 64, {2072, 520}, 2, ranks, "segments"};
          run(what, path, shape);
          shape.odd_b = true;
          run(what + ", odd B", path, shape);
        }
      }
    }
    cuda::emulated_device.sms = 132;
  }
}

// Blocks that share the outputs of a tile.
void many_outputs() {
  cuda::LinearTask task{};
  for (int32_t width : {4096, 1024, 1024}) task.slice[task.slices++].width = width;
  for (int parts : {3, 6, 16, 300, 4000}) {
    std::fill(std::begin(task.first_part), std::end(task.first_part), uint16_t{0});
    cuda::share_parts(task, parts);
    CHECK(task.first_part[3] == parts, "%d parts: %d shared", parts, task.first_part[3]);
    CHECK(task.first_part[1] >= parts / 2 && task.first_part[2] - task.first_part[1] <= parts / 3, "%d parts", parts);
  }
  for (const auto& [name, path] : {std::pair<std::string, Path>{"cluster", cluster}, {"narrow", narrow}}) {
    run(name + ", many outputs", path, {DType::kBFloat16, 1, 64, {40008}, 1, {64}, "one"});
    if (name == "narrow") {  // more parts than 8 bits count
      run(name + ", many outputs of both slices", path, {DType::kBFloat16, 1, 64, {35008, 35008}, 1, {64}, "one"});
    }
    run(name + ", many outputs of one of two slices", path, {DType::kBFloat16, 2, 64, {64, 40000}, 2, {48}, "each"});
    cuda::launches.clear();
    Problem problem({DType::kBFloat16, 1, 64, {40008}, 1, {64}, "one"}, 1);
    problem.spoil(1, false);
    path(problem);
    CHECK(cuda::launches.back().grid.x > 64, "%s shares the outputs", name.c_str());  // a cluster has 16 at most
  }
}

// More planes of v than are added at once, of tiles that are not full.
void many_parts() {
  for (const auto& [name, path] : {std::pair<std::string, Path>{"mma", mma}, {"mma added", mma_added}}) {
    for (int64_t k : {256, 768, 2304, 4096}) {
      run(name + " parts of K " + std::to_string(k), path,
          {DType::kBFloat16, 150, k, {64, 24}, 3, {40, 8}, "segments"});
    }
    Shape shape{DType::kFloat16, 40, 2560, {72}, 2, {256, 3}};
    shape.stale_is_noise = true;
    run(name + " parts of K, noise before", path, shape);
  }
}

// A slice has blocks of its own where that leaves none with much more than an even share.
void balanced_slices() {
  const auto own = [](std::vector<int32_t> widths, int blocks) {
    cuda::LinearTask task{};
    for (int32_t width : widths) {
      task.slice[task.slices++].width = width;
      task.units += static_cast<int32_t>(cuda::divide_up(width, cuda::kUnitN));
    }
    cuda::share_by_slices(task, blocks);
    const bool is_own = task.first_part[task.slices] == blocks;
    const auto parts = std::minmax_element(task.first_part, task.first_part + task.slices + 1);
    CHECK(is_own || *parts.second == 0, "an even share, but %d first parts are there", *parts.second);
    return is_own;
  };
  CHECK(own({4096, 1024, 1024}, 6), "4, 1 and 1 blocks");
  CHECK(own({4096, 1024, 1024}, 16), "many blocks");
  CHECK(!own({4096, 1024, 1024}, 3), "one block has two thirds of the outputs");
  CHECK(own({14336, 14336}, 2) && own({14336, 14336}, 6), "even slices, an even number of blocks");
  CHECK(!own({14336, 14336}, 3) && !own({14336, 14336}, 5), "even slices, few blocks, an odd number");
  CHECK(own({14336, 14336}, 9), "an odd number that hardly matters");
  CHECK(own({64, 64, 64, 64}, 4), "slices of a unit, where beginning another costs more than it");
  CHECK(own({4096}, 2), "one slice");
  CHECK(!own({64, 64}, 9), "more blocks than units");
  CHECK(!own({4096, 0}, 2) && own({4096, 64, 0}, 66), "a slice of no outputs");
}

// A row's bits do not depend on where it stands in the batch, nor on the adapters of the others.
void same_bits_at_any_place() {
  for (const auto& [name, path] : {std::pair<std::string, Path>{"cluster", cluster},
                                   {"narrow", narrow},
                                   {"narrow apart", narrow_apart},
                                   {"narrow halves", narrow_halves}}) {
    Random random(5);
    for (int64_t rows : {2, 9, 17, 40, 72}) {
      for (int rank : {16, 8, 40}) {
        cuda::emulated_device.sms = random.chance(0.3) ? 5 : 132;
        Shape shape{DType::kBFloat16, rows, 32 * random.between(1, 9), {72, 24}, 5, {rank, 3, 0, 16}};
        const std::string what = name + ", " + std::to_string(rows) + " rows, rank " + std::to_string(rank) + ", moved";
        Problem problem(shape, random.bits());
        running = what;
        problem.spoil(1, false);
        CHECK(path(problem) == cudaSuccess, "%s", what.c_str());
        const std::vector<unsigned char> before = problem.y_bytes();
        std::vector<int64_t> to(static_cast<size_t>(rows));
        for (size_t r = 0; r < to.size(); ++r) to[r] = static_cast<int64_t>(r);
        for (size_t r = to.size(); r > 1; --r) std::swap(to[r - 1], to[random.bits() % r]);
        std::vector<bool> keeps(to.size());
        for (size_t r = 0; r < keeps.size(); ++r) keeps[r] = r == 0 || random.chance(0.6);
        problem.move_rows(to, keeps);
        problem.spoil(2, false);
        CHECK(path(problem) == cudaSuccess, "%s", what.c_str());
        const std::vector<unsigned char> after = problem.y_bytes();
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = to[static_cast<size_t>(r)];
          CHECK(!keeps[static_cast<size_t>(r)] || problem.row_of(after, at) == problem.row_of(before, r),
                "%s: row %lld, at %lld now", what.c_str(), (long long)r, (long long)at);
        }
        problem.check(what);
        running.clear();
      }
    }
    cuda::emulated_device.sms = 132;
  }
}

// What only a caller that is wrong, or unlucky, sends.
void odd_calls() {
  for (const auto& [name, path] : {std::pair<std::string, Path>{"cluster", cluster},
                                   {"narrow", narrow},
                                   {"wide", wide},
                                   {"mma", mma},
                                   {"mma added", mma_added},
                                   {"narrow apart", narrow_apart},
                                   {"wide apart", wide_apart}}) {
    Problem no_room({DType::kBFloat16, 3, 64, {64, 24}, 2, {16}}, 1);
    no_room.set_v_width(0);
    no_room.spoil(1, false);
    CHECK(path(no_room) == cudaSuccess && no_room.is_untouched(), "%s: no columns of v", name.c_str());

    for (int rank : {1, 3, 6}) {  // ranks beyond stand for nothing, not for infinity times nothing
      Problem infinite({DType::kBFloat16, 2, 64, {64}, 1, {rank}, "one"}, 2);
      infinite.set_x(0, 5, INFINITY);
      infinite.spoil(1, false);
      CHECK(path(infinite) == cudaSuccess, "%s", name.c_str());
      for (int64_t n = 0; n < 64 && rank == 1; ++n) {
        CHECK(std::isinf(infinite.y(0, 0, n)), "%s: output %lld is %g", name.c_str(), (long long)n,
              infinite.y(0, 0, n));
      }
      for (int64_t n = 0; n < 64; ++n) CHECK(std::isfinite(infinite.y(1, 0, n)), "%s", name.c_str());
    }
  }
  for (Path path : {wide_lookup, mma_lookup, narrow_lookup}) {
    Shape shape{DType::kBFloat16, 5, 37, {136}, 1, {16}, "one"};
    shape.lookup = "token";
    Problem problem(shape, 3);
    problem.set_a_cols(15);
    problem.spoil(1, false);
    CHECK(path(problem) == cudaSuccess && problem.is_untouched(), "an entry of more ranks than A has columns");
  }
}

void prefill() {
  for (const auto& [name, path] : {std::pair<std::string, Path>{"wide", wide},
                                   {"mma", mma},
                                   {"mma added", mma_added},
                                   {"wide halves", wide_halves},
                                   {"mma halves", mma_halves}}) {
    run(name + " rows 300", path, {DType::kBFloat16, 300, 320, {128, 64}, 3, {16, 40}, "segments"});
    run(name + " rows 257 of one", path, {DType::kFloat16, 257, 128, {200}, 1, {24}, "one"});
    run(name + " rows 200 mixed", path, {DType::kBFloat16, 200, 64, {72, 64}, 4, {8, 64, 130}, "mixed"});
    run(name + ", a rank above an even share", path, {DType::kBFloat16, 40, 64, {64, 128}, 1, {200, 8}, "one"});
    run(name + ", more ranks than a pass takes", path,
        {DType::kBFloat16, 20, 640, {64, 64, 8}, 1, {256, 100, 200}, "one"});
    run(name + ", small ranks of many slices", path,
        {DType::kBFloat16, 20, 128, {64, 64, 8, 8, 8, 8, 8, 8}, 1, {8}, "one"});
    run(name + ", K in parts", path, {DType::kBFloat16, 150, 1024, {128, 64}, 3, {16, 40}, "segments"});
    run(name + ", K in parts, few rows", path, {DType::kBFloat16, 5, 2048, {64}, 2, {33}, "mixed"});
    Shape shape{DType::kBFloat16, 150, 128, {64, 200, 64}, 2, {12, 24}, "segments"};
    shape.shared_a = true;
    run(name + ", one A for all slices", path, shape);
    // sums of more than 64 ranks
    shape.ranks = {100};
    shape.k = 1024;  // parts enough for each slice to have its own
    shape.rows = 70;
    run(name + ", one A of many ranks for all slices", path, shape);
    run(name + ", many ranks, absent slices", path,
        {DType::kBFloat16, 70, 1024, {64, 72, 40}, 3, {48, 0, 100, 0, 33, 17, 64, 64, 64}, "segments"});
    run(name + ", more slices than v has room for side by side", path,
        {DType::kBFloat16, 24, 256, {8, 8, 8, 64, 8, 8, 8, 8}, 2, {33, 16, 16, 16, 16, 16, 16, 8}, "mixed"});
    for (int sms : {3, 7}) {  // tiles one after the other, in clusters of several sizes
      cuda::emulated_device.sms = sms;
      run(name + ", many ranks on " + std::to_string(sms) + " SMs", path,
          {DType::kBFloat16, 200, 512, {128, 64}, 5, {64, 40, 8, 100}, "segments"});
    }
    for (int sms : {4, 7}) {  // 2 or 3 clusters of two: of 4 or 5 tiles some have clusters of their own
      cuda::emulated_device.sms = sms;
      for (const auto& [tiles, groups, ids] :
           {std::tuple<std::string, int, std::string>{"as many as expected", 1, "one"},
            {"none", 1, "none"},
            {"fewer", 12, "one"},
            {"one more", 12, "segments"},
            {"more", 20, "segments"}}) {
        const std::string what = name + ", tiles left over on " + std::to_string(sms) + " SMs, " + tiles;
        run(what, path, {DType::kBFloat16, 520, 512, {128, 64}, groups, {8, 40}, ids});
        run(what + ", many ranks", path, {DType::kFloat16, 520, 512, {64, 72}, groups, {100, 30, 33}, ids});
      }
    }
    cuda::emulated_device.sms = 132;
  }
  // panel after panel of B, in pairs of pieces and not, the last ones cut off, of tiles with rows for one warpgroup or
  // two
  for (const auto& [name, path] : {std::pair<std::string, Path>{"wide", wide}, {"mma", mma}}) {
    for (int rank : {33, 64, 72, 96, 100, 128, 130, 192, 256}) {
      for (int64_t rows : {53, 117}) {
        Shape shape{DType::kBFloat16, rows, 64, {520, 296}, 1, {rank, 90}, "one"};
        const std::string what = name + ", panels, rank " + std::to_string(rank) + ", rows " + std::to_string(rows);
        run(what, path, shape);
        shape.dtype = DType::kFloat16;
        shape.odd_b = true;
        shape.widths = {328, 360};
        run(what + ", odd B", path, shape);
      }
    }
  }
  run("large blocks of expand", mma, {DType::kBFloat16, 16, 64, {8192, 40}, 16, {16, 0, 70, 8}, "each"});
  run("large blocks of expand, halves", mma_halves, {DType::kFloat16, 16, 64, {8200}, 16, {16, 8, 256, 0}, "each"});
  for (int rank : {16, 64, 256}) {
    const Shape shape{DType::kBFloat16, 130, 64, {2048}, 64, {rank}, "one"};
    run("large blocks of expand, whole tiles, rank " + std::to_string(rank), mma, shape);
    cuda::emulated_device = {0, 8, 108, 163 * 1024};  // 8.0: as far as v of a tile has room
    run("8.0, many outputs, rank " + std::to_string(rank), mma, shape);
    cuda::emulated_device = {0, 9, 132, 227 * 1024};
  }
  cuda::emulated_device = {0, 8, 84, 99 * 1024};  // 8.6: v of few rows at a time, half the ranks a pass over x
  run("8.6, many ranks, added", mma_added,
      {DType::kBFloat16, 150, 1024, {64, 200}, 2, {200, 130, 64, 256}, "segments"});
  run("8.6, many ranks", mma, {DType::kBFloat16, 150, 128, {64, 200}, 2, {200, 130, 64, 256}, "segments"});
  run("8.6, halves of many ranks", mma_halves, {DType::kFloat16, 140, 64, {72}, 1, {256}, "one"});
  cuda::emulated_device = {0, 9, 132, 227 * 1024};
}

// Passes over x as one walk that the blocks of a cluster share.
void passes() {
  for (int passes = 1; passes <= 16; ++passes) {
    for (int chunks = 1; chunks <= 40; chunks += 3) {
      for (int parts = 1; parts <= 16; ++parts) {
        const cuda::PassShares shares{passes, chunks, parts};
        int least = 1 << 30, most = 0, most_planes = 0;
        std::vector<int> of_part(static_cast<size_t>(parts));
        bool right = true;
        for (int pass = 0; pass < passes; ++pass) {
          const int first = shares.first_part(pass), end = shares.end_part(pass);
          right &= 0 <= first && first < end && end <= parts;
          most_planes = std::max(most_planes, shares.planes(pass));
          int done = 0;  // each chunk by one block, in order
          for (int part = 0; part < parts; ++part) {
            cuda::LinearTask task{};
            task.k = chunks * cuda::kChunkK;
            cuda::BlockShare share{};
            for (int lane = 0; lane < 32; ++lane) share.set_k(task, passes, part, parts, lane);
            const cuda::Part own = share.chunks_of(pass, chunks);
            const bool has_part = first <= part && part < end;
            right &= own.begin == own.end || (has_part && own.begin == done && own.end <= chunks);
            done += own.end - own.begin;
            of_part[static_cast<size_t>(part)] += own.end - own.begin;
            // a block goes from its first pass to its last one, and is the first one of all but that
            right &= (share.first_pass <= pass && pass <= share.last_pass) == has_part;
            right &= share.first_pass == shares.first_pass(part);
            right &= !has_part || pass == shares.first_pass(part) || first == part;
          }
          right &= done == chunks;
        }
        right &= most_planes == shares.most_planes();
        for (int n : of_part) least = std::min(least, n), most = std::max(most, n);
        CHECK(right && most - least <= 1, "%d passes of %d chunks, %d parts", passes, chunks, parts);
      }
    }
  }
  for (const auto& [name, path] :
       {std::pair<std::string, Path>{"wide", wide}, {"wide halves", wide_halves}, {"wide apart", wide_apart}}) {
    for (const std::vector<int>& ranks : std::vector<std::vector<int>>{
             {128, 128, 128}, {256, 256}, {100, 140, 143}, {256, 250, 256, 240}, {200, 0, 256, 16, 256}}) {
      std::vector<int64_t> widths(ranks.size(), 40);
      widths[0] = 200;
      const std::string what =
          name + ", passes over x of " + std::to_string(ranks.size()) + " slices, rank " + std::to_string(ranks[0]);
      for (int blocks : {2, 3, 5}) {  // of the cluster
        cuda::emulated_device.sms = blocks;
        Shape shape{DType::kBFloat16, 21, 704, widths, 1, ranks, "one"};
        shape.stale_is_noise = blocks == 3;
        cuda::launches.clear();
        run(what + ", blocks " + std::to_string(blocks), path, shape);
        const auto is_so = [blocks](const auto& launch) { return launch.cluster == blocks; };
        CHECK(std::any_of(cuda::launches.begin(), cuda::launches.end(), is_so), "%s: no clusters of %d", what.c_str(),
              blocks);
      }
      run(what + ", fewer chunks than blocks", path, {DType::kFloat16, 21, 64, widths, 1, ranks, "one"});
    }
    // tiles of one to four passes in turn, and in a launch of those left over
    for (const auto& [rows, k, groups, sms] : {std::tuple<int64_t, int64_t, int, int>{300, 192, 5, 5},
                                               {300, 704, 5, 7},
                                               {520, 192, 12, 4},
                                               {520, 192, 12, 7}}) {
      cuda::emulated_device.sms = sms;
      run(name + ", tiles of several passes, rows " + std::to_string(rows) + ", " + std::to_string(sms) + " SMs", path,
          {DType::kBFloat16,
           rows,
           k,
           {72, 40, 40},
           groups,
           {128, 40, 16, 256, 200, 3, 0, 8, 20, 128, 128, 129},
           "segments"});
    }
    cuda::emulated_device.sms = 132;
  }
}

// Runs of few and of many rows in one batch.
void mixed_lengths() {
  for (const auto& [name, path] : {std::pair<std::string, Path>{"cluster and wide", by_length<cluster_of, wide_of>},
                                   {"narrow and wide", by_length<narrow_of, wide_of>},
                                   {"narrow and mma", by_length<narrow_of, mma_of>},
                                   {"cluster and mma added", by_length<cluster_of, mma_added_of>}}) {
    for (const char* ids : {"mixed", "lengths", "none", "one"}) {
      Shape shape{DType::kBFloat16, 300, 320, {128, 64}, 12, {16, 40, 0, 8}, ids};
      run(name + ", " + ids, path, shape);
      shape.dtype = DType::kFloat16;
      shape.groups = 70;
      run(name + " of many groups, " + ids, path, shape);
      shape.k = 512;
      cuda::emulated_device.sms = 4;  // clusters of two, and larger ones of what they leave over
      run(name + " of many groups on 4 SMs, " + ids, path, shape);
      cuda::emulated_device.sms = 132;
    }
  }
}

void embedding() {
  for (const auto& [name, path] : {std::pair<std::string, Path>{"wide lookup", wide_lookup},
                                   {"mma lookup", mma_lookup},
                                   {"narrow lookup", narrow_lookup}}) {
    for (const char* layout : {"rank", "token"}) {
      for (int64_t rows : {1, 5, 40, 150, 400}) {
        Shape shape{DType::kBFloat16, rows, 37, {136}, 4, {16, 8, 0, 33}};
        shape.lookup = layout;
        const std::string what = name + " by " + layout + ", rows " + std::to_string(rows);
        run(what, path, shape, 4);
        shape.ranks = {64, 8, 256, 100};
        run(what + ", many ranks", path, shape);
        shape.ranks = {16, 8, 0, 33};
        shape.dtype = DType::kFloat16;
        shape.odd_b = true;
        shape.widths = {64, 40};
        run(what + ", odd B", path, shape);
      }
      for (int sms : {3, 7}) {  // tiles one after the other
        cuda::emulated_device.sms = sms;
        Shape shape{DType::kBFloat16, 300, 37, {136, 64}, 5, {16, 8, 0, 40}, "segments"};
        shape.lookup = layout;
        run(name + " by " + layout + " on " + std::to_string(sms) + " SMs", path, shape);
      }
      cuda::emulated_device.sms = 132;
    }
  }
}

}  // namespace
}  // namespace polylora::testing

int main() {
  using namespace polylora;
  testing::any_shape("cluster", testing::cluster, 32);
  testing::any_shape("wide", testing::wide, 8);
  testing::any_shape("mma", testing::mma, 8);
  testing::any_shape("mma added", testing::mma_added, 8);
  testing::any_shape("wide halves", testing::wide_halves, 8);
  testing::any_shape("narrow", testing::narrow, 32);
  testing::any_shape("narrow apart", testing::narrow_apart, 32);
  testing::any_shape("wide apart", testing::wide_apart, 8);
  testing::any_shape("narrow halves", testing::narrow_halves, 8);
  testing::many_full_tiles();
  testing::few_jobs_of_many();
  testing::many_units_a_warp();
  testing::many_outputs();
  testing::many_parts();
  testing::balanced_slices();
  testing::same_bits_at_any_place();
  testing::odd_calls();
  testing::prefill();
  testing::passes();
  testing::mixed_lengths();
  testing::embedding();
  return testing::report();
}
