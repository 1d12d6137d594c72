// Work distribution over threads.
//
// The threads themselves belong to the program around the kernels: `ops.cpp` runs on torch's pool, the tests on
// std::thread. Which thread does what changes no result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace kvchat {

// Defined by the program: how many threads a kernel may use, and a call of `run(context)` on each of `count` threads
// (the caller's is one of them) that returns when all are done.
int64_t thread_count();
void run_on_threads(int64_t count, void (*run)(const void*), const void* context);

// Calls `work(begin, end)` for pieces of [0, count), `piece` long. A thread that has finished takes the next piece
// (dynamic scheduling): cores are seldom equally free, and a layer starts when the last thread is done.
template <typename Work>
inline void parallel_for(int64_t count, int64_t piece, const Work& work) {
  const int64_t threads = std::min(thread_count(), (count + piece - 1) / piece);
  if (threads <= 1) return work(0, count);
  std::atomic<int64_t> next = 0;
  const auto take_pieces = [&] {
    for (int64_t begin; (begin = next.fetch_add(piece)) < count;) work(begin, std::min(begin + piece, count));
  };
  using Take = decltype(take_pieces);
  run_on_threads(threads, [](const void* context) { (*static_cast<const Take*>(context))(); }, &take_pieces);
}

}  // namespace kvchat
