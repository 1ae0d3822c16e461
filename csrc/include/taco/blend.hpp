// Several datasets in fixed proportions: the sample at any position of an endless stream, computed, nothing stored.
//
// Weights W_d are whole numbers that add up to a period of 2^20 positions. In a period, position p -> q =
// permute(period, p) -> the dataset d whose share holds q; it is number k = period * W_d + (q - W_0 - .. - W_(d-1)) of
// the samples drawn from d, so row permute_d(epoch, k % rows_d) of epoch k / rows_d. Hence every period holds exactly
// W_d samples of d, in random places; every epoch of d holds each of its rows once, and a small dataset is repeated,
// never overrun.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace taco {

class Blend {
 public:
  static constexpr int64_t kPeriod = int64_t{1} << 20;

  // `weights` and `num_rows` hold an entry per dataset. `shuffle` false takes the rows of a dataset in their own order.
  // Throws std::invalid_argument unless there are as many weights as row counts, each weight is at least 1, they add up
  // to kPeriod and every dataset has a row.
  Blend(uint64_t seed, std::vector<int64_t> weights, std::vector<int64_t> num_rows, bool shuffle);

  // Dataset, epoch of that dataset and row in it, at `count` positions.
  // Throws std::out_of_range for a negative position or one whose period or epoch reaches 2^32.
  void look_up(const int64_t* positions, int64_t count, int64_t* datasets, int64_t* epochs, int64_t* rows) const;

 private:
  // Positions that are looked up together: what is kept of them stays in the processor's cache.
  static constexpr int64_t kBlock = 2048;
  // Shares of a period are looked up by their upper bits: a search among random shares is a coin toss at each step.
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

// The whole weights nearest to `shares` (positive, any sum): each at least 1, together kPeriod; what is left over after
// rounding down goes to the largest remainders, of equal ones to the first.
// Throws std::invalid_argument if a share is not positive and finite or is below 1 / kPeriod of all.
std::vector<int64_t> whole_weights(const std::vector<double>& shares);

}  // namespace taco
