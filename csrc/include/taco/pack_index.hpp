// Rows of several whole documents: best-fit packing, so that short documents need little padding.
//
// A document is cut into pieces of capacity = seq_length - 2 tokens; its last piece has the remaining tokens; empty
// documents yield nothing. In a row a piece is [CLS] tokens [SEP] and takes its tokens + 2 positions; all pieces of a
// row are from different documents. Every token is in exactly one row.
//
// Pieces are packed within fixed windows of kPiecesPerWindow pieces (the last one shorter), in document order, so that
// memory is bounded, threads take one window each, and the result does not depend on them. Within a window: pieces in
// order of decreasing length, ties in order; each goes into the row with the least sufficient room, with ties into the
// row that reached this room last, and otherwise into a new row (best-fit decreasing; Johnson et al. 1974, "Worst-Case
// Performance Bounds for Simple One-Dimensional Packing Algorithms"). Rows are numbered in the order in which they were
// opened, and hold their pieces in document order.
//
// The table takes 6 bytes per piece, 4 per row and 24 per window.
#pragma once

#include <cstdint>
#include <vector>

namespace taco {

constexpr int64_t kPiecesPerWindow = int64_t{1} << 18;
constexpr int64_t kMaxPackSeqLength = 65536;  // a piece's tokens fit into 16 bits

// Pieces of a window; fewer for long rows, so that its tokens stay below 2^32.
constexpr int64_t pieces_per_window(int64_t seq_length) {
  return seq_length <= (int64_t{1} << 14) ? kPiecesPerWindow : (int64_t{1} << 32) / seq_length;
}

// First row, piece and token of a window; an extra last entry holds the ends.
struct PackWindow {
  int64_t row;
  int64_t piece;
  int64_t token;
};

// Builds the table. Immutable once built.
class PackTable {
 public:
  // `offsets` has num_documents + 1 entries: the first token of each document, then the end.
  // Throws std::invalid_argument if they are negative, decrease or reach 2^62, or unless
  // 3 <= seq_length <= kMaxPackSeqLength.
  PackTable(const int64_t* offsets, int64_t num_documents, int64_t seq_length, int num_threads);

  std::vector<PackWindow> windows;
  std::vector<uint32_t> row_pieces;     // per row its first piece, relative to the window's first
  std::vector<uint32_t> piece_starts;   // per piece, in row order, its first token, relative to the window's first
  std::vector<uint16_t> piece_lengths;  // per piece, its tokens
};

// A view of a table; the arrays must outlive it.
class PackIndex {
 public:
  // Throws std::invalid_argument unless the windows increase from 0 and end with the sizes of the arrays.
  PackIndex(const PackWindow* windows, int64_t num_windows, const uint32_t* row_pieces, int64_t num_rows,
            const uint32_t* piece_starts, const uint16_t* piece_lengths, int64_t num_pieces, int64_t seq_length);

  int64_t num_rows() const { return windows_[num_windows_].row; }
  int64_t seq_length() const { return capacity_ + 2; }
  int64_t capacity() const { return capacity_; }
  int64_t tokens_end() const { return windows_[num_windows_].token; }

  // First token of the first piece of a row. Throws std::out_of_range unless 0 <= row < num_rows().
  int64_t first_token(int64_t row) const;

  // Calls visit(first token, count) for every piece of a row. Throws std::out_of_range if the row is outside the index
  // or the table is damaged: a row without a piece, a piece outside the tokens, or pieces that do not fit into a row.
  template <typename Visit>
  void for_each_piece(int64_t row, Visit visit) const {
    const PackWindow& window = find_window(row);
    const PackWindow& next = *(&window + 1);
    const int64_t end = row + 1 < next.row ? window.piece + row_pieces_[row + 1] : next.piece;
    int64_t piece = window.piece + row_pieces_[row], room = seq_length();
    if (piece >= end || end > next.piece) refuse(row);
    for (; piece < end; ++piece) {
      const int64_t first = window.token + piece_starts_[piece], count = piece_lengths_[piece];
      room -= count + 2;
      if (count < 1 || room < 0 || first + count > tokens_end()) refuse(row);
      visit(first, count);
    }
  }

 private:
  [[noreturn]] static void refuse(int64_t row);
  const PackWindow& find_window(int64_t row) const;

  const PackWindow* windows_;
  int64_t num_windows_;
  const uint32_t* row_pieces_;
  const uint32_t* piece_starts_;
  const uint16_t* piece_lengths_;
  int64_t capacity_;
};

}  // namespace taco
