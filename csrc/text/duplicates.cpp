#include "taco/duplicates.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace taco {
namespace {

constexpr int64_t kDocumentsPerTurn = 4096;
constexpr int64_t kMaxParts = int64_t{1} << 20;
constexpr int kMaxThreads = 1024;
// Odd constants without a pattern: fractional parts of square roots of primes.
constexpr uint64_t kKey[4] = {0x6a09e667f3bcc909, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1};

struct Entry {
  DocumentHash hash;
  int64_t document;
};
static_assert(sizeof(Entry) == kDuplicateEntryBytes);

bool operator==(const DocumentHash& a, const DocumentHash& b) { return a.high == b.high && a.low == b.low; }

bool comes_before(const Entry& a, const Entry& b) {
  if (a.hash.high != b.hash.high) return a.hash.high < b.hash.high;
  if (a.hash.low != b.hash.low) return a.hash.low < b.hash.low;
  return a.document < b.document;
}

// The high and low half of a 128-bit product, from 32-bit products: the same with every compiler.
uint64_t multiply_and_fold(uint64_t a, uint64_t b) {
  const uint64_t a0 = a & 0xffffffff, a1 = a >> 32, b0 = b & 0xffffffff, b1 = b >> 32;
  const uint64_t low = a0 * b0, middle = a1 * b0 + (low >> 32);
  const uint64_t other = a0 * b1 + (middle & 0xffffffff);
  const uint64_t high = a1 * b1 + (middle >> 32) + (other >> 32);
  return high ^ ((other << 32) | (low & 0xffffffff));
}

uint64_t load(const uint8_t* data, size_t size) {
  uint8_t bytes[8] = {};
  if (size > 0) std::memcpy(bytes, data, size);
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = (value << 8) | bytes[i];
  return value;
}

void check_documents(int64_t num_bytes, const int64_t* offsets, int64_t num_documents, int num_threads) {
  if (num_documents < 0) throw std::invalid_argument("offsets: expected at least one");
  if (num_threads < 1 || num_threads > kMaxThreads) {
    throw std::invalid_argument("num_threads: expected 1 to " + std::to_string(kMaxThreads));
  }
  int64_t before = 0;
  for (int64_t i = 0; i <= num_documents; ++i) {
    if (offsets[i] < before || offsets[i] > num_bytes) {
      throw std::invalid_argument("offset " + std::to_string(i) + ": expected " + std::to_string(before) + " to " +
                                  std::to_string(num_bytes) + ", found " + std::to_string(offsets[i]));
    }
    before = offsets[i];
  }
}

// Runs work(0) ... work(num_threads - 1) in parallel and rethrows the first exception.
void run_threads(int num_threads, const std::function<void(int)>& work) {
  std::exception_ptr failure;
  std::mutex mutex;
  const auto guarded = [&](int number) {
    try {
      work(number);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  try {
    for (int number = 1; number < num_threads; ++number) threads.emplace_back(guarded, number);
    guarded(0);
  } catch (...) {
    for (std::thread& thread : threads) thread.join();
    throw;
  }
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

// Which of the `num_parts` equal ranges of the high half contains `high`.
int64_t part_of(uint64_t high, int64_t num_parts) {
  // Uses the top 32 bits: uniform enough for 2^30 parts, and the product stays below 2^62.
  return static_cast<int64_t>(((high >> 32) * static_cast<uint64_t>(num_parts)) >> 32);
}

class Marker {
 public:
  Marker(const uint8_t* file, const int64_t* offsets, uint8_t* is_duplicate)
      : file_(file), offsets_(offsets), is_duplicate_(is_duplicate) {}

  // `entries` of one or more whole groups of equal hashes.
  void mark(std::vector<Entry>& entries) const {
    std::sort(entries.begin(), entries.end(), comes_before);
    std::vector<int64_t> different;
    for (size_t i = 0; i < entries.size(); ++i) {
      if (i == 0 || !(entries[i].hash == entries[i - 1].hash)) different.clear();
      const int64_t document = entries[i].document;
      const auto same = [&](int64_t other) { return are_equal(document, other); };
      if (std::any_of(different.begin(), different.end(), same)) {
        is_duplicate_[document] = 1;
      } else {
        different.push_back(document);
      }
    }
  }

 private:
  bool are_equal(int64_t a, int64_t b) const {
    const int64_t size = offsets_[a + 1] - offsets_[a];
    if (size != offsets_[b + 1] - offsets_[b]) return false;
    return size == 0 || std::memcmp(file_ + offsets_[a], file_ + offsets_[b], static_cast<size_t>(size)) == 0;
  }

  const uint8_t* file_;
  const int64_t* offsets_;
  uint8_t* is_duplicate_;
};

}  // namespace

DocumentHash hash_document(const uint8_t* data, size_t size) {
  uint64_t high = kKey[0] ^ size, low = kKey[1];
  size_t position = 0;
  for (; size - position >= 16; position += 16) {
    const uint64_t first = load(data + position, 8), second = load(data + position + 8, 8);
    high = multiply_and_fold(first ^ kKey[0] ^ high, second ^ kKey[1]) + second;
    low = multiply_and_fold(first ^ kKey[2], second ^ kKey[3] ^ low) + first;
  }
  const size_t rest = size - position, begin = std::min<size_t>(rest, 8);
  const uint64_t first = load(rest > 0 ? data + position : nullptr, begin);
  const uint64_t second = load(rest > 8 ? data + position + 8 : nullptr, rest - begin);
  high = multiply_and_fold(first ^ kKey[2] ^ high, second ^ kKey[3]);
  low = multiply_and_fold(first ^ kKey[0] ^ low, second ^ kKey[1] ^ high);
  return {multiply_and_fold(high ^ kKey[1], low ^ kKey[0]), multiply_and_fold(low ^ kKey[3], high ^ kKey[2])};
}

void hash_documents(const uint8_t* file, int64_t num_bytes, const int64_t* offsets, int64_t num_documents,
                    int num_threads, DocumentHash* hashes) {
  check_documents(num_bytes, offsets, num_documents, num_threads);
  std::atomic<int64_t> next{0};
  run_threads(num_threads, [&](int) {
    for (int64_t first; (first = next.fetch_add(kDocumentsPerTurn)) < num_documents;) {
      const int64_t last = std::min(first + kDocumentsPerTurn, num_documents);
      for (int64_t i = first; i < last; ++i) {
        const int64_t size = offsets[i + 1] - offsets[i];
        hashes[i] = hash_document(size > 0 ? file + offsets[i] : nullptr, static_cast<size_t>(size));
      }
    }
  });
}

void mark_duplicates(const uint8_t* file, int64_t num_bytes, const int64_t* offsets, int64_t num_documents,
                     const DocumentHash* hashes, int64_t part, int64_t num_parts, int num_threads,
                     uint8_t* is_duplicate) {
  check_documents(num_bytes, offsets, num_documents, num_threads);
  if (num_parts < 1 || num_parts > kMaxParts || part < 0 || part >= num_parts) {
    throw std::invalid_argument("part " + std::to_string(part) + " of " + std::to_string(num_parts) +
                                ": expected 0 <= part < num_parts <= " + std::to_string(kMaxParts));
  }
  const Marker marker(file, offsets, is_duplicate);
  // Each thread takes the hashes of its own smaller part, so groups of equal hashes are never split.
  const int64_t first_part = part * num_threads, num_smaller = num_parts * num_threads;
  run_threads(num_threads, [&](int number) {
    const auto is_mine = [&](int64_t i) { return part_of(hashes[i].high, num_smaller) == first_part + number; };
    size_t count = 0;
    for (int64_t i = 0; i < num_documents; ++i) count += is_mine(i) ? 1 : 0;
    std::vector<Entry> entries;
    entries.reserve(count);
    for (int64_t i = 0; i < num_documents; ++i) {
      if (is_mine(i)) entries.push_back({hashes[i], i});
    }
    marker.mark(entries);
  });
}

}  // namespace taco
