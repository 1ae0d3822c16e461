// Words that decide whether a full stop ends a sentence: abbreviations, and words that begin sentences.
#pragma once

#include <string_view>

namespace taco {

enum class WordKind {
  ordinary,
  title,    // Mr: its full stop never ends a sentence
  counter,  // No: never before a number
  company,  // Inc: only before a word that begins sentences
};

// The kind of `word`, which precedes a full stop (not included); case matters, but MR is read as Mr.
WordKind abbreviation_kind(std::string_view word);

// Whether `word` begins sentences more often than it follows an abbreviation: The, He, But.
bool begins_sentences(std::string_view word);

// Whether a number and a full stop before `word` form an ordinal: 3. Oktober.
bool follows_ordinal(std::string_view word);

}  // namespace taco
