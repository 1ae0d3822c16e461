// Tests of the hashes that decide the splits of documents. Prints failures and exits with 1.
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "taco/document_hashes.hpp"

namespace {

void test_known_answer() {
  CHECK(taco::xxh64("", 0) == 0xEF46DB3751D8E999);  // from the specification
}

template <typename Token>
std::vector<uint64_t> hash(const std::vector<Token>& tokens, const std::vector<int64_t>& offsets, int num_threads) {
  std::vector<uint64_t> hashes(offsets.size() - 1);
  taco::hash_documents(tokens.data(), static_cast<int64_t>(tokens.size()), offsets.data(),
                       static_cast<int64_t>(hashes.size()), num_threads, hashes.data());
  return hashes;
}

void test_documents() {
  const std::vector<uint16_t> tokens{7, 8, 9, 7, 8, 9};
  const std::vector<int64_t> offsets{0, 3, 3, 6};
  const auto hashes = hash(tokens, offsets, 1);
  CHECK(hashes[0] == hashes[2]);
  CHECK(hashes[1] == taco::xxh64("", 0));
  CHECK(hash(tokens, offsets, 3) == hashes);
  CHECK(hash(std::vector<int32_t>(tokens.begin(), tokens.end()), offsets, 1) == hashes);
  CHECK(throws<std::invalid_argument>([&] { hash(tokens, {0, 7}, 1); }));
  CHECK(throws<std::invalid_argument>([&] { hash(tokens, {0, 3, 2}, 1); }));
  CHECK(throws<std::invalid_argument>([&] { hash(tokens, {-1, 3}, 1); }));
}

}  // namespace

int main() {
  test_known_answer();
  test_documents();
  return num_failed == 0 ? 0 : 1;
}
