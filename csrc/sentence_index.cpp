#include "taco/sentence_index.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "taco/threads.hpp"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace taco {
namespace {

constexpr int64_t kSequencesPerTask = int64_t{1} << 18;
constexpr int64_t kBlock = 1024;
constexpr int64_t kWindow = 32;
constexpr int64_t kMaxFastCapacity = int64_t{1} << 20;  // (kBlock + 1) * capacity stays below 2^31

// Writes the running sums of `count` int32 lengths, from `sum` on, to `sums`, whose last three entries may be followed
// by others. True if all lengths lie in 0 .. capacity; else the sums are of no use.
bool add_up(const char* lengths, int64_t count, int32_t capacity, uint32_t sum, uint32_t* sums) {
  uint32_t is_odd = 0;  // its highest bit: a length is negative or above the capacity
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

// How many of kWindow increasing sums are at most `limit`, without a branch: a row's end cannot be predicted.
int64_t count_fitting(const uint32_t* sums, int32_t limit) {
#ifdef __SSE2__
  const __m128i limits = _mm_set1_epi32(limit);
  const auto is_over = [&](int64_t i) {
    return _mm_cmpgt_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sums + 4 * i)), limits);
  };
  const auto is_over16 = [&](int64_t i) {
    const __m128i low = _mm_packs_epi32(is_over(i), is_over(i + 1)), high = _mm_packs_epi32(is_over(i + 2), is_over(i + 3));
    return static_cast<uint64_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
  };
  return __builtin_ctzll(is_over16(0) | is_over16(4) << 16 | uint64_t{1} << kWindow);
#else
  int32_t num_fitting = 0;
  for (int64_t i = 0; i < kWindow; ++i) num_fitting += static_cast<int32_t>(sums[i]) <= limit;
  return num_fitting;
#endif
}

// Cuts neighbouring documents into rows; collects the number of tokens of every row.
class RowCutter {
 public:
  RowCutter(const void* lengths, const void* firsts, int64_t num_sequences, int64_t capacity,
            std::vector<uint32_t>& rows)
      : lengths_(static_cast<const char*>(lengths)),
        firsts_(firsts),
        num_sequences_(num_sequences),
        capacity_(capacity),
        rows_(rows) {}

  // Documents document to end - 1. Throws std::invalid_argument for a negative length and for bad firsts.
  void cut(int64_t document, int64_t end) {
    check_documents(document, end);
    document_ = document;
    int64_t first = load_unaligned<int64_t>(firsts_, document);
    const int64_t last = load_unaligned<int64_t>(firsts_, end);
    while (document_ < end) {
      // The last block must not reach into the documents after these.
      const int64_t count = std::min(kBlock, last - first);
      cut_block(first, count, end);
      first += count;
    }
  }

 private:
  int64_t next_border() const { return load_unaligned<int64_t>(firsts_, document_ + 1); }

  // So that the loops end, whatever the firsts are.
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

  // Goes on to the first document that ends after `sequence`, or to `end`.
  void pass_documents(int64_t sequence, int64_t end) {
    while (document_ < end && next_border() <= sequence) ++document_;
  }

  void cut_block(int64_t first, int64_t count, int64_t end) {
    sums_[0] = static_cast<uint32_t>(open_);
    const bool is_plain = capacity_ <= kMaxFastCapacity && add_up(lengths_ + 4 * first, count,
                                                                  static_cast<int32_t>(capacity_), sums_[0], sums_ + 1);
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

  // For blocks with a sentence that is cut, or one of an impossible length, and for very wide rows.
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
  int64_t document_ = 0;  // that of the next sequence
  int64_t open_ = 0;      // tokens of the row that is not closed yet
  uint32_t sums_[1 + kBlock + 2 * kWindow];
  uint32_t closed_[2 * kBlock + 2];
};

// First document whose first sequence is at least `sequence`; defined whatever the firsts are.
int64_t find_document(const void* firsts, int64_t num_documents, int64_t sequence) {
  int64_t low = 0, high = num_documents;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (load_unaligned<int64_t>(firsts, middle) < sequence) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Cuts every run of kept documents.
void cut_runs(RowCutter& cutter, int64_t document, int64_t end, const uint8_t* is_kept) {
  while (document < end) {
    const uint8_t* const none = nullptr;
    int64_t stop = end;
    if (is_kept != none) {
      document = std::find_if(is_kept + document, is_kept + end, [](uint8_t kept) { return kept != 0; }) - is_kept;
      stop = std::find(is_kept + document, is_kept + end, uint8_t{0}) - is_kept;
    }
    if (document < stop) cutter.cut(document, stop);
    document = stop;
  }
}

int64_t sum(const std::vector<uint32_t>& counts) {
  int64_t total = 0;
  for (const uint32_t count : counts) total += count;
  return total;
}

}  // namespace

SentenceTableBuilder::SentenceTableBuilder(int64_t seq_length) : capacity_(seq_length - 2) {
  if (seq_length >= 3 && seq_length <= kMaxSentenceSeqLength) return;
  throw std::invalid_argument("sentence index: seq_length must be 3 to 2^24, found " + std::to_string(seq_length));
}

void SentenceTableBuilder::add(const void* lengths, int64_t num_sequences, const void* firsts, int64_t num_documents,
                               const uint8_t* is_kept, int num_threads) {
  if (num_documents < 1) return;
  const int64_t num_tasks = num_sequences / kSequencesPerTask + 1;
  std::vector<int64_t> borders(static_cast<size_t>(num_tasks) + 1, num_documents);
  borders[0] = 0;
  for (int64_t i = 1; i < num_tasks; ++i) {
    const int64_t border = find_document(firsts, num_documents, i * kSequencesPerTask);
    borders[static_cast<size_t>(i)] = std::max(border, borders[static_cast<size_t>(i) - 1]);
  }
  std::vector<std::vector<uint32_t>> parts(static_cast<size_t>(num_tasks));
  std::vector<int64_t> tokens(static_cast<size_t>(num_tasks));
  for_each_task(num_tasks, num_threads, [&](int64_t i) {
    const auto task = static_cast<size_t>(i);
    thread_local std::vector<uint32_t> rows;  // grows once per thread, not once per task
    rows.clear();
    RowCutter cutter(lengths, firsts, num_sequences, capacity_, rows);
    cut_runs(cutter, borders[task], borders[task + 1], is_kept);
    parts[task].assign(rows.begin(), rows.end());
    tokens[task] = sum(parts[task]);
  });
  for (int64_t i = 0; i < num_tasks; ++i) {
    num_rows_ += static_cast<int64_t>(parts[static_cast<size_t>(i)].size());
    num_tokens_ += tokens[static_cast<size_t>(i)];
    parts_.push_back(std::move(parts[static_cast<size_t>(i)]));
  }
}

void SentenceTableBuilder::finish(int64_t* bases, uint32_t* starts) {
  int64_t row = 0, place = 0, base = 0;
  for (std::vector<uint32_t>& part : parts_) {
    for (const uint32_t count : part) {
      if (row % kRowsPerBlock == 0) bases[row / kRowsPerBlock] = base = place;
      starts[row++] = static_cast<uint32_t>(place - base);
      place += count;
    }
    std::vector<uint32_t>().swap(part);
  }
  parts_.clear();
  num_rows_ = num_tokens_ = 0;
}

SentenceIndex::SentenceIndex(const int64_t* bases, int64_t num_blocks, const uint32_t* starts, int64_t num_rows,
                             int64_t num_tokens, int64_t seq_length)
    : bases_(bases), starts_(starts), num_rows_(num_rows), num_tokens_(num_tokens), capacity_(seq_length - 2) {
  if (seq_length < 3 || seq_length > kMaxSentenceSeqLength || num_tokens < 0 || num_tokens > int64_t{1} << 62) {
    throw std::invalid_argument("sentence index: seq_length " + std::to_string(seq_length) + " with " +
                                std::to_string(num_tokens) + " tokens");
  }
  if (num_blocks != (num_rows + kRowsPerBlock - 1) / kRowsPerBlock) {
    throw std::invalid_argument("sentence index: " + std::to_string(num_blocks) + " blocks for " +
                                std::to_string(num_rows) + " rows");
  }
}

void SentenceIndex::check(int64_t row) const {
  if (row >= 0 && row < num_rows_) return;
  throw std::out_of_range("sentence index: row " + std::to_string(row) + " of " + std::to_string(num_rows_));
}

void SentenceIndex::refuse(int64_t row) {
  throw std::out_of_range("sentence index: the table is damaged at row " + std::to_string(row));
}

}  // namespace taco
