// Which kernels exist for which instruction set: one row of kInstructionSets for each. To add a set, add a row, and its
// translation units in hatch_build.py.
#pragma once

#include "attention.h"
#include "kernels.h"
#include "rounding.h"
#include "training.h"

namespace xv {

struct InstructionSet {
  const char* name;
  bool (*supported)();  // by this processor
  const Kernels* kernels;
  const AttentionKernels* attention;
  const TrainingKernels* training;
  RoundRow round_row;
  RoundColumns round_columns;
  // Fused attention of training for heads of 64 and of 128; null: PyTorch's products around xv_train_softmax.
  const TrainingAttention *training_attention_64, *training_attention_128;
};

// The one in use; xv_select sets it.
extern const InstructionSet* instruction_set;

}  // namespace xv
