// A hash per document, which decides its split: a function of its token ids alone, independent of other documents.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "taco/threads.hpp"

namespace taco {

// xxh64 with seed 0 of `count` bytes (Collet, "xxHash fast digest algorithm", the specification of XXH64).
inline uint64_t xxh64(const void* data, int64_t count) {
  constexpr uint64_t k1 = 0x9E3779B185EBCA87, k2 = 0xC2B2AE3D27D4EB4F, k3 = 0x165667B19E3779F9, k4 = 0x85EBCA77C2B2AE63,
                     k5 = 0x27D4EB2F165667C5;
  const auto rotate = [](uint64_t x, int bits) { return x << bits | x >> (64 - bits); };
  const auto round = [&](uint64_t lane, uint64_t word) { return rotate(lane + word * k2, 31) * k1; };
  const char* place = static_cast<const char*>(data);
  const char* const end = place + count;
  uint64_t hash = k5;
  if (count >= 32) {
    uint64_t lanes[4] = {k1 + k2, k2, 0, 0 - k1};
    for (; end - place >= 32; place += 32) {
      for (int i = 0; i < 4; ++i) lanes[i] = round(lanes[i], load_unaligned<uint64_t>(place, i));
    }
    hash = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
    for (const uint64_t lane : lanes) hash = (hash ^ round(0, lane)) * k1 + k4;
  }
  hash += static_cast<uint64_t>(count);
  for (; end - place >= 8; place += 8) {
    hash = rotate(hash ^ round(0, load_unaligned<uint64_t>(place, 0)), 27) * k1 + k4;
  }
  for (; end - place >= 4; place += 4) hash = rotate(hash ^ load_unaligned<uint32_t>(place, 0) * k1, 23) * k2 + k3;
  for (; place < end; ++place) hash = rotate(hash ^ static_cast<uint8_t>(*place) * k5, 11) * k1;
  hash = (hash ^ hash >> 33) * k2;
  hash = (hash ^ hash >> 29) * k3;
  return hash ^ hash >> 32;
}

// Writes xxh64 of the token ids of every document, as little-endian int32 for any `Token`, so that a copy in another
// dtype has the same hashes. `offsets` has num_documents + 1 entries: first tokens, then the end.
// Throws std::invalid_argument if offsets are negative, decrease or exceed num_tokens.
template <typename Token>
void hash_documents(const Token* tokens, int64_t num_tokens, const int64_t* offsets, int64_t num_documents,
                    int num_threads, uint64_t* hashes) {
  constexpr int64_t kTokensPerTask = int64_t{1} << 20;
  if (num_documents < 1) return;
  if (offsets[0] < 0 || offsets[num_documents] > num_tokens) {
    throw std::invalid_argument("document hashes: offsets must lie in 0 to " + std::to_string(num_tokens));
  }
  for (int64_t i = 0; i < num_documents; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      throw std::invalid_argument("document hashes: offset " + std::to_string(i + 1) +
                                  " is smaller than the one before");
    }
  }
  // Tasks of whole documents; borders need not be exact, only equal for adjacent tasks.
  const int64_t first = offsets[0], num_tasks = (offsets[num_documents] - first) / kTokensPerTask + 1;
  const auto border = [&](int64_t task) {
    return task == num_tasks
               ? num_documents
               : std::lower_bound(offsets, offsets + num_documents, first + task * kTokensPerTask) - offsets;
  };
  for_each_task(num_tasks, num_threads, [&](int64_t task) {
    std::vector<int32_t> ids;
    const int64_t end = border(task + 1);
    for (int64_t i = task == 0 ? 0 : border(task); i < end; ++i) {
      const int64_t count = offsets[i + 1] - offsets[i];
      if constexpr (sizeof(Token) == sizeof(int32_t)) {
        hashes[i] = xxh64(tokens + offsets[i], count * 4);
      } else {
        ids.assign(tokens + offsets[i], tokens + offsets[i + 1]);
        hashes[i] = xxh64(ids.data(), count * 4);
      }
    }
  });
}

}  // namespace taco
