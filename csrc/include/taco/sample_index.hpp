// Where rows begin: documents of a token array -> rows of a fixed length, without a table of rows.
//
// A row is [CLS] + capacity tokens + [SEP], capacity = seq_length - 2. Empty documents yield nothing. Two modes:
//   stream    Every document is followed by one [SEP], which is not on disk; this stream is cut into pieces of
//             `capacity`. No padding. The incomplete piece at the end is left out.
//   document  A row holds tokens of one document; a long document continues in further rows, its last row is padded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace taco {

enum class RowMode { stream, document };

// Where a row begins: in document number `document` (empty ones not counted), `offset` tokens after its first token.
// In stream mode `offset` may equal the length of the document: the row begins with the [SEP] that follows it.
struct RowStart {
  int64_t document;
  int64_t offset;
};

// The sample index of one dataset: a prefix sum over its documents. A row is found by binary search among the documents
// between two fences, about kDocumentsPerFence of them: among all documents every step would be a cache miss.
// Memory: 8 bytes per document in stream mode, 16 in document mode, and half a byte for the fences. Immutable once
// built, so threads may share it.
class RowIndex {
 public:
  // `offsets` has num_documents + 1 entries: the first token of each document, then the end; no reference is kept.
  // Throws std::invalid_argument if they are negative, decrease or reach 2^62, or if seq_length is not 3 to 2^30.
  RowIndex(RowMode mode, const int64_t* offsets, int64_t num_documents, int64_t seq_length);

  int64_t num_rows() const { return num_rows_; }
  int64_t seq_length() const { return capacity_ + 2; }
  int64_t capacity() const { return capacity_; }
  RowMode mode() const { return mode_; }

  // One past the last token that any row can hold; a token array must have at least this length.
  int64_t tokens_end() const { return tokens_end_; }

  // Tokens (separators included) after the last complete row; 0 in document mode.
  int64_t num_left_out() const { return num_left_out_; }

  int64_t memory_bytes() const {
    return static_cast<int64_t>((starts_.size() + first_tokens_.size() + fences_.size()) * sizeof(int64_t));
  }

  // Throws std::out_of_range unless 0 <= row < num_rows().
  RowStart locate(int64_t row) const;

  // First token and length of a document (0 <= document, as in RowStart; not checked).
  int64_t first_token(int64_t document) const {
    // In stream mode every earlier document adds one separator.
    return mode_ == RowMode::stream ? starts_[static_cast<size_t>(document)] + tokens_begin_ - document
                                    : first_tokens_[static_cast<size_t>(document)];
  }
  int64_t length(int64_t document) const {
    return mode_ == RowMode::stream
               ? starts_[static_cast<size_t>(document) + 1] - starts_[static_cast<size_t>(document)] - 1
               : first_tokens_[static_cast<size_t>(document) + 1] - first_tokens_[static_cast<size_t>(document)];
  }

 private:
  static constexpr size_t kDocumentsPerFence = 16;

  void set_fences();

  RowMode mode_;
  int64_t capacity_;
  int64_t num_rows_ = 0;
  int64_t num_left_out_ = 0;
  int64_t tokens_begin_ = 0;
  int64_t tokens_end_ = 0;
  // Per non-empty document, then the end: in stream mode its first position in the stream; else its first row.
  std::vector<int64_t> starts_;
  std::vector<int64_t> first_tokens_;  // document mode only
  // Entry k: the last document (or the end) that starts at or before position k * 2^fence_shift_.
  std::vector<int64_t> fences_;
  int fence_shift_ = 0;
};

}  // namespace taco
