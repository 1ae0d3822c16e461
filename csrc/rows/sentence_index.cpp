#include "taco/sentence_index.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "rows/row_cutter.hpp"
#include "taco/threads.hpp"

namespace taco {
namespace {

using detail::RowCutter;

constexpr int64_t kSequencesPerTask = int64_t{1} << 18;
// First document whose first sequence is at least `sequence`; defined for any firsts.
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
