# Experiment G (docs/results/found.md): bash benchmarks/unlike.sh K DOLLY.jsonl.gz, in a folder that has models/smollm2-135m-q4 and unlike.yaml
set -e
k=$1 d=data/$1
fast="Answer at once: only the final answer after ####." slow="Work it out, then write the final answer after ####."
lorapar demo-data $d --long --seed $k --gold-only 108
python "$(dirname "$0")/unlike_rows.py" "$2" $d $k
arm() { # name, rate of SFT, settings
    local name=$1 rate=$2; shift 2
    lorapar run unlike.yaml --set run=k$k-$name --set runs_dir=runs --set seed=$k --set data.path=$d/mixed.jsonl --set sft.learning_rate=$rate \
        --set "eval.benchmarks={recall: {kind: demo, path: $d/recall.jsonl, max_new_tokens: 16, label: false, prompt: {system: '$fast'}}, chains: {kind: demo, path: $d/chains.jsonl, max_new_tokens: 64, label: false, prompt: {system: '$slow'}}}" "$@"
}
arm split 4.0e-3
arm all 2.0e-3 --set partition.strategy=all
arm within 4.0e-3 --set partition.strategy=random_within
