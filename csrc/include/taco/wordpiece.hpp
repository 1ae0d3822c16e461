// BERT's WordPiece: text to token ids, the same ids as Hugging Face's BertTokenizerFast gives without [CLS] and [SEP].
//
// A special token that the text spells is that token. Everything else is normalised and split into words
// (text/unicode.hpp); a word becomes the longest pieces that it begins with, from left to right, pieces inside a word
// being written with ## in front. A word that has no such pieces, or more than max_word_characters characters, is one
// unknown token.
//
// Speed comes from two things: runs of ASCII letters and digits are found 16 bytes at a time, and the ids of words seen
// lately are kept. Nothing is kept per text: a text of any length, even one endless word, takes no more memory than
// its ids.
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
  std::vector<std::string> pieces;  // by id; an empty one stands for an id without piece
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
  // Throws std::invalid_argument for a piece that occurs twice; an id that Id cannot hold; max_word_characters outside
  // 16 .. 1000; a special token that is not "[", anything without another "[", "]".
  explicit WordPiece(const WordPieceVocabulary& vocabulary);
  ~WordPiece();

  // Appends the ids of each text, which is UTF-8, to `ids`; lengths[i] is how many text i gave.
  //
  // Throws std::invalid_argument for a text that ends within a character or has a code point beyond U+10FFFF.
  void encode(const std::string_view* texts, int64_t num_texts, TokenBuffer<Id>& ids, int64_t* lengths) const;

  // What the vocabulary takes, and each thread that encodes at the same time beside it.
  static constexpr size_t kBytesPerThread = (sizeof(Id) == 2 ? 32 + 16 : 48 + 24) * (size_t{1} << 16);

 private:
  friend class WordScanner<Id>;

  // Ids of one word of `size` bytes, written to `out`; returns how many, at most the number of its characters.
  size_t split_word(const char* word, size_t size, Id* out) const;
  // The special token that begins `text`, longest first; null for none.
  const SpecialToken* find_special(std::string_view text) const;

  bool is_cased_;
  Id unknown_id_;
  size_t max_word_characters_;
  std::vector<SpecialToken> special_;  // longest first
  PieceTrie trie_;
  uint32_t inside_word_;  // node of "##" in the trie
  const CharTable& characters_;
  std::vector<Id> isolated_ids_;  // by code point of the first plane, for isolated ones
  // Scanners that no thread uses at the moment; there are never more than threads were encoding at once.
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<WordScanner<Id>>> idle_;
};

}  // namespace taco
