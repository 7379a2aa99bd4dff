#!/usr/bin/env bash
# What a GPU should show, in at most nine minutes on one H100: bash benchmarks/gpu.sh OUT [--rehearse]
#
# Needs torch, triton, timm, lightning and this repository. Other packages are installed from OUT/../data/wheels, and
# CUB_200_2011/ and PF-WILLOW/ are read from OUT/../data, if they are there. Each part writes its files and its log to OUT
# as it goes. A part that has too little time left is skipped. OUT/parts.csv has the seconds and the exit status of each.
# --rehearse runs every part on a CPU, tiny, in a few minutes.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,7s/^# //p' "$0"; exit 2; }
mkdir -p "$1" && OUT=$(cd "$1" && pwd)
DATA=$(dirname "$OUT")/data
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 WANDB_MODE=disabled MPLBACKEND=Agg
DEVICE=cuda LIMIT=${LIMIT:-530}
[ "${2:-}" = --rehearse ] && DEVICE=cpu LIMIT=1200
HEADS="baseline gsf vitsc lpmflow actr"
echo part,seconds,status > "$OUT/parts.csv"

# part NAME LEAST MOST COMMAND: run a command that needs LEAST seconds, and end it after MOST
part() {
  local name=$1 least=$2 most=$3 left=$((LIMIT - SECONDS)) start=$SECONDS
  shift 3
  if [ "$left" -lt "$least" ]; then
    echo "$name,0,skipped" | tee -a "$OUT/parts.csv"
    return
  fi
  timeout $((left < most ? left : most)) "$@" > "$OUT/$name.log" 2>&1
  echo "$name,$((SECONDS - start)),$?" | tee -a "$OUT/parts.csv"
}

[ -d "$DATA/wheels" ] && part wheels 5 60 pip install --no-index --find-links "$DATA/wheels" "$DATA"/wheels/*.whl

if [ $DEVICE = cuda ]; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$OUT/device.csv"
  part op_tests 30 90 python -m pytest -q tests/ops -k "cuda or triton"
  part op 60 150 python benchmarks/correlation.py --device cuda --seconds 100 --out "$OUT"
  part steps 60 150 python benchmarks/step.py --device cuda --batch 16 --precisions fp32 tf32 bf16 --compile --out "$OUT"
  fit=(--config zoo_configs/trainer/gpus.yaml --trainer.max_steps 50)
  study=(--device cuda --jobs 5 --data_root "$DATA" --out "$OUT/study")
  studies="cub_frozen cub_finetuned synthetic"
else
  part op_tests 30 300 python -m pytest -q tests/ops/test_functional.py -k "torch and cpu" --maxfail 1
  part op 30 300 python benchmarks/correlation.py --grids 16 --windows plain --methods corrzoo eager --rounds 1 --out "$OUT"
  part steps 30 300 python benchmarks/step.py --backbones timm/test_vit.r160_in1k --size 64 --rounds 1 --precisions fp32 bf16 --out "$OUT"
  fit=(--config zoo_configs/trainer/gpus.yaml --trainer.accelerator cpu --trainer.devices 1 --trainer.strategy auto --trainer.max_steps 2)
  study=(--pairs 160 --heads gsf --out "$OUT/study")
  studies=synthetic
fi

for head in $HEADS; do
  part "fit_$head" 15 60 python -m corrzoo fit --config "zoo_configs/demo/$head.yaml" "${fit[@]}" \
    --trainer.limit_val_batches 2 --trainer.default_root_dir "$OUT/fit"
done

for name in $studies; do
  [ "$name" = synthetic ] || [ -d "$DATA/CUB_200_2011" ] || continue
  part "study_$name" 60 300 python benchmarks/study.py "$name" "${study[@]}"
done

! grep -vE ',(0|skipped|status)$' "$OUT/parts.csv"
