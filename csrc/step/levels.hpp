// The random half-words of a line, many blocks at once so that the compiler uses vectors.
#pragma once

#include <cstdint>

#include "taco/step.hpp"

// Versions of a function for newer processors, of which the loader takes the best; the sanitizers' start-up code cannot
// run such a choice.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define TACO_FOR_EACH_PROCESSOR __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define TACO_FOR_EACH_PROCESSOR
#endif
// Code of a function above, compiled with it for each processor.
#define TACO_INLINE inline __attribute__((always_inline))

namespace taco {

constexpr int64_t kBlockSize = 8;   // half-words of a block
constexpr int64_t kNumBlocks = 32;  // drawn at once
constexpr int64_t kChunk = kNumBlocks * kBlockSize;
constexpr int kRounds = 7;

inline int64_t blocks_of(int64_t width) { return (width + kBlockSize - 1) / kBlockSize; }

// kChunk half-words from block `first` on.
TACO_INLINE void draw_levels(const DropoutPlace& place, int64_t first, uint16_t* levels) {
  uint32_t c0[kNumBlocks], c1[kNumBlocks], c2[kNumBlocks], c3[kNumBlocks];
  for (int64_t i = 0; i < kNumBlocks; ++i) {
    const uint64_t block = static_cast<uint64_t>(first + i);
    c0[i] = static_cast<uint32_t>(block);
    c1[i] = static_cast<uint32_t>(block >> 32) | place.place;
    c2[i] = place.micro_batch[0];
    c3[i] = place.micro_batch[1];
  }
  uint32_t key0 = place.key[0], key1 = place.key[1];
  for (int round = 0; round < kRounds; ++round) {
    for (int64_t i = 0; i < kNumBlocks; ++i) {
      const uint64_t product0 = uint64_t{0xD2511F53} * c0[i], product1 = uint64_t{0xCD9E8D57} * c2[i];
      c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ key0;
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ key1;
      c1[i] = static_cast<uint32_t>(product1);
      c3[i] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  for (int64_t i = 0; i < kNumBlocks; ++i) {
    const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
    for (int w = 0; w < 4; ++w) {
      levels[8 * i + 2 * w] = static_cast<uint16_t>(words[w]);
      levels[8 * i + 2 * w + 1] = static_cast<uint16_t>(words[w] >> 16);
    }
  }
}

// `width` half-words from block `first` on; `levels` has room for `width` rounded up to a multiple of kChunk.
TACO_INLINE void draw_blocks(const DropoutPlace& place, int64_t first, int64_t width, uint16_t* levels) {
  for (int64_t done = 0; done < width; done += kChunk) {
    draw_levels(place, first + done / kBlockSize, levels + done);
  }
}

// The half-words of a whole line.
TACO_INLINE void draw_line(const DropoutPlace& place, int64_t line, int64_t width, uint16_t* levels) {
  draw_blocks(place, line * blocks_of(width), width, levels);
}

inline int64_t round_up_to_chunk(int64_t width) { return (width + kChunk - 1) / kChunk * kChunk; }

// Lines that one task works on; fixed, so that sums over them do not depend on the number of threads.
inline int64_t lines_per_task(int64_t width) { return width >= 32768 ? 1 : 32768 / width; }

}  // namespace taco
