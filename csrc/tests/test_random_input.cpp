// Random and hostile input for the sample index, the rows, the order and the masks: the only allowed results are the
// right answer or an exception named in the contract. sanitize.sh runs it; arguments: number of cases, seed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "taco/masking.hpp"
#include "taco/permutation.hpp"
#include "taco/rows.hpp"
#include "taco/sample_index.hpp"
#include "taco/token_map.hpp"

namespace {

using Random = std::mt19937_64;

[[noreturn]] void fail(const char* what) {
  std::printf("failed: %s\n", what);
  std::exit(1);
}

void require(bool is_good, const char* what) {
  if (!is_good) fail(what);
}

// Runs `action`; false if it refused its input with an exception of the contract. Other exceptions end the program.
template <typename Action>
bool succeeds(Action action) {
  try {
    action();
    return true;
  } catch (const std::invalid_argument&) {
  } catch (const std::out_of_range&) {
  }
  return false;
}

int64_t between(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

bool chance(Random& random, int one_in) { return between(random, 1, one_in) == 1; }

// An edge-case number, as programs often get wrong.
int64_t hostile(Random& random) {
  static const std::vector<int64_t> edges{
      0,        1, 2, 3, INT32_MAX, int64_t{1} << 31, UINT32_MAX, int64_t{1} << 32, int64_t{1} << 61, int64_t{1} << 62,
      INT64_MAX};
  const int64_t edge = edges[static_cast<size_t>(between(random, 0, static_cast<int64_t>(edges.size()) - 1))];
  const int64_t moved = edge == INT64_MAX ? edge : edge + between(random, -1, 1);
  return chance(random, 3) ? -moved : moved;
}

std::vector<int64_t> random_offsets(Random& random) {
  std::vector<int64_t> offsets{chance(random, 8) ? between(random, 0, 5) : 0};
  const int64_t num_documents = between(random, 0, 12);
  for (int64_t i = 0; i < num_documents; ++i) {
    offsets.push_back(offsets.back() + (chance(random, 3) ? 0 : between(random, 0, 30)));
  }
  return offsets;
}

// All rows by the plain definition: stream cuts the concatenation, document cuts every document.
std::vector<std::vector<int64_t>> plain_rows(taco::RowMode mode, const std::vector<int64_t>& offsets, int64_t capacity,
                                             int64_t sep) {
  std::vector<std::vector<int64_t>> rows;
  std::vector<int64_t> line;
  const auto cut = [&](bool keeps_rest) {
    for (size_t first = 0; first < line.size(); first += static_cast<size_t>(capacity)) {
      const size_t last = std::min(line.size(), first + static_cast<size_t>(capacity));
      if (!keeps_rest && last - first < static_cast<size_t>(capacity)) break;
      rows.emplace_back(line.begin() + static_cast<int64_t>(first), line.begin() + static_cast<int64_t>(last));
    }
    line.clear();
  };
  for (size_t i = 0; i + 1 < offsets.size(); ++i) {
    if (offsets[i] == offsets[i + 1]) continue;
    for (int64_t place = offsets[i]; place < offsets[i + 1]; ++place) line.push_back(5 + place % 90);
    if (mode == taco::RowMode::document) cut(true);
    if (mode == taco::RowMode::stream) line.push_back(sep);
  }
  cut(false);
  return rows;
}

void check_rows(Random& random) {
  const auto mode = chance(random, 2) ? taco::RowMode::stream : taco::RowMode::document;
  const auto offsets = random_offsets(random);
  const int64_t seq_length = between(random, 3, 40);
  const taco::RowIndex index(mode, offsets.data(), static_cast<int64_t>(offsets.size()) - 1, seq_length);
  const auto expected = plain_rows(mode, offsets, seq_length - 2, 3);
  require(index.num_rows() == static_cast<int64_t>(expected.size()), "number of rows");
  std::vector<uint16_t> tokens(static_cast<size_t>(offsets.back()));
  for (size_t place = 0; place < tokens.size(); ++place) tokens[place] = static_cast<uint16_t>(5 + place % 90);
  for (int64_t row = 0; row < index.num_rows(); ++row) {
    std::vector<int64_t> ids(static_cast<size_t>(seq_length), -1), segment(ids), wanted{2};
    taco::fill_rows(index, taco::TokenMap(), tokens.data(), offsets.back(), &row, 1, {100, 2, 3, 0}, ids.data(),
                    segment.data());
    const auto& body = expected[static_cast<size_t>(row)];
    wanted.insert(wanted.end(), body.begin(), body.end());
    wanted.push_back(3);
    wanted.resize(static_cast<size_t>(seq_length), 0);
    require(ids == wanted, "tokens of a row");
  }
}

void attack_rows(Random& random) {
  const auto mode = chance(random, 2) ? taco::RowMode::stream : taco::RowMode::document;
  auto offsets = random_offsets(random);
  for (int64_t& offset : offsets) {
    if (chance(random, 6)) offset = hostile(random);
  }
  if (chance(random, 3)) std::sort(offsets.begin(), offsets.end());
  const int64_t seq_length = chance(random, 4) ? hostile(random) : between(random, 3, 40);
  succeeds([&] {
    const taco::RowIndex index(mode, offsets.data(), static_cast<int64_t>(offsets.size()) - 1, seq_length);
    require(index.num_rows() >= 0 && index.num_left_out() >= 0, "counts");
    const int64_t row = chance(random, 2) ? hostile(random) : index.num_rows() - between(random, 0, 2);
    const bool is_inside = row >= 0 && row < index.num_rows();
    require(succeeds([&] { index.locate(row); }) == is_inside, "row outside the index");
    if (is_inside) {
      const auto [document, offset] = index.locate(row);
      require(offset >= 0 && offset <= index.length(document), "place in a document");
      require(index.first_token(document) + offset <= index.tokens_end(), "place in the tokens");
    }
    // An array that is shorter than the index needs must be refused before a token is read.
    if (index.tokens_end() > 0 && seq_length < 100) {
      std::vector<int64_t> out(static_cast<size_t>(seq_length));
      const int32_t* const none = nullptr;
      const auto fill = [&] {
        taco::fill_rows(index, taco::TokenMap(), none, index.tokens_end() - 1, &row, 1, {100, 2, 3, 0}, out.data(),
                        out.data());
      };
      require(!succeeds(fill), "short token array");
    }
  });
}

void attack_order(Random& random) {
  const int64_t size = chance(random, 2) ? hostile(random) : between(random, 1, 3000);
  const int64_t epoch = chance(random, 3) ? hostile(random) : between(random, 0, 9);
  std::vector<int64_t> positions(static_cast<size_t>(between(random, 0, 300))), elements(positions);
  for (int64_t& position : positions) position = chance(random, 99) ? hostile(random) : between(random, 0, 2999);
  const bool is_inside = std::all_of(positions.begin(), positions.end(), [&](int64_t p) { return p >= 0 && p < size; });
  succeeds([&] {
    const taco::Permutation permutation(random(), epoch, size);
    const auto count = static_cast<int64_t>(positions.size());
    require(succeeds([&] { permutation.look_up(positions.data(), count, elements.data()); }) == is_inside, "position");
    if (!is_inside) return;
    for (const int64_t element : elements) require(element >= 0 && element < size, "element outside");
    if (size > 3000) return;
    std::vector<int64_t> all(static_cast<size_t>(size)), seen(all);
    std::iota(all.begin(), all.end(), int64_t{0});
    permutation.look_up(all.data(), size, seen.data());
    std::sort(seen.begin(), seen.end());
    require(seen == all, "bijection");
  });
}

taco::MaskPolicy random_policy(Random& random) {
  const auto kind = static_cast<taco::MaskKind>(between(random, 0, 2));
  const auto size = static_cast<size_t>(between(random, 1, 60));
  const double rates[] = {0.15, 0.5, 1.0, 1e-300, 0.0, -1.0, 1.5, std::nan("")};
  const uint64_t seed = random();
  const double rate = chance(random, 4) ? rates[between(random, 3, 7)] : rates[between(random, 0, 2)];
  const double span = chance(random, 9) ? 0.5 : 1.0 + static_cast<double>(between(random, 0, 900)) / 100;
  const int64_t mask_id = chance(random, 9) ? hostile(random) : 0;
  taco::MaskPolicy policy{seed, rate, kind, span, mask_id, {}, {}, {}};
  for (size_t id = 0; id < size; ++id) {
    policy.is_special.push_back(id < 5);
    if (id >= 5) policy.ordinary_ids.push_back(static_cast<int64_t>(id));
    if (kind == taco::MaskKind::whole_word) policy.continues_word.push_back(chance(random, 3));
  }
  if (chance(random, 20)) policy.continues_word.resize(size / 2, 1);
  if (chance(random, 9)) policy.ordinary_ids.push_back(hostile(random));
  return policy;
}

void attack_masks(Random& random) {
  const auto policy = random_policy(random);
  succeeds([&] {
    const taco::Masker masker(policy);
    const int64_t num_rows = between(random, 0, 3), seq_length = between(random, 0, 50);
    const int64_t room = chance(random, 6) ? hostile(random) % 50 : between(random, 1, 50);
    std::vector<int64_t> ids(static_cast<size_t>(num_rows * seq_length)), samples(static_cast<size_t>(num_rows));
    auto epochs = samples;
    for (int64_t& id : ids) id = chance(random, 500) ? hostile(random) : between(random, 0, policy.vocab_size() - 1);
    for (int64_t& sample : samples) sample = chance(random, 3) ? hostile(random) : between(random, 0, 99);
    for (int64_t& epoch : epochs) epoch = chance(random, 20) ? hostile(random) : between(random, 0, 9);
    std::vector<int64_t> index(static_cast<size_t>(num_rows * std::max<int64_t>(room, 0))), labels(index);
    auto masked = ids;
    masker.mask_rows(num_rows, seq_length, room, samples.data(), epochs.data(), masked.data(), index.data(),
                     labels.data());
    // Restoring the labels gives the original row, so nothing else was changed.
    for (size_t i = 0; i < labels.size(); ++i) {
      if (labels[i] != taco::kIgnoredLabel) masked.at(static_cast<size_t>(index[i])) = labels[i];
    }
    require(masked == ids, "tokens that were not chosen");
  });
}

// Immutable objects may be used by many threads at once; ThreadSanitizer checks it.
void share_between_threads() {
  std::vector<int64_t> offsets(1001);
  for (size_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<int64_t>(i * 7);
  const std::vector<uint16_t> tokens(7000, 9);
  const taco::RowIndex index(taco::RowMode::stream, offsets.data(), 1000, 32);
  const taco::Permutation order(7, 0, index.num_rows());
  taco::MaskPolicy policy{7, 0.15, taco::MaskKind::token, 3.0, 4, std::vector<uint8_t>(10, 0), {}, {5, 6, 7}};
  const taco::Masker masker(policy);
  std::vector<std::vector<int64_t>> results(4);
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&] {
      for (int64_t position = 0; position < index.num_rows(); ++position) {
        int64_t row = 0;
        const int64_t epoch = 0;
        order.look_up(&position, 1, &row);
        std::vector<int64_t> ids(32), segment(32), places(10), labels(10);
        taco::fill_rows(index, taco::TokenMap(), tokens.data(), 7000, &row, 1, {10, 2, 3, 0}, ids.data(),
                        segment.data());
        masker.mask_rows(1, 32, 10, &row, &epoch, ids.data(), places.data(), labels.data());
        result.insert(result.end(), ids.begin(), ids.end());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) require(result == results[0], "threads agree");
}

}  // namespace

int main(int argc, char** argv) {
  const long num_cases = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 20000;
  const unsigned long seed = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 1;
  long number = 0;
  try {
    for (; number < num_cases; ++number) {
      Random random(seed * 1000003 + static_cast<unsigned long>(number));
      check_rows(random);
      attack_rows(random);
      attack_order(random);
      attack_masks(random);
    }
    share_between_threads();
  } catch (const std::exception& error) {
    std::printf("case %ld of seed %lu: %s\n", number, seed, error.what());
    return 1;
  }
  return 0;
}
