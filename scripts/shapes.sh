#!/usr/bin/env bash
# Pretrain a tiny network without labels, train it to segment disks, squares and triangles, evaluate, and predict: less
# than three minutes on two cores. It calls only the programs that you would call for ADE20K.
#
#   bash scripts/shapes.sh
#   SEED=1 MODEL=mixmae_tiny OUTPUT=runs/mixmae_shapes bash scripts/shapes.sh
#   DATA=/my/folder INPUT_SIZE=64 bash scripts/shapes.sh
#
# DATA has images/{train,val} and annotations/{train,val}, as the README says. OUTPUT (runs/shapes) is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh

SEED=${SEED:-0}
MODEL=${MODEL:-mirl_vit_tiny}
INPUT_SIZE=${INPUT_SIZE:-64}
OUTPUT=${OUTPUT:-runs/shapes}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a network this small gains nothing from a second thread
began=$SECONDS
use_venv .venv requirements.txt tests/requirements.txt
install_s=$((SECONDS - began))

if [ -e "$OUTPUT" ] && [ ! -e "$OUTPUT/.shapes" ]; then
  echo "shapes.sh: error: $OUTPUT is there already and not of this script's making; OUTPUT=... names another" >&2
  exit 2
fi
rm -rf "$OUTPUT"
mkdir -p "$OUTPUT"
touch "$OUTPUT/.shapes"
if [ -z "${DATA:-}" ]; then
  DATA=$OUTPUT/data
  python scripts/make_shapes.py "$DATA" --size "$INPUT_SIZE"
fi

common=(--model "$MODEL" --input_size "$INPUT_SIZE" --seed "$SEED" --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --num_workers 1)
pretrain=("${common[@]}" --data_path "$DATA/images" --batch_size 32 --epochs 30 --warmup_epochs 3 --lr 2e-3
          --crop_scale 0.4 1 --print_freq 12)
segment=("${common[@]}" --data_path "$DATA" --model_kwargs channels=32 aux_channels=32 --batch_size 8
         --steps 300 --eval_freq 150 --warmup_steps 20 --lr 2e-3 --drop_path 0 --scale_range 0.8 1.25 --no_photometric
         --print_freq 50)

timed() { # timed NAME COMMAND...: its seconds go to $NAME_s
  local began=$SECONDS name=$1
  shift
  echo "+ $*"
  "$@"
  printf -v "${name}_s" '%d' $((SECONDS - began))
}
miou() { sed -n 's/^\* mIoU \([0-9.]*\).*/\1/p' "$1" | tail -n 1; }

# from random weights on the second core, meanwhile; what it says is in scratch.txt
{
  timed scratch python scripts/finetune_segmentation.py "${segment[@]}" --output_dir "$OUTPUT/scratch"
  echo "$scratch_s" > "$OUTPUT/scratch_s"
} > "$OUTPUT/scratch.txt" 2>&1 &
timed pretrain python main_pretrain.py "${pretrain[@]}" --output_dir "$OUTPUT/pretrain"
timed pretrained python scripts/finetune_segmentation.py "${segment[@]}" --output_dir "$OUTPUT/segment" \
  --finetune "$OUTPUT/pretrain/checkpoint-last.pth"
wait $! || { tail -n 5 "$OUTPUT/scratch.txt" >&2 && exit 1; }
timed eval python scripts/finetune_segmentation.py --eval --resume "$OUTPUT/segment/checkpoint-last.pth" --data_path "$DATA" \
  | tee "$OUTPUT/eval.txt"
timed predict python scripts/finetune_segmentation.py --resume "$OUTPUT/segment/checkpoint-last.pth" \
  --predict "$DATA/images/val" --output_dir "$OUTPUT"

cat << TABLE

$MODEL at $INPUT_SIZE px, seed $SEED               mIoU on val/   time
  pretraining                                     $(printf '%6d s' "$pretrain_s")
  trained from it, evaluated in a new process     $(miou "$OUTPUT/eval.txt") %   $pretrained_s s
  same budget from random weights                 $(miou "$OUTPUT/scratch.txt") %   $(cat "$OUTPUT/scratch_s") s
pictures: $OUTPUT/predictions
curves:   .venv/bin/tensorboard --logdir $OUTPUT
install $install_s s, run $((SECONDS - began - install_s)) s
TABLE
