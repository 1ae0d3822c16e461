// BERT's WordPiece: text to token ids, the same ids as from Hugging Face's BertTokenizerFast without [CLS] and [SEP].
//
// A special token spelt in the text becomes that token. Everything else is normalised and split into words
// (text/unicode.hpp). A word becomes pieces from left to right, each the longest one that matches; pieces inside a word
// are written with a leading ##. A word that has no such pieces, or more than max_word_characters characters, is one
// unknown token.
//
// Two things make it fast: runs of ASCII letters and digits are found 16 bytes at a time, and the ids of recent words
// are cached. Nothing is stored per text: a text of any length, even one endless word, takes no more memory than its
// ids.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "taco/token_buffer.hpp"
#include "text/piece_trie.hpp"
#include "text/unicode.hpp"

namespace taco {

struct SpecialToken {
  std::string text;
  int64_t id;
};

struct WordPieceVocabulary {
  std::vector<std::string> pieces;  // by id; empty for an id without a piece
  std::vector<SpecialToken> special;
  int64_t unknown_id;
  bool is_cased;
  int64_t max_word_characters;
};

template <typename Id>
class WordScanner;

// Id: uint16_t or int32_t. Threads may share one object.
template <typename Id>
class WordPiece {
 public:
  // Throws std::invalid_argument if a piece occurs twice, Id cannot hold an id, max_word_characters is outside
  // 16 .. 1000, or a special token is not "[", anything without another "[", "]".
  explicit WordPiece(const WordPieceVocabulary& vocabulary);
  ~WordPiece();

  // Appends the ids of each text, which is UTF-8, to `ids`; lengths[i] is the number of ids of text i.
  //
  // Throws std::invalid_argument if a text ends within a character or has a code point beyond U+10FFFF.
  void encode(const std::string_view* texts, int64_t num_texts, TokenBuffer<Id>& ids, int64_t* lengths) const;

  // Memory that each encoding thread needs besides the vocabulary.
  static constexpr size_t kBytesPerThread = (sizeof(Id) == 2 ? 32 + 16 : 48 + 24) * (size_t{1} << 16);

 private:
  friend class WordScanner<Id>;

  // Ids of one word of `size` bytes, written to `out`; returns how many, at most the number of its characters.
  size_t split_word(const char* word, size_t size, Id* out) const;
  // The longest special token that begins `text`; null for none.
  const SpecialToken* find_special(std::string_view text) const;

  bool is_cased_;
  Id unknown_id_;
  size_t max_word_characters_;
  std::vector<SpecialToken> special_;  // longest first
  PieceTrie trie_;
  uint32_t inside_word_;  // node of "##" in the trie
  const CharTable& characters_;
  std::vector<Id> isolated_ids_;  // by code point of the first plane, for isolated ones
  // Scanners not in use by a thread; never more than the largest number of threads that encoded at once.
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<WordScanner<Id>>> idle_;
};

}  // namespace taco
