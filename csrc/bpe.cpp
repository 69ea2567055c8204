// Learning byte-pair merges from counted words in bounded memory. The merges are those of the tokenizers library's
// BpeTrainer, ties included (the smaller pair of ids first).
//
// With a list of words for every pair, memory would grow with the long tail of rare pairs, which are never merged.
// Therefore training runs in phases. A phase keeps the pairs that occur at least `threshold` times and ends when a pair
// below the threshold could be next. Then the words are scanned again and a phase with a lower threshold begins.
//
// A scan builds one list of words for each pair. The library instead builds a list whenever a merge creates a pair. The
// two agree because no pair is created twice: all occurrences of a pair merge at once, from the left, so that the
// symbols between two boundaries are what the merges make of those characters alone (if a run of equal symbols crosses
// a boundary, an even number of them precedes it). So each token is created by exactly one pair, everywhere at once,
// and a pair that contains it is created by the merge that creates the token or by the merge of the other symbol.
#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "bpe_store.h"
#include "xverse_tokenizer.h"

namespace xv {

namespace {

constexpr uint32_t kNone = UINT32_MAX;
constexpr size_t kPairBytes = 96;        // of a pair in the map, the queue and the allocator, without its list
constexpr int64_t kPhase = 16;           // the threshold of a phase is its largest count divided by this

struct Settings {
  uint32_t vocab_size, max_length;
  int64_t min_frequency;
  size_t memory;  // bytes, words included
  int threads;
};

struct Entry {
  int64_t count;
  uint64_t key;
  uint8_t* list;  // owned: uint32 size, then the data of a Positions
  bool operator<(const Entry& other) const { return count != other.count ? count < other.count : key > other.key; }
};

struct Counted {
  uint64_t key = 0;
  int64_t count = 0;
  uint32_t last = 0, bytes = 0;
};
struct Kept {
  uint64_t key = 0;
  int64_t count = 0;
};
struct Filled {
  uint64_t key = 0;
  uint8_t* to = nullptr;
  uint32_t last = 0;
};
// What a merge changes for one neighbouring symbol: its pair with the merged part falls, the one with the new symbol
// rises.
struct Neighbour {
  int64_t fall = 0, rise = 0;
  Positions words;
};

class Trainer {
 public:
  // The tokens of merges have the ids from `first_id` on; those below are special tokens or single characters.
  Trainer(const Settings& settings, uint32_t first_id) : settings_(settings), next_id_(first_id) {
    lengths_.assign(next_id_, 1);
    left_.resize(settings.vocab_size), right_.resize(settings.vocab_size);
  }
  ~Trainer() { clear_queue(); }

  // Loads the words of the files; id_of maps code points to ids. A character without an id splits a word.
  void load(WordMerge& merge, size_t bytes, const uint32_t* id_of) {
    is_wide_ = next_id_ > 60000;
    if (is_wide_) load_into(wide_, merge, bytes, id_of);
    else load_into(narrow_, merge, bytes, id_of);
  }

  // Returns false if `report` stopped it.
  bool train(XvtReport report) {
    for (bool first = true; next_id_ < settings_.vocab_size; first = false) {
      if (!is_wide_ && next_id_ >= WordStore<uint16_t>::kFill) widen(), first = true;
      const bool more = is_wide_ ? phase(wide_, first, report) : phase(narrow_, first, report);
      if (stopped_) return false;
      if (!more) break;
    }
    return true;
  }

  std::vector<uint32_t> merges;  // left, right, result, …
  std::vector<int64_t> counts;   // of each pair when it was merged
  int64_t words = 0, phases = 0;

 private:
  template <class Symbol>
  void load_into(WordStore<Symbol>& store, WordMerge& merge, size_t bytes, const uint32_t* id_of) {
    // A record has at least two bytes before the word, a part of a word at least two characters.
    store = WordStore<Symbol>(6 * bytes + 4096);
    uint32_t symbols[kLongestWord];
    while (merge.next()) {
      ++words;
      const uint8_t* const end = merge.record.word + merge.record.size;
      uint32_t length = 0;
      const auto cut = [&] {
        if (length > 1) store.append(symbols, length, int64_t(merge.record.count));
        length = 0;
      };
      int step;
      for (const uint8_t* at = merge.record.word; at < end; at += step) {
        const uint32_t id = id_of[code_point(at, step)];
        if (id == kNone) cut();
        else symbols[length++] = id;
      }
      cut();
      if (store.used > UINT32_MAX - 2 * kLongestWord) throw Failure{EOVERFLOW};
    }
  }

  void widen() {
    wide_ = WordStore<uint32_t>(narrow_.used + 4096);
    size_t released = 0;
    narrow_.each([&](size_t offset, const WordStore<uint16_t>::Word& word) {
      if (word.length > 1) wide_.append(word.symbols, word.length, word.count);
      if (offset - released < (size_t(1) << 24)) return;
      narrow_.release(released, offset / 4096 * 4096), released = offset / 4096 * 4096;
    });
    narrow_ = WordStore<uint16_t>();
    is_wide_ = true;
  }

  bool counts_at_all(uint64_t key) const {
    const uint32_t left = lengths_[key >> 32], right = lengths_[uint32_t(key)];
    return left + right < settings_.max_length || (left == 1 && right == 1);
  }

  template <class Body>
  void on_threads(int parts, const Body& body) {
    std::atomic<int> next{0};
    std::atomic<bool> short_of_memory{false};
    const auto work = [&] {
      try {
        for (int part; (part = next++) < parts;) body(part);
      } catch (const std::bad_alloc&) {
        short_of_memory = true;
      }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < std::min(settings_.threads, parts); ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
    if (short_of_memory) throw std::bad_alloc();
  }

  // Counts all pairs and keeps those that the next phase needs. Returns false if none is left to merge.
  template <class Symbol>
  bool scan(const WordStore<Symbol>& store) {
    clear_queue();
    const size_t taken = store.used * sizeof(Symbol);
    const size_t room = settings_.memory > taken ? settings_.memory - taken : 0;
    const size_t budget = std::max(room / 2, size_t(1) << 24);
    const size_t most_places = std::max(budget / size_t(settings_.threads) / sizeof(Counted) / 3, size_t(1) << 14);
    std::vector<std::vector<Counted>> frequent;
    std::atomic<int64_t> top{0};
    for (int parts = parts_;; parts *= 2) {
      frequent.assign(size_t(parts), {});
      top = 0;
      std::atomic<bool> overflow{false};
      on_threads(parts, [&](int part) {
        if (overflow) return;
        PairMap<Counted> pairs;
        store.each([&](size_t offset, const typename WordStore<Symbol>::Word& word) {
          if (overflow) return;
          for (uint32_t i = 1; i < word.length; ++i) {
            const uint64_t key = pair_key(word.symbols[i - 1], word.symbols[i]), hash = hash_pair(key);
            if (int(hash >> 40) % parts != part) continue;
            Counted& pair = pairs.make(key, hash);
            pair.count += word.count;
            if (pair.last == offset + 1) continue;
            pair.bytes += varint_size(uint32_t(offset + 1) - pair.last);
            pair.last = uint32_t(offset + 1);
          }
          if (pairs.size() > most_places && parts < 4096) overflow = true;
        });
        if (overflow) return;
        int64_t best = 0;
        pairs.each([&](const Counted& pair) {
          if (counts_at_all(pair.key)) best = std::max(best, pair.count);
        });
        int64_t known = top;
        while (known < best && !top.compare_exchange_weak(known, best)) {}
        const int64_t least = std::max<int64_t>(1, top / kPhase);
        pairs.each([&](const Counted& pair) {
          if (counts_at_all(pair.key) && pair.count >= least) frequent[size_t(part)].push_back(pair);
        });
      });
      if (!overflow) break;
      parts_ = 2 * parts;
    }
    ++phases;
    threshold_ = std::max<int64_t>(1, top / kPhase);
    std::vector<Counted> chosen;
    for (auto& part : frequent) {
      for (const Counted& pair : part)
        if (pair.count >= threshold_) chosen.push_back(pair);
      part = {};
    }
    std::sort(chosen.begin(), chosen.end(), [](const Counted& a, const Counted& b) {
      return a.count != b.count ? a.count > b.count : a.key < b.key;
    });
    size_t total = 0;
    for (const Counted& pair : chosen) {
      total += pair.bytes + kPairBytes;
      if (total > budget && pair.count < top) {
        threshold_ = std::max(threshold_, pair.count + 1);
        break;
      }
    }
    kept_ = PairMap<Kept>();
    live_ = 0, most_live_ = 2 * budget;
    PairMap<Filled> lists;
    for (const Counted& pair : chosen) {
      if (pair.count < threshold_) break;
      auto* list = static_cast<uint8_t*>(std::malloc(4 + pair.bytes));
      if (list == nullptr) throw std::bad_alloc();
      std::memcpy(list, &pair.bytes, 4);
      queue_.push_back({pair.count, pair.key, list});
      live_ += pair.bytes + kPairBytes;
      kept_.make(pair.key).count = pair.count;
      lists.make(pair.key).to = list + 4;
    }
    chosen = {};
    std::make_heap(queue_.begin(), queue_.end());
    const int parts = settings_.threads;
    on_threads(parts, [&](int part) {
      store.each([&](size_t offset, const typename WordStore<Symbol>::Word& word) {
        for (uint32_t i = 1; i < word.length; ++i) {
          const uint64_t key = pair_key(word.symbols[i - 1], word.symbols[i]);
          if (parts > 1 && int(hash_pair(key) >> 40) % parts != part) continue;
          Filled* list = lists.find(key);
          if (list == nullptr || list->last == offset + 1) continue;
          list->to = put_varint(list->to, uint32_t(offset + 1) - list->last);
          list->last = uint32_t(offset + 1);
        }
      });
    });
    return top >= std::max<int64_t>(1, settings_.min_frequency);
  }

  // Returns whether another phase has to follow.
  template <class Symbol>
  bool phase(WordStore<Symbol>& store, bool first, XvtReport report) {
    if (!first) store.compact();
    if (!scan(store)) return false;
    const uint32_t last_id = sizeof(Symbol) == 2 ? WordStore<uint16_t>::kFill : kNone;
    for (bool merged = false; next_id_ < settings_.vocab_size;) {
      if (next_id_ >= last_id || (merged && live_ > most_live_)) return true;
      if (queue_.empty()) return threshold_ > 1;
      std::pop_heap(queue_.begin(), queue_.end());
      Entry entry = queue_.back();
      queue_.pop_back();
      Kept* pair = kept_.find(entry.key);
      if (pair->count < threshold_) {
        drop(entry);
        continue;
      }
      if (pair->count != entry.count) {
        entry.count = pair->count;
        push(entry);
        continue;
      }
      if (entry.count < settings_.min_frequency) {
        drop(entry);
        return false;
      }
      merge_pair(store, entry);
      merged = true;
      drop(entry);
      if (counts.size() % 256 == 0 && report != nullptr && report(int64_t(counts.size()), entry.count) != 0) {
        stopped_ = true;
        return false;
      }
    }
    return false;
  }

  template <class Symbol>
  void merge_pair(WordStore<Symbol>& store, const Entry& entry) {
    const uint32_t a = uint32_t(entry.key >> 32), b = uint32_t(entry.key), made = next_id_++;
    lengths_.push_back(lengths_[a] + lengths_[b]);
    merges.insert(merges.end(), {a, b, made});
    counts.push_back(entry.count);

    uint32_t size;
    std::memcpy(&size, entry.list, 4);
    const uint8_t *at = entry.list + 4, *const end = at + size;
    const uint32_t length = lengths_[made];
    for (uint64_t offset = 0, distance; at < end;) {
      at = get_varint(at, distance);
      offset += distance;
      const auto word = store.at(offset - 1);
      Symbol* const symbols = word.symbols;
      uint32_t from = 0;
      while (from + 1 < word.length && (symbols[from] != a || symbols[from + 1] != b)) ++from;
      if (from + 1 >= word.length) continue;
      uint32_t to = from;
      while (from < word.length) {
        if (symbols[from] != a || from + 1 == word.length || symbols[from + 1] != b) {
          symbols[to++] = symbols[from++];
          continue;
        }
        if (to > 0) change(left_, touched_left_, symbols[to - 1], word.count, length, uint32_t(offset - 1));
        symbols[to++] = Symbol(made);
        from += 2;
        if (from < word.length) change(right_, touched_right_, symbols[from], word.count, length, uint32_t(offset - 1));
      }
      std::fill(symbols + to, symbols + word.length, WordStore<Symbol>::kFill);
      store.shorten(offset - 1, to);
    }

    for (const uint32_t x : touched_left_) fall(pair_key(x, a), left_[x].fall);
    for (const uint32_t y : touched_right_) fall(pair_key(b, y), right_[y].fall);
    const int64_t fell = left_[made].fall;  // of (made, a) in "abab", which one merge both creates and removes
    for (const uint32_t x : touched_left_) rise(pair_key(x, made), left_[x], 0);
    for (const uint32_t y : touched_right_) rise(pair_key(made, y), right_[y], y == a ? fell : 0);
    for (const uint32_t x : touched_left_) left_[x] = {};
    for (const uint32_t y : touched_right_) right_[y] = {};
    touched_left_.clear(), touched_right_.clear();
    pool_.reset();
  }

  void change(std::vector<Neighbour>& side, std::vector<uint32_t>& touched, uint32_t symbol, int64_t count,
              uint32_t length, uint32_t offset) {
    Neighbour& neighbour = side[symbol];
    if (neighbour.fall == 0) touched.push_back(symbol);
    neighbour.fall += count;
    if (lengths_[symbol] + length >= settings_.max_length) return;
    neighbour.rise += count;
    pool_.append(neighbour.words, offset);
  }

  void fall(uint64_t key, int64_t count) {
    if (Kept* pair = kept_.find(key)) pair->count -= count;
  }

  // `fell`: the part of the rise that the same merge took away again.
  void rise(uint64_t key, const Neighbour& neighbour, int64_t fell) {
    const int64_t count = neighbour.rise - fell;
    if (neighbour.rise == 0 || count < threshold_) return;
    kept_.make(key).count = count;
    push(key, count, neighbour.words);
  }

  void push(const Entry& entry) {
    queue_.push_back(entry);
    std::push_heap(queue_.begin(), queue_.end());
  }
  void push(uint64_t key, int64_t count, const Positions& words) {
    auto* list = static_cast<uint8_t*>(std::malloc(4 + words.size));
    if (list == nullptr) throw std::bad_alloc();
    std::memcpy(list, &words.size, 4);
    std::memcpy(list + 4, words.data, words.size);
    live_ += words.size + kPairBytes;
    push({count, key, list});
  }
  void drop(const Entry& entry) {
    uint32_t size;
    std::memcpy(&size, entry.list, 4);
    live_ -= size + kPairBytes;
    std::free(entry.list);
  }
  void clear_queue() {
    for (const Entry& entry : queue_) std::free(entry.list);
    queue_ = {};
  }

  Settings settings_;
  uint32_t next_id_;
  std::vector<uint32_t> lengths_;  // in characters
  WordStore<uint16_t> narrow_;     // while ids fit in 16 bits
  WordStore<uint32_t> wide_;
  bool is_wide_ = false, stopped_ = false;
  int parts_ = 1;  // of the pairs, counted separately
  int64_t threshold_ = 1;
  PairMap<Kept> kept_;
  std::vector<Entry> queue_;
  size_t live_ = 0, most_live_ = 0;  // bytes of the queue's lists
  std::vector<Neighbour> left_, right_;
  std::vector<uint32_t> touched_left_, touched_right_;
  Pool pool_;
};

}  // namespace

}  // namespace xv

using namespace xv;

extern "C" {

int64_t xvt_train(const char* const* paths, const int64_t* multipliers, int files, int64_t bytes,
                  const uint32_t* alphabet, int64_t characters, uint32_t first_id, uint32_t vocab_size,
                  int64_t min_frequency, uint32_t max_length, int64_t memory, int threads, XvtReport report,
                  uint32_t* merges, int64_t* counts, int64_t* totals) {
  try {
    std::vector<uint32_t> id_of(0x110000, kNone);
    for (int64_t i = 0; i < characters; ++i) id_of[alphabet[i]] = first_id + uint32_t(i);
    id_of[' '] = id_of[0x2581];
    Trainer trainer({vocab_size, max_length, min_frequency, size_t(memory), std::max(threads, 1)},
                    first_id + uint32_t(characters));
    {
      WordMerge merge(paths, multipliers, files);
      trainer.load(merge, size_t(bytes), id_of.data());
    }
    std::vector<uint32_t>().swap(id_of);
    if (!trainer.train(report)) return -ECANCELED;
    std::copy(trainer.merges.begin(), trainer.merges.end(), merges);
    std::copy(trainer.counts.begin(), trainer.counts.end(), counts);
    totals[0] = trainer.words, totals[1] = trainer.phases;
    return int64_t(trainer.counts.size());
  } catch (const Failure& failure) {
    return -(failure.number != 0 ? failure.number : EIO);
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

}  // extern "C"
