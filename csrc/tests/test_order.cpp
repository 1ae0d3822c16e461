// Tests of the order of rows: random draws, permutations and blends. Prints failures and exits with 1.
// Comparisons with plain NumPy versions on random input are in tests/data.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <set>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "taco/blend.hpp"
#include "taco/permutation.hpp"
#include "taco/philox.hpp"

namespace {

void test_philox() {
  using C = taco::PhiloxCounter;
  // Known-answer tests from the Random123 distribution.
  CHECK(taco::philox4x32({0, 0, 0, 0}, {0, 0}) == (C{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK(taco::philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}) == (C{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK(taco::philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        (C{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
  taco::Draws draws(taco::Purpose::masks, 7, 0, 1);
  for (int i = 0; i < 1000; ++i) CHECK(draws.below(3) < 3);
}

std::vector<int64_t> look_up(const taco::Permutation& permutation, int64_t first, int64_t count) {
  std::vector<int64_t> positions(static_cast<size_t>(count)), elements(positions);
  std::iota(positions.begin(), positions.end(), first);
  permutation.look_up(positions.data(), count, elements.data());
  return elements;
}

void test_permutation() {
  for (const int64_t size : {1, 2, 3, 1000, 1023, 1024, 1025, 4096, 4097}) {
    const auto elements = look_up(taco::Permutation(11, 2, size), 0, size);
    const std::set<int64_t> seen(elements.begin(), elements.end());
    CHECK(static_cast<int64_t>(seen.size()) == size && *seen.begin() == 0 && *seen.rbegin() == size - 1);
  }
  const int64_t huge = taco::Permutation::kMaxSize - 12345;
  const taco::Permutation permutation(11, 0, huge);
  for (const int64_t element : look_up(permutation, huge - 1000, 1000)) CHECK(element >= 0 && element < huge);
  CHECK(throws<std::out_of_range>([&] { look_up(permutation, huge, 1); }));
  CHECK(throws<std::out_of_range>([&] { look_up(permutation, -1, 1); }));
  CHECK(throws<std::invalid_argument>([] { taco::Permutation(0, 0, 0); }));
  CHECK(throws<std::invalid_argument>([] { taco::Permutation(0, -1, 5); }));
  CHECK(throws<std::invalid_argument>([] { taco::Permutation(0, 0, taco::Permutation::kMaxSize + 1); }));
}

void test_blend() {
  const std::vector<int64_t> weights = taco::whole_weights({1.0, 3.0});
  const taco::Blend blend(5, weights, {7, 1000}, true);
  std::vector<int64_t> positions(static_cast<size_t>(taco::Blend::kPeriod)), datasets(positions), epochs(positions),
      rows(positions);
  std::iota(positions.begin(), positions.end(), int64_t{0});
  blend.look_up(positions.data(), taco::Blend::kPeriod, datasets.data(), epochs.data(), rows.data());
  CHECK(std::count(datasets.begin(), datasets.end(), 0) == weights[0]);
  CHECK(throws<std::invalid_argument>([] { taco::whole_weights({0.0}); }));
}

}  // namespace

int main() {
  test_philox();
  test_permutation();
  test_blend();
  return num_failed == 0 ? 0 : 1;
}
