// The C interface of the tokenizer's library, libxverse_bpe.so: counting words, learning merges, encoding texts.
// xverse/tokenizer/native.py binds all of it with ctypes; tests/kernels/test_abi.py compares the two. A file that
// defines one of these functions includes this header.
//
// Texts are valid UTF-8. Functions that return int give 0 or an errno.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
namespace xv {
struct Counter;
struct Encoder;
}  // namespace xv
typedef xv::Counter XvtCounter;
typedef xv::Encoder XvtEncoder;
extern "C" {
#else
typedef struct XvtCounter XvtCounter;
typedef struct XvtEncoder XvtEncoder;
#endif

// ---- words ----

// Counts words into sorted run files PREFIX.0, PREFIX.1, …, in about `memory` bytes. Null: out of memory.
XvtCounter* xvt_counter(const char* prefix, int64_t memory);
void xvt_counter_free(XvtCounter* counter);

// Counts the words of texts that follow each other; text i ends at ends[i].
int xvt_counter_add(XvtCounter* counter, const uint8_t* text, const int64_t* ends, int64_t documents);

// Writes the last run file. totals [3]: words, words dropped for their length, run files.
int xvt_counter_finish(XvtCounter* counter, int64_t* totals);

// Where the words of a text begin and end, in bytes; both arrays have room for `size` values. Returns their number.
int64_t xvt_word_bounds(const uint8_t* text, int64_t size, int64_t* begins, int64_t* ends);

// Merges files of counted words into one. totals [3]: distinct words, occurrences, bytes.
int xvt_merge_words(const char* const* paths, int files, const char* target, int64_t* totals);

// Adds to counts [0x110000] how often each character occurs in a file of counted words, times `multiplier`.
int xvt_count_characters(const char* path, int64_t multiplier, int64_t* counts);

// Concatenates items by number: item i is bytes[starts[i]] to bytes[starts[i + 1] - 1]. Stops before an item that does
// not fit in the `room` bytes of `target`. Returns the number of bytes written.
int64_t xvt_concatenate(const uint8_t* bytes, const int64_t* starts, const int32_t* chosen, int64_t count,
                        uint8_t* target, int64_t room);

// ---- learning merges ----

// Called now and then with the number of merges so far and the count of the last one; anything but 0 stops.
typedef int (*XvtReport)(int64_t merges, int64_t count);

// Learns merges from files of counted words; each file's counts are multiplied. `bytes`: size of all files. The code
// points of `alphabet` have the ids from first_id on; a space in a word is read as U+2581. merges has room for
// [vocab_size, 3] ids (left, right, result), counts for [vocab_size]. totals [2]: distinct words, phases. Returns the
// number of merges, or a negative errno (ECANCELED after `report` stopped it).
int64_t xvt_train(const char* const* paths, const int64_t* multipliers, int files, int64_t bytes,
                  const uint32_t* alphabet, int64_t characters, uint32_t first_id, uint32_t vocab_size,
                  int64_t min_frequency, uint32_t max_length, int64_t memory, int threads, XvtReport report,
                  uint32_t* merges, int64_t* counts, int64_t* totals);

// ---- encoding ----

// An encoder; `split` is XVT_JOINED or XVT_SPACES. `characters` and `ids` [count]; `bytes` [256]: the ids of the byte
// tokens; `merged` [merges, 3]: left, right and result, in order of rank. Null: out of memory.
enum XvtSplit {
  XVT_JOINED = 1,  // a run of spaces belongs to the word after it
  XVT_SPACES = 2,  // every space begins a word (Metaspace alone)
};
XvtEncoder* xvt_encoder(int split, const uint32_t* characters, const uint32_t* ids, int64_t count,
                        const uint32_t* bytes, const uint32_t* merged, int64_t merges);
void xvt_encoder_free(XvtEncoder* encoder);

// Encodes documents that follow each other in `text`; document i ends at ends[i]. Their ids follow each other in
// `target`, which has room for one id for each byte and each document; lengths [documents]. `last` is appended to each
// unless it is UINT32_MAX. Returns the number of ids, or -1 if out of memory. Calls may run concurrently.
int64_t xvt_encode(XvtEncoder* encoder, const uint8_t* text, const int64_t* ends, int64_t documents, uint32_t last,
                   int threads, uint32_t* target, int64_t* lengths);

#ifdef __cplusplus
}
#endif
