// Tests of WordPiece without Python, mainly for sanitizers; ids are compared with the reference in tests/data.
// Prints failures and exits with 1.
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "taco/token_buffer.hpp"
#include "taco/wordpiece.hpp"

namespace {

taco::WordPieceVocabulary make_vocabulary() {
  std::vector<std::string> pieces{"[UNK]",  "[MASK]", "the",    "cat", "##s", "un",
                                  "##able", ",",      "\u4e2d", "e",   "##e", ""};
  pieces.push_back(std::string(15, 'x'));
  pieces.push_back("##" + std::string(20, 'x'));
  return {pieces, {{"[MASK]", 1}}, 0, false, 100};
}

template <typename Id>
std::vector<int64_t> encode(const taco::WordPiece<Id>& tokenizer, const std::string& text) {
  taco::TokenBuffer<Id> ids;
  int64_t length = 0;
  // A copy of the exact size on the heap: a sanitizer detects every read beyond it.
  const std::vector<char> exact(text.begin(), text.end());
  const std::string_view view(exact.data(), exact.size());
  tokenizer.encode(&view, 1, ids, &length);
  CHECK(length == static_cast<int64_t>(ids.size()));
  return {ids.end() - length, ids.end()};
}

template <typename Id>
void test_ids() {
  using Ids = std::vector<int64_t>;
  const taco::WordPiece<Id> tokenizer(make_vocabulary());
  CHECK(encode(tokenizer, "").empty());
  CHECK(encode(tokenizer, "The cats, unable") == (Ids{2, 3, 4, 7, 5, 6}));
  CHECK(encode(tokenizer, "the[MASK]cat the cats the cats the cats") == (Ids{2, 1, 3, 2, 3, 4, 2, 3, 4, 2, 3, 4}));
  CHECK(encode(tokenizer, "\u00c9\u0301e\u4e2de dog") == (Ids{9, 10, 8, 9, 0}));
  CHECK(encode(tokenizer, std::string(35, 'X') + ' ' + std::string(101, 'e')) == (Ids{12, 13, 0}));
  CHECK(encode(tokenizer, std::string(1'000'000, 'e')) == (Ids{0}));
  CHECK(encode(tokenizer, std::string(100, 'e')).size() == 100);
}

template <typename Id>
void test_errors() {
  const auto refuses = [](auto change) {
    taco::WordPieceVocabulary vocabulary = make_vocabulary();
    change(vocabulary);
    return throws<std::invalid_argument>([&] { taco::WordPiece<Id>{vocabulary}; });
  };
  CHECK(refuses([](auto& vocabulary) { vocabulary.pieces.push_back("the"); }));
  CHECK(refuses([](auto& vocabulary) { vocabulary.unknown_id = -1; }));
  CHECK(refuses([](auto& vocabulary) { vocabulary.unknown_id = int64_t{1} << 40; }));
  CHECK(refuses([](auto& vocabulary) { vocabulary.max_word_characters = 15; }));
  CHECK(refuses([](auto& vocabulary) { vocabulary.special.push_back({"", 1}); }));
  const taco::WordPiece<Id> tokenizer(make_vocabulary());
  for (const char* text : {"a\xe4\xb8", "\xc3", "the \xf0\x9f\x98"}) {
    CHECK(throws<std::invalid_argument>([&] { encode(tokenizer, text); }));
  }
  CHECK(throws<std::invalid_argument>([&] { encode(tokenizer, "\xf7\xbf\xbf\xbf"); }));
}

// Any bytes: ids or std::invalid_argument, and no read or write out of bounds.
void test_random_bytes() {
  const taco::WordPiece<uint16_t> tokenizer(make_vocabulary());
  std::mt19937 random(7);
  const std::vector<std::string> parts{"the ",   "\u0301", "\u302e", "\U0001d165", "\U0001d16d", "\u0941", "[MASK]",
                                       "\u00c9", "\uac01", "\u4e2d", "\U0001d160", "xxxxxxxxxx", "[",      " "};
  int num_encoded = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::string text;
    for (uint32_t i = random() % 40; i > 0; --i) {
      text += random() % 8 == 0 ? std::string(1, static_cast<char>(random())) : parts[random() % parts.size()];
    }
    try {
      for (const int64_t id : encode(tokenizer, text)) CHECK(id >= 0 && id < 14);
      ++num_encoded;
    } catch (const std::invalid_argument&) {
    }
  }
  CHECK(num_encoded > 1000);
}

void test_threads() {
  const taco::WordPiece<uint16_t> tokenizer(make_vocabulary());
  std::vector<std::vector<int64_t>> found(4);
  std::vector<std::thread> threads;
  for (auto& ids : found) {
    threads.emplace_back([&] {
      for (int round = 0; round < 50; ++round) {
        ids = encode(tokenizer, "The cats, unable \u4e2d " + std::string(35, 'x'));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& ids : found) CHECK(ids == (std::vector<int64_t>{2, 3, 4, 7, 5, 6, 8, 12, 13}));
}

}  // namespace

int main() {
  test_ids<uint16_t>();
  test_ids<int32_t>();
  test_errors<uint16_t>();
  test_errors<int32_t>();
  test_random_bytes();
  test_threads();
  return num_failed == 0 ? 0 : 1;
}
