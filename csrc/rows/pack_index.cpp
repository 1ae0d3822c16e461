#include "taco/pack_index.hpp"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "taco/threads.hpp"

namespace taco {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 62;
constexpr uint32_t kNone = UINT32_MAX;

void check(const int64_t* offsets, int64_t num_documents, int64_t seq_length) {
  if (seq_length < 3 || seq_length > kMaxPackSeqLength) {
    throw std::invalid_argument("pack index: seq_length must be 3 to 65536, found " + std::to_string(seq_length));
  }
  if (num_documents < 0) throw std::invalid_argument("pack index: offsets must have at least one entry");
  if (offsets[0] < 0 || offsets[num_documents] > kMaxTokens) {
    throw std::invalid_argument("pack index: offsets must lie in 0 to 2^62");
  }
}

// Where a window begins: the document and the first token of its first piece.
struct WindowStart {
  int64_t document;
  int64_t token;
};

// The rows of a window while they are filled: a stack of rows per amount of free room, and a set of these amounts.
class Rows {
 public:
  explicit Rows(int64_t seq_length)
      : tops_(static_cast<size_t>(seq_length) + 1, kNone), has_room_(static_cast<size_t>(seq_length) / 64 + 1) {}

  // Puts a piece of `places` positions into a row and returns the row's number.
  uint32_t add(int64_t places) {
    int64_t room = find_room(places);
    uint32_t row;
    if (room < 0) {
      room = static_cast<int64_t>(tops_.size()) - 1;
      row = static_cast<uint32_t>(below_.size());
      below_.push_back(kNone);
    } else {
      row = tops_[static_cast<size_t>(room)];
      tops_[static_cast<size_t>(room)] = below_[row];
      if (below_[row] == kNone) has_room_[static_cast<size_t>(room) / 64] &= ~(uint64_t{1} << room % 64);
    }
    push(row, room - places);
    return row;
  }

  int64_t count() const { return static_cast<int64_t>(below_.size()); }

 private:
  void push(uint32_t row, int64_t room) {
    if (room < 3) return;  // every piece is longer
    below_[row] = tops_[static_cast<size_t>(room)];
    tops_[static_cast<size_t>(room)] = row;
    has_room_[static_cast<size_t>(room) / 64] |= uint64_t{1} << room % 64;
  }

  // The smallest free room of at least `places`; -1 if there is none.
  int64_t find_room(int64_t places) const {
    auto word = static_cast<size_t>(places) / 64;
    uint64_t bits = has_room_[word] & ~uint64_t{0} << places % 64;
    while (bits == 0) {
      if (++word == has_room_.size()) return -1;
      bits = has_room_[word];
    }
    return static_cast<int64_t>(word) * 64 + __builtin_ctzll(bits);
  }

  std::vector<uint32_t> tops_, below_;
  std::vector<uint64_t> has_room_;
};

// Packs one window; each thread of a table uses one.
class WindowPacker {
 public:
  WindowPacker(const int64_t* offsets, int64_t seq_length) : offsets_(offsets), seq_length_(seq_length) {}

  // Writes `count` pieces, beginning at `start`, in row order, and returns the first piece of every row.
  std::vector<uint32_t> pack(WindowStart start, int64_t count, uint32_t* piece_starts, uint16_t* piece_lengths) {
    collect(start, count);
    const std::vector<uint32_t> rows = place();
    std::vector<uint32_t> row_pieces(static_cast<size_t>(num_rows_) + 1);
    for (const uint32_t row : rows) ++row_pieces[row + 1];
    for (size_t row = 1; row < row_pieces.size(); ++row) row_pieces[row] += row_pieces[row - 1];
    std::vector<uint32_t> next(row_pieces);
    for (size_t i = 0; i < rows.size(); ++i) {
      const uint32_t to = next[rows[i]]++;
      piece_starts[to] = starts_[i];
      piece_lengths[to] = lengths_[i];
    }
    row_pieces.pop_back();
    return row_pieces;
  }

 private:
  void collect(WindowStart start, int64_t count) {
    const int64_t capacity = seq_length_ - 2;
    starts_.clear();
    lengths_.clear();
    int64_t token = start.token;
    for (int64_t document = start.document; static_cast<int64_t>(starts_.size()) < count; ++document) {
      const int64_t end = offsets_[document + 1];
      for (; token < end && static_cast<int64_t>(starts_.size()) < count; token += lengths_.back()) {
        starts_.push_back(static_cast<uint32_t>(token - start.token));
        lengths_.push_back(static_cast<uint16_t>(std::min(capacity, end - token)));
      }
    }
  }

  // The row of every piece.
  std::vector<uint32_t> place() {
    std::vector<uint32_t> firsts(static_cast<size_t>(seq_length_));  // by decreasing length
    const auto group = [&](size_t i) { return static_cast<size_t>(seq_length_ - 2 - lengths_[i]); };
    for (size_t i = 0; i < lengths_.size(); ++i) ++firsts[group(i) + 1];
    for (size_t i = 1; i < firsts.size(); ++i) firsts[i] += firsts[i - 1];
    std::vector<uint32_t> order(lengths_.size()), rows_of(lengths_.size());
    for (size_t i = 0; i < lengths_.size(); ++i) order[firsts[group(i)]++] = static_cast<uint32_t>(i);
    Rows rows(seq_length_);
    for (const uint32_t i : order) rows_of[i] = rows.add(lengths_[i] + 2);
    num_rows_ = rows.count();
    return rows_of;
  }

  const int64_t* const offsets_;
  const int64_t seq_length_;
  int64_t num_rows_ = 0;
  std::vector<uint32_t> starts_;
  std::vector<uint16_t> lengths_;
};

// Windows of `size` pieces; the last entry of `windows` holds the ends. Throws std::invalid_argument for bad offsets.
std::vector<WindowStart> find_windows(const int64_t* offsets, int64_t num_documents, int64_t capacity, int64_t size,
                                      std::vector<PackWindow>& windows) {
  std::vector<WindowStart> starts;
  int64_t num_pieces = 0;
  for (int64_t document = 0; document < num_documents; ++document) {
    const int64_t length = offsets[document + 1] - offsets[document];
    if (length < 0) {
      throw std::invalid_argument("pack index: offset " + std::to_string(document + 1) + " (" +
                                  std::to_string(offsets[document + 1]) + ") is smaller than the one before (" +
                                  std::to_string(offsets[document]) + ")");
    }
    const int64_t end = num_pieces + (length + capacity - 1) / capacity;
    for (int64_t next = static_cast<int64_t>(windows.size()) * size; next < end; next += size) {
      const int64_t token = offsets[document] + (next - num_pieces) * capacity;
      starts.push_back({document, token});
      windows.push_back({0, next, token});
    }
    num_pieces = end;
  }
  windows.push_back({0, num_pieces, offsets[num_documents]});
  return starts;
}

}  // namespace

PackTable::PackTable(const int64_t* offsets, int64_t num_documents, int64_t seq_length, int num_threads) {
  check(offsets, num_documents, seq_length);
  const auto starts = find_windows(offsets, num_documents, seq_length - 2, pieces_per_window(seq_length), windows);
  piece_starts.resize(static_cast<size_t>(windows.back().piece));
  piece_lengths.resize(piece_starts.size());
  std::vector<std::vector<uint32_t>> rows(starts.size());
  for_each_task(static_cast<int64_t>(starts.size()), num_threads, [&](int64_t task) {
    const auto i = static_cast<size_t>(task);
    const int64_t first = windows[i].piece, count = windows[i + 1].piece - first;
    rows[i] = WindowPacker(offsets, seq_length)
                  .pack(starts[i], count, piece_starts.data() + first, piece_lengths.data() + first);
  });
  for (size_t i = 0; i < rows.size(); ++i) {
    windows[i].row = static_cast<int64_t>(row_pieces.size());
    row_pieces.insert(row_pieces.end(), rows[i].begin(), rows[i].end());
    std::vector<uint32_t>().swap(rows[i]);
  }
  windows.back().row = static_cast<int64_t>(row_pieces.size());
}

PackIndex::PackIndex(const PackWindow* windows, int64_t num_windows, const uint32_t* row_pieces, int64_t num_rows,
                     const uint32_t* piece_starts, const uint16_t* piece_lengths, int64_t num_pieces,
                     int64_t seq_length)
    : windows_(windows),
      num_windows_(num_windows),
      row_pieces_(row_pieces),
      piece_starts_(piece_starts),
      piece_lengths_(piece_lengths),
      capacity_(seq_length - 2) {
  bool is_good = seq_length >= 3 && seq_length <= kMaxPackSeqLength && num_windows >= 0 && windows[0].row == 0 &&
                 windows[0].piece == 0 && windows[0].token >= 0 && windows[num_windows].row == num_rows &&
                 windows[num_windows].piece == num_pieces && windows[num_windows].token <= kMaxTokens;
  for (int64_t i = 0; is_good && i < num_windows; ++i) {
    const PackWindow &window = windows[i], &next = windows[i + 1];
    is_good = window.row <= next.row && window.piece <= next.piece && window.token <= next.token;
  }
  if (!is_good) throw std::invalid_argument("pack index: the windows do not fit the rows, the pieces or each other");
}

const PackWindow& PackIndex::find_window(int64_t row) const {
  if (row < 0 || row >= num_rows()) {
    throw std::out_of_range("pack index: row " + std::to_string(row) + " of " + std::to_string(num_rows()));
  }
  const auto is_before = [](int64_t wanted, const PackWindow& window) { return wanted < window.row; };
  return *(std::upper_bound(windows_, windows_ + num_windows_, row, is_before) - 1);
}

int64_t PackIndex::first_token(int64_t row) const {
  const PackWindow& window = find_window(row);
  const int64_t piece = window.piece + row_pieces_[row];
  if (piece >= (&window + 1)->piece) refuse(row);
  return window.token + piece_starts_[piece];
}

void PackIndex::refuse(int64_t row) {
  throw std::out_of_range("pack index: the table is damaged at row " + std::to_string(row));
}

}  // namespace taco
