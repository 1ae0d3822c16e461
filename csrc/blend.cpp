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

// A seed of its own for the periods (stream 0) and for each dataset (stream d + 1).
uint64_t derive_seed(uint64_t seed, size_t stream) {
  return Draws(Purpose::blend, seed, 0, static_cast<uint64_t>(stream)).next64();
}

// Positions of a batch mostly share period and epoch: looks up runs of equal epochs at once, in place.
void permute_runs(uint64_t seed, int64_t size, const std::vector<int64_t>& epochs, std::vector<int64_t>& elements) {
  for (size_t first = 0; first < epochs.size();) {
    size_t end = first + 1;
    while (end < epochs.size() && epochs[end] == epochs[first]) ++end;
    const std::vector<int64_t> positions(elements.begin() + static_cast<std::ptrdiff_t>(first),
                                         elements.begin() + static_cast<std::ptrdiff_t>(end));
    Permutation(seed, epochs[first], size)
        .look_up(positions.data(), static_cast<int64_t>(positions.size()), elements.data() + first);
    first = end;
  }
}

}  // namespace

Blend::Blend(uint64_t seed, std::vector<int64_t> weights, std::vector<int64_t> num_rows, bool shuffle)
    : seed_(seed), weights_(std::move(weights)), num_rows_(std::move(num_rows)), shuffle_(shuffle) {
  require(weights_.size() == num_rows_.size(), std::to_string(weights_.size()) + " weights for " +
                                                   std::to_string(num_rows_.size()) + " datasets");
  int64_t end = 0;
  for (size_t d = 0; d < weights_.size(); ++d) {
    require(weights_[d] >= 1 && weights_[d] <= kPeriod, "weight " + std::to_string(weights_[d]) + " is not in 1 .. 2^20");
    require(num_rows_[d] >= 1, "dataset " + std::to_string(d) + " has no row");
    ends_.push_back(end += weights_[d]);
  }
  require(end == kPeriod, "weights add up to " + std::to_string(end) + ", not to 2^20");
}

void Blend::look_up(const int64_t* positions, int64_t count, int64_t* datasets, int64_t* epochs, int64_t* rows) const {
  const auto size = static_cast<size_t>(count);
  std::vector<int64_t> periods(size), shares(size);
  for (size_t i = 0; i < size; ++i) {
    if (positions[i] < 0 || positions[i] / kPeriod > int64_t{UINT32_MAX}) {
      throw std::out_of_range("blend: position " + std::to_string(positions[i]) + " is not in 0 .. 2^52 - 1");
    }
    periods[i] = positions[i] / kPeriod;
    shares[i] = positions[i] % kPeriod;
  }
  permute_runs(derive_seed(seed_, 0), kPeriod, periods, shares);
  for (size_t i = 0; i < size; ++i) {
    const auto d = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), shares[i]) - ends_.begin());
    const int64_t drawn = periods[i] * weights_[d] + (shares[i] - (ends_[d] - weights_[d]));
    datasets[i] = static_cast<int64_t>(d);
    epochs[i] = drawn / num_rows_[d];
    rows[i] = drawn % num_rows_[d];
    if (epochs[i] > int64_t{UINT32_MAX}) throw std::out_of_range("blend: epoch " + std::to_string(epochs[i]) + " is 2^32 or more");
  }
  if (shuffle_) permute_rows(datasets, epochs, rows, size);
}

void Blend::permute_rows(const int64_t* datasets, const int64_t* epochs, int64_t* rows, size_t size) const {
  // By dataset, then by epoch: so each permutation is made once.
  std::vector<size_t> firsts(weights_.size() + 1), places(size);
  for (size_t i = 0; i < size; ++i) ++firsts[static_cast<size_t>(datasets[i]) + 1];
  for (size_t d = 1; d < firsts.size(); ++d) firsts[d] += firsts[d - 1];
  std::vector<size_t> next(firsts);
  for (size_t i = 0; i < size; ++i) places[next[static_cast<size_t>(datasets[i])]++] = i;
  const auto is_earlier = [&](size_t a, size_t b) { return epochs[a] < epochs[b]; };
  std::vector<int64_t> own_epochs, own_rows;
  for (size_t d = 0; d < weights_.size(); ++d) {
    const auto first = places.begin() + static_cast<std::ptrdiff_t>(firsts[d]),
               end = places.begin() + static_cast<std::ptrdiff_t>(firsts[d + 1]);
    if (!std::is_sorted(first, end, is_earlier)) std::stable_sort(first, end, is_earlier);
    own_epochs.clear(), own_rows.clear();
    for (auto i = first; i != end; ++i) own_epochs.push_back(epochs[*i]), own_rows.push_back(rows[*i]);
    permute_runs(derive_seed(seed_, d + 1), num_rows_[d], own_epochs, own_rows);
    for (auto i = first; i != end; ++i) rows[*i] = own_rows[static_cast<size_t>(i - first)];
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
  for (; left < 0; ++left) --*std::max_element(weights.begin(), weights.end());  // floating-point dust
  return weights;
}

}  // namespace taco
