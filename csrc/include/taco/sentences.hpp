// Splits text into sentences, by rules over UTF-8 that need neither a model nor the language's name.
//
// A sentence ends
//   * at the end of a paragraph: two line ends with only whitespace between them, or U+2029. A single line end is
//     whitespace, since books are wrapped;
//   * after . ! ? and their equivalents in other scripts, with any quotes and brackets that close after them, before
//     whitespace, unless the next word begins with a lower-case letter, a comma or the like;
//   * immediately after full stops that are written without a following space (CJK 。！？, danda and others);
//   * but not after an abbreviation, an initial or the number of a list item; see sentences/sentence_words.hpp.
//
// Only whitespace (Unicode's White_Space) between sentences is left out, so the sentences have the text's words and
// punctuation. Time is linear in the text, whatever it contains: every look-behind and look-ahead is bounded.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

namespace taco {

// Bytes [begin, end) of a text; the first and the last character are not whitespace.
struct Sentence {
  size_t begin;
  size_t end;
};

// The sentences of `text` in order: none if it holds only whitespace, else at least one.
//
// Every sentence, split again by itself, is one sentence. Each invalid byte counts as one character; valid characters
// are never cut.
std::vector<Sentence> split_sentences(std::string_view text);

}  // namespace taco
