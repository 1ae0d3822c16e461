// Shared by the test programs: a check that counts and prints failures, and one for exceptions.
#pragma once

#include <cstdio>
#include <exception>

namespace {

int num_failed = 0;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      ++num_failed;                                                       \
    }                                                                     \
  } while (false)

// Whether `action` throws an Error; other exceptions do not count.
template <typename Error, typename Action>
bool throws(Action action) {
  try {
    action();
  } catch (const Error&) {
    return true;
  } catch (const std::exception&) {
  }
  return false;
}

}  // namespace
