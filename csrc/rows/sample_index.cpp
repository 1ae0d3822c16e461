#include "taco/sample_index.hpp"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>

namespace taco {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 62;
constexpr int64_t kMaxSeqLength = int64_t{1} << 30;

// Returns seq_length, so that it is checked before anything is computed from it.
int64_t check(const int64_t* offsets, int64_t num_documents, int64_t seq_length) {
  if (seq_length < 3 || seq_length > kMaxSeqLength) {
    throw std::invalid_argument("row index: seq_length must be 3 to 2^30, found " + std::to_string(seq_length));
  }
  if (num_documents < 0) throw std::invalid_argument("row index: offsets must have at least one entry");
  if (offsets[0] < 0 || offsets[num_documents] > kMaxTokens) {
    throw std::invalid_argument("row index: offsets must lie in 0 to 2^62");
  }
  for (int64_t i = 0; i < num_documents; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      throw std::invalid_argument("row index: offset " + std::to_string(i + 1) + " (" + std::to_string(offsets[i + 1]) +
                                  ") is smaller than the one before (" + std::to_string(offsets[i]) + ")");
    }
  }
  return seq_length;
}

}  // namespace

RowIndex::RowIndex(RowMode mode, const int64_t* offsets, int64_t num_documents, int64_t seq_length)
    : mode_(mode), capacity_(check(offsets, num_documents, seq_length) - 2) {
  const bool is_stream = mode == RowMode::stream;
  int64_t num_filled = 0;
  for (int64_t i = 0; i < num_documents; ++i) num_filled += offsets[i + 1] > offsets[i];
  tokens_begin_ = offsets[0];
  tokens_end_ = offsets[num_documents];
  starts_.reserve(static_cast<size_t>(num_filled) + 1);
  first_tokens_.reserve(is_stream ? 0 : static_cast<size_t>(num_filled) + 1);
  int64_t start = 0;
  for (int64_t i = 0; i < num_documents; ++i) {
    const int64_t length = offsets[i + 1] - offsets[i];
    if (length == 0) continue;
    starts_.push_back(start);
    if (!is_stream) first_tokens_.push_back(offsets[i]);
    start += is_stream ? length + 1 : (length - 1) / capacity_ + 1;
  }
  starts_.push_back(start);
  if (!is_stream) first_tokens_.push_back(tokens_end_);
  num_rows_ = is_stream ? start / capacity_ : start;
  num_left_out_ = is_stream ? start % capacity_ : 0;
  set_fences();
}

void RowIndex::set_fences() {
  const auto end = static_cast<uint64_t>(starts_.back());
  while (end >> fence_shift_ > starts_.size() / kDocumentsPerFence) ++fence_shift_;
  fences_.reserve(static_cast<size_t>(end >> fence_shift_) + 2);
  size_t document = 0;
  for (uint64_t k = 0; k <= (end >> fence_shift_) + 1; ++k) {
    while (document + 1 < starts_.size() && static_cast<uint64_t>(starts_[document + 1]) <= k << fence_shift_) {
      ++document;
    }
    fences_.push_back(static_cast<int64_t>(document));
  }
}

RowStart RowIndex::locate(int64_t row) const {
  if (row < 0 || row >= num_rows_) {
    throw std::out_of_range("row index: row " + std::to_string(row) + " of " + std::to_string(num_rows_));
  }
  const int64_t place = mode_ == RowMode::stream ? row * capacity_ : row;
  const auto fence = static_cast<size_t>(place >> fence_shift_);
  const auto first = starts_.begin() + fences_[fence], end = starts_.begin() + fences_[fence + 1] + 1;
  const int64_t document = std::upper_bound(first, end, place) - starts_.begin() - 1;
  const int64_t after = place - starts_[static_cast<size_t>(document)];
  return {document, mode_ == RowMode::stream ? after : after * capacity_};
}

}  // namespace taco
