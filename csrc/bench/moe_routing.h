// Where the tokens of a call go. No CUDA.
//
// Every token goes to top_k distinct experts, all equally likely and independent of other tokens': the first top_k of a
// shuffled deck of all experts. Its weights are the softmax of top_k numbers that are nearly normal. From call to call
// the adapters move on by one, and pools of adapters take turns so that every adapter of every pool comes up. Where
// every token has an adapter of its own, each (pool, adapter) deals from one deck until fewer than top_k cards are
// left: as likely as any, but no (adapter, expert) pair comes again before all others have, those of the cards left
// excepted.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "hash.h"
#include "moe_cases.h"

namespace polylora::bench {

struct MoeRouting {
  int64_t turn = 0;
  int64_t pool = 0;
  std::vector<int32_t> topk_ids;     // [rows, top_k], distinct in a row
  std::vector<float> topk_weights;   // [rows, top_k], sums of 1
  std::vector<int32_t> slots;        // [rows]
  std::vector<int32_t> row_map;      // [pairs] the pair in each position: pairs stably sorted by expert
  std::vector<int32_t> position;     // [pairs] its inverse
  std::vector<int32_t> expert_rows;  // [experts] pairs of each
  std::vector<int32_t> group;        // [pairs] slot * experts + expert, by position

  /// (adapter, expert) pairs that occur.
  int64_t groups_hit() const { return static_cast<int64_t>(std::set<int32_t>(group.begin(), group.end()).size()); }

  int64_t experts_hit() const {
    return std::count_if(expert_rows.begin(), expert_rows.end(), [](int32_t rows) { return rows > 0; });
  }
};

/// Of the routings that are measured.
inline constexpr uint64_t kRoutingSeed = 3;

/// Draws routings without end; the same for the same case, pools and seed.
class RoutingDealer {
 public:
  RoutingDealer(const MoeCase& c, int64_t pools, uint64_t seed) : case_(c), pools_(pools), seed_(seed) {
    common_.resize(static_cast<size_t>(c.model.experts));
    std::iota(common_.begin(), common_.end(), 0);
  }

  MoeRouting next() {
    MoeRouting routing;
    routing.turn = turn_;
    routing.pool = (turn_ % kMoeSlots + turn_ / kMoeSlots) % pools_;
    for (int64_t row = 0; row < case_.rows; ++row) {
      routing.slots.push_back(case_.slot_of(row, turn_));
      deal(routing, routing.slots.back());
      weigh(routing);
    }
    sort(routing);
    ++turn_;
    return routing;
  }

 private:
  uint64_t random() { return hash(seed_, counter_++); }

  // Shuffles the first `cards` of a deck, in place.
  void shuffle(std::vector<int32_t>& deck, size_t cards) {
    for (size_t i = 0; i < cards; ++i) std::swap(deck[i], deck[i + random() % (deck.size() - i)]);
  }

  void deal(MoeRouting& routing, int32_t slot) {
    const auto top_k = static_cast<size_t>(case_.model.top_k);
    if (case_.rows > kMoeSlots) {
      shuffle(common_, top_k);
      routing.topk_ids.insert(routing.topk_ids.end(), common_.begin(), common_.begin() + case_.model.top_k);
      return;
    }
    std::vector<int32_t>& deck = decks_[{routing.pool, slot}];
    if (deck.size() < top_k) {
      deck = common_;
      shuffle(deck, deck.size());
    }
    routing.topk_ids.insert(routing.topk_ids.end(), deck.end() - case_.model.top_k, deck.end());
    deck.resize(deck.size() - top_k);
  }

  void weigh(MoeRouting& routing) {
    std::vector<double> each;
    for (int32_t j = 0; j < case_.model.top_k; ++j) {
      const uint64_t bits = random();
      double normal = 0;  // a sum of four uniform numbers, of deviation 1
      for (int part = 0; part < 4; ++part) normal += static_cast<double>((bits >> (16 * part)) & 0xffff) / 65536 - 0.5;
      each.push_back(std::exp(normal * std::sqrt(3.0)));
    }
    const double sum = std::accumulate(each.begin(), each.end(), 0.0);
    for (const double weight : each) routing.topk_weights.push_back(static_cast<float>(weight / sum));
  }

  void sort(MoeRouting& routing) const {
    const auto pairs = static_cast<size_t>(case_.pairs());
    routing.row_map.resize(pairs);
    std::iota(routing.row_map.begin(), routing.row_map.end(), 0);
    std::stable_sort(routing.row_map.begin(), routing.row_map.end(), [&](int32_t a, int32_t b) {
      return routing.topk_ids[static_cast<size_t>(a)] < routing.topk_ids[static_cast<size_t>(b)];
    });
    routing.position.resize(pairs);
    routing.expert_rows.resize(static_cast<size_t>(case_.model.experts));
    for (size_t at = 0; at < pairs; ++at) {
      const auto pair = static_cast<size_t>(routing.row_map[at]);
      const int32_t expert = routing.topk_ids[pair];
      const int32_t slot = routing.slots[pair / static_cast<size_t>(case_.model.top_k)];
      routing.position[pair] = static_cast<int32_t>(at);
      routing.group.push_back(static_cast<int32_t>(moe_group(slot, expert, case_.model.experts)));
      ++routing.expert_rows[static_cast<size_t>(expert)];
    }
  }

  MoeCase case_;
  int64_t pools_;
  uint64_t seed_;
  uint64_t counter_ = 0;
  int64_t turn_ = 0;
  std::vector<int32_t> common_;                                        // all experts, in some order
  std::map<std::pair<int64_t, int32_t>, std::vector<int32_t>> decks_;  // by pool and adapter: cards left
};

}  // namespace polylora::bench
