// Divides work among PyTorch's own OpenMP threads. A second thread pool would compete with them for the cores: OpenMP's
// threads keep spinning for milliseconds after each of PyTorch's operations.
#pragma once

#include <atomic>
#include <cstdint>

namespace xv {

// GOMP_parallel of the OpenMP library that PyTorch has loaded (LLVM's libomp exports it too); null: one thread.
extern void (*gomp_parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

template <class Body>
struct Shared {
  const Body* body;
  int64_t count, divisor;
  std::atomic<int64_t> next;
};

template <class Body>
void take_shares(void* data) {
  auto& shared = *static_cast<Shared<Body>*>(data);
  int64_t begin = shared.next.load(std::memory_order_relaxed);
  while (begin < shared.count) {
    // Guided scheduling: a share of the rest, long runs first and single items last, so that a slow core delays little.
    int64_t size = (shared.count - begin) / shared.divisor;
    int64_t end = begin + (size > 1 ? size : 1);
    if (!shared.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
    (*shared.body)(begin, end);
    begin = shared.next.load(std::memory_order_relaxed);
  }
}

// Calls body(begin, end) for disjoint ranges that cover 0 to count - 1, on up to `threads` threads.
template <class Body>
void share(int64_t count, int threads, const Body& body) {
  if (count <= 0) return;
  if (threads <= 1 || count == 1 || gomp_parallel == nullptr) {
    body(int64_t(0), count);
    return;
  }
  Shared<Body> shared{&body, count, 4 * int64_t(threads), {0}};
  gomp_parallel(take_shares<Body>, &shared, unsigned(threads), 0);
}

}  // namespace xv
