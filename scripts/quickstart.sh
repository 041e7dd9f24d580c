#!/usr/bin/env bash
# Pretrain, fine-tune, evaluate and look, on 1,797 scanned digits that come with scikit-learn: about three minutes on two
# cores. It calls only the programs that you would call for ImageNet, so it is the worked example too.
#
#   bash scripts/quickstart.sh
#   SEED=1 MODEL=mirl_vit_tiny INPUT_SIZE=32 DATA=/my/folder bash scripts/quickstart.sh
#   MODEL=a2mim_timm MODEL_KWARGS=name=regnety_002 PRETRAIN_KWARGS=mask_patch_size=16 INPUT_SIZE=64 \
#     bash scripts/quickstart.sh
#
# MODEL_KWARGS are the network's, PRETRAIN_KWARGS those that only pretraining knows. DATA is a folder with train/ and val/
# and one folder per class in each. OUTPUT (runs/quickstart) is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh

SEED=${SEED:-0}
MODEL=${MODEL:-mirl_vit_tiny}
INPUT_SIZE=${INPUT_SIZE:-32}
OUTPUT=${OUTPUT:-runs/quickstart}
tuned_kwargs=(${MODEL_KWARGS:+--model_kwargs $MODEL_KWARGS})
kwargs=(${MODEL_KWARGS:-} ${PRETRAIN_KWARGS:-})
kwargs=(${kwargs:+--model_kwargs "${kwargs[@]}"})

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a network this small gains nothing from a second thread
began=$SECONDS
use_venv .venv requirements.txt tests/requirements.txt
install_s=$((SECONDS - began))

if [ -e "$OUTPUT" ] && [ ! -e "$OUTPUT/.quickstart" ]; then
  echo "quickstart.sh: error: $OUTPUT is there already and not of this script's making; OUTPUT=... names another" >&2
  exit 2
fi
rm -rf "$OUTPUT"
mkdir -p "$OUTPUT"
touch "$OUTPUT/.quickstart"
if [ -z "${DATA:-}" ]; then
  DATA=$OUTPUT/data
  python scripts/make_digits.py "$DATA" --size "$INPUT_SIZE"
fi

common=(--model "$MODEL" --input_size "$INPUT_SIZE" --data_path "$DATA" --seed "$SEED"
        --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --hflip 0 --num_workers 1)
pretrain=("${common[@]}" ${kwargs[@]+"${kwargs[@]}"} --batch_size 128 --epochs 60 --warmup_epochs 5 --lr 2e-3 --vis_freq 20 --print_freq 11)
# the learning rate is the best of 1e-3, 2e-3, 4e-3 and 8e-3 for both starts
finetune=("${common[@]}" ${tuned_kwargs[@]+"${tuned_kwargs[@]}"} --batch_size 64 --epochs 5 --warmup_epochs 1 --lr 4e-3 --layer_decay 0.75 --drop_path 0
          --aa none --reprob 0 --smoothing 0 --crop_scale 0.6 1 --crop_pct 1 --print_freq 22)

timed() { # timed NAME COMMAND...: its seconds go to $NAME_s
  local began=$SECONDS name=$1
  shift
  echo "+ $*"
  "$@"
  printf -v "${name}_s" '%d' $((SECONDS - began))
}
accuracy() { sed -n 's/^\* Acc@1 \([0-9.]*\).*/\1/p' "$1" | tail -n 1; }

timed pretrain python main_pretrain.py "${pretrain[@]}" --output_dir "$OUTPUT/pretrain"
timed finetune python main_finetune.py "${finetune[@]}" --output_dir "$OUTPUT/finetune" \
  --finetune "$OUTPUT/pretrain/checkpoint-last.pth"
timed scratch python main_finetune.py "${finetune[@]}" --output_dir "$OUTPUT/scratch" > >(tee "$OUTPUT/scratch.txt")
timed eval python main_finetune.py "${common[@]}" ${tuned_kwargs[@]+"${tuned_kwargs[@]}"} --crop_pct 1 --eval \
  --resume "$OUTPUT/finetune/checkpoint-last.pth" | tee "$OUTPUT/eval.txt"
timed pictures python scripts/visualize.py --model "$MODEL" ${kwargs[@]+"${kwargs[@]}"} --input_size "$INPUT_SIZE" --seed "$SEED" \
  --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --checkpoint "$OUTPUT/pretrain/checkpoint-last.pth" \
  --output "$OUTPUT/reconstruction.png" "$DATA/val"

cat << TABLE

$MODEL at $INPUT_SIZE px, seed $SEED               top-1 on val/   time
  pretraining                                     $(printf '%6d s' "$pretrain_s")
  fine-tuned from it, evaluated in a new process  $(accuracy "$OUTPUT/eval.txt") %   $finetune_s s
  same budget from random weights                 $(accuracy "$OUTPUT/scratch.txt") %   $scratch_s s
pictures: $OUTPUT/reconstruction.png, and over time $OUTPUT/pretrain/pictures-*.png
curves:   .venv/bin/tensorboard --logdir $OUTPUT
install $install_s s, run $((SECONDS - began - install_s)) s
TABLE
