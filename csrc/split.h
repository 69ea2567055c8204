// Splitting texts into words (XVERSE's pre-tokens), as the tokenizers library does.
#pragma once

#include <algorithm>

#include "isolated.h"
#include "words.h"
#include "xverse_tokenizer.h"

namespace xv {

enum Class : uint8_t { kInside, kIsolate, kSpace, kTab, kLineEnd, kLiteral };

// How spaces, tabs and line ends separate words; each numeral and punctuation mark is always a word.
enum class Split {
  kTraining,  // one space belongs to the word after it; the rest of a longer run is a word (TRAINING_WORDS)
  kJoined = XVT_JOINED,  // a whole run of spaces belongs to the word after it (WORDS)
  kSpaces = XVT_SPACES,  // every space begins a word; tabs and line ends are ordinary characters (Metaspace alone)
};

constexpr uint32_t kCodePoints = 0x110000;
constexpr uint32_t kSpaceMark = 0x2581;  // how the vocabulary writes a space; in a text it is never part of a word

inline const uint8_t* classes() {
  static const std::vector<uint8_t> table = [] {
    std::vector<uint8_t> classes(kCodePoints, kInside);
    for (const auto& range : kIsolated)
      std::fill(classes.begin() + range[0], classes.begin() + range[1] + 1, kIsolate);
    classes[' '] = kSpace, classes['\t'] = kTab, classes['\r'] = classes['\n'] = kLineEnd;
    classes[kSpaceMark] = kLiteral;
    return classes;
  }();
  return table.data();
}

// Calls emit(word, size) for each word of a text in valid UTF-8, and literal() for each ▁ in the text.
template <Split split, class Emit, class Literal>
void each_word(const uint8_t* text, size_t size, const uint8_t* table, const Emit& emit, const Literal& literal) {
  const uint8_t* at = text;
  const uint8_t* const end = text + size;
  const auto run = [&](const uint8_t* from, uint8_t kind) {
    while (from < end && *from < 0x80 && table[*from] == kind) ++from;
    return from;
  };
  while (at < end) {
    const uint8_t kind = table[*at < 0x80 ? *at : 'x'];
    const uint8_t* word = at;
    if (split != Split::kSpaces && (kind == kTab || kind == kLineEnd)) {
      at = run(at, kind);
      emit(word, size_t(at - word));
      continue;
    }
    if (kind == kSpace && split == Split::kSpaces) ++at;
    if (kind == kSpace && split != Split::kSpaces) {
      at = run(at, kSpace);
      const bool leads = at < end && (*at >= 0x80 || (table[*at] != kTab && table[*at] != kLineEnd));
      const uint8_t* const stop = !leads ? at : split == Split::kTraining ? at - 1 : word;
      if (stop > word) emit(word, size_t(stop - word));
      if (!leads) continue;
      word = stop;
    }
    while (at < end) {  // from `word`, which may begin with spaces, to the next whitespace
      int length;
      const uint8_t inside = table[code_point(at, length)];
      if (inside == kInside || (split == Split::kSpaces && (inside == kTab || inside == kLineEnd))) {
        at += length;
        continue;
      }
      if (at > word) emit(word, size_t(at - word));
      word = at;
      if (inside != kIsolate && inside != kLiteral) break;
      if (inside == kIsolate) emit(at, size_t(length));
      else literal();
      word = at += length;
    }
    if (at == end && at > word) emit(word, size_t(at - word));
  }
}

template <Split split, class Emit>
void each_word(const uint8_t* text, size_t size, const uint8_t* table, const Emit& emit) {
  each_word<split>(text, size, table, emit, [] {});
}

}  // namespace xv
