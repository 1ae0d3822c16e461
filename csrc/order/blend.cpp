#include "taco/blend.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "taco/permutation.hpp"
#include "taco/philox.hpp"

namespace taco {
namespace {

void require(bool is_good, const std::string& message) {
  if (!is_good) throw std::invalid_argument("blend: " + message);
}

// A separate seed for the periods (stream 0) and for each dataset (stream d + 1).
uint64_t derive_seed(uint64_t seed, size_t stream) {
  return Draws(Purpose::blend, seed, 0, static_cast<uint64_t>(stream)).next64();
}

// Positions of a batch mostly share period and epoch, so runs of equal epochs are looked up together.
void permute_runs(uint64_t seed, int64_t num_rows, const int64_t* epochs, const int64_t* positions, size_t size,
                  int64_t* elements) {
  for (size_t first = 0; first < size;) {
    size_t end = first + 1;
    while (end < size && epochs[end] == epochs[first]) ++end;
    Permutation(seed, epochs[first], num_rows)
        .look_up(positions + first, static_cast<int64_t>(end - first), elements + first);
    first = end;
  }
}

}  // namespace

// Working memory of a block, besides its results.
struct Blend::Scratch {
  Scratch(size_t size, size_t num_datasets)
      : periods(size),
        places_in_period(size),
        shares(size),
        sorted_epochs(size),
        sorted_rows(size),
        permuted_rows(size),
        sorted(size),
        firsts(num_datasets + 1),
        next(num_datasets + 1) {}

  std::vector<int64_t> periods, places_in_period, shares, sorted_epochs, sorted_rows, permuted_rows;
  std::vector<size_t> sorted, firsts, next;
};

Blend::Blend(uint64_t seed, std::vector<int64_t> weights, std::vector<int64_t> num_rows, bool shuffle)
    : seed_(seed), shuffle_(shuffle) {
  require(weights.size() == num_rows.size(),
          std::to_string(weights.size()) + " weights for " + std::to_string(num_rows.size()) + " datasets");
  int64_t end = 0;
  for (size_t d = 0; d < weights.size(); ++d) {
    require(weights[d] >= 1 && weights[d] <= kPeriod, "weight " + std::to_string(weights[d]) + " is not in 1 .. 2^20");
    require(num_rows[d] >= 1, "dataset " + std::to_string(d) + " has no row");
    members_.push_back({end, end + weights[d], num_rows[d], 1.0 / static_cast<double>(num_rows[d])});
    end += weights[d];
  }
  require(end == kPeriod, "weights add up to " + std::to_string(end) + ", not to 2^20");
  uint32_t owner = 0;
  for (int64_t share = 0; share < kPeriod; share += int64_t{1} << kOwnerShift) {
    while (share >= members_[owner].end) ++owner;
    owners_.push_back(owner);
  }
}

void Blend::look_up(const int64_t* positions, int64_t count, int64_t* datasets, int64_t* epochs, int64_t* rows) const {
  Scratch scratch(static_cast<size_t>(std::min(kBlock, std::max(count, int64_t{0}))), members_.size());
  for (int64_t first = 0; first < count; first += kBlock) {
    const auto size = static_cast<size_t>(std::min(kBlock, count - first));
    look_up_block(positions + first, size, datasets + first, epochs + first, rows + first, scratch);
  }
}

void Blend::look_up_block(const int64_t* positions, size_t size, int64_t* datasets, int64_t* epochs, int64_t* rows,
                          Scratch& scratch) const {
  for (size_t i = 0; i < size; ++i) {
    if (positions[i] < 0 || positions[i] / kPeriod > int64_t{UINT32_MAX}) {
      throw std::out_of_range("blend: position " + std::to_string(positions[i]) + " is not in 0 .. 2^52 - 1");
    }
    scratch.periods[i] = positions[i] / kPeriod;
    scratch.places_in_period[i] = positions[i] % kPeriod;
  }
  permute_runs(derive_seed(seed_, 0), kPeriod, scratch.periods.data(), scratch.places_in_period.data(), size,
               scratch.shares.data());
  for (size_t i = 0; i < size; ++i) {
    const size_t d = owner_of(scratch.shares[i]);
    const Member& member = members_[d];
    const int64_t drawn = scratch.periods[i] * (member.end - member.first) + (scratch.shares[i] - member.first);
    // A multiplication is faster than a division. It may be off by one or two, as `drawn` is below 2^52.
    int64_t epoch = static_cast<int64_t>(static_cast<double>(drawn) * member.inverse);
    int64_t row = drawn - epoch * member.num_rows;
    while (row < 0) row += member.num_rows, --epoch;
    while (row >= member.num_rows) row -= member.num_rows, ++epoch;
    if (epoch > int64_t{UINT32_MAX}) {
      throw std::out_of_range("blend: epoch " + std::to_string(epoch) + " is 2^32 or more");
    }
    datasets[i] = static_cast<int64_t>(d), epochs[i] = epoch, rows[i] = row;
  }
  if (shuffle_) permute_rows(datasets, epochs, rows, size, scratch);
}

size_t Blend::owner_of(int64_t share) const {
  size_t owner = owners_[static_cast<size_t>(share >> kOwnerShift)];
  while (share >= members_[owner].end) ++owner;
  return owner;
}

void Blend::permute_rows(const int64_t* datasets, const int64_t* epochs, int64_t* rows, size_t size,
                         Scratch& scratch) const {
  // By dataset, then by epoch, so that each permutation is built once.
  std::fill(scratch.firsts.begin(), scratch.firsts.end(), size_t{0});
  for (size_t i = 0; i < size; ++i) ++scratch.firsts[static_cast<size_t>(datasets[i]) + 1];
  for (size_t d = 1; d < scratch.firsts.size(); ++d) scratch.firsts[d] += scratch.firsts[d - 1];
  scratch.next = scratch.firsts;
  for (size_t i = 0; i < size; ++i) scratch.sorted[scratch.next[static_cast<size_t>(datasets[i])]++] = i;
  const auto is_earlier = [&](size_t a, size_t b) { return epochs[a] < epochs[b]; };
  for (size_t d = 0; d < members_.size(); ++d) {
    const size_t first = scratch.firsts[d], number = scratch.firsts[d + 1] - first;
    size_t* const places = scratch.sorted.data() + first;
    if (!std::is_sorted(places, places + number, is_earlier)) std::stable_sort(places, places + number, is_earlier);
    for (size_t i = 0; i < number; ++i) {
      scratch.sorted_epochs[i] = epochs[places[i]];
      scratch.sorted_rows[i] = rows[places[i]];
    }
    permute_runs(derive_seed(seed_, d + 1), members_[d].num_rows, scratch.sorted_epochs.data(),
                 scratch.sorted_rows.data(), number, scratch.permuted_rows.data());
    for (size_t i = 0; i < number; ++i) rows[places[i]] = scratch.permuted_rows[i];
  }
}

std::vector<int64_t> whole_weights(const std::vector<double>& shares) {
  double sum = 0;
  for (const double share : shares) {
    require(share > 0 && std::isfinite(share), "weight " + std::to_string(share) + " is not a positive number");
    sum += share;
  }
  require(!shares.empty() && std::isfinite(sum), "there is no weight, or their sum is no number");
  std::vector<int64_t> weights;
  std::vector<double> remainders;
  for (const double share : shares) {
    const double exact = share / sum * static_cast<double>(Blend::kPeriod), whole = std::floor(exact);
    require(whole >= 1, "weight " + std::to_string(share) + " is less than 2^-20 of the sum " + std::to_string(sum));
    weights.push_back(static_cast<int64_t>(whole));
    remainders.push_back(exact - whole);
  }
  std::vector<size_t> order(shares.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return remainders[a] > remainders[b]; });
  int64_t left = Blend::kPeriod - std::accumulate(weights.begin(), weights.end(), int64_t{0});
  for (size_t i = 0; left > 0; i = (i + 1) % order.size(), --left) ++weights[order[i]];
  for (; left < 0; ++left) --*std::max_element(weights.begin(), weights.end());  // rounding errors
  return weights;
}

}  // namespace taco
