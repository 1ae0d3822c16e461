// Where the tokens of a split's documents are: positions among the split's tokens -> positions in the dataset.
//
// The index of a split is built over its documents alone, as if they were contiguous; the map converts its positions to
// those in the token array. One entry per run of adjacent documents that belong to the split.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

namespace taco {

// A view of the runs: first position in the split, and first token in the dataset; both increase. No runs: identity.
class TokenMap {
 public:
  TokenMap() = default;

  // Throws std::invalid_argument unless `places` starts at 0 and increases, and `tokens` increases at least as fast.
  TokenMap(const int64_t* places, const int64_t* tokens, int64_t count)
      : places_(places), tokens_(tokens), count_(count) {
    bool is_good = count == 0 || (places[0] == 0 && tokens[0] >= 0);
    for (int64_t i = 1; is_good && i < count; ++i) {
      const int64_t step = places[i] - places[i - 1];
      is_good = step > 0 && tokens[i] - tokens[i - 1] >= step;
    }
    if (!is_good) throw std::invalid_argument("token map: the runs do not rise");
  }

  // Token at `place`, 0 or more.
  int64_t token(int64_t place) const {
    if (count_ == 0) return place;
    const int64_t run = std::upper_bound(places_, places_ + count_, place) - places_ - 1;
    return tokens_[run] + (place - places_[run]);
  }

 private:
  const int64_t* places_ = nullptr;
  const int64_t* tokens_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace taco
