#include "taco/permutation.hpp"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "taco/philox.hpp"

namespace taco {
namespace {

void check(int64_t epoch, int64_t size) {
  if (size < 1 || size > Permutation::kMaxSize) {
    throw std::invalid_argument("permutation: size must be 1 to 2^62, found " + std::to_string(size));
  }
  if (epoch < 0 || epoch > UINT32_MAX) {
    throw std::invalid_argument("permutation: epoch must be 0 to 2^32 - 1, found " + std::to_string(epoch));
  }
}

int bits_for(int64_t size) {
  int bits = 0;
  while ((int64_t{1} << bits) < size) ++bits;
  return bits;
}

}  // namespace

Permutation::Permutation(uint64_t seed, int64_t epoch, int64_t size) : size_(size) {
  check(epoch, size);
  Draws draws(Purpose::order, seed, static_cast<uint32_t>(epoch), static_cast<uint64_t>(size));
  if (size <= kTable) {
    std::iota(table_.begin(), table_.end(), uint16_t{0});
    for (uint32_t last = static_cast<uint32_t>(size) - 1; last > 0; --last) {
      std::swap(table_[last], table_[draws.below(last + 1)]);
    }
    return;
  }
  const int bits = bits_for(size);
  right_bits_ = bits / 2;
  right_mask_ = (uint64_t{1} << right_bits_) - 1;
  left_mask_ = (uint64_t{1} << (bits - right_bits_)) - 1;
  for (uint64_t& key : keys_) key = draws.next64();
}

void Permutation::look_up(const int64_t* positions, int64_t count, int64_t* elements) const {
  for (int64_t i = 0; i < count; ++i) {
    if (positions[i] >= 0 && positions[i] < size_) continue;
    throw std::out_of_range("permutation: position " + std::to_string(positions[i]) + " of " + std::to_string(size_));
  }
  for (int64_t first = 0; first < count; first += kBlock) {
    look_up_block(positions + first, std::min(kBlock, count - first), elements + first);
  }
}

void Permutation::look_up_block(const int64_t* positions, int64_t count, int64_t* elements) const {
  if (size_ <= kTable) {
    for (int64_t i = 0; i < count; ++i) elements[i] = table_[static_cast<size_t>(positions[i])];
    return;
  }
  // The walks of a block advance together: the length of a single walk is random, which defeats branch prediction.
  std::array<int64_t, kBlock> walking;
  int64_t num_walking = 0;
  for (int64_t i = 0; i < count; ++i) {
    elements[i] = static_cast<int64_t>(encrypt(static_cast<uint64_t>(positions[i])));
    walking[static_cast<size_t>(num_walking)] = i;
    num_walking += elements[i] >= size_;
  }
  while (num_walking > 0) {
    int64_t num_left = 0;
    for (int64_t j = 0; j < num_walking; ++j) {
      const int64_t i = walking[static_cast<size_t>(j)];
      elements[i] = static_cast<int64_t>(encrypt(static_cast<uint64_t>(elements[i])));
      walking[static_cast<size_t>(num_left)] = i;
      num_left += elements[i] >= size_;
    }
    num_walking = num_left;
  }
}

}  // namespace taco
