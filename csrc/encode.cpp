// Texts to token ids, as the tokenizers library's BPE gives them: words by split.h, the ids of a word by its merges in
// the order of their ranks. Most words of a text have been seen before: each thread remembers theirs.
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "split.h"

namespace xv {

namespace {

constexpr uint32_t kNone = UINT32_MAX;
constexpr size_t kRemembered = 64;              // bytes of a word; longer ones seldom come again
constexpr size_t kMostWords = size_t(1) << 18;  // that a thread remembers; then it begins anew
constexpr size_t kMostBytes = size_t(1) << 24;

struct Merge {
  uint64_t key = UINT64_MAX;  // the pair: left, right
  uint32_t rank = 0, id = 0;
};

// The vocabulary; read only once it is made.
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
      Merge& found = table[slot(row[0], row[1])];
      found = {uint64_t(row[0]) << 32 | row[1], uint32_t(i), row[2]};
    }
  }

  size_t slot(uint32_t left, uint32_t right) const {
    const uint64_t key = uint64_t(left) << 32 | right;
    size_t index = mix(key ^ 0x9E3779B97F4A7C15ull, 0xA0761D6478BD642Full) & (table.size() - 1);
    while (table[index].key != key && table[index].key != UINT64_MAX) index = (index + 1) & (table.size() - 1);
    return index;
  }

  // The merge of a pair, or null.
  const Merge* find(uint32_t left, uint32_t right) const {
    const Merge& found = table[slot(left, right)];
    return found.key == UINT64_MAX ? nullptr : &found;
  }

  std::vector<uint32_t> of_character;
  uint32_t of_byte[256];
  std::vector<Merge> table;
};

// What one thread needs to encode: words that it remembers, and room for one word's symbols.
class Worker {
 public:
  explicit Worker(const Vocabulary& vocabulary) : vocabulary_(vocabulary), slots_(size_t(1) << 10) {}

  // Writes the ids of a word; returns where they end. There are at most as many as bytes.
  uint32_t* encode(const uint8_t* word, size_t size, uint32_t* to) {
    if (size > kRemembered) return merge(word, size, to);
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
    uint32_t end = 0;  // of the entry in `known_`: ids, then the word; 0: empty
    uint16_t ids = 0, size = 0;
  };
  struct Symbol {
    uint32_t id;
    int32_t before, behind;  // -1: none
    bool gone;               // part of the symbol in front of it
  };
  struct Next {
    uint32_t rank, position, id;
    bool operator<(const Next& other) const {  // the top of the heap has the least rank, then the first place
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
    for (size_t i = 1; i < symbols_.size(); ++i) meet(uint32_t(i) - 1, uint32_t(i));
    std::make_heap(heap_.begin(), heap_.end());
    while (!heap_.empty()) {
      std::pop_heap(heap_.begin(), heap_.end());
      const Next next = heap_.back();
      heap_.pop_back();
      Symbol& left = symbols_[next.position];
      if (left.gone || left.behind < 0) continue;
      Symbol& right = symbols_[size_t(left.behind)];
      const Merge* const now = vocabulary_.find(left.id, right.id);
      if (now == nullptr || now->id != next.id) continue;  // one of the two has become another since
      left.id = next.id, right.gone = true;
      left.behind = right.behind;
      if (left.behind >= 0) {
        symbols_[size_t(left.behind)].before = int32_t(next.position);
        meet_again(next.position, uint32_t(left.behind));
      }
      if (left.before >= 0) meet_again(uint32_t(left.before), next.position);
    }
    for (int32_t i = 0; i >= 0; i = symbols_[size_t(i)].behind) *to++ = symbols_[size_t(i)].id;
    return to;
  }

  void add(uint32_t id) {
    const int32_t place = int32_t(symbols_.size());
    symbols_.push_back({id, place - 1, place + 1, false});
  }

  void meet(uint32_t left, uint32_t right) {
    const Merge* const found = vocabulary_.find(symbols_[left].id, symbols_[right].id);
    if (found != nullptr) heap_.push_back({found->rank, left, found->id});
  }

  void meet_again(uint32_t left, uint32_t right) {
    const size_t before = heap_.size();
    meet(left, right);
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

  // A text's ids to `to`; returns where they end.
  template <Split how>
  uint32_t* encode(Worker& worker, const uint8_t* text, size_t size, uint32_t* to) const {
    each_word<how>(
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

// `split`: 1 kJoined, 2 kSpaces. `characters` and `ids` [count]; ids of the 256 bytes; rows of `merged` [merges, 3] are
// left, right and result in the order of their ranks. Null where memory is short.
Encoder* xvt_encoder(int split, const uint32_t* characters, const uint32_t* ids, int64_t count, const uint32_t* bytes,
                     const uint32_t* merged, int64_t merges) {
  try {
    return new Encoder(Split(split), Vocabulary(characters, ids, count, bytes, merged, merges));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void xvt_encoder_free(Encoder* encoder) { delete encoder; }

// The ids of documents in valid UTF-8, one after the other in `target`, `lengths` of each. Document i ends at ends[i];
// `last` is put behind each where it is not UINT32_MAX. `target` has room for one id per byte and document.
// Returns how many ids there are, or -1 where memory is short. Any number of calls may run at a time.
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
  } catch (const std::system_error&) {  // no more threads to be had: those there are do it
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
