# Experiment F (docs/results/protocol.md): bash benchmarks/protect.sh K DOLLY, in a folder that has models/smollm2-135m-q4 and protect.yaml
set -e
k=$1 d=data/$1
test_of="{kind: demo, path: $d/final.jsonl, limit: 300, max_new_tokens: 48, label: false}"
both="{new: {kind: demo, path: $d/new-test.jsonl, max_new_tokens: 16, label: false}, old: $test_of}"
lorapar demo-data $d --long --seed $k
python "$(dirname "$0")/protect_rows.py" "$2" $d $k
common=(--set runs_dir=runs --set seed=$k)
old=(protect.yaml "${common[@]}" --set run=k$k-old --set data.path=$d/old.jsonl --set partition.protect=null --set sft.max_steps=60
    --set sft.num_train_epochs=4 --set sft.learning_rate=2.0e-3 --set "eval.benchmarks={old: $test_of}")
lorapar run "${old[@]}"
lorapar export "${old[@]}" old/$k --merged --target sft
arm() { # name, rate, settings
    local name=$1 rate=$2; shift 2
    lorapar run protect.yaml "${common[@]}" --set run=k$k-$name --set model.name=old/$k --set data.path=$d/new.jsonl \
        --set partition.protect=$d/old.jsonl --set sft.learning_rate=$rate --set "eval.benchmarks=$both" "$@"
}
arm protect 2.0e-3 --set partition.protect_theta=0.9
share=$(python -c "import json; print(json.load(open('runs/k$k-protect/partition/latest-sft/manifest.json')))" | grep -o "'active_share': [0-9.]*" | head -1 | cut -d' ' -f2)
arm random 2.0e-3 --set partition.protect_theta=0 --set partition.strategy=random_half --set partition.density=$share
arm low 5.0e-4 --set partition.protect_theta=0
arm high 2.0e-3 --set partition.protect_theta=0
