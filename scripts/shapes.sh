#!/usr/bin/env bash
# Pretrain a tiny network without labels, train it to segment or detect disks, squares and triangles, evaluate, and
# predict: a few minutes on two cores. It calls only the programs that you would call for ADE20K and COCO.
#
#   bash scripts/shapes.sh
#   TASK=detect bash scripts/shapes.sh
#   SEED=1 MODEL=mirl_vit_tiny LR=1e-3 OUTPUT=runs/mirl_detected TASK=detect bash scripts/shapes.sh
#   DATA=/my/folder INPUT_SIZE=64 bash scripts/shapes.sh
#
# DATA has images/{train,val} and annotations/{train,val}, as the README says, or is a COCO folder where TASK is detect.
# OUTPUT (runs/shapes, runs/detected) is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh

SEED=${SEED:-0}
TASK=${TASK:-segment}
case $TASK in
  segment)
    program=scripts/finetune_segmentation.py default_model=mirl_vit_tiny default_size=64 default_output=runs/shapes
    form=() images=images val=images/val figure=mIoU unit=' %'
    budget=(--model_kwargs channels=32 aux_channels=32 --steps 300 --eval_freq 150 --drop_path 0 --scale_range 0.8 1.25
            --no_photometric)
    ;;
  detect)
    program=scripts/finetune_detection.py default_model=a2mim_resnet_tiny default_size=96 default_output=runs/detected
    form=(--coco) images=train2017 val=val2017 figure='box AP' unit=''
    budget=(--steps 280 --eval_freq 280 --drop_path 0 --augment none --test_size "${INPUT_SIZE:-96}" --max_size "${INPUT_SIZE:-96}"
            --lr_sched cosine --weight_decay 0.05 --layer_decay 1 --clip_grad 1 --width 64)
    budget+=(--detector_kwargs anchor_scale=2 rpn_samples=64 proposals='(200, 100, 200, 100)'
             roi_samples=32 fc_width=128 conv_width=32 mask_convs=2)
    ;;
  *)
    echo "shapes.sh: error: TASK=$TASK should be segment or detect" >&2
    exit 2
    ;;
esac
MODEL=${MODEL:-$default_model}
INPUT_SIZE=${INPUT_SIZE:-$default_size}
OUTPUT=${OUTPUT:-$default_output}
LR=${LR:-2e-3} # with labels

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
  python scripts/make_shapes.py "$DATA" --size "$INPUT_SIZE" "${form[@]}"
fi

common=(--model "$MODEL" --input_size "$INPUT_SIZE" --seed "$SEED" --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --num_workers 1)
pretrain=("${common[@]}" --data_path "$DATA/$images" --batch_size 32 --epochs 30 --warmup_epochs 3 --lr 2e-3
          --crop_scale 0.4 1 --print_freq 12)
learn=("${common[@]}" --data_path "$DATA" --batch_size 8 --warmup_steps 20 --lr "$LR" --print_freq 50 "${budget[@]}")

timed() { # timed NAME COMMAND...: its seconds go to $NAME_s
  local began=$SECONDS name=$1
  shift
  echo "+ $*"
  "$@"
  printf -v "${name}_s" '%d' $((SECONDS - began))
}
figures() { sed -n "s/^\* $figure \([0-9.]*\).*/\1/p" "$1" | tail -n 1; }

# from random weights on the second core, meanwhile; what it says is in scratch.txt
{
  timed scratch python "$program" "${learn[@]}" --output_dir "$OUTPUT/scratch"
  echo "$scratch_s" > "$OUTPUT/scratch_s"
} > "$OUTPUT/scratch.txt" 2>&1 &
timed pretrain python main_pretrain.py "${pretrain[@]}" --output_dir "$OUTPUT/pretrain"
timed pretrained python "$program" "${learn[@]}" --output_dir "$OUTPUT/tuned" \
  --finetune "$OUTPUT/pretrain/checkpoint-last.pth"
wait $! || { tail -n 5 "$OUTPUT/scratch.txt" >&2 && exit 1; }
timed eval python "$program" --eval --resume "$OUTPUT/tuned/checkpoint-last.pth" --data_path "$DATA" --output_dir "$OUTPUT" \
  | tee "$OUTPUT/eval.txt"
timed predict python "$program" --resume "$OUTPUT/tuned/checkpoint-last.pth" \
  --predict "$DATA/$val" --output_dir "$OUTPUT"

cat << TABLE

$MODEL at $INPUT_SIZE px, seed $SEED               $figure on val   time
  pretraining                                     $(printf '%6d s' "$pretrain_s")
  trained from it, evaluated in a new process     $(figures "$OUTPUT/eval.txt")$unit   $pretrained_s s
  same budget from random weights                 $(figures "$OUTPUT/scratch.txt")$unit   $(cat "$OUTPUT/scratch_s") s
pictures: $OUTPUT/predictions
curves:   .venv/bin/tensorboard --logdir $OUTPUT
install $install_s s, run $((SECONDS - began - install_s)) s
TABLE
