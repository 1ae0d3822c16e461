// Tests of the row modes: what a row holds, and what is refused. Prints failures and exits with 1.
// Comparisons with plain NumPy versions on random input are in tests/data.
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "taco/pack_index.hpp"
#include "taco/rows.hpp"
#include "taco/sample_index.hpp"
#include "taco/sentence_index.hpp"
#include "taco/token_map.hpp"

namespace {

std::vector<int64_t> row_of(taco::RowMode mode, const std::vector<int64_t>& offsets, int64_t seq_length, int64_t row) {
  std::vector<uint16_t> tokens;
  for (int64_t i = 0; i < offsets.back(); ++i) tokens.push_back(static_cast<uint16_t>(10 + i));
  const taco::RowIndex index(mode, offsets.data(), static_cast<int64_t>(offsets.size()) - 1, seq_length);
  std::vector<int64_t> ids(static_cast<size_t>(seq_length)), segment(ids);
  taco::fill_rows(index, taco::TokenMap(), tokens.data(), offsets.back(), &row, 1, {100, 2, 3, 0}, ids.data(),
                  segment.data());
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
    taco::fill_rows(index, taco::TokenMap(), tokens.data(), num_tokens, &row, 1, {10, 2, 3, 0}, ids.data(),
                    segment.data());
  };
  CHECK(index.num_rows() == 2 && index.num_left_out() == 1);
  fill(0, 4);
  CHECK(ids == (std::vector<int64_t>{2, 5, 6, 3}));
  CHECK(throws<std::out_of_range>([&] { fill(1, 4); }));  // id -7
  CHECK(throws<std::out_of_range>([&] { fill(2, 4); }));
  CHECK(throws<std::out_of_range>([&] { fill(-1, 4); }));
  CHECK(throws<std::invalid_argument>([&] { fill(0, 3); }));
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

}  // namespace

int main() {
  test_rows();
  test_row_errors();
  test_sentence_rows();
  test_packed_rows();
  return num_failed == 0 ? 0 : 1;
}
