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

void check_place(int64_t epoch, int64_t sample) {
  if (epoch >= 0 && epoch <= UINT32_MAX && sample >= 0) return;
  require(epoch >= 0 && epoch <= UINT32_MAX, "epoch must be 0 to 2^32 - 1, found " + std::to_string(epoch));
  require(sample >= 0, "sample must not be negative, found " + std::to_string(sample));
}

uint32_t span_threshold(double mean) {
  return static_cast<uint32_t>(std::min((1.0 - 1.0 / mean) * 4294967296.0, 4294967295.0));
}

// The properties of each id, in one byte; built once, so that a token costs one look-up.
constexpr uint8_t kSpecialFlag = 1, kContinuesFlag = 2;

std::vector<uint8_t> make_flags(const MaskPolicy& policy) {
  std::vector<uint8_t> flags(policy.is_special.size());
  for (size_t id = 0; id < flags.size(); ++id) {
    flags[id] = policy.is_special[id] ? kSpecialFlag : 0;
    if (policy.kind == MaskKind::whole_word && policy.continues_word[id]) flags[id] |= kContinuesFlag;
  }
  return flags;
}

// Columns of a row, one bit each.
class ColumnSet {
 public:
  explicit ColumnSet(int64_t seq_length) : words_(static_cast<size_t>(seq_length / 64 + 1)) {}

  void clear() { std::fill(words_.begin(), words_.end(), 0); }
  void insert(int32_t column) { words_[word_of(column)] |= bit_of(column); }
  bool contains(int32_t column) const { return (words_[word_of(column)] & bit_of(column)) != 0; }

  // Calls visit(column) for every member, ascending.
  template <typename Visit>
  void for_each(Visit visit) const {
    for (size_t word = 0; word < words_.size(); ++word) {
      for (uint64_t left = words_[word]; left != 0; left &= left - 1) {
        visit(static_cast<int32_t>(word * 64) + __builtin_ctzll(left));
      }
    }
  }

 private:
  static size_t word_of(int32_t column) { return static_cast<size_t>(column) / 64; }
  static uint64_t bit_of(int32_t column) { return uint64_t{1} << (column % 64); }

  std::vector<uint64_t> words_;
};

// Chooses and masks tokens row by row; keeps its working memory, so that a row allocates nothing.
//
// To a branch predictor it is random which tokens are special, continue a word or are chosen, so the loops over all
// columns have no branch that depends on it.
class RowMasker {
 public:
  RowMasker(const MaskPolicy& policy, const std::vector<uint8_t>& flags, int64_t seq_length, int64_t num_predictions)
      : policy_(policy),
        flags_(flags),
        seq_length_(static_cast<int32_t>(seq_length)),
        num_predictions_(num_predictions),
        span_threshold_(span_threshold(policy.mean_span_length)),
        chosen_(seq_length),
        units_(static_cast<size_t>(seq_length) + 1) {}

  // Masks `ids`, whose first token is at position `base`; writes num_predictions entries to index and labels.
  void mask(Draws draws, int64_t base, int64_t* ids, int64_t* index, int64_t* labels) {
    chosen_.clear();
    choose(draws, ids, find_units(ids));
    int64_t used = 0;
    chosen_.for_each([&](int32_t column) {
      index[used] = base + column;
      labels[used++] = ids[column];
      ids[column] = replace(draws, ids[column]);
    });
    std::fill(index + used, index + num_predictions_, int64_t{0});
    std::fill(labels + used, labels + num_predictions_, kIgnoredLabel);
  }

 private:
  struct Unit {
    int32_t first, end;  // columns
  };

  uint8_t flags(int64_t id) const { return flags_[static_cast<size_t>(id)]; }

  // Collects the units of the row in units_[1 ..], num_units_ of them, and returns the number of non-special tokens.
  int64_t find_units(const int64_t* ids) {
    const auto vocab_size = static_cast<uint64_t>(policy_.vocab_size());
    Unit* const units = units_.data();
    int64_t num_candidates = 0;
    size_t last = 0;
    uint8_t was_ordinary = 0;
    bool is_outside = false;
    for (int32_t column = 0; column < seq_length_; ++column) {
      const auto id = static_cast<uint64_t>(ids[column]);
      is_outside |= id >= vocab_size;
      const uint8_t found = flags_[id < vocab_size ? id : 0];
      const uint8_t is_ordinary = (found & kSpecialFlag) ^ 1;
      const uint8_t starts = is_ordinary & ((was_ordinary & (found >> 1)) ^ 1);
      last += starts;
      // units_[0] takes columns of no unit, so that every column is stored without a branch.
      units[starts ? last : 0].first = column;
      units[is_ordinary ? last : 0].end = column + 1;
      num_candidates += is_ordinary;
      was_ordinary = is_ordinary;
    }
    if (is_outside) refuse_ids(ids);
    num_units_ = last;
    return num_candidates;
  }

  void refuse_ids(const int64_t* ids) const {
    for (int32_t column = 0; column < seq_length_; ++column) check_id(ids[column], policy_.vocab_size(), "token id");
  }

  void choose(Draws& draws, const int64_t* ids, int64_t num_candidates) {
    if (num_candidates == 0) return;
    const auto rounded = static_cast<int64_t>(std::floor(policy_.rate * static_cast<double>(num_candidates) + 0.5));
    const int64_t budget = std::max<int64_t>(1, rounded);
    if (budget > num_predictions_) refuse_budget(budget);
    int64_t num_chosen = 0;
    Unit* const units = units_.data() + 1;
    for (size_t i = 0; i < num_units_ && num_chosen < budget; ++i) {
      std::swap(units[i], units[i + draws.below(static_cast<uint32_t>(num_units_ - i))]);
      if (policy_.kind == MaskKind::span) {
        num_chosen += take_span(draws, ids, units[i].first, budget - num_chosen);
      } else if (num_chosen + units[i].end - units[i].first <= num_predictions_) {
        for (int32_t column = units[i].first; column < units[i].end; ++column) chosen_.insert(column);
        num_chosen += units[i].end - units[i].first;
      }
    }
  }

  void refuse_budget(int64_t budget) const {
    require(false, "a row has " + std::to_string(budget) + " tokens to predict, room is for " +
                       std::to_string(num_predictions_));
  }

  // Takes at most `room` tokens, beginning at column `first`, and returns how many.
  int64_t take_span(Draws& draws, const int64_t* ids, int32_t first, int64_t room) {
    if (chosen_.contains(first)) return 0;
    int64_t length = 1;
    while (length < kMaxSpan && draws.next() < span_threshold_) ++length;
    const int64_t end = std::min<int64_t>(first + std::min(length, room), seq_length_);
    int32_t column = first;
    for (; column < end && !chosen_.contains(column) && !(flags(ids[column]) & kSpecialFlag); ++column) {
      chosen_.insert(column);
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
  const std::vector<uint8_t>& flags_;
  const int32_t seq_length_;
  const int64_t num_predictions_;
  const uint32_t span_threshold_;
  ColumnSet chosen_;
  std::vector<Unit> units_;
  size_t num_units_ = 0;
};

}  // namespace

Masker::Masker(MaskPolicy policy) : policy_(std::move(policy)) {
  check(policy_);
  flags_ = make_flags(policy_);
}

void Masker::mask_rows(int64_t num_rows, int64_t seq_length, int64_t num_predictions, const int64_t* samples,
                       const int64_t* epochs, int64_t* ids, int64_t* index, int64_t* labels) const {
  require(num_rows >= 0 && seq_length >= 0 && seq_length <= INT32_MAX, "rows must be shorter than 2^31");
  require(num_predictions > 0, "num_predictions must be at least 1");
  RowMasker masker(policy_, flags_, seq_length, num_predictions);
  for (int64_t row = 0; row < num_rows; ++row) {
    check_place(epochs[row], samples[row]);
    const Draws draws(Purpose::masks, policy_.seed, static_cast<uint32_t>(epochs[row]),
                      static_cast<uint64_t>(samples[row]));
    const int64_t first = row * seq_length, out = row * num_predictions;
    masker.mask(draws, first, ids + first, index + out, labels + out);
  }
}

void Masker::mark_valid(int64_t count, const int64_t* ids, const int64_t* segment, bool exclude_special,
                        bool* valid) const {
  for (int64_t i = 0; i < count; ++i) valid[i] = segment[i] > 0;
  if (!exclude_special) return;
  for (int64_t i = 0; i < count; ++i) {
    check_id(ids[i], policy_.vocab_size(), "token id");
    valid[i] = valid[i] && !(flags_[static_cast<size_t>(ids[i])] & kSpecialFlag);
  }
}

}  // namespace taco
