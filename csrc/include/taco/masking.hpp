// Dynamic masking for masked language modelling, a pure function of (seed, epoch, sample).
//
// Of the n non-special tokens of a row, max(1, floor(rate * n + 1/2)) are chosen (none if n is 0). A chosen token
// becomes [MASK] (80 %), a random ordinary id (10 %) or stays (10 %), as in Devlin et al. 2019, "BERT".
//   token       single tokens.
//   whole_word  whole words; a word is a token and the following tokens that continue a word. A word that would
//               exceed num_predictions of the row is skipped: fewer tokens, even none, may be chosen.
//   span        runs of tokens: starting at a random token, a geometric number of them with mean mean_span_length, at
//               most kMaxSpan, ended early by a special or chosen token or the budget (Joshi et al. 2020, "SpanBERT").
//
// The draws, from Draws(Purpose::masks, seed, epoch, sample), in this order, so that they can be reimplemented:
//   1. Units (tokens; words) are in order of columns. For i = 0, 1, ... until the budget is met or there are no more,
//      unit i is swapped with unit i + below(number of units - i); then it is taken. A span whose first token is
//      already chosen is skipped; any other draws its length: 1, plus one for each random word below the threshold
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
  std::vector<int64_t> ordinary_ids;    // replacements for chosen tokens; not empty

  int64_t vocab_size() const { return static_cast<int64_t>(is_special.size()); }
};

// One policy, validated once. Immutable after construction, so threads may share it.
class Masker {
 public:
  // Throws std::invalid_argument if the policy is outside the ranges above, std::out_of_range if an id is outside the
  // vocabulary.
  explicit Masker(MaskPolicy policy);

  int64_t vocab_size() const { return policy_.vocab_size(); }

  // Masks num_rows rows of seq_length token ids in place. Row r is sample samples[r] of epoch epochs[r].
  // index and labels, [num_rows * num_predictions], receive per row the chosen positions (row * seq_length + column,
  // ascending) and their original ids; unused entries are 0 and kIgnoredLabel.
  //
  // Throws std::invalid_argument if a row has more tokens to choose than num_predictions, an epoch is outside
  // 0 .. 2^32 - 1 or a sample is negative; std::out_of_range if an id is outside the vocabulary.
  void mask_rows(int64_t num_rows, int64_t seq_length, int64_t num_predictions, const int64_t* samples,
                 const int64_t* epochs, int64_t* ids, int64_t* index, int64_t* labels) const;

  // Which of `count` tokens, not yet masked, may take part in the contrastive loss: those with a positive segment,
  // without special tokens if exclude_special; then throws std::out_of_range if an id is outside the vocabulary.
  void mark_valid(int64_t count, const int64_t* ids, const int64_t* segment, bool exclude_special, bool* valid) const;

 private:
  MaskPolicy policy_;
  std::vector<uint8_t> flags_;  // [vocabulary size], the properties of an id, as bits
};

}  // namespace taco
