// Encoding texts to the token ids that the tokenizers library's BPE gives: split.h splits a text into words, whose
// pairs merge in order of rank. Most words of a text repeat: each thread caches their ids.
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "split.h"
#include "xverse_tokenizer.h"

namespace xv {

namespace {

constexpr uint32_t kNone = UINT32_MAX;
constexpr size_t kLongestCached = 64;           // bytes of a word; longer ones rarely repeat
constexpr size_t kMostWords = size_t(1) << 18;  // in a thread's cache; when full it is cleared
constexpr size_t kMostBytes = size_t(1) << 24;

struct Merge {
  uint64_t key = UINT64_MAX;  // the pair: left, right
  uint32_t rank = 0, id = 0;
};

// The vocabulary; immutable.
struct Vocabulary {
  Vocabulary(const uint32_t* characters, const uint32_t* ids, int64_t count, const uint32_t* bytes,
             const uint32_t* merged, int64_t merges)
      : of_character(kCodePoints, kNone) {
    for (int64_t i = 0; i < count; ++i) of_character[characters[i]] = ids[i];
    std::copy(bytes, bytes + 256, of_byte);
    size_t size = 16;
    while (size < size_t(merges) * 2) size *= 2;
    table.resize(size);
    for (int64_t i = 0; i < merges; ++i) {
      const uint32_t* const row = merged + 3 * i;
      table[slot(row[0], row[1])] = {uint64_t(row[0]) << 32 | row[1], uint32_t(i), row[2]};
    }
  }

  size_t slot(uint32_t left, uint32_t right) const {
    const uint64_t key = uint64_t(left) << 32 | right;
    size_t index = mix(key ^ 0x9E3779B97F4A7C15ull, 0xA0761D6478BD642Full) & (table.size() - 1);
    while (table[index].key != key && table[index].key != UINT64_MAX) index = (index + 1) & (table.size() - 1);
    return index;
  }

  // The merge of a pair; null: none.
  const Merge* find(uint32_t left, uint32_t right) const {
    const Merge& merge = table[slot(left, right)];
    return merge.key == UINT64_MAX ? nullptr : &merge;
  }

  std::vector<uint32_t> of_character;
  uint32_t of_byte[256];
  std::vector<Merge> table;
};

// The state of one encoding thread: its cache of words, and the symbols of the current word.
class Worker {
 public:
  explicit Worker(const Vocabulary& vocabulary) : vocabulary_(vocabulary), slots_(size_t(1) << 10) {}

  // Writes the ids of a word, at most one for each byte; returns their end.
  uint32_t* encode(const uint8_t* word, size_t size, uint32_t* to) {
    if (size > kLongestCached) return merge(word, size, to);
    const uint64_t hash = hash_word(word, size);
    size_t index = hash & (slots_.size() - 1);
    for (; slots_[index].end != 0; index = (index + 1) & (slots_.size() - 1)) {
      const Slot& slot = slots_[index];
      if (slot.hash != hash || slot.size != size) continue;
      const uint8_t* const known = known_.data() + slot.end - size;
      if (std::memcmp(known, word, size) != 0) continue;
      std::memcpy(to, known - 4 * size_t(slot.ids), 4 * size_t(slot.ids));
      return to + slot.ids;
    }
    uint32_t* const end = merge(word, size, to);
    const size_t ids = size_t(end - to), begin = known_.size();
    if (used_ >= kMostWords || begin > kMostBytes) {
      std::fill(slots_.begin(), slots_.end(), Slot{});
      known_.clear(), used_ = 0;
      return end;
    }
    known_.resize(begin + 4 * ids + size);
    std::memcpy(known_.data() + begin, to, 4 * ids);
    std::memcpy(known_.data() + begin + 4 * ids, word, size);
    slots_[index] = {hash, uint32_t(known_.size()), uint16_t(ids), uint16_t(size)};
    if (++used_ * 2 > slots_.size()) grow();
    return end;
  }

 private:
  struct Slot {
    uint64_t hash = 0;
    uint32_t end = 0;  // of the entry in `known_`: ids, then the word; 0: an empty slot
    uint16_t ids = 0, size = 0;
  };
  struct Symbol {
    uint32_t id;
    int32_t before, behind;  // -1: none
    bool gone;               // merged into the symbol before it
  };
  struct Next {
    uint32_t rank, position, id;
    bool operator<(const Next& other) const {  // the top of the heap has the lowest rank, then the leftmost position
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };

  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.end == 0) continue;
      size_t index = slot.hash & (slots_.size() - 1);
      while (slots_[index].end != 0) index = (index + 1) & (slots_.size() - 1);
      slots_[index] = slot;
    }
  }

  uint32_t* merge(const uint8_t* word, size_t size, uint32_t* to) {
    symbols_.clear(), heap_.clear();
    int length;
    for (const uint8_t* at = word; at < word + size; at += length) {
      const uint32_t id = vocabulary_.of_character[code_point(at, length)];
      if (id != kNone) add(id);
      else
        for (int i = 0; i < length; ++i) add(vocabulary_.of_byte[at[i]]);
    }
    symbols_.back().behind = -1;
    for (size_t i = 1; i < symbols_.size(); ++i) add_pair(uint32_t(i) - 1, uint32_t(i));
    std::make_heap(heap_.begin(), heap_.end());
    while (!heap_.empty()) {
      std::pop_heap(heap_.begin(), heap_.end());
      const Next next = heap_.back();
      heap_.pop_back();
      Symbol& left = symbols_[next.position];
      if (left.gone || left.behind < 0) continue;
      Symbol& right = symbols_[size_t(left.behind)];
      const Merge* const now = vocabulary_.find(left.id, right.id);
      if (now == nullptr || now->id != next.id) continue;  // one of the two symbols has changed since
      left.id = next.id, right.gone = true;
      left.behind = right.behind;
      if (left.behind >= 0) {
        symbols_[size_t(left.behind)].before = int32_t(next.position);
        push_pair(next.position, uint32_t(left.behind));
      }
      if (left.before >= 0) push_pair(uint32_t(left.before), next.position);
    }
    for (int32_t i = 0; i >= 0; i = symbols_[size_t(i)].behind) *to++ = symbols_[size_t(i)].id;
    return to;
  }

  void add(uint32_t id) {
    const int32_t place = int32_t(symbols_.size());
    symbols_.push_back({id, place - 1, place + 1, false});
  }

  void add_pair(uint32_t left, uint32_t right) {
    const Merge* const merge = vocabulary_.find(symbols_[left].id, symbols_[right].id);
    if (merge != nullptr) heap_.push_back({merge->rank, left, merge->id});
  }

  void push_pair(uint32_t left, uint32_t right) {
    const size_t before = heap_.size();
    add_pair(left, right);
    if (heap_.size() > before) std::push_heap(heap_.begin(), heap_.end());
  }

  const Vocabulary& vocabulary_;
  std::vector<Slot> slots_;
  std::vector<uint8_t> known_;
  size_t used_ = 0;
  std::vector<Symbol> symbols_;
  std::vector<Next> heap_;
};

}  // namespace

struct Encoder {
  Encoder(Split split, Vocabulary vocabulary) : split(split), vocabulary(std::move(vocabulary)) {}

  // Writes a text's ids to `to`; returns their end.
  template <Split kSplit>
  uint32_t* encode(Worker& worker, const uint8_t* text, size_t size, uint32_t* to) const {
    each_word<kSplit>(
        text, size, classes(), [&](const uint8_t* word, size_t length) { to = worker.encode(word, length, to); },
        [&] {
          for (const uint8_t byte : {0xE2, 0x96, 0x81}) *to++ = vocabulary.of_byte[byte];
        });
    return to;
  }

  std::unique_ptr<Worker> take() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!idle.empty()) {
        std::unique_ptr<Worker> worker = std::move(idle.back());
        idle.pop_back();
        return worker;
      }
    }
    return std::make_unique<Worker>(vocabulary);
  }

  void give_back(std::unique_ptr<Worker> worker) {
    const std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(std::move(worker));
  }

  const Split split;
  const Vocabulary vocabulary;
  std::mutex mutex;
  std::vector<std::unique_ptr<Worker>> idle;
};

}  // namespace xv

using namespace xv;

extern "C" {

Encoder* xvt_encoder(int split, const uint32_t* characters, const uint32_t* ids, int64_t count, const uint32_t* bytes,
                     const uint32_t* merged, int64_t merges) {
  try {
    return new Encoder(Split(split), Vocabulary(characters, ids, count, bytes, merged, merges));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void xvt_encoder_free(Encoder* encoder) { delete encoder; }

int64_t xvt_encode(Encoder* encoder, const uint8_t* text, const int64_t* ends, int64_t documents, uint32_t last,
                   int threads, uint32_t* target, int64_t* lengths) {
  const auto begin_of = [&](int64_t i) { return i == 0 ? 0 : ends[i - 1]; };
  const auto place_of = [&](int64_t i) { return target + begin_of(i) + i; };
  std::atomic<int64_t> next{0};
  std::atomic<bool> short_of_memory{false};
  const int64_t step = std::max<int64_t>(1, documents / (int64_t(threads) * 8));
  const auto work = [&] {
    try {
      std::unique_ptr<Worker> worker = encoder->take();
      for (int64_t first; (first = next.fetch_add(step)) < documents;)
        for (int64_t i = first; i < std::min(documents, first + step); ++i) {
          const uint8_t* const from = text + begin_of(i);
          const size_t size = size_t(ends[i] - begin_of(i));
          uint32_t* to = place_of(i);
          to = encoder->split == Split::kSpaces ? encoder->encode<Split::kSpaces>(*worker, from, size, to)
                                                : encoder->encode<Split::kJoined>(*worker, from, size, to);
          if (last != kNone) *to++ = last;
          lengths[i] = to - place_of(i);
        }
      encoder->give_back(std::move(worker));
    } catch (const std::bad_alloc&) {
      short_of_memory = true;
    }
  };
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads && i < documents; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads are available: continue with fewer
  }
  work();
  for (std::thread& thread : others) thread.join();
  if (short_of_memory) return -1;
  uint32_t* end = target;
  for (int64_t i = 0; i < documents; ++i) {
    std::memmove(end, place_of(i), size_t(lengths[i]) * sizeof(uint32_t));
    end += lengths[i];
  }
  return end - target;
}

}  // extern "C"
