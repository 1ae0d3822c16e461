// Rows of whole sentences: consecutive sentences (sequences of the .idx) of one document, as many as fit into a row.
//
// A row takes sentences while their tokens fit into capacity = seq_length - 2. A longer sentence is cut into pieces of
// `capacity`; each piece, also the shorter last one, is a separate row, and the next sentence begins a new row. A
// document begins a new row. Empty sentences and documents yield nothing. So rows have neither gaps nor overlaps: row r
// holds the tokens from its start to the start of row r + 1, and every token is in exactly one row.
//
// The table therefore holds only starts: per row a uint32, relative to an int64 per block of kRowsPerBlock rows; 4.03
// bytes per row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace taco {

constexpr int64_t kRowsPerBlock = 256;
// Within a block starts are less than kRowsPerBlock * capacity apart, which must fit into 32 bits.
constexpr int64_t kMaxSentenceSeqLength = int64_t{1} << 24;

// Builds the table from any number of parts, each of whole documents; the result does not depend on parts and threads.
// Besides the table it keeps 4 bytes per row, which `finish` frees as it writes.
class SentenceTableBuilder {
 public:
  // Throws std::invalid_argument unless 3 <= seq_length <= kMaxSentenceSeqLength.
  explicit SentenceTableBuilder(int64_t seq_length);

  // Adds num_documents documents: `lengths` is int32 [num_sequences], tokens of each sequence, `firsts` int64
  // [num_documents + 1], first sequence of each document, then the end; neither need be aligned. With `is_kept` (uint8
  // [num_documents]) documents with 0 are skipped, as if they did not exist.
  // Throws std::invalid_argument if a length is negative or firsts decrease or are outside 0 .. num_sequences; the
  // builder is then unchanged.
  void add(const void* lengths, int64_t num_sequences, const void* firsts, int64_t num_documents,
           const uint8_t* is_kept, int num_threads);

  int64_t num_rows() const { return num_rows_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_blocks() const { return (num_rows_ + kRowsPerBlock - 1) / kRowsPerBlock; }

  // Writes `bases`, int64 [num_blocks()], and `starts`, uint32 [num_rows()], and empties the builder.
  void finish(int64_t* bases, uint32_t* starts);

 private:
  int64_t capacity_;
  int64_t num_rows_ = 0;
  int64_t num_tokens_ = 0;
  std::vector<std::vector<uint32_t>> parts_;  // tokens per row
};

// A view of a table; `bases` and `starts` must outlive it.
class SentenceIndex {
 public:
  // Throws std::invalid_argument unless the sizes are consistent and `num_tokens` is in 0 .. 2^62.
  SentenceIndex(const int64_t* bases, int64_t num_blocks, const uint32_t* starts, int64_t num_rows, int64_t num_tokens,
                int64_t seq_length);

  int64_t num_rows() const { return num_rows_; }
  int64_t seq_length() const { return capacity_ + 2; }
  int64_t capacity() const { return capacity_; }
  int64_t tokens_end() const { return num_tokens_; }

  // Throws std::out_of_range unless 0 <= row < num_rows().
  void check(int64_t row) const;

  // First token of a row (not checked); `num_rows()` gives the end of the last one.
  int64_t first_token(int64_t row) const {
    return row == num_rows_ ? num_tokens_ : bases_[row / kRowsPerBlock] + static_cast<int64_t>(starts_[row]);
  }

  // Calls visit(first token, count) for the one piece of a row. Throws std::out_of_range if the row is outside the
  // index or the table is damaged: a piece longer than a row or outside the tokens.
  template <typename Visit>
  void for_each_piece(int64_t row, Visit visit) const {
    check(row);
    const int64_t first = first_token(row), count = first_token(row + 1) - first;
    if (first < 0 || count < 1 || count > capacity_ || first + count > num_tokens_) refuse(row);
    visit(first, count);
  }

 private:
  [[noreturn]] static void refuse(int64_t row);

  const int64_t* bases_;
  const uint32_t* starts_;
  int64_t num_rows_, num_tokens_, capacity_;
};

}  // namespace taco
