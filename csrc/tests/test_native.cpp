// Tests of the library without Python: built with every .cpp of the library (csrc/tests/sanitize.sh), then run.
// Prints what failed and exits 1. Comparisons with plain NumPy versions on random input live in tests/data.
#include <algorithm>
#include <numeric>
#include <set>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "taco/blend.hpp"
#include "taco/document_hashes.hpp"
#include "taco/masking.hpp"
#include "taco/pack_index.hpp"
#include "taco/permutation.hpp"
#include "taco/philox.hpp"
#include "taco/rows.hpp"
#include "taco/sample_index.hpp"
#include "taco/sentence_index.hpp"
#include "taco/token_map.hpp"

namespace {

void test_philox() {
  using C = taco::PhiloxCounter;
  // The known answers of the Random123 distribution.
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

std::vector<int64_t> row_of(taco::RowMode mode, const std::vector<int64_t>& offsets, int64_t seq_length, int64_t row) {
  std::vector<uint16_t> tokens;
  for (int64_t i = 0; i < offsets.back(); ++i) tokens.push_back(static_cast<uint16_t>(10 + i));
  const taco::RowIndex index(mode, offsets.data(), static_cast<int64_t>(offsets.size()) - 1, seq_length);
  std::vector<int64_t> ids(static_cast<size_t>(seq_length)), segment(ids);
  taco::fill_rows(index, taco::TokenMap(), tokens.data(), offsets.back(), &row, 1, {100, 2, 3, 0}, ids.data(), segment.data());
  return ids;
}

void test_rows() {
  using Row = std::vector<int64_t>;
  const std::vector<int64_t> offsets{0, 2, 2, 5, 6};  // documents 10 11 | (empty) | 12 13 14 | 15
  CHECK(row_of(taco::RowMode::stream, offsets, 5, 0) == (Row{2, 10, 11, 3, 3}));
  CHECK(row_of(taco::RowMode::stream, offsets, 5, 1) == (Row{2, 12, 13, 14, 3}));
  CHECK(row_of(taco::RowMode::stream, offsets, 5, 2) == (Row{2, 3, 15, 3, 3}));
  CHECK(row_of(taco::RowMode::document, offsets, 4, 0) == (Row{2, 10, 11, 3}));
  CHECK(row_of(taco::RowMode::document, offsets, 4, 1) == (Row{2, 12, 13, 3}));
  CHECK(row_of(taco::RowMode::document, offsets, 4, 2) == (Row{2, 14, 3, 0}));
  CHECK(row_of(taco::RowMode::document, offsets, 4, 3) == (Row{2, 15, 3, 0}));
}

void test_row_errors() {
  const std::vector<int64_t> offsets{0, 4}, falling{0, 4, 3}, negative{-1, 4};
  CHECK(throws<std::invalid_argument>([&] { taco::RowIndex(taco::RowMode::stream, falling.data(), 2, 8); }));
  CHECK(throws<std::invalid_argument>([&] { taco::RowIndex(taco::RowMode::stream, negative.data(), 1, 8); }));
  CHECK(throws<std::invalid_argument>([&] { taco::RowIndex(taco::RowMode::stream, offsets.data(), 1, 2); }));
  CHECK(throws<std::invalid_argument>([&] { taco::RowIndex(taco::RowMode::stream, offsets.data(), -1, 8); }));
  const taco::RowIndex index(taco::RowMode::stream, offsets.data(), 1, 4);
  const std::vector<int32_t> tokens{5, 6, -7, 8};
  std::vector<int64_t> ids(4), segment(4);
  const auto fill = [&](int64_t row, int64_t num_tokens) {
    taco::fill_rows(index, taco::TokenMap(), tokens.data(), num_tokens, &row, 1, {10, 2, 3, 0}, ids.data(), segment.data());
  };
  CHECK(index.num_rows() == 2 && index.num_left_out() == 1);
  fill(0, 4);
  CHECK(ids == (std::vector<int64_t>{2, 5, 6, 3}));
  CHECK(throws<std::out_of_range>([&] { fill(1, 4); }));  // id -7
  CHECK(throws<std::out_of_range>([&] { fill(2, 4); }));
  CHECK(throws<std::out_of_range>([&] { fill(-1, 4); }));
  CHECK(throws<std::invalid_argument>([&] { fill(0, 3); }));
}

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

void test_sentence_rows() {
  const std::vector<int32_t> lengths{3, 4, 20, 2, 0, 5, 5};
  const std::vector<int64_t> firsts{0, 4, 4, 7};
  for (const int threads : {1, 3}) {
    taco::SentenceTableBuilder builder(10);
    builder.add(lengths.data(), 7, firsts.data(), 3, nullptr, threads);
    std::vector<int64_t> bases(static_cast<size_t>(builder.num_blocks()));
    std::vector<uint32_t> starts(static_cast<size_t>(builder.num_rows()));
    const int64_t num_tokens = builder.num_tokens();
    builder.finish(bases.data(), starts.data());
    // 3 + 4 | 20 = 8 + 8 + 4 | 2 || 0 + 5 | 5
    CHECK((starts == std::vector<uint32_t>{0, 7, 15, 23, 27, 29, 34}));
    CHECK(num_tokens == 39);
    const taco::SentenceIndex index(bases.data(), 1, starts.data(), 7, num_tokens, 10);
    CHECK(index.first_token(7) == 39);
    CHECK(throws<std::out_of_range>([&] { index.check(7); }));
  }
  const std::vector<int32_t> negative{3, -1};
  const std::vector<int64_t> one{0, 2};
  taco::SentenceTableBuilder builder(10);
  CHECK(throws<std::invalid_argument>([&] { builder.add(negative.data(), 2, one.data(), 1, nullptr, 1); }));
  CHECK(builder.num_rows() == 0);
}

void test_packed_rows() {
  const std::vector<int64_t> offsets{0, 3, 3, 23, 25};  // pieces 3 | 8 8 4 | 2 in rows of 10
  for (const int threads : {1, 3}) {
    const taco::PackTable table(offsets.data(), 4, 10, threads);
    CHECK((table.piece_lengths == std::vector<uint16_t>{8, 8, 4, 2, 3}));
    CHECK((table.row_pieces == std::vector<uint32_t>{0, 1, 2, 4}));
    CHECK(table.windows.back().row == 4 && table.windows.back().token == 25);
  }
}

void test_blend_and_hashes() {
  const std::vector<int64_t> weights = taco::whole_weights({1.0, 3.0});
  const taco::Blend blend(5, weights, {7, 1000}, true);
  std::vector<int64_t> positions(static_cast<size_t>(taco::Blend::kPeriod)), datasets(positions), epochs(positions),
      rows(positions);
  std::iota(positions.begin(), positions.end(), int64_t{0});
  blend.look_up(positions.data(), taco::Blend::kPeriod, datasets.data(), epochs.data(), rows.data());
  CHECK(std::count(datasets.begin(), datasets.end(), 0) == weights[0]);
  CHECK(throws<std::invalid_argument>([] { taco::whole_weights({0.0}); }));
  CHECK(taco::xxh64("", 0) == 0xEF46DB3751D8E999);  // the known answer of its specification
}

}  // namespace

int main() {
  test_sentence_rows();
  test_packed_rows();
  test_blend_and_hashes();
  test_philox();
  test_permutation();
  test_rows();
  test_row_errors();
  test_masking();
  test_masking_errors();
  return num_failed == 0 ? 0 : 1;
}
