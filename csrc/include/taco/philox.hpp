// Philox 4x32-10, the counter-based generator of Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
//
// The same (counter, key) gives the same four words everywhere, so draws are pure functions of their arguments: there
// is no state to save and no dependence on threads, ranks or call order.
#pragma once

#include <array>
#include <cstdint>

namespace taco {

using PhiloxCounter = std::array<uint32_t, 4>;
using PhiloxKey = std::array<uint32_t, 2>;

// Four pseudo-random words for one counter under one key.
inline PhiloxCounter philox4x32(PhiloxCounter counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(product0)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// The purpose of a stream of draws. It is part of the key, so that order, masks and blends share no numbers of a seed.
enum class Purpose : uint32_t { order = 0x4F524452, masks = 0x4D41534B, blend = 0x424C4E44 };

// An endless stream of words, a pure function of (purpose, seed, epoch, number).
// Word i is word i % 4 of block i / 4; block b has the counter (b, epoch, low half of number, high half of number) and
// the key (low half of seed XOR purpose, high half of seed).
class Draws {
 public:
  Draws(Purpose purpose, uint64_t seed, uint32_t epoch, uint64_t number)
      : key_{static_cast<uint32_t>(seed) ^ static_cast<uint32_t>(purpose), static_cast<uint32_t>(seed >> 32)},
        counter_{0, epoch, static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32)} {}

  uint32_t next() {
    if (used_ == 4) {
      words_ = philox4x32(counter_, key_);
      ++counter_[0];
      used_ = 0;
    }
    return words_[used_++];
  }

  // The next two words as one number; the first word is the low half.
  uint64_t next64() {
    const uint64_t low = next();
    return low | uint64_t{next()} << 32;
  }

  // Uniform over 0 .. bound - 1 without bias (Lemire 2019, "Fast Random Integer Generation in an Interval"); bound > 0.
  uint32_t below(uint32_t bound) {
    uint64_t product = uint64_t{next()} * bound;
    if (static_cast<uint32_t>(product) < bound) {
      const uint32_t threshold = (0u - bound) % bound;
      while (static_cast<uint32_t>(product) < threshold) product = uint64_t{next()} * bound;
    }
    return static_cast<uint32_t>(product >> 32);
  }

 private:
  PhiloxKey key_;
  PhiloxCounter counter_;
  PhiloxCounter words_{};
  int used_ = 4;
};

}  // namespace taco
