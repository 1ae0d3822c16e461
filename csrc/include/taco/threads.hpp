// Parallel work whose result does not depend on the number of threads: numbered tasks, each with its own output.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace taco {

// Unaligned loads: the arrays of an .idx file may be at odd addresses.
template <typename T>
T load_unaligned(const void* base, int64_t index) {
  T value;
  __builtin_memcpy(&value, static_cast<const char*>(base) + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

// Calls task(i) once for every i in 0 .. num_tasks - 1, on up to num_threads threads, in any order; returns when all
// have ended. If tasks throw, the exception of the lowest task that ran is rethrown and the others are dropped.
template <typename Task>
void for_each_task(int64_t num_tasks, int num_threads, Task task) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> has_failed{false};
  std::mutex mutex;
  std::exception_ptr failure;
  int64_t failed_task = num_tasks;
  const auto work = [&] {
    for (int64_t i = next++; i < num_tasks && !has_failed; i = next++) {
      try {
        task(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        has_failed = true;
        if (i < failed_task) {
          failed_task = i;
          failure = std::current_exception();
        }
      }
    }
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < num_threads && i < num_tasks; ++i) {
    try {
      threads.emplace_back(work);
    } catch (const std::exception&) {
      break;  // the system has no more threads: fewer of them do the same work
    }
  }
  work();
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace taco
