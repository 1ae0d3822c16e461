#include "taco/masking.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "taco/philox.hpp"

namespace taco {
namespace {

constexpr uint32_t kMaskBelow = 3435973837;    // 0.8 * 2^32
constexpr uint32_t kRandomBelow = 3865470566;  // 0.9 * 2^32

void require(bool is_good, const std::string& message) {
  if (!is_good) throw std::invalid_argument("masking: " + message);
}

void check_id(int64_t id, int64_t vocab_size, const char* what) {
  if (id < 0 || id >= vocab_size) {
    throw std::out_of_range(std::string("masking: ") + what + " " + std::to_string(id) +
                            " is outside the vocabulary of " + std::to_string(vocab_size) + " pieces");
  }
}

void check(const MaskPolicy& policy) {
  require(policy.rate > 0 && policy.rate <= 1, "rate must lie in (0, 1], found " + std::to_string(policy.rate));
  require(policy.mean_span_length >= 1,
          "mean_span_length must be at least 1, found " + std::to_string(policy.mean_span_length));
  require(!policy.ordinary_ids.empty() && policy.ordinary_ids.size() <= UINT32_MAX, "there is no ordinary id to draw");
  require(policy.continues_word.size() == (policy.kind == MaskKind::whole_word ? policy.is_special.size() : 0),
          "continues_word must cover the vocabulary for whole_word and be empty otherwise");
  check_id(policy.mask_id, policy.vocab_size(), "mask id");
  for (const int64_t id : policy.ordinary_ids) check_id(id, policy.vocab_size(), "ordinary id");
}

uint32_t span_threshold(double mean) {
  return static_cast<uint32_t>(std::min((1.0 - 1.0 / mean) * 4294967296.0, 4294967295.0));
}

// Chooses and masks one row after the other; holds what they share, so that a row allocates nothing.
class RowMasker {
 public:
  RowMasker(const MaskPolicy& policy, int64_t seq_length, int64_t num_predictions)
      : policy_(policy),
        seq_length_(static_cast<int32_t>(seq_length)),
        num_predictions_(num_predictions),
        span_threshold_(span_threshold(policy.mean_span_length)),
        state_(static_cast<size_t>(seq_length)) {
    units_.reserve(static_cast<size_t>(seq_length));
  }

  // Masks `ids`, whose first token has the place `base`; writes num_predictions entries to index and labels.
  void mask(Draws draws, int64_t base, int64_t* ids, int64_t* index, int64_t* labels) {
    choose(draws, find_units(ids));
    int64_t used = 0;
    for (int32_t column = 0; column < seq_length_; ++column) {
      if (state_[static_cast<size_t>(column)] != kChosen) continue;
      index[used] = base + column;
      labels[used++] = ids[column];
      ids[column] = replace(draws, ids[column]);
    }
    std::fill(index + used, index + num_predictions_, int64_t{0});
    std::fill(labels + used, labels + num_predictions_, kIgnoredLabel);
  }

 private:
  struct Unit {
    int32_t first;  // column
    int32_t length;
  };
  enum State : uint8_t { kSpecial, kFree, kChosen };

  // Collects the units of the row and returns the number of its non-special tokens.
  int64_t find_units(const int64_t* ids) {
    units_.clear();
    int64_t num_candidates = 0;
    bool is_inside_word = false;
    for (int32_t column = 0; column < seq_length_; ++column) {
      check_id(ids[column], policy_.vocab_size(), "token id");
      const auto id = static_cast<size_t>(ids[column]);
      const bool is_special = policy_.is_special[id] != 0;
      state_[static_cast<size_t>(column)] = is_special ? kSpecial : kFree;
      if (!is_special) {
        ++num_candidates;
        if (is_inside_word && policy_.kind == MaskKind::whole_word && policy_.continues_word[id]) {
          ++units_.back().length;
        } else {
          units_.push_back({column, 1});
        }
      }
      is_inside_word = !is_special;
    }
    return num_candidates;
  }

  void choose(Draws& draws, int64_t num_candidates) {
    if (num_candidates == 0) return;
    const auto rounded = static_cast<int64_t>(std::floor(policy_.rate * static_cast<double>(num_candidates) + 0.5));
    const int64_t budget = std::max<int64_t>(1, rounded);
    require(budget <= num_predictions_, "a row has " + std::to_string(budget) + " tokens to predict, room is for " +
                                            std::to_string(num_predictions_));
    int64_t num_chosen = 0;
    for (size_t i = 0; i < units_.size() && num_chosen < budget; ++i) {
      std::swap(units_[i], units_[i + draws.below(static_cast<uint32_t>(units_.size() - i))]);
      if (policy_.kind == MaskKind::span) {
        num_chosen += take_span(draws, units_[i].first, budget - num_chosen);
      } else if (num_chosen + units_[i].length <= num_predictions_) {
        take(units_[i]);
        num_chosen += units_[i].length;
      }
    }
  }

  void take(const Unit& unit) {
    std::fill_n(state_.begin() + unit.first, unit.length, kChosen);
  }

  // Takes at most `room` tokens from column `first` on and returns how many.
  int64_t take_span(Draws& draws, int32_t first, int64_t room) {
    if (state_[static_cast<size_t>(first)] == kChosen) return 0;
    int64_t length = 1;
    while (length < kMaxSpan && draws.next() < span_threshold_) ++length;
    const int64_t end = std::min<int64_t>(first + std::min(length, room), seq_length_);
    int64_t column = first;
    for (; column < end && state_[static_cast<size_t>(column)] == kFree; ++column) {
      state_[static_cast<size_t>(column)] = kChosen;
    }
    return column - first;
  }

  int64_t replace(Draws& draws, int64_t id) {
    const uint32_t word = draws.next();
    if (word < kMaskBelow) return policy_.mask_id;
    if (word < kRandomBelow) {
      return policy_.ordinary_ids[draws.below(static_cast<uint32_t>(policy_.ordinary_ids.size()))];
    }
    return id;
  }

  const MaskPolicy& policy_;
  const int32_t seq_length_;
  const int64_t num_predictions_;
  const uint32_t span_threshold_;
  std::vector<State> state_;
  std::vector<Unit> units_;
};

}  // namespace

Masker::Masker(MaskPolicy policy) : policy_(std::move(policy)) { check(policy_); }

void Masker::mask_rows(int64_t num_rows, int64_t seq_length, int64_t num_predictions, const int64_t* samples,
                       const int64_t* epochs, int64_t* ids, int64_t* index, int64_t* labels) const {
  require(num_rows >= 0 && seq_length >= 0 && seq_length <= INT32_MAX, "rows must be shorter than 2^31");
  require(num_predictions > 0, "num_predictions must be at least 1");
  RowMasker masker(policy_, seq_length, num_predictions);
  for (int64_t row = 0; row < num_rows; ++row) {
    require(epochs[row] >= 0 && epochs[row] <= UINT32_MAX,
            "epoch must be 0 to 2^32 - 1, found " + std::to_string(epochs[row]));
    require(samples[row] >= 0, "sample must not be negative, found " + std::to_string(samples[row]));
    const Draws draws(Purpose::masks, policy_.seed, static_cast<uint32_t>(epochs[row]),
                      static_cast<uint64_t>(samples[row]));
    const int64_t first = row * seq_length, out = row * num_predictions;
    masker.mask(draws, first, ids + first, index + out, labels + out);
  }
}

}  // namespace taco
