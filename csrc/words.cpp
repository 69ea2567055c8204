// Counting the words of texts in bounded memory: sorted run files on the disk, merged later (words.h).
#include "words.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>

#include "split.h"
#include "xverse_tokenizer.h"

namespace xv {

WordReader::WordReader(const char* path) : file_(std::fopen(path, "rb")), buffer_(1 << 18) {
  if (!file_) throw Failure{errno};
  std::setvbuf(file_.get(), nullptr, _IONBF, 0);
}

bool WordReader::next() {
  constexpr size_t kLongestRecord = kLongestWord + 20;
  if (end_ - at_ < kLongestRecord) {
    std::memmove(buffer_.data(), buffer_.data() + at_, end_ - at_);
    end_ -= at_, at_ = 0;
    end_ += std::fread(buffer_.data() + end_, 1, buffer_.size() - kLongestRecord - end_, file_.get());
    if (std::ferror(file_.get())) throw Failure{EIO};
    std::memset(buffer_.data() + end_, 0, kLongestRecord);  // a malformed end reads as zeros, not beyond the buffer
  }
  if (at_ == end_) return false;
  uint64_t size;
  const uint8_t* from = get_varint(buffer_.data() + at_, size);
  from = get_varint(from, record.count);
  at_ = size_t(from - buffer_.data()) + size;
  if (size == 0 || size > kLongestWord || at_ > end_) throw Failure{EBADMSG};
  record.word = from, record.size = size, record.hash = hash_word(from, size);
  return true;
}

WordWriter::WordWriter(const char* path)
    : file_(::open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)), buffer_(1 << 18) {
  if (file_ < 0) throw Failure{errno};
}

WordWriter::~WordWriter() {
  if (file_ >= 0) ::close(file_);
}

void WordWriter::put(const uint8_t* word, size_t size, uint64_t count) {
  if (buffer_.size() - used_ < size + 20) flush();
  uint8_t* to = put_varint(put_varint(buffer_.data() + used_, size), count);
  std::memcpy(to, word, size);
  used_ = size_t(to - buffer_.data()) + size;
  records += 1, occurrences += int64_t(count);
}

void WordWriter::flush() {
  for (size_t done = 0; done < used_;) {
    const ssize_t wrote = ::write(file_, buffer_.data() + done, used_ - done);
    if (wrote < 0 && errno != EINTR) throw Failure{errno};
    if (wrote > 0) done += size_t(wrote);
  }
  bytes += int64_t(used_), used_ = 0;
}

void WordWriter::finish() {
  flush();
  if (::fsync(file_) != 0) throw Failure{errno};
  const int file = file_;
  file_ = -1;
  if (::close(file) != 0) throw Failure{errno};
}

WordMerge::WordMerge(const char* const* paths, const int64_t* multipliers, int files) {
  for (int i = 0; i < files; ++i) {
    Source source{std::make_unique<WordReader>(paths[i]), multipliers ? uint64_t(multipliers[i]) : 1};
    if (source.multiplier != 0 && source.reader->next()) heap_.push_back(std::move(source));
  }
  for (size_t i = heap_.size() / 2; i-- > 0;) sift(i);
}

void WordMerge::sift(size_t index) {
  const auto before = [&](size_t a, size_t b) {
    return compare(heap_[a].reader->record, heap_[b].reader->record) < 0;
  };
  for (;;) {
    size_t least = index;
    for (size_t below = 2 * index + 1; below <= 2 * index + 2 && below < heap_.size(); ++below)
      if (before(below, least)) least = below;
    if (least == index) return;
    std::swap(heap_[index], heap_[least]);
    index = least;
  }
}

bool WordMerge::next() {
  if (heap_.empty()) return false;
  const Record& first = heap_[0].reader->record;
  word_.assign(first.word, first.word + first.size);
  record = {word_.data(), word_.size(), 0, first.hash};
  do {
    record.count += heap_[0].reader->record.count * heap_[0].multiplier;
    if (!heap_[0].reader->next()) {
      std::swap(heap_[0], heap_.back());
      heap_.pop_back();
    }
    if (!heap_.empty()) sift(0);
  } while (!heap_.empty() && compare(heap_[0].reader->record, record) == 0);
  return true;
}

// Counts words in a hash table; whenever it is full, writes it, sorted, to PREFIX.0, PREFIX.1, …
struct Counter {
  struct Slot {
    uint64_t hash;
    uint32_t offset;  // into `bytes`, plus 1; 0: an empty slot
    uint32_t count;
  };

  Counter(std::string prefix, int64_t memory) : prefix(std::move(prefix)) {
    while (most_slots * 2 * sizeof(Slot) <= size_t(memory) / 2) most_slots *= 2;
    most_bytes = std::min<size_t>(size_t(memory) / 4, UINT32_MAX - 2 * kLongestWord);
    slots.resize(size_t(1) << 12);
  }

  void add(const uint8_t* word, size_t size) {
    words += 1;
    if (size > kLongestWord) {
      long_words += 1;
      return;
    }
    const uint64_t hash = hash_word(word, size);
    size_t index = hash & (slots.size() - 1);
    for (; slots[index].offset != 0; index = (index + 1) & (slots.size() - 1)) {
      Slot& slot = slots[index];
      if (slot.hash != hash) continue;
      uint64_t length;
      const uint8_t* known = get_varint(bytes.data() + slot.offset - 1, length);
      if (length != size || std::memcmp(known, word, size) != 0) continue;
      if (++slot.count == UINT32_MAX) spill();
      return;
    }
    const size_t offset = bytes.size();
    bytes.resize(offset + size + 3);
    uint8_t* to = put_varint(bytes.data() + offset, size);
    std::memcpy(to, word, size);
    bytes.resize(size_t(to - bytes.data()) + size);
    slots[index] = {hash, uint32_t(offset + 1), 1};
    used += 1;
    if (bytes.size() > most_bytes) return spill();
    if (used * 5 < slots.size() * 3) return;
    if (slots.size() < most_slots) grow();
    else spill();
  }

  void grow() {
    std::vector<Slot> old(slots.size() * 2);
    old.swap(slots);
    for (const Slot& slot : old) {
      if (slot.offset == 0) continue;
      size_t index = slot.hash & (slots.size() - 1);
      while (slots[index].offset != 0) index = (index + 1) & (slots.size() - 1);
      slots[index] = slot;
    }
  }

  void spill() {
    if (used == 0) return;
    const auto record = [&](const Slot& slot) {
      uint64_t size;
      const uint8_t* word = get_varint(bytes.data() + slot.offset - 1, size);
      return Record{word, size, slot.count, slot.hash};
    };
    const auto end = std::partition(slots.begin(), slots.end(), [](const Slot& s) { return s.offset != 0; });
    std::sort(slots.begin(), end, [&](const Slot& a, const Slot& b) {
      return a.hash != b.hash ? a.hash < b.hash : compare(record(a), record(b)) < 0;
    });
    WordWriter writer((prefix + "." + std::to_string(runs)).c_str());
    for (auto slot = slots.begin(); slot != end; ++slot) {
      const Record found = record(*slot);
      writer.put(found.word, found.size, found.count);
    }
    writer.finish();
    runs += 1, used = 0;
    bytes.clear();
    std::fill(slots.begin(), slots.end(), Slot{});
  }

  std::string prefix;
  std::vector<Slot> slots;
  std::vector<uint8_t> bytes;
  size_t most_slots = size_t(1) << 12, most_bytes, used = 0;
  int64_t words = 0, long_words = 0, runs = 0;
};

// Runs `body`; returns 0, or the errno of its failure.
template <class Body>
int guard(const Body& body) {
  try {
    body();
    return 0;
  } catch (const Failure& failure) {
    return failure.number != 0 ? failure.number : EIO;
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
}

}  // namespace xv

using namespace xv;

extern "C" {

Counter* xvt_counter(const char* prefix, int64_t memory) {
  Counter* counter = nullptr;
  guard([&] { counter = new Counter(prefix, memory); });
  return counter;
}

void xvt_counter_free(Counter* counter) { delete counter; }

int xvt_counter_add(Counter* counter, const uint8_t* text, const int64_t* ends, int64_t documents) {
  return guard([&] {
    int64_t begin = 0;
    for (int64_t i = 0; i < documents; begin = ends[i++])
      each_word<Split::kTraining>(text + begin, size_t(ends[i] - begin), classes(),
                                  [&](const uint8_t* word, size_t size) { counter->add(word, size); });
  });
}

int xvt_counter_finish(Counter* counter, int64_t* totals) {
  return guard([&] {
    counter->spill();
    totals[0] = counter->words, totals[1] = counter->long_words, totals[2] = counter->runs;
  });
}

int64_t xvt_word_bounds(const uint8_t* text, int64_t size, int64_t* begins, int64_t* ends) {
  int64_t count = 0;
  each_word<Split::kTraining>(text, size_t(size), classes(), [&](const uint8_t* word, size_t length) {
    begins[count] = word - text, ends[count++] = word - text + int64_t(length);
  });
  return count;
}

int xvt_merge_words(const char* const* paths, int files, const char* target, int64_t* totals) {
  return guard([&] {
    WordMerge merge(paths, nullptr, files);
    WordWriter writer(target);
    while (merge.next()) writer.put(merge.record.word, merge.record.size, merge.record.count);
    writer.finish();
    totals[0] = writer.records, totals[1] = writer.occurrences, totals[2] = writer.bytes;
  });
}

int xvt_count_characters(const char* path, int64_t multiplier, int64_t* counts) {
  return guard([&] {
    WordReader reader(path);
    while (reader.next()) {
      const uint8_t* const end = reader.record.word + reader.record.size;
      int length;
      for (const uint8_t* at = reader.record.word; at < end; at += length)
        counts[code_point(at, length)] += int64_t(reader.record.count) * multiplier;
    }
  });
}

int64_t xvt_concatenate(const uint8_t* bytes, const int64_t* starts, const int32_t* chosen, int64_t count,
                        uint8_t* target, int64_t room) {
  int64_t used = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = starts[chosen[i]], size = starts[chosen[i] + 1] - start;
    if (used + size > room) break;
    std::memcpy(target + used, bytes + start, size_t(size));
    used += size;
  }
  return used;
}

}  // extern "C"
