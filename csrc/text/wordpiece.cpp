#include "taco/wordpiece.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include "text/ascii_word.hpp"
#include "text/word_scanner.hpp"

namespace taco {
namespace {

constexpr uint32_t kFirstPlane = 0x10000;

void require(bool is_good, const std::string& message) {
  if (!is_good) throw std::invalid_argument("vocabulary: " + message);
}

template <typename Id>
Id to_id(int64_t id) {
  require(id >= 0 && id <= std::numeric_limits<Id>::max(), "id " + std::to_string(id) + " does not fit the dtype");
  return static_cast<Id>(id);
}

template <typename Id>
std::vector<SpecialToken> check_special(std::vector<SpecialToken> special) {
  for (const SpecialToken& token : special) {
    to_id<Id>(token.id);
    require(
        token.text.size() >= 2 && token.text.front() == '[' && token.text.back() == ']' && token.text.rfind('[') == 0,
        "special token " + token.text + " is not written as [NAME]");
  }
  const auto is_longer = [](const SpecialToken& a, const SpecialToken& b) { return a.text.size() > b.text.size(); };
  std::stable_sort(special.begin(), special.end(), is_longer);
  return special;
}

template <typename Id>
size_t check_limit(const WordPieceVocabulary& vocabulary) {
  const int64_t limit = vocabulary.max_word_characters;
  // Words of up to kAsciiBlock letters are looked up without counting them.
  require(limit >= kAsciiBlock && limit <= 1000,
          "max_word_characters must be 16 to 1000, found " + std::to_string(limit));
  if (!vocabulary.pieces.empty()) to_id<Id>(static_cast<int64_t>(vocabulary.pieces.size()) - 1);
  return static_cast<size_t>(limit);
}

}  // namespace

template <typename Id>
WordPiece<Id>::WordPiece(const WordPieceVocabulary& vocabulary)
    : is_cased_(vocabulary.is_cased),
      unknown_id_(to_id<Id>(vocabulary.unknown_id)),
      max_word_characters_(check_limit<Id>(vocabulary)),
      special_(check_special<Id>(vocabulary.special)),
      trie_(vocabulary.pieces),
      inside_word_(trie_.find("##")),
      characters_(CharTable::get(vocabulary.is_cased)),
      isolated_ids_(kFirstPlane, unknown_id_) {
  for (uint32_t c = 0; c < kFirstPlane; ++c) {
    if (characters_.kind(c) != kIsolated) continue;
    const Utf8 utf8 = to_utf8(c);
    split_word(utf8.bytes.data(), static_cast<size_t>(utf8.size), &isolated_ids_[c]);
  }
}

template <typename Id>
WordPiece<Id>::~WordPiece() = default;

template <typename Id>
void WordPiece<Id>::encode(const std::string_view* texts, int64_t num_texts, TokenBuffer<Id>& ids,
                           int64_t* lengths) const {
  std::unique_ptr<WordScanner<Id>> scanner;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      scanner = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (scanner == nullptr) scanner = std::make_unique<WordScanner<Id>>(*this);
  for (int64_t i = 0; i < num_texts; ++i) {
    const size_t before = ids.size();
    scanner->scan(texts[i], ids);
    lengths[i] = static_cast<int64_t>(ids.size() - before);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(scanner));
}

template <typename Id>
size_t WordPiece<Id>::split_word(const char* word, size_t size, Id* out) const {
  size_t count = 0;
  for (size_t start = 0; start < size;) {
    const uint32_t node = start == 0 ? PieceTrie::kRoot : inside_word_;
    const PieceTrie::Match match = trie_.longest(node, std::string_view(word + start, size - start));
    if (match.id == PieceTrie::kNone) {
      out[0] = unknown_id_;
      return 1;
    }
    out[count++] = static_cast<Id>(match.id);
    start += match.length;
  }
  return count;
}

template <typename Id>
const SpecialToken* WordPiece<Id>::find_special(std::string_view text) const {
  for (const SpecialToken& token : special_) {
    if (text.substr(0, token.text.size()) == token.text) return &token;
  }
  return nullptr;
}

template class WordPiece<uint16_t>;
template class WordPiece<int32_t>;

}  // namespace taco
