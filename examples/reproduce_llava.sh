#!/usr/bin/env bash
# The paper's numbers for LLaVA-1.5-7B, end to end on one GPU: heads, RefCOCO val, and a comparison with what was published.
# docs/reproduce-llava.md explains each step and the expected results.
#
#   examples/reproduce_llava.sh REFER_FOLDER COCO_IMAGES [NAME=VALUE ...]
#
# REFER_FOLDER  with refcoco/refs(unc).p and refcoco/instances.json, as the authors of RefCOCO distribute them, or parquet
# COCO_IMAGES   COCO's folder train2014
# NAME=VALUE    options for every step, such as model.name=/shared/llava-1.5-7b-hf output_dir=/shared/results
#
# Every step resumes where it stopped: run it again after an interruption. SAMPLES=50 LIMIT=50 make a quick trial, and
# MODEL=llava-13b takes another model.
set -euo pipefail
if (($# < 2)); then
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    exit 2
fi
refer=$1 images=$2
shift 2
model=${MODEL:-llava} samples=${SAMPLES:-1000} limit=${LIMIT:-}
data=outputs/datasets folder=outputs/localization_heads
for option in "$@"; do [[ $option != output_dir=* ]] || folder=${option#output_dir=}; done

echo "== 1/4 RefCOCO as JSON lines: train to find heads on, and val to score"
prepare=(stage=prepare dataset=refcoco dataset_path="$refer" images="$images")
locheads "${prepare[@]}" split=train num_samples=$((5 * samples))
locheads "${prepare[@]}" split=val ${limit:+num_samples="$limit"}
pool=$(ls -t "$data"/refcoco-train*.jsonl | head -n 1)
val=$(ls -t "$data"/refcoco-val*.jsonl | head -n 1)

echo "== 2/4 Is the model read correctly?"
locheads stage=doctor model="$model" "$@"

echo "== 3/4 Heads, without labels: five draws of $samples"
locheads stage=find data_file="$pool" num_samples="$samples" num_trials=5 model="$model" "$@"

echo "== 4/4 Boxes: by the paper's read-out and by the default one"
heads=$(ls -d "$folder/$model/heads.json")
for grounding in paper sharp; do
    locheads stage=evaluate data_file="$val" grounding=$grounding heads="$heads" model="$model" "$@"
    cp "$folder/$model/metrics.json" "$folder/$model/metrics_$grounding.json"
done
python - "$folder/$model" <<'END'
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
found = [f"L{one['layer']}H{one['head']}" for one in json.loads((folder / "heads.json").read_text())["heads"][:5]]
print("\nheads, paper: L14H24 L14H13 L14H26; a fork of the published code: L14H24 L14H26 L14H29 L10H29 L10H23")
print("heads, here: ", *found)
print("\nRefCOCO val Acc@0.5, paper: 0.865; readers who reimplemented it: 0.46; published box: 0.26")
for name in ("paper", "sharp"):
    print(f"Acc@0.5, here, grounding={name}: {json.loads((folder / f'metrics_{name}.json').read_text())['acc@0.5']:.3f}")
END
