// Fills rows: token ids of a dataset -> [CLS] tokens [SEP] (padding), and which columns hold tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "taco/sample_index.hpp"
#include "taco/token_map.hpp"

namespace taco {

struct RowIds {
  int64_t vocab_size;  // every token must be below it
  int64_t cls;
  int64_t sep;
  int64_t pad;
};

namespace detail {

// Copies `count` tokens to `out`; throws std::out_of_range if an id is not in the vocabulary.
template <typename Token>
int64_t* copy_tokens(const Token* tokens, int64_t first, int64_t count, int64_t vocab_size, int64_t* out) {
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t id = static_cast<int64_t>(tokens[i]);
    if (id < 0 || id >= vocab_size) {
      throw std::out_of_range("token " + std::to_string(i) + " has id " + std::to_string(id) +
                              ", outside the vocabulary of " + std::to_string(vocab_size) + " pieces");
    }
    *out++ = id;
  }
  return out;
}

inline void check_tokens(int64_t end, int64_t num_tokens) {
  if (num_tokens >= end) return;
  throw std::invalid_argument("the index needs " + std::to_string(end) + " tokens, found " +
                              std::to_string(num_tokens));
}

// Writes up to `capacity` tokens of row `row` and returns the end; only a document's last row may be shorter.
template <typename Token>
int64_t* fill_tokens(const RowIndex& index, const TokenMap& map, const Token* tokens, int64_t num_tokens, int64_t row,
                     const RowIds& ids, int64_t* out) {
  int64_t* const end = out + index.capacity();
  auto [document, offset] = index.locate(row);
  while (true) {
    const int64_t count = std::min<int64_t>(index.length(document) - offset, end - out);
    if (count > 0) {
      const int64_t first = map.token(index.first_token(document) + offset);
      check_tokens(first + count, num_tokens);
      out = copy_tokens(tokens, first, count, ids.vocab_size, out);
    }
    if (index.mode() == RowMode::document || out == end) return out;
    *out++ = ids.sep;
    if (out == end) return out;
    ++document;
    offset = 0;
  }
}

}  // namespace detail

// Fills num_rows rows of index.seq_length() columns each: `out_ids` with token ids, `out_segment` with 1 for tokens and
// 0 for padding. `tokens` are the num_tokens tokens of the dataset that `index` was built from; if the index covers
// only some of its documents, `map` locates them.
//
// Throws std::invalid_argument if the token array is shorter than the index needs, std::out_of_range if a row is
// outside the index or a token id outside the vocabulary. The output is then unspecified.
template <typename Token>
void fill_rows(const RowIndex& index, const TokenMap& map, const Token* tokens, int64_t num_tokens, const int64_t* rows,
               int64_t num_rows, const RowIds& ids, int64_t* out_ids, int64_t* out_segment) {
  detail::check_tokens(index.tokens_end(), num_tokens);
  const int64_t seq_length = index.seq_length();
  for (int64_t i = 0; i < num_rows; ++i) {
    int64_t* const first = out_ids + i * seq_length;
    int64_t* const segment = out_segment + i * seq_length;
    *first = ids.cls;
    int64_t* out = detail::fill_tokens(index, map, tokens, num_tokens, rows[i], ids, first + 1);
    *out++ = ids.sep;
    std::fill(out, first + seq_length, ids.pad);
    std::fill(segment, segment + (out - first), int64_t{1});
    std::fill(segment + (out - first), segment + seq_length, int64_t{0});
  }
}

// The same for an index of pieces (SentenceIndex, PackIndex): each piece is [CLS] tokens [SEP], and `out_segment`
// numbers the pieces of a row 1, 2, 3, ... Also throws std::out_of_range if the table is damaged.
template <typename Index, typename Token>
void fill_rows(const Index& index, const TokenMap& map, const Token* tokens, int64_t num_tokens, const int64_t* rows,
               int64_t num_rows, const RowIds& ids, int64_t* out_ids, int64_t* out_segment) {
  detail::check_tokens(index.tokens_end(), num_tokens);
  const int64_t seq_length = index.seq_length();
  for (int64_t i = 0; i < num_rows; ++i) {
    int64_t *out = out_ids + i * seq_length, *const end = out + seq_length;
    int64_t *segment = out_segment + i * seq_length, number = 0;
    index.for_each_piece(rows[i], [&](int64_t place, int64_t count) {
      const int64_t first = map.token(place);
      detail::check_tokens(first + count, num_tokens);
      *out++ = ids.cls;
      out = detail::copy_tokens(tokens, first, count, ids.vocab_size, out);
      *out++ = ids.sep;
      segment = std::fill_n(segment, count + 2, ++number);
    });
    std::fill_n(segment, end - out, int64_t{0});
    std::fill(out, end, ids.pad);
  }
}

}  // namespace taco
