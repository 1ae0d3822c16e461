// Random bytes through the sentence splitter: sentences are in order and inside the text, with only whitespace between
// them, and each is one sentence by itself. sanitize.sh runs it; the argument is the number of cases.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "taco/sentences.hpp"

namespace {

using Random = std::mt19937_64;

const char* const kParts[] = {".",  "!",  "?",  ";",      "…",  "。", "！",   "।",    "\"",   "'",       "”",
                              "»",  "«",  ")",  "]",      "(",  "[",  "[1]",  "—",    "-",    " ",       " ",
                              "\n", "\r", "　", "\u2029", "Mr", "No", "U.S",  "I",    "A",    "a",       "The",
                              "5",  "α",  "中", "と",     "é",  "É",  "\xe2", "\x80", "\xff", "\xf0\x9f"};

std::string random_text(Random& random) {
  std::string text;
  for (size_t i = random() % 24; i > 0; --i) {
    if (random() % 16 == 0) {
      text += static_cast<char>(random() % 256);
    } else {
      text += kParts[random() % (sizeof(kParts) / sizeof(kParts[0]))];
    }
  }
  return text;
}

// From memory of exactly that size, so that reads beyond its ends are detected.
std::vector<taco::Sentence> split(const std::string& text) {
  const std::unique_ptr<char[]> bytes(new char[text.size()]);
  text.copy(bytes.get(), text.size());
  return taco::split_sentences({bytes.get(), text.size()});
}

bool is_good(const std::string& text) {
  size_t at = 0;
  for (const taco::Sentence& sentence : split(text)) {
    if (sentence.begin < at || sentence.end <= sentence.begin || sentence.end > text.size()) return false;
    at = sentence.end;
    const std::string alone = text.substr(sentence.begin, sentence.end - sentence.begin);
    const auto again = split(alone);
    if (again.size() != 1 || again[0].begin != 0 || again[0].end != alone.size()) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const long num_cases = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 50000;
  Random random(1);
  for (long number = 0; number < num_cases; ++number) {
    const std::string text = random_text(random);
    if (!is_good(text)) {
      std::printf("case %ld: failed\n", number);
      return 1;
    }
  }
  return 0;
}
