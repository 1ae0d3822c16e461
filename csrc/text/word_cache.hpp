// A cache of the ids of recent words, looked up by the words' bytes.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace taco {

// Words of at most 8 * kWords bytes with at most kMaxIds ids. One word per slot: a new word replaces the old one.
template <size_t kWords, size_t kMaxIds, typename Id>
class WordCache {
 public:
  // The bytes of a word, zero-padded: no word contains a zero byte.
  using Key = std::array<uint64_t, kWords>;
  static constexpr size_t kKeyBytes = 8 * kWords;

  struct Slot {
    Key key{};
    std::array<Id, kMaxIds> ids;
    Id count;
  };

  explicit WordCache(int log2_slots) : slots_(size_t{1} << log2_slots), shift_(64 - log2_slots) {}

  static Key make_key(const char* bytes, size_t size) {
    Key key{};
    std::memcpy(key.data(), bytes, size);
    return key;
  }

  // The slot of a word: it holds the word's ids if its key equals `key`.
  Slot& slot(const Key& key) {
    constexpr uint64_t kFactors[] = {0x9E3779B97F4A7C15u, 0xC2B2AE3D27D4EB4Fu, 0xD6E8FEB86659FD93u,
                                     0xA0761D6478BD642Fu};
    static_assert(kWords <= std::size(kFactors));
    uint64_t mixed = 0;
    for (size_t i = 0; i < kWords; ++i) mixed ^= key[i] * kFactors[i];
    return slots_[static_cast<size_t>(mixed >> shift_)];
  }

  void store(const Key& key, const Id* ids, size_t count) {
    if (count > kMaxIds) return;
    Slot& place = slot(key);
    place.key = key;
    std::copy_n(ids, count, place.ids.begin());
    place.count = static_cast<Id>(count);
  }

 private:
  std::vector<Slot> slots_;
  int shift_;
};

}  // namespace taco
