#!/usr/bin/env bash
# The whole path on a CPU: text -> tokenizer and shards -> pretraining -> dialogues -> fine-tuning -> a model to talk to.
#
#   bash recipes/nano/run.sh CORPUS SFT OUT [nano|mini] [STEP.key=value …]
#
# CORPUS  folder of {language}.jsonl(.gz) files with {"text": …, "lang": …} lines, of any languages
# SFT     folder of alpaca, sharegpt or messages files, used beside the dialogues that recipes/skills writes
# OUT     folder of the run; run again after an interruption, it resumes
# STEP    data, pretrain or sft: the recipe that key=value changes. Minutes instead of hours, to try it out:
#           data.vocab_size=2000 pretrain.train.steps=100 pretrain.train.warmup_steps=10 sft.max_steps=50
set -euo pipefail
usage() {
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
(($# >= 3)) || usage
for input in "$1" "$2"; do # now, not after hours of pretraining
  [[ $input == *://* || -e $input ]] || {
    echo "run.sh: $input: no such file or folder" >&2
    exit 2
  }
done
corpus=$1 sft=$(realpath -- "$2") out=$(realpath -m -- "$3") shape=nano
[[ $corpus == *://* ]] || corpus=$(realpath -- "$corpus")
shift 3
if [[ ${1:-} == nano || ${1:-} == mini ]]; then
  shape=$1
  shift
fi
data_settings=() pretrain_settings=() sft_settings=()
for setting; do
  case $setting in
    data.*=*) data_settings+=("${setting#data.}") ;;
    pretrain.*=*) pretrain_settings+=("${setting#pretrain.}") ;;
    sft.*=*) sft_settings+=("${setting#sft.}") ;;
    *)
      echo "run.sh: '$setting' is not STEP.key=value with STEP one of data, pretrain, sft" >&2
      usage
      ;;
  esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.." # the recipes name files of this checkout
xverse=$(command -v .venv/bin/xverse || command -v xverse) || {
  echo "run.sh: xverse is not installed; run: pip install -e '.[data,finetune]'" >&2
  exit 2
}

# A step ends with this script: on a signal that the script gets, and where the system can do it, on its death.
child=
stop() {
  trap - TERM INT HUP
  [[ -n $child ]] && kill -TERM "$child" 2>/dev/null && wait "$child" || true
  exit "$1"
}
trap 'stop 143' TERM
trap 'stop 130' INT
trap 'stop 129' HUP
with=()
setpriv --pdeathsig TERM true 2>/dev/null && with=(setpriv --pdeathsig TERM)
step() {
  ${with[@]+"${with[@]}"} "$@" &
  child=$!
  wait "$child"
  child=
}

step "$xverse" data prepare recipes/nano/data.yaml corpus="$corpus" out="$out/data" ${data_settings[@]+"${data_settings[@]}"}
step "$xverse" pretrain recipes/nano/pretrain.yaml shape="$shape" data="$out/data" out="$out/pretrain" \
  ${pretrain_settings[@]+"${pretrain_settings[@]}"}
skills=$out/skills write=("$(dirname "$xverse")/python" -m recipes.skills)
[[ -e $skills/skills.jsonl ]] || step "${write[@]}" --dialogues 140000 --joined 0.5 \
  --beside recipes/nano/persona.jsonl --out "$skills/skills.jsonl"
[[ -e $skills/persona.jsonl ]] || step "${write[@]}" --dialogues 0 --beside recipes/nano/persona.jsonl --out "$skills/persona.jsonl"
[[ -e $skills/instructions.jsonl ]] || step "${write[@]}" --dialogues 0 --beside "$sft" --out "$skills/instructions.jsonl"
step "$xverse" finetune recipes/nano/sft.yaml model_name_or_path="$out/pretrain/model" \
  dataset.0.name="$skills/skills.jsonl" dataset.1.name="$skills/persona.jsonl" \
  dataset.2.name="$skills/instructions.jsonl" replay.data="$out/data" \
  output_dir="$out/sft" ${sft_settings[@]+"${sft_settings[@]}"}
echo "xverse chat --model $out/sft"
