// Text -> sentences, by rules over UTF-8 that need no model and no word of which language it is.
//
// A sentence ends
//   * at a paragraph's end: two line ends with nothing but whitespace between them, or U+2029. One line end is only
//     whitespace, since books are wrapped;
//   * after . ! ? and their kin in other scripts, with the quotes and brackets that close behind them, before
//     whitespace, unless the next word begins in lower case or with a comma and the like;
//   * after the full stops that are written without a blank behind them (CJK 。！？, danda and others), at once;
//   * but not after an abbreviation, an initial or the number of a list's item; see sentences/sentence_words.hpp.
//
// Only whitespace (Unicode's White_Space) between sentences is left out, so the words and the punctuation of the
// sentences are those of the text. Time is linear in the text whatever it holds: every look back or ahead is bounded.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

namespace taco {

// Bytes [begin, end) of a text; the first and the last character are no whitespace.
struct Sentence {
  size_t begin;
  size_t end;
};

// The sentences of `text` in order: none if it holds only whitespace, else at least one.
//
// Every sentence, split again on its own, is one sentence. Bytes that are not UTF-8 count as characters of their own;
// valid characters are never cut.
std::vector<Sentence> split_sentences(std::string_view text);

}  // namespace taco
