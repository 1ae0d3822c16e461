// Several datasets in fixed proportions: computes the sample at any position of an endless stream; nothing is stored.
//
// Weights W_d are integers that add up to a period of 2^20 positions. In a period, position p -> q = permute(period, p)
// -> the dataset d whose share contains q. It is number k = period * W_d + (q - W_0 - .. - W_(d-1)) of the samples from
// d, and so row permute_d(epoch, k % rows_d) of epoch k / rows_d. Hence every period has exactly W_d samples of d, at
// random positions; every epoch of d has each of its rows once, and a small dataset is repeated, never read beyond its
// end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace taco {

class Blend {
 public:
  static constexpr int64_t kPeriod = int64_t{1} << 20;

  // `weights` and `num_rows` have one entry per dataset. Without `shuffle` rows of a dataset come in storage order.
  // Throws std::invalid_argument unless there are as many weights as row counts, each weight is at least 1, they add up
  // to kPeriod and every dataset has a row.
  Blend(uint64_t seed, std::vector<int64_t> weights, std::vector<int64_t> num_rows, bool shuffle);

  // Dataset, its epoch and its row at each of `count` positions.
  // Throws std::out_of_range for a negative position or one whose period or epoch reaches 2^32.
  void look_up(const int64_t* positions, int64_t count, int64_t* datasets, int64_t* epochs, int64_t* rows) const;

 private:
  // Positions that are looked up together: their data fits the processor's cache.
  static constexpr int64_t kBlock = 2048;
  // Shares of a period are looked up by their upper bits: in a binary search every branch would be unpredictable.
  static constexpr int kOwnerShift = 8;

  // A dataset: where its share of a period begins and ends, its rows, and 1 / num_rows.
  struct Member {
    int64_t first, end, num_rows;
    double inverse;
  };
  struct Scratch;

  void look_up_block(const int64_t* positions, size_t size, int64_t* datasets, int64_t* epochs, int64_t* rows,
                     Scratch& scratch) const;
  void permute_rows(const int64_t* datasets, const int64_t* epochs, int64_t* rows, size_t size, Scratch& scratch) const;
  size_t owner_of(int64_t share) const;

  uint64_t seed_;
  std::vector<Member> members_;
  std::vector<uint32_t> owners_;  // of the first of each kPeriod >> kOwnerShift pieces of a period
  bool shuffle_;
};

// The integer weights closest to `shares` (positive, any sum): each at least 1, kPeriod in total; after rounding down,
// the rest goes to the largest remainders, with ties to the first.
// Throws std::invalid_argument if a share is not positive and finite or is below 1 / kPeriod of the sum.
std::vector<int64_t> whole_weights(const std::vector<double>& shares);

}  // namespace taco
