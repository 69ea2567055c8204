// Words (XVERSE's pre-tokens) and files of counted words.
//
// A file is a sequence of records, one for each word, sorted by (hash of the word, word):
//   length (varint), count (varint), the word in UTF-8 with plain spaces
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace xv {

constexpr size_t kLongestWord = 16384;  // bytes; longer ones are not words of any language and are dropped

inline uint64_t mix(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return uint64_t(product) ^ uint64_t(product >> 64);
}

inline uint64_t hash_word(const uint8_t* word, size_t size) {
  uint64_t hash = 0x9E3779B97F4A7C15ull ^ (size * 0xD6E8FEB86659FD93ull);
  while (size >= 8) {
    uint64_t part;
    std::memcpy(&part, word, 8);
    hash = mix(hash ^ part, 0xA0761D6478BD642Full);
    word += 8, size -= 8;
  }
  uint64_t part = 0;
  std::memcpy(&part, word, size);
  return mix(hash ^ part, 0xE7037ED1A0B428DBull);
}

inline uint8_t* put_varint(uint8_t* to, uint64_t value) {
  for (; value >= 128; value >>= 7) *to++ = uint8_t(value) | 128;
  *to++ = uint8_t(value);
  return to;
}

inline const uint8_t* get_varint(const uint8_t* from, uint64_t& value) {
  value = 0;
  for (int shift = 0;; shift += 7) {
    const uint8_t byte = *from++;
    value |= uint64_t(byte & 127) << shift;
    if (byte < 128) return from;
  }
}

// The code point at `from` in valid UTF-8, and its length.
inline uint32_t code_point(const uint8_t* from, int& length) {
  const uint32_t lead = from[0];
  if (lead < 0x80) return length = 1, lead;
  if (lead < 0xE0) return length = 2, (lead & 31) << 6 | (from[1] & 63);
  if (lead < 0xF0) return length = 3, (lead & 15) << 12 | (from[1] & 63u) << 6 | (from[2] & 63);
  return length = 4, (lead & 7) << 18 | (from[1] & 63u) << 12 | (from[2] & 63u) << 6 | (from[3] & 63);
}

struct Record {
  const uint8_t* word;
  size_t size;
  uint64_t count, hash;
};

inline int compare(const Record& a, const Record& b) {
  if (a.hash != b.hash) return a.hash < b.hash ? -1 : 1;
  const int order = std::memcmp(a.word, b.word, a.size < b.size ? a.size : b.size);
  return order != 0 ? order : a.size < b.size ? -1 : a.size > b.size;
}

// Reads a file of counted words. Throws Failure(errno), or Failure(EBADMSG) for a malformed file.
class WordReader {
 public:
  explicit WordReader(const char* path);
  bool next();  // false at the end
  Record record{};

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::unique_ptr<std::FILE, Close> file_;
  std::vector<uint8_t> buffer_;
  size_t at_ = 0, end_ = 0;
};

class WordWriter {
 public:
  explicit WordWriter(const char* path);
  ~WordWriter();
  void put(const uint8_t* word, size_t size, uint64_t count);
  void finish();  // returns when the file is on the disk
  int64_t records = 0, occurrences = 0, bytes = 0;

 private:
  void flush();
  int file_;
  std::vector<uint8_t> buffer_;
  size_t used_ = 0;
};

// Merges sorted files to one sorted stream; counts of equal words add up, each file's times its multiplier.
class WordMerge {
 public:
  WordMerge(const char* const* paths, const int64_t* multipliers, int files);
  bool next();
  Record record{};

 private:
  void sift(size_t index);
  struct Source {
    std::unique_ptr<WordReader> reader;
    uint64_t multiplier;
  };
  std::vector<Source> heap_;
  std::vector<uint8_t> word_;
};

struct Failure {
  int number;  // errno
};

}  // namespace xv
