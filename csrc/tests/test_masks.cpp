// Tests of the masks: what is masked, and what is refused. Prints failures and exits with 1.
// Comparisons with plain NumPy versions on random input are in tests/data.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "taco/masking.hpp"

namespace {

taco::MaskPolicy policy_of(taco::MaskKind kind) {
  taco::MaskPolicy policy{5, 0.15, kind, 3.0, 4, std::vector<uint8_t>(50, 0), {}, {}};
  for (size_t id = 0; id < 5; ++id) policy.is_special[id] = 1;
  for (int64_t id = 5; id < 50; ++id) policy.ordinary_ids.push_back(id);
  if (kind == taco::MaskKind::whole_word) policy.continues_word.assign(50, 0);
  return policy;
}

void test_masking() {
  for (const auto kind : {taco::MaskKind::token, taco::MaskKind::whole_word, taco::MaskKind::span}) {
    const taco::Masker masker(policy_of(kind));
    std::vector<int64_t> ids(64, 7), index(9), labels(9);
    ids.front() = 2;
    ids.back() = 3;
    const int64_t sample = 3, epoch = 1;
    masker.mask_rows(1, 64, 9, &sample, &epoch, ids.data(), index.data(), labels.data());
    CHECK(std::all_of(labels.begin(), labels.end(), [](int64_t label) { return label == 7; }));
    CHECK(std::is_sorted(index.begin(), index.end()) && index.front() > 0 && index.back() < 63);
    CHECK(ids.front() == 2 && ids.back() == 3 && std::count(ids.begin(), ids.end(), 7) >= 62 - 9);
  }
}

void test_masking_errors() {
  const taco::Masker masker(policy_of(taco::MaskKind::token));
  std::vector<int64_t> ids(64, 7), index(9), labels(9);
  const auto mask = [&](int64_t sample, int64_t epoch, int64_t num_predictions) {
    masker.mask_rows(1, 64, num_predictions, &sample, &epoch, ids.data(), index.data(), labels.data());
  };
  CHECK(throws<std::invalid_argument>([&] { mask(0, 0, 2); }));
  CHECK(throws<std::invalid_argument>([&] { mask(0, 0, 0); }));
  CHECK(throws<std::invalid_argument>([&] { mask(-1, 0, 9); }));
  CHECK(throws<std::invalid_argument>([&] { mask(0, int64_t{1} << 32, 9); }));
  ids[5] = 50;
  CHECK(throws<std::out_of_range>([&] { mask(0, 0, 9); }));
  auto policy = policy_of(taco::MaskKind::token);
  policy.rate = 0;
  CHECK(throws<std::invalid_argument>([&] { taco::Masker{policy}; }));
  policy = policy_of(taco::MaskKind::token);
  policy.ordinary_ids = {50};
  CHECK(throws<std::out_of_range>([&] { taco::Masker{policy}; }));
  policy = policy_of(taco::MaskKind::whole_word);
  policy.continues_word.clear();
  CHECK(throws<std::invalid_argument>([&] { taco::Masker{policy}; }));
}

}  // namespace

int main() {
  test_masking();
  test_masking_errors();
  return num_failed == 0 ? 0 : 1;
}
