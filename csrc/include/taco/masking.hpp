// Dynamic masking for masked language modelling, a pure function of (seed, epoch, sample).
//
// Of the n non-special tokens of a row, max(1, floor(rate * n + 1/2)) are chosen (none if n is 0). A chosen token
// becomes [MASK] (80 %), a random ordinary id (10 %) or stays (10 %), as in Devlin et al. 2019, "BERT".
//   token       tokens one by one.
//   whole_word  whole words, a word being a token and the tokens right after it that continue a word. A word that
//               would bring the row beyond num_predictions is passed over: fewer tokens, even none, may be chosen.
//   span        runs of tokens: from a random token on, a geometric number of them with mean mean_span_length, at most
//               kMaxSpan, ended early by a special or chosen token or the budget (Joshi et al. 2020, "SpanBERT").
//
// The draws, from Draws(Purpose::masks, seed, epoch, sample), in this order, so that another implementation can follow:
//   1. Units (tokens; words) stand in order of columns. For i = 0, 1, ... until the budget is met or they run out,
//      unit i is exchanged with unit i + below(number of units - i); then it is taken. A span whose first token is
//      chosen already is passed over; any other draws its length: 1, and one more for each word below the threshold
//      floor((1 - 1 / mean) * 2^32), while it is shorter than kMaxSpan.
//   2. For each chosen column, ascending: u = next(); below 3435973837 [MASK]; else below 3865470566
//      ordinary_ids[below(number of ordinary ids)]; else unchanged.
#pragma once

#include <cstdint>
#include <vector>

namespace taco {

enum class MaskKind { token, whole_word, span };

constexpr int64_t kMaxSpan = 10;
constexpr int64_t kIgnoredLabel = -100;

struct MaskPolicy {
  uint64_t seed;
  double rate;  // in (0, 1]
  MaskKind kind;
  double mean_span_length;  // >= 1; used by span only
  int64_t mask_id;
  std::vector<uint8_t> is_special;      // [vocabulary size], 0 or 1
  std::vector<uint8_t> continues_word;  // [vocabulary size], 0 or 1; empty unless whole_word
  std::vector<int64_t> ordinary_ids;    // what a chosen token may be replaced by; not empty

  int64_t vocab_size() const { return static_cast<int64_t>(is_special.size()); }
};

// One policy, checked once. Immutable after construction, so threads may share it.
class Masker {
 public:
  // Throws std::invalid_argument for a policy outside the ranges above, std::out_of_range for an id outside the
  // vocabulary.
  explicit Masker(MaskPolicy policy);

  int64_t vocab_size() const { return policy_.vocab_size(); }

  // Masks num_rows rows of seq_length token ids in place. Row r is sample samples[r] of epoch epochs[r].
  // index and labels, [num_rows * num_predictions], receive per row the chosen places (row * seq_length + column,
  // ascending) and the ids that stood there; unused entries are 0 and kIgnoredLabel.
  //
  // Throws std::invalid_argument for a row with more tokens to choose than num_predictions, an epoch outside
  // 0 .. 2^32 - 1 or a negative sample; std::out_of_range for an id outside the vocabulary.
  void mask_rows(int64_t num_rows, int64_t seq_length, int64_t num_predictions, const int64_t* samples,
                 const int64_t* epochs, int64_t* ids, int64_t* index, int64_t* labels) const;

  // Which of `count` tokens, not masked yet, may take part in the contrastive loss: those with a positive segment,
  // special tokens left out if exclude_special. Throws std::out_of_range then for an id outside the vocabulary.
  void mark_valid(int64_t count, const int64_t* ids, const int64_t* segment, bool exclude_special, bool* valid) const;

 private:
  MaskPolicy policy_;
  std::vector<uint8_t> flags_;  // [vocabulary size], what the policy says of an id, in bits
};

}  // namespace taco
