// Which documents of a token file are exact copies of an earlier one, in bounded memory.
//
// Documents are byte ranges: document i is [offsets[i], offsets[i + 1]) of the file. First every document is hashed
// (16 bytes each), then parts of the hash space are searched one by one. Documents with equal hashes are compared byte
// by byte. Of equal documents the first is kept. All functions check the offsets against the size of the file and throw
// std::invalid_argument; results do not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace taco {

// A 128-bit hash of a document.
struct DocumentHash {
  uint64_t high;
  uint64_t low;
};

// Bytes that mark_duplicates needs per document of a part, in addition to its arguments.
constexpr size_t kDuplicateEntryBytes = 24;

// The hash of `size` bytes; equal bytes give equal hashes on every machine.
DocumentHash hash_document(const uint8_t* data, size_t size);

// Fills `hashes` [num_documents]; `num_threads` from 1 to 1024.
void hash_documents(const uint8_t* file, int64_t num_bytes, const int64_t* offsets, int64_t num_documents,
                    int num_threads, DocumentHash* hashes);

// Sets is_duplicate[i] to 1 if document i equals an earlier one, for documents whose hash is in part number `part` of
// `num_parts` equal parts; leaves all others unchanged. Equal documents are in the same part.
// Also throws std::invalid_argument unless 0 <= part < num_parts <= 2^20.
void mark_duplicates(const uint8_t* file, int64_t num_bytes, const int64_t* offsets, int64_t num_documents,
                     const DocumentHash* hashes, int64_t part, int64_t num_parts, int num_threads,
                     uint8_t* is_duplicate);

}  // namespace taco
