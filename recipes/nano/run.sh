#!/usr/bin/env bash
# The whole path on a CPU: text -> tokenizer and shards -> pretraining -> fine-tuning -> a model to talk to.
#
#   bash recipes/nano/run.sh CORPUS SFT OUT [nano|mini]
#
# CORPUS  folder of {language}.jsonl(.gz) files with {"text": …, "lang": …} lines
# SFT     folder of alpaca, sharegpt or messages files
# OUT     folder of the run; run again after an interruption, it resumes
set -euo pipefail
if (($# < 3 || $# > 4)); then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
corpus=$(realpath -- "$1") sft=$(realpath -- "$2") out=$(realpath -m -- "$3") shape=${4:-nano}
cd "$(dirname "${BASH_SOURCE[0]}")/../.." # the recipes name files of this checkout
xverse=$(command -v .venv/bin/xverse || command -v xverse) || {
  echo "run.sh: xverse is not installed; 'pip install -e .[data]' does it" >&2
  exit 1
}

"$xverse" data prepare recipes/nano/data.yaml corpus="$corpus" out="$out/data"
"$xverse" pretrain recipes/nano/pretrain.yaml shape="$shape" data="$out/data" out="$out/pretrain"
"$xverse" finetune recipes/nano/sft.yaml model_name_or_path="$out/pretrain/model" \
  dataset.0.name="$sft" output_dir="$out/sft"
echo "xverse chat --model $out/sft"
