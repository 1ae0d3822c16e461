// How sentences become rows: runs of whole sentences of one document, as many as fit; see taco/sentence_index.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "taco/threads.hpp"

namespace taco::detail {

constexpr int64_t kBlock = 512;  // so that all lanes fit the first-level cache
constexpr int64_t kWindow = 32;
constexpr int kLanes = 3;
constexpr int64_t kMaxFastCapacity = int64_t{1} << 20;  // (kBlock + 1) * capacity stays below 2^31

// Writes the running sums of `count` int32 lengths, starting from `sum`, to `sums`. True if all lengths are in
// 0 .. capacity; else the sums are invalid.
inline bool add_up(const char* lengths, int64_t count, int32_t capacity, uint32_t sum, uint32_t* sums) {
  uint32_t is_odd = 0;  // its highest bit is set if a length is negative or above the capacity
  int64_t i = 0;
#ifdef __SSE2__
  __m128i odd = _mm_setzero_si128(), carry = _mm_set1_epi32(static_cast<int32_t>(sum));
  const __m128i capacities = _mm_set1_epi32(capacity);
  for (; i + 4 <= count; i += 4) {
    __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lengths + 4 * i));
    odd = _mm_or_si128(odd, _mm_or_si128(x, _mm_sub_epi32(capacities, x)));
    x = _mm_add_epi32(x, _mm_slli_si128(x, 4));
    x = _mm_add_epi32(x, _mm_slli_si128(x, 8));
    x = _mm_add_epi32(x, carry);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + i), x);
    carry = _mm_shuffle_epi32(x, 0xFF);
  }
  sum = static_cast<uint32_t>(_mm_cvtsi128_si32(carry));
  is_odd = _mm_movemask_ps(_mm_castsi128_ps(odd)) ? 1u << 31 : 0;
#endif
  for (; i < count; ++i) {
    const auto length = load_unaligned<uint32_t>(lengths, i);
    is_odd |= length | (static_cast<uint32_t>(capacity) - length);
    sums[i] = sum += length;
  }
  return is_odd >> 31 == 0;
}

// How many of kWindow increasing sums are at most `limit`, branch-free: the end of a row is unpredictable.
inline int64_t count_fitting(const uint32_t* sums, int32_t limit) {
#ifdef __SSE2__
  const __m128i limits = _mm_set1_epi32(limit);
  const auto is_over = [&](int64_t i) {
    return _mm_cmpgt_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sums + 4 * i)), limits);
  };
  const auto is_over16 = [&](int64_t i) {
    const __m128i low = _mm_packs_epi32(is_over(i), is_over(i + 1)),
                  high = _mm_packs_epi32(is_over(i + 2), is_over(i + 3));
    return static_cast<uint64_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
  };
  return __builtin_ctzll(is_over16(0) | is_over16(4) << 16 | uint64_t{1} << kWindow);
#else
  int32_t num_fitting = 0;
  for (int64_t i = 0; i < kWindow; ++i) num_fitting += static_cast<int32_t>(sums[i]) <= limit;
  return num_fitting;
#endif
}

// Cuts whole documents of up to kBlock sentences into rows without a branch that depends on lengths, since the end of a
// row is unpredictable. Each row begins where the previous one ended, so several lanes advance together: the processor
// works on one while it waits for another.
struct Lane {
  int64_t document = 0, num_taken = 0;
  bool is_plain = true;  // no sentence is longer than a row or has a negative length
  size_t used = 0;
  uint32_t closed[kBlock + 1];  // tokens of the rows

  // Takes documents from `document` to at most `end`; returns the first one not taken.
  int64_t take(const char* lengths, const void* firsts, int64_t from, int64_t end, int32_t capacity) {
    document = from;
    const int64_t first = load_unaligned<int64_t>(firsts, from);
    int64_t count = 0;
    for (num_taken = 0; from + num_taken < end && num_taken < kBlock; ++num_taken) {
      const int64_t border = load_unaligned<int64_t>(firsts, from + num_taken + 1) - first;
      if (border > kBlock) break;
      borders_[num_taken] = static_cast<uint32_t>(count = border);
    }
    is_plain = add_up(lengths + 4 * first, count, capacity, 0, sums_ + 1);
    std::fill(sums_ + 1 + count, sums_ + 1 + count + kWindow, uint32_t{INT32_MAX});
    borders_[num_taken] = static_cast<uint32_t>(count);
    last_ = is_plain ? static_cast<uint32_t>(num_taken) : 0;
    if (!is_plain) borders_[0] = 0;
    used = 0;
    sentence_ = begin_ = number_ = 0;
    return from + num_taken;
  }

  // Closes a row, or advances by kWindow sentences; false if none is left.
  bool step(uint32_t capacity) {
    const uint32_t stop = borders_[number_];
    const uint32_t limit = std::min(begin_ + capacity, sums_[stop]);
    const auto num_fitting = static_cast<uint32_t>(count_fitting(sums_ + 1 + sentence_, static_cast<int32_t>(limit)));
    sentence_ = std::min(sentence_ + num_fitting, stop);  // empty sentences of the next document may have been counted
    const uint32_t sum = sums_[sentence_];
    const bool goes_on = (num_fitting == kWindow) & (sentence_ < stop);
    closed[used] = sum - begin_;
    used += !goes_on & (sum > begin_);
    begin_ = goes_on ? begin_ : sum;
    number_ += (sentence_ >= stop) & (number_ < last_);
    return number_ < last_;
  }

 private:
  uint32_t last_ = 0;      // documents to cut
  uint32_t sentence_ = 0;  // the next one
  uint32_t begin_ = 0;     // tokens before the open row
  uint32_t number_ = 0;    // of the document
  uint32_t borders_[kBlock + 1];
  uint32_t sums_[1 + kBlock + kWindow + 4] = {};
};

// Cuts adjacent documents into rows; collects the number of tokens of every row.
class RowCutter {
 public:
  RowCutter(const void* lengths, const void* firsts, int64_t num_sequences, int64_t capacity,
            std::vector<uint32_t>& rows)
      : lengths_(static_cast<const char*>(lengths)),
        firsts_(firsts),
        num_sequences_(num_sequences),
        capacity_(capacity),
        rows_(rows) {}

  // Cuts documents document .. end - 1. Throws std::invalid_argument if a length is negative or firsts are bad.
  void cut(int64_t document, int64_t end) {
    check_documents(document, end);
    while (document < end) {
      const int64_t next = capacity_ <= kMaxFastCapacity ? cut_side_by_side(document, end) : document;
      if (next == document) cut_one_by_one(document, document + 1);  // it is longer than a block
      document = std::max(next, document + 1);
    }
  }

 private:
  // Cuts documents, beginning with `document`, that fill up to kLanes blocks; returns the first one not cut.
  int64_t cut_side_by_side(int64_t document, int64_t end) {
    for (Lane& lane : lanes_) document = lane.take(lengths_, firsts_, document, end, static_cast<int32_t>(capacity_));
    const auto capacity = static_cast<uint32_t>(capacity_);
    for (bool is_busy = true; is_busy;) {
      is_busy = false;
      for (Lane& lane : lanes_) is_busy |= lane.step(capacity);
    }
    for (const Lane& lane : lanes_) {
      if (lane.is_plain) {
        rows_.insert(rows_.end(), lane.closed, lane.closed + lane.used);
      } else {
        cut_one_by_one(lane.document, lane.document + lane.num_taken);
      }
    }
    return document;
  }

  void cut_one_by_one(int64_t document, int64_t end) {
    document_ = document;
    int64_t first = load_unaligned<int64_t>(firsts_, document);
    const int64_t last = load_unaligned<int64_t>(firsts_, end);
    while (document_ < end) {
      // The last block must not extend into later documents.
      const int64_t count = std::min(kBlock, last - first);
      cut_block(first, count, end);
      first += count;
    }
  }

  int64_t next_border() const { return load_unaligned<int64_t>(firsts_, document_ + 1); }

  // Makes the loops terminate for any firsts.
  void check_documents(int64_t document, int64_t end) const {
    int64_t first = load_unaligned<int64_t>(firsts_, document);
    for (; document < end; ++document) {
      const int64_t border = load_unaligned<int64_t>(firsts_, document + 1);
      if (first < 0 || border < first || border > num_sequences_) {
        throw std::invalid_argument("sentence index: document " + std::to_string(document) + " has the sequences " +
                                    std::to_string(first) + " to " + std::to_string(border) + " of " +
                                    std::to_string(num_sequences_));
      }
      first = border;
    }
  }

  // Advances to the first document that ends after `sequence`, or to `end`.
  void pass_documents(int64_t sequence, int64_t end) {
    while (document_ < end && next_border() <= sequence) ++document_;
  }

  void cut_block(int64_t first, int64_t count, int64_t end) {
    sums_[0] = static_cast<uint32_t>(open_);
    const bool is_plain = capacity_ <= kMaxFastCapacity &&
                          add_up(lengths_ + 4 * first, count, static_cast<int32_t>(capacity_), sums_[0], sums_ + 1);
    if (is_plain) {
      cut_plain(first, count, end);
    } else {
      cut_slowly(first, count, end);
    }
  }

  void cut_plain(int64_t first, int64_t count, int64_t end) {
    std::fill(sums_ + 1 + count, sums_ + 1 + count + kWindow, uint32_t{INT32_MAX});
    size_t used = 0;
    int64_t i = 0;
    uint32_t begin = 0;
    for (; document_ < end; pass_documents(first + i, end)) {
      const int64_t border = next_border() - first;
      const int64_t stop = std::min(border, count);
      const uint32_t end_sum = sums_[stop];
      while (true) {
        const uint32_t limit = std::min(begin + static_cast<uint32_t>(capacity_), end_sum);
        const int64_t num_fitting = count_fitting(sums_ + 1 + i, static_cast<int32_t>(limit));
        i += num_fitting;
        if (num_fitting == kWindow && i < stop) continue;
        if (i >= stop) break;
        closed_[used++] = sums_[i] - begin;
        begin = sums_[i];
      }
      i = stop;  // empty sentences of the next document may have been counted
      if (border > count) break;
      closed_[used] = end_sum - begin;
      used += end_sum > begin;
      begin = end_sum;
    }
    rows_.insert(rows_.end(), closed_, closed_ + used);
    open_ = sums_[count] - begin;
  }

  // For blocks with a sentence that must be cut or has an invalid length, and for very long rows.
  void cut_slowly(int64_t first, int64_t count, int64_t end) {
    for (int64_t i = first; i <= first + count; ++i) {
      if (document_ < end && i == next_border()) {
        close_row();
        pass_documents(i, end);
      }
      if (i == first + count) break;
      const auto length = static_cast<int64_t>(load_unaligned<int32_t>(lengths_, i));
      if (length < 0) {
        throw std::invalid_argument("sentence index: sequence " + std::to_string(i) + " has the length " +
                                    std::to_string(length));
      }
      if (open_ + length > capacity_) close_row();
      open_ += length;
      if (length <= capacity_) continue;
      rows_.insert(rows_.end(), static_cast<size_t>(length / capacity_), static_cast<uint32_t>(capacity_));
      open_ = length % capacity_;
      close_row();
    }
  }

  void close_row() {
    if (open_ > 0) rows_.push_back(static_cast<uint32_t>(open_));
    open_ = 0;
  }

  const char* const lengths_;
  const void* const firsts_;
  const int64_t num_sequences_, capacity_;
  std::vector<uint32_t>& rows_;
  int64_t document_ = 0;  // of the next sequence
  int64_t open_ = 0;      // tokens of the open row
  Lane lanes_[kLanes];
  uint32_t sums_[1 + kBlock + 2 * kWindow];
  uint32_t closed_[2 * kBlock + 2];
};

}  // namespace taco::detail
