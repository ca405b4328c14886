// The CUDA kernels of a mixture of experts, run thread by thread on the CPU (emulator/emulator.h), against double
// precision.
//
// Every array ends at a page that faults. What no kernel may read is NaN: weights of absent slices, ranks beyond an
// adapter's own, rows that do not exist, weights of pairs that count for nothing. Until a kernel has waited for the one
// before it, all but A and B hold something else.
#include "moe/paths.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <string>

#include "check.h"
#include "emulated.h"
#include "polylora/activation.h"
#include "polylora/cpu.h"
#include "reference.h"

namespace polylora::cuda {

/// POLYLORA_BATCH_INVARIANT, as tests set it.
bool invariant = false;
bool batch_invariant() { return invariant; }

}  // namespace polylora::cuda

namespace polylora::testing {
namespace {

enum class Op { kGateUp, kDown, kGateUpAct, kDownReduce };

struct Shape {
  Op op;
  int64_t tokens = 9;
  int top_k = 2;
  int64_t k = 64;
  std::vector<int64_t> widths = {64};  // one slice, or gate and up
  std::vector<int> ranks = {16};       // of (group, slice), in turn; 0: absent
  DType dtype = DType::kBFloat16;
  int slots = 3, experts = 4;
  std::string ids = "mixed";
  std::string map =
      "";  // "": none, "sorted": by expert, padded to fours, "shuffled": any order, pairs twice or nowhere
  bool interleaved = false;  // gate and up
  Activation act = Activation::kSilu;
  bool y_weighted = false;
  bool apart = false;            // the deltas by an op of their own
  bool few = false;              // and by linear's kernels, as those of few pairs
  bool narrow = false;           // by linear's kernels: one expert, a pair a token
  bool v_given = false;          // and v, of each row of x: for gate and up, where all experts share A
  bool shared_a = false;         // one A for gate and up
  bool experts_share_a = false;  // of one adapter
  bool experts_share_b = false;
  bool own_arenas = false;  // of each slice
  int64_t more_v = 0;       // columns of v beyond what the table uses
  int64_t more_stride = 0;  // of B beyond the rank
  bool odd_b = false;       // offsets and pitches of B that are no multiples of 8
  bool tight_b = false;     // pitches of B that are the rank
  bool broken = false;      // some entries lead outside what the call is given: they count as absent
  bool other_plan = false;  // made for other sizes: counts as empty
  bool stale_is_noise = false;
};

/// What a kernel reads or writes, and what stands there until the grid before it has ended.
struct Staged {
  unsigned char* data;
  std::vector<unsigned char> truth, stale;
};

class Problem {
 public:
  Problem(const Shape& shape, uint64_t seed)
      : shape_(shape), random_(seed), slices_(static_cast<int>(shape.widths.size())) {
    groups_ = shape.slots * shape.experts;
    pairs_ = shape.tokens * shape.top_k;
    gated_ = shape.op == Op::kGateUp || shape.op == Op::kGateUpAct;  // reads x by token
    in_place_ = shape.op == Op::kGateUp || shape.op == Op::kDown;
    make_weights();
    experts_of_pairs_ = draw_experts();
    slot_of_token_ = draw_slots();
    map_ = draw_map();
    rows_ = shape.map.empty() ? pairs_ : static_cast<int64_t>(map_.size());
    make_rows();
    make_results();
    make_plans();
  }

  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;
  ~Problem() { emulator::options().grid_begins = emulator::options().previous_grid = nullptr; }

  LoraParams params() const {
    LoraParams p{};
    p.dtype = shape_.dtype;
    p.rows = rows_;
    p.k = shape_.k;
    p.x = x_->data();
    p.x_stride = x_stride_;
    p.x_div = gated_ ? shape_.top_k : 0;
    p.y = y_->data();
    p.y_stride = y_stride_;
    p.v_width = static_cast<int32_t>(v_width_);
    p.row_map = shape_.map.empty() ? nullptr : reinterpret_cast<const int32_t*>(map_bytes_->data());
    p.row_weight = gated_ ? nullptr : reinterpret_cast<const float*>(weights_->data());
    p.slices.table = reinterpret_cast<const SliceEntry*>(table_bytes_->data());
    p.slices.groups = groups_;
    p.slices.count = slices_;
    p.slices.col_stride = shape_.interleaved ? 2 : 1;
    for (int s = 0; s < slices_; ++s) {
      const Arena& arena = arena_of(s);
      p.slices.a[s] = arena.a->data();
      p.slices.a_stride[s] = arena.a_stride;
      p.slices.a_rows[s] = arena.a_rows;
      p.slices.b[s] = arena.b->data();
      p.slices.b_elements[s] = arena.b_elements;
      p.slices.width[s] = static_cast<int32_t>(shape_.widths[static_cast<size_t>(s)]);
      p.slices.col[s] = cols_[static_cast<size_t>(s)];
    }
    p.plan =
        plan_view(reinterpret_cast<const int32_t*>(plan_->data()), rows_, groups_, shape_.map.empty() ? 0 : pairs_);
    return p;
  }

  GateUpActParams gate_up_act_params() const {
    GateUpActParams g{};
    g.lora = params();
    g.h = result_->data();
    g.h_stride = result_stride_;
    g.act = shape_.act;
    g.alpha = kAlpha;
    g.limit = kLimit;
    return g;
  }

  DownReduceParams down_reduce_params() const {
    DownReduceParams d{};
    d.lora = params();
    d.out = result_->data();
    d.out_stride = result_stride_;
    d.tokens = shape_.tokens;
    d.top_k = shape_.top_k;
    d.y_weighted = shape_.y_weighted;
    return d;
  }

  Op op() const { return shape_.op; }
  bool apart() const { return shape_.apart; }
  bool few() const { return shape_.few; }
  bool narrow() const { return shape_.narrow; }
  bool v_given() const { return shape_.v_given; }

  /// v of the rows of x, NaN where no adapter has a rank; sets the pitch.
  float* given_v(int64_t& stride) {
    stride = v_width_ + 3;
    const int64_t x_rows = gated_ ? shape_.tokens : rows_;
    std::vector<float> v(static_cast<size_t>(elements_of(x_rows, stride, v_width_)), std::nanf(""));
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t group = group_of(row);
      for (int s = 0; group >= 0 && s < slices_; ++s) {
        const SliceEntry& entry = present_[at_entry(group, s)];
        for (int64_t j = 0; j < entry.rank; ++j) {
          v[static_cast<size_t>(x_row_of(row) * stride + entry.v_col + j)] = static_cast<float>(v_of(row, s, entry, j));
        }
      }
    }
    if (v_bytes_ == nullptr) v_bytes_ = stage_words(v, std::vector<float>(v.size(), 1e3f));
    return reinterpret_cast<float*>(v_bytes_->data());
  }

  /// Memory for the deltas of all rows, NaN until they are made.
  void* deltas(int64_t bytes) {
    deltas_.reset(new GuardedBytes(bytes));
    std::memset(deltas_->data(), 0xff, static_cast<size_t>(bytes));
    return deltas_->data();
  }
  /// A plan that was made for another call has no rows, so none has a delta.
  bool deltas_are_as_planned() const {
    const auto as_before = [](unsigned char byte) { return byte == 0xff; };
    return !shape_.other_plan || std::all_of(deltas_->data(), deltas_->data() + deltas_->size(), as_before);
  }

  /// All inputs and outputs as another step left them, until the kernel waits for it.
  void spoil(uint64_t seed, bool stale) {
    scratch_.reset();
    arrived_ = false;
    grids_ = 0;
    emulator::options().seed = seed;
    emulator::options().grid_begins = [this] {
      if (grids_++ > 0 && scratch_ && cuda::launches.back().overlap) hide_until_waited(*scratch_);
    };
    emulator::options().previous_grid = [this] { arrive(); };
    for (Staged& staged : staged_) {
      const auto& from = stale ? staged.stale : staged.truth;
      std::copy(from.begin(), from.end(), staged.data);
    }
    // another step's table is this one, or whatever stood in its memory
    if (stale && random_.chance(0.5)) {
      std::memcpy(table_bytes_->data(), table_.data(), table_.size() * sizeof(SliceEntry));
    }
  }

  /// Memory of the call that another call used until the grid before has ended.
  void* scratch(int64_t bytes) {
    scratch_.reset(new GuardedBytes(bytes));
    return scratch_->data();
  }

  /// Once: a path may be several grids, and what it has written since must stay.
  void arrive() {
    if (arrived_) return;
    arrived_ = true;
    for (Staged& staged : staged_) std::copy(staged.truth.begin(), staged.truth.end(), staged.data);
    if (scratch_) std::memset(scratch_->data(), 0xff, static_cast<size_t>(scratch_->size()));
  }

  /// Checks what the op wrote, and that it wrote nothing else; returns its bits.
  std::vector<unsigned char> check(const std::string& what) {
    arrive();  // nothing was launched
    for (const Staged& staged : staged_) {
      const unsigned char* written = in_place_ ? y_->data() : result_->data();
      if (staged.data == written) continue;
      CHECK(std::equal(staged.truth.begin(), staged.truth.end(), staged.data), "%s: an input changed", what.c_str());
    }
    if (in_place_) {
      check_in_place(what);
    } else if (shape_.op == Op::kGateUpAct) {
      check_activations(what);
    } else {
      check_sums(what);
    }
    return in_place_ ? y_->copy() : result_->copy();
  }

 private:
  static constexpr float kAlpha = 1.702f;
  static constexpr float kLimit = 1.25f;  // within reach of the values

  struct Arena {
    std::unique_ptr<Array> a, b;
    int64_t a_stride, a_rows = 3, b_elements = 8;
  };

  struct Delta {
    bool present = false;
    double value = 0, error = 0;
  };

  /// Of a matrix: what lies behind its last row, a call is not given.
  static int64_t elements_of(int64_t rows, int64_t stride, int64_t columns) {
    return rows == 0 ? 0 : (rows - 1) * stride + columns;
  }

  // ---- weights and table

  const Arena& arena_of(int slice) const { return arenas_[shape_.own_arenas ? static_cast<size_t>(slice) : 0]; }
  Arena& arena_of(int slice) { return arenas_[shape_.own_arenas ? static_cast<size_t>(slice) : 0]; }
  int64_t width_of(int slice) const { return shape_.widths[static_cast<size_t>(slice)]; }
  size_t at_entry(int64_t group, int slice) const { return static_cast<size_t>(group * slices_ + slice); }

  void make_weights() {
    for (int s = 0; s < slices_; ++s) {
      arenas_.emplace_back();
      arenas_.back().a_stride = shape_.k + 16 + 8 * s;
    }
    int at_rank = 0;
    for (int g = 0; g < groups_; ++g) {
      const bool first_expert = g % shape_.experts == 0;
      int64_t v_col = 0;
      for (int s = 0; s < slices_; ++s) {
        const bool sharing = shape_.experts_share_a || shape_.experts_share_b;
        const SliceEntry of_first = first_expert ? SliceEntry{} : table_[at_entry(g - g % shape_.experts, s)];
        const SliceEntry gate = s > 0 ? table_.back() : SliceEntry{};
        SliceEntry entry{};
        entry.rank = shape_.ranks[static_cast<size_t>(at_rank++) % shape_.ranks.size()];
        if (shape_.shared_a && gate.rank > 0 && entry.rank > 0) entry.rank = gate.rank;
        if (sharing && !first_expert) entry.rank = of_first.rank;
        entry.scale = static_cast<float>(0.5 + random_.uniform());
        if (entry.rank == 0) {
          entry.a_row = -5;
          entry.v_col = 1 << 20;
          entry.b_offset = -77;
        } else {
          place(entry, g, s, shape_.shared_a && gate.rank > 0 ? &gate : nullptr, first_expert ? nullptr : &of_first,
                v_col);
        }
        table_.push_back(entry);
      }
    }
    v_width_ = std::max<int64_t>(v_width_, 1) + shape_.more_v;
    for (Arena& arena : arenas_) {
      arena.a.reset(new Array(shape_.dtype, elements_of(arena.a_rows, arena.a_stride, shape_.k)));
      arena.b.reset(new Array(shape_.dtype, arena.b_elements));
    }
    for (int g = 0; g < groups_; ++g) {
      for (int s = 0; s < slices_; ++s) fill(table_[at_entry(g, s)], s);
    }
    present_ = table_;
    if (shape_.v_given) {  // where A lies is nobody's business, and slices that share v may have an A each
      for (int g = 0; g < groups_; ++g) {
        if (slices_ > 1) table_[at_entry(g, 1)].a_row += 1000;
      }
    }
    if (shape_.broken) break_entries();
    table_bytes_.reset(new GuardedBytes(static_cast<int64_t>(table_.size() * sizeof(SliceEntry))));
    std::vector<unsigned char> noise(table_.size() * sizeof(SliceEntry));
    for (unsigned char& byte : noise) byte = static_cast<unsigned char>(random_.bits());
    const auto* bytes = reinterpret_cast<const unsigned char*>(table_.data());
    staged_.push_back({table_bytes_->data(), {bytes, bytes + noise.size()}, noise});
  }

  void place(SliceEntry& entry, int group, int slice, const SliceEntry* gate, const SliceEntry* of_first,
             int64_t& v_col) {
    Arena& arena = arena_of(slice);
    if (gate != nullptr) {
      entry.a_row = gate->a_row;
      entry.v_col = gate->v_col;
    } else {
      entry.v_col = static_cast<int32_t>(v_col);
      v_col += entry.rank;
      if (shape_.experts_share_a && of_first != nullptr) {
        entry.a_row = of_first->a_row;
      } else {
        entry.a_row = static_cast<int32_t>(arena.a_rows + 1);
        arena.a_rows += entry.rank + 1;
      }
    }
    v_width_ = std::max<int64_t>(v_width_, entry.v_col + entry.rank);
    if (shape_.experts_share_b && of_first != nullptr) {
      entry.b_stride = of_first->b_stride;
      entry.b_offset = of_first->b_offset;
      return;
    }
    const int64_t pitch = shape_.tight_b ? entry.rank : (entry.rank + 7) / 8 * 8;
    entry.b_stride = static_cast<int32_t>(pitch + shape_.more_stride + (shape_.odd_b ? 3 + 2 * (group % 2) : 0));
    entry.b_offset = (arena.b_elements + 15) / 8 * 8 + (shape_.odd_b ? 1 : 0);
    arena.b_elements = entry.b_offset + (width_of(slice) - 1) * entry.b_stride + entry.rank;
  }

  void fill(const SliceEntry& entry, int slice) {
    Arena& arena = arena_of(slice);
    for (int64_t j = 0; j < entry.rank; ++j) {
      if (!std::isnan(arena.a->get((entry.a_row + j) * arena.a_stride))) continue;  // shared
      for (int64_t i = 0; i < shape_.k; ++i) {
        arena.a->set((entry.a_row + j) * arena.a_stride + i,
                     normal(random_) / std::sqrt(static_cast<double>(shape_.k)));
      }
    }
    for (int64_t n = 0; n < width_of(slice); ++n) {
      for (int64_t j = 0; j < entry.rank; ++j) {
        const int64_t at = entry.b_offset + n * entry.b_stride + j;
        if (std::isnan(arena.b->get(at))) {
          arena.b->set(at, normal(random_) / std::sqrt(static_cast<double>(entry.rank)));
        }
      }
    }
  }

  void break_entries() {
    for (size_t at = 0; at < table_.size(); ++at) {
      SliceEntry& entry = table_[at];
      const Arena& arena = arena_of(static_cast<int>(at) % slices_);
      if (entry.rank == 0 || random_.chance(0.5)) continue;
      switch (random_.between(shape_.v_given ? 1 : 0, 6)) {
        case 0:
          entry.a_row = static_cast<int32_t>(arena.a_rows - entry.rank + 1);
          break;
        case 1:
          entry.a_row = -1;
          break;
        case 2:
          entry.b_offset = arena.b_elements - entry.rank;  // room for the first output alone
          break;
        case 3:
          entry.b_offset = -8;
          break;
        case 4:
          entry.v_col = static_cast<int32_t>(v_width_ - entry.rank + 1);
          break;
        case 5:
          entry.rank = kMaxRank + 8;
          break;
        default:
          entry.rank = -entry.rank;
      }
      present_[at].rank = 0;
    }
  }

  // ---- who goes where

  std::vector<int32_t> draw_experts() {
    std::vector<int32_t> experts;
    for (int64_t token = 0; token < shape_.tokens; ++token) {
      std::vector<int32_t> left(static_cast<size_t>(shape_.experts));  // a token's experts differ, as a router's do
      std::iota(left.begin(), left.end(), 0);
      for (int j = 0; j < shape_.top_k; ++j) {
        if (left.empty()) {
          experts.push_back(-1);
          continue;
        }
        const size_t drawn = static_cast<size_t>(random_.between(0, static_cast<int64_t>(left.size()) - 1));
        int32_t expert = left[drawn];
        left.erase(left.begin() + static_cast<int64_t>(drawn));
        if (shape_.ids == "one") expert = 0;
        if (shape_.ids == "skewed" && random_.chance(0.8)) expert = 1;
        if (shape_.ids == "each") expert = static_cast<int32_t>((token + j) % shape_.experts);
        // the same expert twice in one token
        if (shape_.ids == "mixed" && j > 0 && random_.chance(0.15)) expert = experts.back();
        if (shape_.ids == "mixed" && random_.chance(0.1)) expert = random_.chance(0.5) ? -1 : shape_.experts + 3;
        experts.push_back(expert);
      }
    }
    return experts;
  }

  std::vector<int32_t> draw_slots() {
    std::vector<int32_t> slots;
    for (int64_t token = 0; token < shape_.tokens; ++token) {
      int32_t slot = static_cast<int32_t>(random_.between(0, shape_.slots - 1));
      if (shape_.ids == "none") slot = -1;
      if (shape_.ids == "one") slot = 0;
      if (shape_.ids == "skewed" && random_.chance(0.8)) slot = shape_.slots - 1;
      if (shape_.ids == "mixed" && random_.chance(0.2)) slot = random_.chance(0.5) ? -1 : shape_.slots + 2;
      slots.push_back(slot);
    }
    return slots;
  }

  std::vector<int32_t> draw_map() {
    std::vector<int32_t> map;
    if (shape_.map == "sorted") {
      for (int32_t expert = -1; expert < shape_.experts; ++expert) {
        for (int64_t pair = 0; pair < pairs_; ++pair) {
          const int32_t its = experts_of_pairs_[static_cast<size_t>(pair)];
          const bool here = expert < 0 ? (its < 0 || its >= shape_.experts) && pair % 2 == 0 : its == expert;
          if (here) map.push_back(static_cast<int32_t>(pair));
        }
        while (map.size() % 4 != 0) map.push_back(-1);
      }
      for (int more = 0; more < 4; ++more) map.push_back(-1);  // room for the worst case
    } else if (shape_.map == "shuffled") {
      for (int64_t pair = 0; pair < pairs_; ++pair) {
        if (random_.chance(0.1)) continue;
        map.push_back(static_cast<int32_t>(pair));
        if (random_.chance(0.1)) map.push_back(static_cast<int32_t>(pair));
        if (random_.chance(0.2)) map.push_back(random_.chance(0.7) ? -1 : static_cast<int32_t>(pairs_ + 9));
      }
      map.push_back(-1);
      for (size_t i = map.size(); i > 1; --i) std::swap(map[i - 1], map[random_.bits() % i]);
    } else if (shape_.map == "padding") {
      map.assign(11, -1);
    }
    return map;
  }

  /// Pair of a row, or -1.
  int64_t pair_of(int64_t row) const {
    if (shape_.map.empty()) return row;
    const int32_t pair = map_[static_cast<size_t>(row)];
    return pair < 0 || pair >= pairs_ ? -1 : pair;
  }

  int64_t group_of(int64_t row) const {
    if (shape_.other_plan) return kNoAdapter;
    const int64_t pair = pair_of(row);
    if (pair < 0) return kNoRow;
    const int32_t expert = experts_of_pairs_[static_cast<size_t>(pair)];
    if (expert < 0 || expert >= shape_.experts) return kNoRow;
    const int32_t slot = slot_of_token_[static_cast<size_t>(pair / shape_.top_k)];
    return slot < 0 || slot >= shape_.slots ? kNoAdapter : slot * shape_.experts + expert;
  }

  /// The row that down_reduce takes for a pair, or -1: the last of them.
  int64_t row_of(int64_t pair) const {
    if (shape_.map.empty() || shape_.other_plan) return pair < rows_ && group_of(pair) != kNoRow ? pair : -1;
    for (int64_t row = rows_; row-- > 0;) {
      if (pair_of(row) == pair) return group_of(row) == kNoRow ? -1 : row;
    }
    return -1;
  }

  bool has_delta(int64_t row) const {
    const int64_t group = group_of(row);
    if (group < 0) return false;
    bool any = false;
    for (int s = 0; s < slices_; ++s) any |= present_[at_entry(group, s)].rank > 0;
    return any;
  }

  int64_t x_row_of(int64_t row) const { return gated_ ? pair_of(row) / shape_.top_k : row; }

  // ---- rows

  void make_rows() {
    x_stride_ = shape_.k + 8;
    const int64_t x_rows = gated_ ? shape_.tokens : rows_;
    x_.reset(new Array(shape_.dtype, elements_of(x_rows, x_stride_, shape_.k)));
    int64_t end = 8;
    for (int s = 0; s < slices_; ++s) {
      cols_.push_back(shape_.interleaved ? 8 + s : end);
      end += width_of(s) + (shape_.interleaved ? 0 : 8);
    }
    y_stride_ = (end + 15) / 8 * 8;
    y_.reset(
        new Array(shape_.dtype, elements_of(rows_, y_stride_, column_of(slices_ - 1, width_of(slices_ - 1) - 1) + 1)));
    for (int64_t row = 0; row < rows_; ++row) {
      if (has_delta(row)) {
        for (int64_t i = 0; i < shape_.k; ++i) x_->set(x_row_of(row) * x_stride_ + i, normal(random_));
      }
      if (group_of(row) == kNoRow) continue;
      for (int s = 0; s < slices_; ++s) {
        for (int64_t n = 0; n < width_of(s); ++n) y_->set(row * y_stride_ + column_of(s, n), normal(random_));
      }
    }
    stage(*x_, 1e4);
    stage(*y_, 3e3);

    std::vector<float> weights(static_cast<size_t>(pairs_), std::nanf(""));
    const auto weight = [this] { return random_.chance(0.05) ? 0.f : static_cast<float>(0.1 + random_.uniform()); };
    if (shape_.op == Op::kDown) {
      for (int64_t row = 0; row < rows_; ++row) {
        if (has_delta(row)) weights[static_cast<size_t>(pair_of(row))] = weight();
      }
    } else if (shape_.op == Op::kDownReduce) {
      for (int64_t pair = 0; pair < pairs_; ++pair) {
        const int64_t row = row_of(pair);
        if (row >= 0 && (!shape_.y_weighted || has_delta(row))) weights[static_cast<size_t>(pair)] = weight();
      }
    }
    weight_ = weights;
    weights_ = stage_words(weights, std::vector<float>(weights.size(), 7.f));
    std::vector<int32_t> other_map;
    for (size_t i = 0; i < map_.size(); ++i) {
      other_map.push_back(static_cast<int32_t>(random_.between(-1, pairs_ > 0 ? pairs_ - 1 : -1)));
      if (shape_.stale_is_noise) other_map.back() = static_cast<int32_t>(random_.bits());
    }
    map_bytes_ = stage_words(map_, other_map);
  }

  int64_t col_stride() const { return shape_.interleaved ? 2 : 1; }
  int64_t column_of(int slice, int64_t n) const { return cols_[static_cast<size_t>(slice)] + n * col_stride(); }

  void make_results() {
    if (in_place_) return;
    result_stride_ = width_of(0) + 8;
    const int64_t rows = shape_.op == Op::kGateUpAct ? rows_ : shape_.tokens;
    result_.reset(new Array(shape_.dtype, elements_of(rows, result_stride_, width_of(0))));
    stage(*result_, 5.0);
    for (unsigned char& byte : staged_.back().truth) byte = static_cast<unsigned char>(random_.bits());
  }

  void make_plans() {
    const int64_t words = plan_layout(rows_, groups_, shape_.map.empty() ? 0 : pairs_).words;
    std::vector<int32_t> truth = make_plan(experts_of_pairs_, slot_of_token_, map_);
    const std::vector<int32_t> other_experts = draw_experts(), other_slots = draw_slots();
    std::vector<int32_t> other_map = map_;
    for (size_t i = other_map.size(); i > 1; --i) std::swap(other_map[i - 1], other_map[random_.bits() % i]);
    std::vector<int32_t> stale = make_plan(other_experts, other_slots, other_map);
    if (shape_.stale_is_noise) {
      for (int32_t& word : stale) word = static_cast<int32_t>(random_.bits());
    }
    if (shape_.other_plan) {
      // of its sections, nothing can be said
      for (size_t i = kPlanHeaderWords; i < static_cast<size_t>(words); ++i) {
        truth[i] = static_cast<int32_t>(random_.bits());
      }
      const PlanHeader words_that_tell[] = {kPlanVersion, kPlanRows, kPlanGroups, kPlanPairs};
      truth[static_cast<size_t>(words_that_tell[random_.between(0, 3)])] += 1;
    }
    plan_ = stage_words(truth, stale);
  }

  std::vector<int32_t> make_plan(const std::vector<int32_t>& experts, const std::vector<int32_t>& slots,
                                 const std::vector<int32_t>& map) const {
    const bool mapped = !shape_.map.empty();
    std::vector<int32_t> plan(static_cast<size_t>(plan_layout(rows_, groups_, mapped ? pairs_ : 0).words), -1);
    MoePlanParams m{};
    m.plan = plan.data();
    m.topk_ids = experts.data();
    m.token_slots = slots.data();
    m.row_map = mapped ? map.data() : nullptr;
    m.rows = rows_;
    m.pairs = pairs_;
    m.top_k = shape_.top_k;
    m.slots = shape_.slots;
    m.experts = m.global_experts = shape_.experts;
    cpu::moe_plan(m, serial);
    return plan;
  }

  void stage(Array& array, double stale) {
    Array other(shape_.dtype, array.size() / size_of(shape_.dtype));
    for (int64_t i = 0; i < array.size() / size_of(shape_.dtype); ++i) other.set(i, stale);
    staged_.push_back({array.data(), array.copy(), other.copy()});
  }

  template <typename Word>
  std::unique_ptr<GuardedBytes> stage_words(const std::vector<Word>& truth, const std::vector<Word>& stale) {
    auto bytes = std::make_unique<GuardedBytes>(static_cast<int64_t>(truth.size() * sizeof(Word)));
    const auto* t = reinterpret_cast<const unsigned char*>(truth.data());
    const auto* s = reinterpret_cast<const unsigned char*>(stale.data());
    staged_.push_back({bytes->data(), {t, t + bytes->size()}, {s, s + bytes->size()}});
    return bytes;
  }

  // ---- checks

  const std::vector<unsigned char>& before(const unsigned char* data) const {
    for (const Staged& staged : staged_) {
      if (staged.data == data) return staged.truth;
    }
    std::abort();
  }

  double v_of(int64_t row, int slice, const SliceEntry& entry, int64_t j) {
    const Arena& arena = arena_of(slice);
    const int64_t key = (x_row_of(row) * slices_ + slice) << 32 | (entry.a_row + j);
    const auto found = exact_v_.find(key);
    if (found != exact_v_.end()) return found->second;
    double sum = 0;
    for (int64_t i = 0; i < shape_.k; ++i) {
      sum += x_->get(x_row_of(row) * x_stride_ + i) * arena.a->get((entry.a_row + j) * arena.a_stride + i);
    }
    return exact_v_[key] = sum;
  }

  /// What the adapter adds to an output; without a top-k weight.
  Delta delta_of(int64_t row, int slice, int64_t n) {
    const int64_t group = group_of(row);
    if (group < 0) return {};
    const SliceEntry& entry = present_[at_entry(group, slice)];
    if (entry.rank <= 0) return {};
    Delta delta{true, 0, 0};
    double sizes = 0;
    for (int64_t j = 0; j < entry.rank; ++j) {
      const double b = arena_of(slice).b->get(entry.b_offset + n * entry.b_stride + j);
      const double term = entry.scale * v_of(row, slice, entry, j) * b;
      delta.value += term;
      sizes += std::fabs(term);
    }
    delta.error = delta_error(shape_.dtype, sizes);
    if (shape_.apart) delta.error += rounding_error(shape_.dtype, delta.value);
    return delta;
  }

  static bool same(const unsigned char* left, const unsigned char* right, int64_t element) {
    return std::memcmp(left + 2 * element, right + 2 * element, 2) == 0;
  }

  void check_in_place(const std::string& what) {
    const std::vector<unsigned char>& bits = before(y_->data());
    const int64_t elements = y_->size() / 2;
    Array base(shape_.dtype, elements);
    base.restore(bits);
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t column = 0; column < y_stride_ && row * y_stride_ + column < elements; ++column) {
        const int64_t at = row * y_stride_ + column;
        Delta delta;
        for (int s = 0; s < slices_; ++s) {
          const int64_t n = column - cols_[static_cast<size_t>(s)];
          if (n < 0 || n % col_stride() != 0 || n / col_stride() >= width_of(s)) continue;
          delta = delta_of(row, s, n / col_stride());
        }
        if (!delta.present) {
          CHECK(same(y_->data(), bits.data(), at), "%s: row %lld (group %lld) column %lld changed", what.c_str(),
                (long long)row, (long long)group_of(row), (long long)column);
          continue;
        }
        const double weight =
            shape_.op == Op::kDown ? static_cast<double>(weight_[static_cast<size_t>(pair_of(row))]) : 1.0;
        const double want = base.get(at) + weight * delta.value;
        const double bound = rounding_error(shape_.dtype, want) + weight * delta.error;
        const double got = y_->get(at);
        CHECK(std::fabs(got - want) <= bound, "%s: row %lld (group %lld) column %lld: got %g, want %g, base %g",
              what.c_str(), (long long)row, (long long)group_of(row), (long long)column, got, want, base.get(at));
      }
    }
  }

  static double activated(Activation act, double x) {
    switch (act) {
      case Activation::kSilu:
        return x / (1 + std::exp(-x));
      case Activation::kGelu:
        return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
      case Activation::kGeluTanh:
        return 0.5 * x * (1 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
      case Activation::kRelu2:
        return x > 0 ? x * x : 0;
      default:
        return std::nan("");
    }
  }

  /// h and how far it may stray.
  Delta activation_of(int64_t row, int64_t n) {
    double in[2] = {}, error[2] = {};
    for (int s = 0; s < slices_; ++s) {
      const Delta delta = delta_of(row, s, n);
      in[s] = y_->get(row * y_stride_ + column_of(s, n)) + delta.value;
      error[s] = delta.error;
    }
    double factor, slope = 1.13, up = in[1];  // the others rise by at most that much a step
    if (shape_.act == Activation::kSwigluOai) {
      const double g = std::min(in[0], double{kLimit});
      factor = g / (1 + std::exp(-double{kAlpha} * g));
      up = std::min(std::max(up, -double{kLimit}), double{kLimit}) + 1;
    } else {
      factor = activated(shape_.act, in[0]);
      if (shape_.act == Activation::kRelu2) slope = 2 * std::fabs(in[0]) + error[0];
    }
    if (slices_ == 1) up = 1;
    Delta h{true, factor * up, slope * error[0] * (std::fabs(up) + error[1]) + std::fabs(factor) * error[1]};
    h.error += rounding_error(shape_.dtype, std::fabs(h.value) + h.error) + 4e-6 * (1 + std::fabs(h.value));
    return h;
  }

  void check_activations(const std::string& what) {
    const std::vector<unsigned char>& bits = before(result_->data());
    for (int64_t row = 0; row < rows_; ++row) {
      const bool exists = group_of(row) != kNoRow;
      for (int64_t n = 0; n < result_stride_ && row * result_stride_ + n < result_->size() / 2; ++n) {
        const int64_t at = row * result_stride_ + n;
        if (!exists || n >= width_of(0)) {
          CHECK(same(result_->data(), bits.data(), at), "%s: row %lld (group %lld) column %lld changed", what.c_str(),
                (long long)row, (long long)group_of(row), (long long)n);
          continue;
        }
        const Delta want = activation_of(row, n);
        const double got = result_->get(at);
        CHECK(std::fabs(got - want.value) <= want.error, "%s: row %lld (group %lld) output %lld: got %g, want %g",
              what.c_str(), (long long)row, (long long)group_of(row), (long long)n, got, want.value);
      }
    }
  }

  void check_sums(const std::string& what) {
    const std::vector<unsigned char>& bits = before(result_->data());
    for (int64_t token = 0; token < shape_.tokens; ++token) {
      std::vector<int64_t> rows;
      for (int j = 0; j < shape_.top_k; ++j) rows.push_back(row_of(token * shape_.top_k + j));
      for (int64_t n = 0; n < result_stride_ && token * result_stride_ + n < result_->size() / 2; ++n) {
        const int64_t at = token * result_stride_ + n;
        if (n >= width_of(0)) {
          CHECK(same(result_->data(), bits.data(), at), "%s: token %lld column %lld changed", what.c_str(),
                (long long)token, (long long)n);
          continue;
        }
        double want = 0, slack = 0;
        float base = 0;  // in the very order of the base model's sum
        bool adds = false;
        for (int j = 0; j < shape_.top_k; ++j) {
          const int64_t row = rows[static_cast<size_t>(j)];
          if (row < 0) continue;
          const float weight = weight_[static_cast<size_t>(token * shape_.top_k + j)];
          const double y2 = y_->get(row * y_stride_ + column_of(0, n));
          const float y2_weight = shape_.y_weighted ? 1.f : weight;
          const Delta delta = delta_of(row, 0, n);
          base = std::fmaf(y2_weight, static_cast<float>(y2), base);
          want += y2_weight * y2 + (delta.present ? weight * delta.value : 0);
          slack += std::fabs(y2_weight * y2) * 1e-6 + (delta.present ? weight * delta.error : 0);
          adds |= delta.present;
        }
        const double got = result_->get(at);
        if (!adds) {
          CHECK(got == round_to(base, shape_.dtype), "%s: token %lld output %lld: got %g, base sum %g", what.c_str(),
                (long long)token, (long long)n, got, base);
          continue;
        }
        CHECK(std::fabs(got - want) <= rounding_error(shape_.dtype, want) + slack,
              "%s: token %lld output %lld: got %g, want %g, base %g", what.c_str(), (long long)token, (long long)n, got,
              want, base);
      }
    }
  }

  Shape shape_;
  Random random_;
  int slices_, groups_;
  bool gated_, in_place_, arrived_ = false;
  int64_t pairs_, rows_ = 0, x_stride_ = 0, y_stride_ = 0, v_width_ = 0, result_stride_ = 0;
  std::vector<Arena> arenas_;
  std::vector<SliceEntry> table_, present_;  // as the kernels see it; with rank 0 where an entry leads outside
  std::vector<int64_t> cols_;
  std::vector<int32_t> experts_of_pairs_, slot_of_token_, map_;
  std::vector<float> weight_;
  std::unique_ptr<Array> x_, y_, result_;
  std::unique_ptr<GuardedBytes> plan_, table_bytes_, map_bytes_, weights_, scratch_, deltas_, v_bytes_;
  std::vector<Staged> staged_;
  int grids_ = 0;  // of the call
  std::unordered_map<int64_t, double> exact_v_;
};

/// Of a call of moe_delta, without the deltas.
LoraParams delta_params(const Problem& problem) {
  LoraParams p = problem.params();
  for (int s = 0; s < p.slices.count; ++s) p.slices.col[s] = s > 0 ? p.slices.col[s - 1] + p.slices.width[s - 1] : 0;
  p.slices.col_stride = 1;
  return p;
}

/// moe_delta; sets where it left them.
cudaError_t make_deltas(Problem& problem, const void*& delta, int64_t& stride) {
  LoraParams p = delta_params(problem);
  const int64_t width = sum_of_widths(p.slices);
  stride = width + 8;
  p.y = problem.deltas(p.rows > 0 ? 2 * ((p.rows - 1) * stride + width) : 0);
  p.y_stride = stride;
  delta = p.y;
  if (problem.v_given()) {
    p.v_of_x = true;
    p.v = problem.given_v(p.v_stride);
    p.x = nullptr;
    p.k = p.x_stride = 7;  // nothing that a stream of A could take
    for (int s = 0; s < p.slices.count; ++s) {
      p.slices.a[s] = nullptr;
      p.slices.a_rows[s] = -1;
    }
  }
  if (!cuda::moe_stream_serves(p) || (problem.few() && !cuda::few_deltas_serve(p))) return cudaErrorNotSupported;
  int64_t bytes = 0;
  const cudaError_t error = (problem.few() ? cuda::few_deltas_scratch : cuda::moe_deltas_scratch)(p, bytes);
  p.scratch = problem.scratch(bytes);
  if (error != cudaSuccess || p.rows == 0) return error;
  const cudaError_t done = (problem.few() ? cuda::few_deltas_path : cuda::moe_delta_path)(p, nullptr);
  CHECK(problem.deltas_are_as_planned(), "%s: deltas by a plan of another call", running.c_str());
  return done;
}

cudaError_t apart(Problem& problem) {
  if (problem.op() == Op::kGateUpAct) {
    GateUpActParams g = problem.gate_up_act_params();
    const cudaError_t error = make_deltas(problem, g.delta, g.delta_stride);
    if (error != cudaSuccess) return error;
    return cuda::moe_add_act_serves(g) ? cuda::moe_add_act_path(g, nullptr) : cudaErrorNotSupported;
  }
  DownReduceParams d = problem.down_reduce_params();
  const cudaError_t error = make_deltas(problem, d.delta, d.delta_stride);
  if (error != cudaSuccess || d.tokens == 0) return error;
  return cuda::moe_add_reduce_serves(d) ? cuda::moe_add_reduce_path(d, nullptr) : cudaErrorNotSupported;
}

cudaError_t fast(Problem& problem) {
  if (problem.apart()) return apart(problem);
  if (!cuda::moe_stream_serves(problem.params())) return cudaErrorNotSupported;
  int64_t bytes = 0;
  cudaError_t error;
  if (problem.op() == Op::kGateUpAct) {
    GateUpActParams g = problem.gate_up_act_params();
    if (problem.narrow() && !cuda::act_narrow_serves(g)) return cudaErrorNotSupported;
    error = (problem.narrow() ? cuda::act_narrow_scratch : cuda::moe_gate_up_act_scratch)(g, bytes);
    g.lora.scratch = problem.scratch(bytes);
    if (error != cudaSuccess) return error;
    return (problem.narrow() ? cuda::act_narrow_path : cuda::moe_gate_up_act_path)(g, nullptr);
  }
  if (problem.op() == Op::kDownReduce) {
    DownReduceParams d = problem.down_reduce_params();
    error = cuda::moe_down_reduce_scratch(d, bytes);
    d.lora.scratch = problem.scratch(bytes);
    return error == cudaSuccess ? cuda::moe_down_reduce_path(d, nullptr) : error;
  }
  LoraParams p = problem.params();
  error = cuda::moe_linear_scratch(p, bytes);
  p.scratch = problem.scratch(bytes);
  return error == cudaSuccess ? cuda::moe_linear_path(p, nullptr) : error;
}

void run(const std::string& what, const Shape& shape, int runs = 2) {
  Problem problem(shape, std::hash<std::string>()(what));
  check_runs(what, fast, problem, runs);
  if (shape.apart || shape.narrow || shape.op == Op::kGateUp || shape.op == Op::kDown) return;
  Shape of_two = shape;
  of_two.apart = true;
  run(what + ", apart", of_two, runs);
  const LoraParams p = delta_params(Problem(of_two, 1));
  if (cuda::few_deltas_serve(p)) {
    of_two.few = true;
    run(what + ", apart, as few", of_two, runs);
    of_two.few = false;
  }
  if (!shape.experts_share_a && shape.op == Op::kGateUpAct) return;
  of_two.v_given = true;
  run(what + ", v given", of_two, runs);
}

const char* name_of(Op op) {
  switch (op) {
    case Op::kGateUp:
      return "gate_up";
    case Op::kDown:
      return "down";
    case Op::kGateUpAct:
      return "gate_up_act";
    default:
      return "down_reduce";
  }
}

/// Gate and up where the op has them.
std::vector<int64_t> widths_of(Op op, int64_t width) {
  const bool two = op == Op::kGateUp || op == Op::kGateUpAct;
  return two ? std::vector<int64_t>{width, width} : std::vector<int64_t>{width};
}

// What every op must get right.
void any_op(Op op) {
  const std::string name = name_of(op);
  const char* maps[] = {"", "sorted", "shuffled"};
  int turn = 0;
  for (int64_t tokens : {1, 3, 9, 40}) {
    for (int top_k : {1, 2, 4}) {
      for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
        Shape shape{op, tokens, top_k, 64, widths_of(op, 72), {16, 8, 32, 4, 24}, dtype};
        shape.slots = turn % 2 == 0 ? 3 : 1;
        shape.experts = turn % 4 < 2 ? 4 : 7;
        shape.map = maps[turn++ % 3];
        shape.y_weighted = turn % 2 == 0;
        run(name + " tokens " + std::to_string(tokens) + " top " + std::to_string(top_k) + " map " + shape.map +
                (dtype == DType::kFloat16 ? " fp16" : ""),
            shape);
      }
    }
  }
  for (int rank : {1, 3, 4, 8, 12, 16, 24, 32, 64, 100, 128, 256}) {
    run(name + " rank " + std::to_string(rank), {op, 5, 2, 64, widths_of(op, 64), {rank}});
  }
  for (int64_t k : {8, 40, 64, 96, 128, 200, 328}) {
    run(name + " k " + std::to_string(k), {op, 5, 2, k, widths_of(op, 64), {16, 8}});
  }
  for (int64_t width : {8, 64, 136, 520}) {
    run(name + " width " + std::to_string(width), {op, 5, 2, 64, widths_of(op, width), {8, 16, 24}});
  }
  for (const char* map : maps) {
    Shape shape{op, 20, 4, 64, widths_of(op, 64), {16, 0, 64, 8, 0, 128, 4}};
    shape.map = map;
    run(name + " absent slices, map " + map, shape, 4);
    shape.stale_is_noise = true;
    run(name + " noise before, map " + map, shape, 4);
    shape.broken = true;
    shape.more_v = 5;
    run(name + " broken entries, map " + map, shape);
    shape.broken = false;
    shape.other_plan = true;
    run(name + " a plan of other sizes, map " + map, shape, 4);
    shape.other_plan = false;
    for (const char* ids : {"none", "one", "each", "skewed"}) {
      shape.ids = ids;
      run(name + " ids " + ids + ", map " + map, shape);
    }
    shape.ids = "mixed";
    shape.ranks = {0};
    run(name + " all absent, map " + map, shape);
  }
  Shape shape{op, 12, 2, 96, widths_of(op, 72), {12, 24, 16, 0}};
  shape.map = "shuffled";
  shape.more_stride = 24;
  shape.more_v = 37;
  run(name + " pitches above the rank", shape);
  shape.odd_b = true;
  run(name + " odd pitches of B", shape);
  shape.ranks = {33, 7, 16};
  shape.more_stride = 0;
  shape.odd_b = false;
  shape.tight_b = true;
  run(name + " B without padding", shape);
  shape = {op, 12, 2, 64, widths_of(op, 72), {16, 24, 8}};
  shape.experts_share_a = true;
  run(name + " one A for all experts", shape);
  shape.experts_share_a = false;
  shape.experts_share_b = true;
  run(name + " one B for all experts", shape);
  shape.odd_b = true;
  shape.map = "sorted";
  run(name + " one odd B for all experts", shape);
  shape = {op, 3, 22, 64, widths_of(op, 64), {16, 4, 32, 0}};
  shape.experts = 30;
  run(name + " top 22", shape);
  shape.y_weighted = true;
  shape.map = "sorted";
  run(name + " top 22, sorted", shape);
  // runs of several tiles, and of more than one wide tile
  run(name + " 70 rows of one group", {op, 70, 1, 64, widths_of(op, 64), {16}, DType::kBFloat16, 1, 4, "one"});
  run(name + " 150 rows of one group", {op, 150, 1, 64, widths_of(op, 64), {32, 8}, DType::kFloat16, 1, 4, "one"});
  for (const char* map : maps) {
    shape = {op, 70, 2, 96, widths_of(op, 64), {16, 8, 40}, DType::kBFloat16, 2, 4, "skewed", map};
    run(name + " runs of many lengths, map " + map, shape);
  }
  for (const char* map : {"sorted", "shuffled", "padding"}) {
    shape = {op, 1, 1, 64, widths_of(op, 64), {16}, DType::kBFloat16, 1, 2, "mixed", map};
    run(name + " little, map " + map, shape);
  }
  run(name + " no tokens", {op, 0, 2, 64, widths_of(op, 64), {16}});
  for (int sms : {2, 7}) {  // more work than blocks
    cuda::emulated_device.sms = sms;
    const std::string what = name + " on " + std::to_string(sms) + " SMs";
    run(what, {op, 40, 2, 96, widths_of(op, 136), {16, 8, 0, 64, 24}, DType::kBFloat16, 3, 4, "mixed", "sorted"});
    run(what + ", one group", {op, 40, 1, 64, widths_of(op, 136), {32, 16}, DType::kFloat16, 1, 4, "one"});
  }
  const cuda::Device others[] = {{0, 8, 108, 163 * 1024}, {0, 8, 84, 99 * 1024}, {0, 12, 188, 99 * 1024}};
  for (const cuda::Device& device : others) {
    cuda::emulated_device = device;
    const std::string what = name + " on " + std::to_string(device.major) + "." + std::to_string(device.sms);
    run(what, {op, 9, 4, 200, widths_of(op, 72), {16, 8, 0, 64, 24}, DType::kBFloat16, 3, 4, "mixed", "sorted"});
    run(what + ", many ranks", {op, 20, 1, 328, widths_of(op, 64), {256, 200}, DType::kFloat16, 1, 2, "each"});
  }
  cuda::emulated_device = {0, 9, 132, 227 * 1024};
}

// Gate and up beside each other, or in turn.
void gate_and_up(Op op) {
  const std::string name = name_of(op);
  for (const char* map : {"", "sorted", "shuffled"}) {
    for (int64_t width : {8, 72, 136}) {
      for (const bool shared : {false, true}) {
        Shape shape{op, 9, 2, 64, {width, width}, {16, 0, 8, 24, 0, 40, 64}};
        shape.map = map;
        shape.interleaved = true;
        shape.shared_a = shared;
        const std::string what = name + " interleaved " + std::to_string(width) + map + (shared ? ", one A" : "");
        run(what, shape);
        shape.interleaved = false;
        shape.own_arenas = !shared;
        run(what + ", not", shape);
      }
    }
  }
  Shape shape{op, 20, 2, 64, {64, 64}, {16, 16, 32, 32, 100, 100, 4, 4}};
  shape.shared_a = true;
  shape.experts_share_a = true;
  run(name + " one A for gate, up and all experts", shape);
  for (int rank : {64, 100, 256}) {
    shape.ranks = {rank};
    run(name + " one A of rank " + std::to_string(rank) + " for gate, up and all experts", shape);
  }
  shape.broken = true;
  run(name + " one A for gate and up, broken entries", shape, 4);
  shape.experts_share_a = false;
  shape.broken = false;
  shape.odd_b = shape.interleaved = true;
  run(name + " interleaved, odd B", shape, 4);
  for (int64_t tokens : {70, 150}) {
    shape = {op, tokens, 1, 64, {72, 72}, {24, 8}, DType::kBFloat16, 1, 4, "one"};
    shape.interleaved = true;
    run(name + " interleaved, " + std::to_string(tokens) + " rows of one group", shape);
  }
  for (const char* map : {"", "sorted", "shuffled"}) {
    for (const char* ids : {"mixed", "none", "skewed"}) {
      shape = {op, 20, 4, 64, {72, 72}, {12, 0, 64, 24, 0, 3, 7, 40}, DType::kBFloat16, 3, 4, ids, map};
      shape.experts_share_a = true;
      const std::string what = name + " one A for all experts, ids " + ids + ", map " + map;
      run(what, shape);
      shape.other_plan = true;
      run(what + ", a plan of other sizes", shape, 4);
      shape.other_plan = false;
      shape.stale_is_noise = shape.broken = shape.interleaved = true;
      run(what + ", broken entries, noise before, interleaved", shape, 4);
    }
  }
  run(name + ", one slice", {op, 20, 2, 96, {72}, {16, 8, 0}});
  run(name + ", one slice, sorted", {op, 20, 2, 96, {136}, {64, 8, 0}, DType::kFloat16, 3, 4, "mixed", "sorted"});
}

/// Blocks are as many as the bytes that are read are worth, among them none of A where v is given.
void blocks_of_given_v() {
  cuda::emulated_device.sms = 7;
  Shape shape{Op::kGateUpAct, 40, 2, 64, {64, 64}, {16}};
  shape.experts_share_a = shape.apart = shape.v_given = true;
  Problem problem(shape, 1);
  problem.spoil(1, false);
  LoraParams p = problem.params();
  std::vector<unsigned char> delta(static_cast<size_t>(p.rows) * 128 * 2 + 16);
  p.y = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(delta.data()) + 15) / 16 * 16);
  p.y_stride = 128;
  p.slices.col[0] = 0;
  p.slices.col[1] = 64;
  p.v_of_x = true;
  p.v = problem.given_v(p.v_stride);
  for (int64_t k : {8, 1 << 24}) {
    p.k = k;
    cuda::launches.clear();
    CHECK(cuda::moe_delta_path(p, nullptr) == cudaSuccess, "k %lld", (long long)k);
    const dim3 grid = cuda::launches.at(0).grid;
    CHECK(cuda::launches.size() == 1 && grid.x * grid.y == 7, "k %lld: %u blocks on 7 SMs", (long long)k,
          grid.x * grid.y);
  }
  cuda::emulated_device.sms = 132;
}

/// Which of the two kernels makes deltas or the activation, no bit tells.
void long_runs() {
  for (const std::vector<int>& ranks : {std::vector<int>{16}, {8, 3, 0, 16}, {24, 32}, {64, 40, 1}, {100, 12}}) {
    for (const bool shared : {false, true}) {
      Shape shape{Op::kGateUpAct, 70, 2, 200, {136, 136}, ranks, DType::kBFloat16, 2, 3, "skewed"};
      if (shared) shape.dtype = DType::kFloat16;
      shape.shared_a = shared;
      shape.odd_b = ranks[0] == 24;
      Problem problem(shape, 1);
      problem.spoil(1, false);
      GateUpActParams g = problem.gate_up_act_params();
      LoraParams& p = g.lora;
      int planes = 0;
      const bool ready = cuda::moe_planes(p, cuda::kAllBlocks, planes) == cudaSuccess;
      const int64_t bytes = cuda::moe_plane_bytes(p, planes);
      p.scratch = problem.scratch(bytes);
      const std::string what = "runs of rank " + std::to_string(ranks[0]) + (shared ? ", one A" : "");
      CHECK(ready && cuda::moe_shrink_path(p, planes, cuda::kAllBlocks, nullptr) == cudaSuccess, "%s", what.c_str());
      CHECK(cuda::moe_expand_long_serves(p, g.h_stride), "%s: not served", what.c_str());
      CHECK(cuda::moe_expand_act_path(g, planes, nullptr) == cudaSuccess, "%s", what.c_str());
      const auto h = problem.check(what);
      problem.spoil(2, false);
      p.scratch = problem.scratch(bytes);
      CHECK(cuda::moe_shrink_path(p, planes, cuda::kAllBlocks, nullptr) == cudaSuccess, "%s", what.c_str());
      cuda::launches.clear();
      CHECK(cuda::moe_expand_long_act_path(g, planes, nullptr) == cudaSuccess && cuda::launches.size() == 1, "%s",
            what.c_str());
      CHECK(problem.check(what + ", long") == h, "%s: other bits", what.c_str());
      std::vector<unsigned char> delta[2];
      for (auto& to : delta) to.resize(static_cast<size_t>(p.rows) * 272 * 2 + 16);
      p.y_stride = 272;
      p.slices.col[0] = 0;
      p.slices.col[1] = 136;
      p.y = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(delta[0].data()) + 15) / 16 * 16);
      CHECK(cuda::moe_expand_deltas_path(p, planes, 1, nullptr) == cudaSuccess, "%s", what.c_str());
      const auto* short_ones = static_cast<const unsigned char*>(p.y);
      p.y = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(delta[1].data()) + 15) / 16 * 16);
      CHECK(cuda::moe_expand_long_deltas_path(p, planes, 1, nullptr) == cudaSuccess, "%s", what.c_str());
      CHECK(std::equal(short_ones, short_ones + p.rows * 272 * 2, static_cast<const unsigned char*>(p.y)),
            "%s: other deltas", what.c_str());
    }
  }
}

/// Which kernel finishes runs of a middling length, no bit tells either: of runs that fill one row tile, two, parts of
/// them, or several walks.
void middle_runs_like_others() {
  int turn = 0;
  for (int64_t rows : {1, 5, 8, 9, 16, 17, 22, 24, 25, 31, 32, 33, 48, 70, 129, 150}) {
    for (const std::vector<int>& ranks : {std::vector<int>{16}, {8, 3, 0, 16}, {12}}) {
      const DType dtype = ++turn % 2 == 0 ? DType::kBFloat16 : DType::kFloat16;
      Shape shape{Op::kGateUpAct, rows, 1, 72, {turn % 4 == 0 ? 136 : 320}, ranks, dtype, 1, 4, "mixed"};
      if (turn % 3 == 0) shape.ids = "skewed";
      if (turn % 3 == 1) shape.ids = "one";
      shape.act = turn % 5 < 3 ? Activation::kRelu2 : Activation::kGelu;
      shape.odd_b = turn % 7 == 3;
      shape.tight_b = turn % 7 == 5;
      const int64_t width = shape.widths[0];
      Problem problem(shape, 1);
      GateUpActParams g = problem.gate_up_act_params();
      LoraParams& p = g.lora;
      int planes = 0;
      const bool ready = cuda::moe_planes(p, cuda::kAllBlocks, planes) == cudaSuccess;
      const int64_t bytes = cuda::moe_plane_bytes(p, planes);
      const std::string what =
          "middle, " + std::to_string(rows) + " rows, rank " + std::to_string(ranks[0]) + ", ids " + shape.ids;
      const auto shrink = [&](uint64_t seed) {
        problem.spoil(seed, false);
        p.scratch = problem.scratch(bytes);
        return ready && cuda::moe_shrink_path(p, planes, cuda::kAllBlocks, nullptr) == cudaSuccess;
      };
      CHECK(shrink(1) && cuda::moe_expand_act_path(g, planes, nullptr) == cudaSuccess, "%s", what.c_str());
      const auto h = problem.check(what);
      CHECK(shrink(2) && cuda::moe_expand_middle_act_path(g, planes, nullptr) == cudaSuccess, "%s", what.c_str());
      CHECK(problem.check(what) == h, "%s: other bits", what.c_str());
      // deltas, all and some of the outputs, and y with them added
      std::vector<unsigned char> of_kernel[2];
      for (const bool middle : {false, true}) {
        std::vector<unsigned char>& to = of_kernel[middle];
        const auto note = [&](const LoraParams& from, int64_t rows_there, int64_t pitch) {
          const auto* begin = static_cast<const unsigned char*>(from.y);
          to.insert(to.end(), begin, begin + 2 * rows_there * pitch);
        };
        std::vector<uint4> memory(static_cast<size_t>(rows * width / 8), uint4{0x3f803f80, 1, 2, 0x40003f00});
        LoraParams of_deltas = p;
        of_deltas.y = memory.data();
        of_deltas.y_stride = width;
        of_deltas.slices.col[0] = 0;
        const auto deltas = middle ? cuda::moe_expand_middle_deltas_path : cuda::moe_expand_deltas_path;
        CHECK(deltas(of_deltas, planes, 1, nullptr) == cudaSuccess, "%s", what.c_str());
        note(of_deltas, rows, width);
        const auto add = middle ? cuda::moe_expand_middle_add_path : cuda::moe_expand_add_path;
        CHECK(add(of_deltas, planes, nullptr) == cudaSuccess, "%s", what.c_str());
        note(of_deltas, rows, width);
        const auto some = middle ? cuda::moe_expand_middle_delta_path : cuda::moe_expand_delta_path;
        CHECK(some(p, planes, memory.data(), 64, 136, nullptr) == cudaSuccess, "%s", what.c_str());
        note(of_deltas, rows, 72);
      }
      CHECK(of_kernel[0] == of_kernel[1], "%s: other deltas", what.c_str());
    }
  }
}

/// As run, of calls whose expand is that of runs of a middling length: one slice.
void run_middle(const std::string& what, const Shape& shape, int runs = 2) {
  const Problem problem(shape, 1);
  CHECK(cuda::moe_expand_middle_serves(problem.params()), "%s: not served", what.c_str());
  run(what, shape, runs);
}

/// Runs of 17 to 32 rows and others beside them, among groups enough that the call counts as middling; more units than
/// are looked up together, and what no kernel may touch.
void middle_runs(Op op) {
  const std::string name = std::string(name_of(op)) + " middle";
  const auto shape_of = [op](int64_t rows, int64_t width, const std::vector<int>& ranks, const std::string& ids) {
    Shape shape{op, rows, 1, 64, {width}, ranks, rows % 2 == 0 ? DType::kBFloat16 : DType::kFloat16};
    shape.slots = 1;
    shape.experts = static_cast<int>(rows);
    shape.ids = ids;
    shape.act = Activation::kRelu2;
    return shape;
  };
  for (int64_t rows : {1, 8, 16, 17, 22, 24, 25, 31, 32, 33, 64, 65, 130}) {
    for (int64_t width : {8, 72, 264}) {
      run_middle(name + " " + std::to_string(rows) + " rows of one group, width " + std::to_string(width),
                 shape_of(rows, width, {16}, "one"));
    }
  }
  for (int rank : {1, 4, 8, 12, 15}) {
    Shape shape = shape_of(22, 136, {rank}, "one");
    run_middle(name + " rank " + std::to_string(rank), shape);
    shape.tight_b = true;
    run_middle(name + " rank " + std::to_string(rank) + ", B without padding", shape);
    shape.odd_b = true;
    run_middle(name + " rank " + std::to_string(rank) + ", odd B", shape);
  }
  for (const char* map : {"", "sorted", "shuffled"}) {
    for (int sms : {1, 2, 132}) {
      cuda::emulated_device.sms = sms;
      Shape shape = shape_of(90, 200, {16, 0, 8, 16, 3}, "skewed");
      shape.slots = 2;
      shape.experts = 32;
      shape.map = map;
      if (shape.map == "sorted") shape.experts = 44;  // and as many rows more
      const std::string what = name + " on " + std::to_string(sms) + " SMs, map " + map;
      if (shape.map != "sorted") {
        run_middle(what, shape);
      } else {
        run(what, shape);
      }
      shape.ids = "none";
      run(what + ", ids none", shape);
      shape.ids = "mixed";
      shape.stale_is_noise = shape.broken = true;
      run(what + ", noise before, broken entries", shape);
      shape.broken = false;
      shape.other_plan = true;
      run(what + ", a plan of other sizes", shape);
      shape.other_plan = false;
      shape.ranks = {0};
      run(what + ", all absent", shape);
    }
  }
  // K in parts: several planes
  cuda::emulated_device.sms = 132;
  Shape shape = shape_of(30, 72, {16, 8}, "skewed");
  shape.k = 584;
  run_middle(name + ", K in parts", shape);
}

/// Which calls count as middling: one slice, up to 16 ranks, rows enough for their groups, none of them for long runs.
void choice_of_middle_expand() {
  const auto serves = [](const char* what, Shape shape, bool is_middle) {
    const Problem problem(shape, 1);
    const bool served = cuda::moe_expand_middle_serves(problem.params());
    CHECK(served == is_middle, "%s: %s", what, served ? "served" : "not served");
  };
  Shape shape{Op::kDown, 22, 1, 64, {64}, {16}, DType::kBFloat16, 1, 20, "one"};
  serves("a row a group and more", shape, true);
  shape.experts = 23;
  serves("less than a row a group", shape, false);
  shape.experts = 11;
  serves("two rows a group", shape, false);
  shape.experts = 20;
  shape.ranks = {17};
  serves("17 ranks", shape, false);
  shape = {Op::kGateUpAct, 22, 1, 64, {64, 64}, {8}, DType::kBFloat16, 1, 20, "one"};
  serves("two slices", shape, false);
}

/// As run, of calls whose shrink is that of long runs.
void run_long(const std::string& what, const Shape& shape, int runs = 2) {
  const Problem problem(shape, 1);
  CHECK(cuda::moe_shrink_long_serves(problem.params()), "%s: not served", what.c_str());
  run(what, shape, runs);
}

/// A read once for up to 128 rows: tiles of all sizes, K and ranks that fill no stage, more units than are looked up
/// together, and what no kernel may touch.
void shrink_of_long_runs(Op op) {
  const std::string name = std::string(name_of(op)) + " long";
  const auto of_one_group = [op](int64_t rows, int64_t k, const std::vector<int>& ranks, DType dtype) {
    return Shape{op, rows, 1, k, widths_of(op, 64), ranks, dtype, 1, 1, "one"};
  };
  cuda::emulated_device.sms = 1;
  for (int64_t rows : {2, 64, 65, 128, 200}) {
    const DType dtype = rows % 2 == 0 ? DType::kBFloat16 : DType::kFloat16;
    run_long(name + " " + std::to_string(rows) + " rows", of_one_group(rows, 128, {16, 8}, dtype));
  }
  for (int64_t k : {8, 72, 296}) {
    for (int64_t rows : {40, 80}) {
      run_long(name + " k " + std::to_string(k) + ", " + std::to_string(rows) + " rows",
               of_one_group(rows, k, {24, 16}, DType::kBFloat16));
    }
  }
  for (int rank : {1, 33, 64, 256}) {
    const int64_t rows = rank == 33 ? 80 : 40;
    run_long(name + " rank " + std::to_string(rank), of_one_group(rows, 136, {rank}, DType::kFloat16));
  }
  run_long(name + ", K in parts", of_one_group(70, 584, {16, 24}, DType::kBFloat16));
  for (const char* map : {"", "sorted", "shuffled"}) {
    Shape shape{op, 60, 2, 136, widths_of(op, 64), {16, 0, 8, 24, 4, 0, 40}, DType::kBFloat16, 3, 7, "mixed", map};
    const std::string what = name + ", many groups, map " + map;
    run_long(what, shape);
    shape.ids = "none";
    run_long(what + ", ids none", shape);
    shape.ids = "skewed";
    shape.stale_is_noise = shape.broken = true;
    shape.more_v = 5;
    run_long(what + ", noise before, broken entries", shape);
    shape.broken = false;
    shape.other_plan = true;
    run_long(what + ", a plan of other sizes", shape);
    shape.other_plan = false;
    shape.ranks = {0};
    run_long(what + ", all absent", shape);
  }
  Shape shape{op, 90, 2, 136, widths_of(op, 64), {16, 16, 40, 24}, DType::kFloat16, 2, 3, "skewed", "sorted"};
  shape.experts_share_a = true;
  run_long(name + ", one A for all experts", shape);
  cuda::emulated_device.sms = 132;
  if (op != Op::kGateUp && op != Op::kGateUpAct) return;
  cuda::emulated_device.sms = 2;
  for (const bool shared : {false, true}) {
    for (const bool interleaved : {false, true}) {
      shape = {op, 90, 2, 200, {64, 64}, {16, 0, 8, 24, 0, 40, 64}, DType::kBFloat16, 2, 3, "skewed"};
      shape.shared_a = shared;
      shape.own_arenas = !shared;
      shape.interleaved = interleaved;
      run_long(name + (shared ? ", one A" : "") + (interleaved ? ", interleaved" : ""), shape);
    }
  }
  cuda::emulated_device.sms = 132;
}

/// Where in its run a row stands, in a tile of how many rows, and which of K a stage brings for it, no bit of its sums
/// tells.
void places_in_long_runs() {
  for (int rank : {16, 32, 64, 128}) {
    for (int64_t k : {64, 200, 296}) {
      for (int64_t rows : {150, 200}) {
        const Shape shape{Op::kDown, rows, 1, k, {64}, {rank}, DType::kBFloat16, 1, 1, "one"};
        const std::string what =
            "a run of " + std::to_string(rows) + " rows, rank " + std::to_string(rank) + ", k " + std::to_string(k);
        Problem problem(shape, 1);
        problem.spoil(1, false);
        LoraParams p = problem.params();
        int planes = 0;
        CHECK(cuda::moe_long_planes(p, 1, planes) == cudaSuccess && planes == 1, "%s: %d planes", what.c_str(), planes);
        p.scratch = problem.scratch(cuda::moe_plane_bytes(p, planes));
        problem.arrive();
        auto* x = static_cast<unsigned char*>(const_cast<void*>(p.x));
        for (int64_t row = 1; row < rows; ++row) std::memcpy(x + 2 * row * p.x_stride, x, static_cast<size_t>(2 * k));
        CHECK(cuda::moe_shrink_long_path(p, planes, 1, nullptr) == cudaSuccess, "%s", what.c_str());
        const auto* sums = static_cast<const float*>(p.scratch);
        const int64_t width = cuda::moe_plane_bytes(p, 1) / (4 * rows);
        for (int64_t row = 0; row < rows; ++row) {
          CHECK(std::memcmp(sums, sums + row * width, static_cast<size_t>(4 * rank)) == 0,
                "%s: row %lld has other bits", what.c_str(), (long long)row);
        }
      }
    }
  }
}

/// Which shrink a call takes: the tiles of its launch tell. And how much memory it asks for.
void choice_of_long_shrink() {
  const Shape shape{Op::kDown, 150, 1, 584, {64}, {16}, DType::kBFloat16, 1, 1, "one"};
  const auto check = [&](const char* what, bool is_long) {
    Problem problem(shape, 1);
    problem.spoil(1, false);
    LoraParams p = problem.params();
    int planes = 0;
    int64_t bytes = 0;
    const auto planes_of = is_long ? cuda::moe_long_planes : cuda::moe_planes;
    CHECK(planes_of(p, cuda::kAllBlocks, planes) == cudaSuccess, "%s", what);
    CHECK(cuda::moe_linear_scratch(p, bytes) == cudaSuccess, "%s", what);
    CHECK(bytes == cuda::moe_plane_bytes(p, planes), "%s: %lld bytes for %d planes", what, (long long)bytes, planes);
    p.scratch = problem.scratch(bytes);
    cuda::launches.clear();
    CHECK(cuda::moe_linear_path(p, nullptr) == cudaSuccess, "%s", what);
    const cuda::LaunchShape& launch = cuda::launches.at(0);
    const bool by_wide_tiles = launch.grid.x == p.plan.max_wide_tiles;
    CHECK(by_wide_tiles == is_long && static_cast<int>(launch.grid.y) == planes, "%s: a grid of %u x %u", what,
          launch.grid.x, launch.grid.y);
    problem.check(what);
  };
  // 2 wide tiles, 10 of 16 rows
  cuda::emulated_device.sms = 2;
  check("units for all SMs", true);
  cuda::invariant = true;
  check("batch-invariant", false);
  cuda::invariant = false;
  cuda::emulated_device.sms = 3;
  check("too few units", false);
  cuda::emulated_device = {0, 8, 2, 163 * 1024};
  check("on 8.0", false);
  cuda::emulated_device = {0, 10, 2, 227 * 1024};
  check("on 10.0", false);
  cuda::emulated_device = {0, 9, 132, 227 * 1024};
}

/// Which kernel applies the activation to y1 and deltas, no bit tells.
void acts_of_deltas() {
  int turn = 0;
  for (int64_t most : {8, 72, 264, 520}) {
    for (const char* map : {"", "sorted", "shuffled"}) {
      for (int slices : {1, 2, 3}) {  // 3: two, interleaved
        const DType dtype = ++turn % 2 == 0 ? DType::kBFloat16 : DType::kFloat16;
        const int64_t width = slices == 1 ? most : std::min<int64_t>(most, 392);  // still few deltas
        Shape shape{Op::kGateUpAct, width > 72 ? 4 : 9, 2, 64, {width}, {16, 0, 8}, dtype, 3, 4, "mixed", map};
        if (slices > 1) shape.widths.push_back(width);
        shape.interleaved = slices == 3;
        shape.act = slices == 1 ? Activation::kRelu2 : turn % 3 == 0 ? Activation::kSwigluOai : Activation::kSilu;
        shape.apart = true;
        const std::string what =
            "act of deltas, width " + std::to_string(width) + ", slices " + std::to_string(slices) + ", map " + map;
        Problem problem(shape, 1);
        std::vector<unsigned char> h[2];
        for (const bool is_long : {false, true}) {
          problem.spoil(1, true);
          GateUpActParams g = problem.gate_up_act_params();
          CHECK(make_deltas(problem, g.delta, g.delta_stride) == cudaSuccess, "%s", what.c_str());
          CHECK(!cuda::moe_act_long_serves(g), "%s: long", what.c_str());
          const auto act = is_long ? cuda::moe_act_long_path : cuda::moe_add_act_path;
          CHECK(act(g, nullptr) == cudaSuccess, "%s", what.c_str());
          h[is_long] = problem.check(what + (is_long ? ", long" : ""));
        }
        CHECK(h[0] == h[1], "%s: other bits", what.c_str());
      }
    }
  }
}

void activations() {
  for (Activation act :
       {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu2, Activation::kSwigluOai}) {
    for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      const std::string what =
          "activation " + std::to_string(static_cast<int>(act)) + (dtype == DType::kFloat16 ? " fp16" : "");
      Shape shape{Op::kGateUpAct, 9, 2, 64, {64, 64}, {16, 8, 0, 32}, dtype};
      shape.act = act;
      run(what, shape);
      shape.interleaved = true;
      shape.map = "sorted";
      run(what + ", interleaved", shape);
      shape.interleaved = false;
      shape.widths = {64};
      if (act != Activation::kSwigluOai) run(what + ", one slice", shape);
    }
  }
}

/// A dense MLP's, by linear's kernels for few rows: jobs of 8 and 16 rows, several a block, all of what a table may
/// say.
void few_rows_without_experts() {
  int turn = 0;
  const auto run_narrow = [&turn](const std::string& what, Shape shape) {
    shape.narrow = true;
    shape.act = ++turn % 3 == 0 ? Activation::kGeluTanh : Activation::kSilu;
    run("gate_up_act without experts, " + what, shape);
  };
  const auto shape_of = [&turn](int64_t rows, int slots, std::vector<int> ranks, const std::string& ids) {
    Shape shape{Op::kGateUpAct, rows, 1, 96, {72, 72}, std::move(ranks)};
    shape.dtype = turn % 2 == 0 ? DType::kBFloat16 : DType::kFloat16;
    shape.slots = slots;
    shape.experts = 1;
    shape.ids = ids;
    return shape;
  };
  for (int64_t rows : {1, 2, 7, 9, 17, 40, 70}) {
    for (int slots : {1, 3, 8}) {
      for (const char* ids : {"mixed", "each", "skewed", "one", "none"}) {
        run_narrow(std::to_string(rows) + " rows of " + std::to_string(slots) + ", " + ids,
                   shape_of(rows, slots, {16, 8, 0, 4, 16, 12, 3, 0, 1}, ids));
        run_narrow(std::to_string(rows) + " rows of " + std::to_string(slots) + ", many ranks, " + ids,
                   shape_of(rows, slots, {64, 40, 0, 32, 64, 33, 3, 0, 48}, ids));
      }
    }
  }
  for (int rank : {16, 40}) {  // blocks without a job share those of the others
    for (int64_t rows : {12, 37, 70}) {
      Shape shape = shape_of(rows, 40, {rank, 8, 0, rank}, "one");
      shape.widths = {1032, 1032};
      run_narrow(std::to_string(rows) + " rows of one of 40 slots, rank " + std::to_string(rank), shape);
    }
  }
  for (int rank : {32, 33, 36, 63, 64, 96, 100, 128, 200, 256}) {  // whole passes over a rank, and what is left of one
    for (const bool odd : {false, true}) {
      Shape shape = shape_of(rank % 2 == 0 ? 40 : 11, 2, {rank, rank, rank, 8}, "mixed");
      shape.odd_b = odd;
      run_narrow("rank " + std::to_string(rank) + (odd ? ", odd B" : ""), shape);
      shape.tight_b = !odd;
      shape.ranks = {8, rank, 0, rank, rank, 0};  // gate and up end in different passes
      run_narrow("ranks 8 and " + std::to_string(rank) + (odd ? ", odd B" : ", tight B"), shape);
    }
  }
  for (int64_t width : {8, 136, 1040}) {
    Shape shape = shape_of(20, 2, {64, 48}, "mixed");
    shape.widths = {width, width};
    run_narrow("many ranks, width " + std::to_string(width), shape);
  }
  for (const bool noise : {false, true}) {
    Shape shape = shape_of(40, 5, {256, 0, 8, 24, 40, 0, 96}, "mixed");  // some far below an even share
    shape.stale_is_noise = noise;
    run_narrow("8 to 256 ranks", shape);
    shape.shared_a = true;
    run_narrow("8 to 256 ranks, one A", shape);
    shape.broken = true;
    shape.shared_a = false;
    shape.more_v = 5;
    run_narrow("8 to 256 ranks, broken entries", shape);
    shape.broken = false;
    shape.other_plan = true;
    run_narrow("8 to 256 ranks, a plan of other sizes", shape);
  }
  for (int64_t width : {8, 64, 136, 520, 1040}) {
    Shape shape = shape_of(20, 2, {16, 8}, "mixed");
    shape.widths = {width, width};
    run_narrow("width " + std::to_string(width), shape);
    shape.odd_b = true;
    run_narrow("width " + std::to_string(width) + ", odd B", shape);
  }
  for (int64_t k : {32, 64, 224, 352}) {
    Shape shape = shape_of(20, 2, {16, 8, 13, 16}, "mixed");
    shape.k = k;
    shape.more_stride = 24;
    run_narrow("k " + std::to_string(k), shape);
    shape.more_stride = 0;
    shape.tight_b = true;
    run_narrow("k " + std::to_string(k) + ", tight B", shape);
  }
  for (const bool noise : {false, true}) {
    Shape shape = shape_of(40, 5, {16, 0, 8, 24, 40, 0, 16}, "mixed");  // some above an even share
    shape.stale_is_noise = noise;
    run_narrow("uneven ranks", shape);
    shape.shared_a = true;
    run_narrow("uneven ranks, one A", shape);
    shape.broken = true;
    shape.shared_a = false;
    shape.more_v = 5;
    run_narrow("broken entries", shape);
  }
  for (int turn_of_word = 0; turn_of_word < 16; ++turn_of_word) {  // each time another word of the plan tells so
    Shape shape = shape_of(40, 5, {16, 0, 8, 24, 40, 0, 16}, turn_of_word % 2 == 0 ? "each" : "mixed");
    shape.other_plan = true;
    run_narrow("a plan of other sizes " + std::to_string(turn_of_word), shape);
  }
  for (int sms : {1, 2, 7}) {  // several jobs a block
    cuda::emulated_device.sms = sms;
    Shape shape = shape_of(70, 3, {16, 0, 8, 16, 4}, "mixed");
    shape.widths = {296, 296};
    run_narrow("on " + std::to_string(sms) + " SMs", shape);
    shape.ranks = {64, 32, 0, 40};
    run_narrow("many ranks on " + std::to_string(sms) + " SMs", shape);
    shape.slots = 12;
    run_narrow("many ranks of 12 on " + std::to_string(sms) + " SMs", shape);
    shape.ranks = {16, 0, 8, 16, 4};
    run_narrow("of 12 on " + std::to_string(sms) + " SMs", shape);
  }
  cuda::emulated_device = {0, 9, 132, 227 * 1024};
  for (int experts : {1, 4}) {  // what is not served: pairs that share a row of x, one slice
    Shape shape = shape_of(9, 2, {16}, "mixed");
    shape.experts = experts;
    const auto serves = [](const Shape& of) { return cuda::act_narrow_serves(Problem(of, 1).gate_up_act_params()); };
    CHECK(serves(shape), "experts %d: not served", experts);
    shape.top_k = 2;
    CHECK(!serves(shape), "pairs of a token: served");
    shape.top_k = 1;
    shape.widths = {72};
    CHECK(!serves(shape), "one slice: served");
    shape.widths = {72, 72};
    shape.interleaved = true;
    CHECK(!serves(shape), "interleaved: served");
    shape.interleaved = false;
    shape.ranks = {256};
    CHECK(serves(shape), "rank 256: not served");
  }
}

}  // namespace
}  // namespace polylora::testing

// With arguments: of the ops of these names alone.
int main(int count, char** names) {
  using namespace polylora::testing;
  for (Op op : {Op::kGateUp, Op::kDown, Op::kGateUpAct, Op::kDownReduce}) {
    const bool named =
        std::any_of(names + 1, names + count, [op](const char* name) { return name == std::string(name_of(op)); });
    if (count > 1 && !named) continue;
    any_op(op);
    if (op == Op::kGateUp || op == Op::kGateUpAct) gate_and_up(op);
    if (op == Op::kGateUpAct) acts_of_deltas();
    if (op == Op::kGateUpAct) activations();
    if (op == Op::kGateUpAct) blocks_of_given_v();
    if (op == Op::kGateUpAct) long_runs();
    if (op == Op::kGateUpAct) middle_runs_like_others();
    middle_runs(op);
    if (op == Op::kDown) choice_of_middle_expand();
    if (op == Op::kGateUpAct) few_rows_without_experts();
    shrink_of_long_runs(op);
    if (op == Op::kDown) places_in_long_runs();
    if (op == Op::kDown) choice_of_long_shrink();
  }
  return report();
}
