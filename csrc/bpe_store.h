// What training keeps in memory: words as symbols, counts of pairs, lists of the words in which a pair occurs.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "words.h"

namespace xv {

inline uint64_t pair_key(uint32_t left, uint32_t right) { return uint64_t(left) << 32 | right; }
inline uint64_t hash_pair(uint64_t key) { return mix(key ^ 0x9E3779B97F4A7C15ull, 0xA0761D6478BD642Full); }

// A sequence of words: a header of 32 bits (number of symbols: 15, count: 17), a 64-bit count if 17 bits are too few,
// the symbols. Words that merges have shortened are padded with kFill, with which no header begins. Address space is
// reserved for the largest possible size; memory is used only for what is written.
template <class Symbol>
class WordStore {
 public:
  static constexpr Symbol kFill = Symbol(~Symbol(0));
  static constexpr size_t kHeader = 4 / sizeof(Symbol), kWide = 8 / sizeof(Symbol);
  static constexpr uint32_t kLength = (1u << 15) - 1, kWideCount = (1u << 17) - 1;

  WordStore() = default;
  explicit WordStore(size_t capacity) : capacity_(capacity * sizeof(Symbol)) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = ::mmap(nullptr, capacity_, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (memory == MAP_FAILED) throw Failure{ENOMEM};
    slots = static_cast<Symbol*>(memory);
  }
  WordStore(const WordStore&) = delete;
  WordStore& operator=(const WordStore&) = delete;
  WordStore& operator=(WordStore&& other) {
    std::swap(slots, other.slots), std::swap(used, other.used), std::swap(capacity_, other.capacity_);
    return *this;
  }
  ~WordStore() {
    if (slots != nullptr) ::munmap(slots, capacity_);
  }

  struct Word {
    Symbol* symbols;
    uint32_t length;
    int64_t count;
  };

  Word at(size_t offset) const {
    uint32_t header;
    std::memcpy(&header, slots + offset, 4);
    Word word{slots + offset + kHeader, header & kLength, int64_t(header >> 15)};
    if (word.count == kWideCount) {
      std::memcpy(&word.count, word.symbols, 8);
      word.symbols += kWide;
    }
    return word;
  }

  void shorten(size_t offset, uint32_t length) {
    uint32_t header;
    std::memcpy(&header, slots + offset, 4);
    header = (header & ~kLength) | length;
    std::memcpy(slots + offset, &header, 4);
  }

  template <class From>
  void append(const From* symbols, uint32_t length, int64_t count) {
    const bool wide = count >= kWideCount;
    const uint32_t header = length | (wide ? kWideCount : uint32_t(count)) << 15;
    Symbol moved[kLongestWord];  // the source may overlap: it may be in this store
    for (uint32_t i = 0; i < length; ++i) moved[i] = Symbol(symbols[i]);
    std::memcpy(slots + used, &header, 4);
    used += kHeader;
    if (wide) {
      std::memcpy(slots + used, &count, 8);
      used += kWide;
    }
    std::memcpy(slots + used, moved, length * sizeof(Symbol));
    used += length;
  }

  // Calls body(offset, word) for every word.
  template <class Body>
  void each(const Body& body) const {
    for (size_t offset = 0; offset < used;) {
      if (slots[offset] == kFill) {
        ++offset;
        continue;
      }
      const Word word = at(offset);
      body(offset, word);
      offset = size_t(word.symbols - slots) + word.length;
    }
  }

  // Closes the gaps, drops words of one symbol and returns the memory.
  void compact() {
    const size_t end = used;
    size_t offset = 0;
    for (used = 0; offset < end;) {
      if (slots[offset] == kFill) {
        ++offset;
        continue;
      }
      const Word word = at(offset);
      offset = size_t(word.symbols - slots) + word.length;
      if (word.length > 1) append(word.symbols, word.length, word.count);
    }
    release(used, end);
  }

  // Returns the memory of slots first to last - 1 to the system; their contents are lost.
  void release(size_t first, size_t last) {
    constexpr size_t kPage = 4096 / sizeof(Symbol);
    first = (first + kPage - 1) / kPage * kPage;
    if (first < last) ::madvise(slots + first, (last - first) * sizeof(Symbol), MADV_DONTNEED);
  }

  Symbol* slots = nullptr;
  size_t used = 0;

 private:
  size_t capacity_ = 0;
};

// A hash table with open addressing from a pair's key to `Value`, which has a `key`. Key 0, a pair of special tokens,
// marks an empty slot.
template <class Value>
class PairMap {
 public:
  explicit PairMap(size_t places = 1 << 12) : places_(places) {}
  Value* find(uint64_t key) {
    for (size_t index = hash_pair(key);; ++index) {
      Value& value = places_[index & (places_.size() - 1)];
      if (value.key == key) return &value;
      if (value.key == 0) return nullptr;
    }
  }
  Value& make(uint64_t key, uint64_t hash) {
    for (size_t index = hash;; ++index) {
      Value& value = places_[index & (places_.size() - 1)];
      if (value.key == key) return value;
      if (value.key != 0) continue;
      if ((size_ + 1) * 5 > places_.size() * 3) {
        grow();
        return make(key, hash);
      }
      ++size_;
      value.key = key;
      return value;
    }
  }
  Value& make(uint64_t key) { return make(key, hash_pair(key)); }
  size_t size() const { return size_; }
  template <class Body>
  void each(const Body& body) const {
    for (const Value& value : places_)
      if (value.key != 0) body(value);
  }

 private:
  void grow() {
    std::vector<Value> old(places_.size() * 2);
    old.swap(places_);
    for (const Value& value : old) {
      if (value.key == 0) continue;
      size_t index = hash_pair(value.key);
      while (places_[index & (places_.size() - 1)].key != 0) ++index;
      places_[index & (places_.size() - 1)] = value;
    }
  }
  std::vector<Value> places_;
  size_t size_ = 0;
};

// Offsets of words in increasing order, as varints of their differences; `last` is the last offset plus 1.
struct Positions {
  uint8_t* data = nullptr;
  uint32_t size = 0, room = 0;
  uint32_t last = 0;
};

inline uint32_t varint_size(uint32_t value) {
  return value < 1u << 7 ? 1 : value < 1u << 14 ? 2 : value < 1u << 21 ? 3 : value < 1u << 28 ? 4 : 5;
}

// Arena for one merge's lists while they grow; `reset` frees all of it.
class Pool {
 public:
  uint8_t* take(size_t size) {
    while (block_ < blocks_.size() && used_ + size > blocks_[block_].size()) ++block_, used_ = 0;
    if (block_ == blocks_.size()) blocks_.emplace_back(std::max(size, kBlock)), used_ = 0;
    uint8_t* memory = blocks_[block_].data() + used_;
    used_ += size;
    return memory;
  }
  void append(Positions& list, uint32_t offset) {
    if (list.last == offset + 1) return;  // the word is in the list already
    if (list.room - list.size < 5) {
      const uint32_t room = list.room == 0 ? 12 : 2 * list.room;
      uint8_t* moved = take(room);
      if (list.size != 0) std::memcpy(moved, list.data, list.size);
      list.data = moved, list.room = room;
    }
    list.size = uint32_t(put_varint(list.data + list.size, offset + 1 - list.last) - list.data);
    list.last = offset + 1;
  }
  void reset() {
    block_ = 0, used_ = 0;
    if (blocks_.size() > 8) blocks_.resize(8), blocks_.shrink_to_fit();
  }

 private:
  static constexpr size_t kBlock = size_t(1) << 20;
  std::vector<std::vector<uint8_t>> blocks_;
  size_t block_ = 0, used_ = 0;
};

}  // namespace xv
