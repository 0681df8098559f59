"""The files of each stage's artifact, described for the reference pages; a test holds them to be true."""

_WEIGHTS = "under PEFT's name of each LoRA weight: A is (r, in_features), B is (out_features, r)"
_ADAPTER = (
    "A plain PEFT adapter: `adapter_config.json`, and `adapter_model.safetensors` with float32 tensors "
    f"{_WEIGHTS}. r is doubled where the initial update is subtracted (`lora.compensate`)."
)
_TRAINED = {
    "adapter/": _ADAPTER,
    "history.json": "One object per logged step: TRL's metrics and lorapar's (rewards by system, KL).",
    "curves.png": "The same as a picture.",
}
OUTPUTS = {
    "classify": {
        "labels.jsonl": "One object per row, in the order of the rows: `id`, `prompt`, `response`, `gold`, "
        "`extra` (other fields of the row), `system` (1, 2, or null if undecided) and `votes` (voter → "
        "probability of System 2).",
        "report.json": "Votes of each voter, invalid and failed answers, agreement, contested rows, and the "
        "comparison with known labels. Only where voters label.",
    },
    "score": {
        "init/": f"The adapter at the start. {_ADAPTER}",
        "shapes.json": "Name of each LoRA weight → `[rows, columns]` of its part that is scored and trained.",
        "importance.safetensors": f"`s1/NAME` and `s2/NAME`: float32 importance of each element, {_WEIGHTS}. "
        "Only where a strategy reads it. The variant `protected` has `protected/NAME`.",
        "held_out.jsonl": "Protected rows that were not scored, as in `labels.jsonl`. Only in the variant "
        "`protected`.",
    },
    "partition": {
        "masks.safetensors": "`region/NAME`: uint8 (0 none, 1 System 1 only, 2 System 2 only, 3 shared). "
        f"`active/sft/NAME` or `active/rl/NAME`: bool, true where the stage trains; a second round of "
        f"SFT trains RL's. All {_WEIGHTS}.",
    },
    "sft": _TRAINED,
    "rl": {
        **_TRAINED,
        "adapters/": "The adapter after each step of `rl.keep_steps`, under the step's number.",
    },
    "eval": {
        "metrics.json": "For all items, each system and each group of the benchmark: counts, accuracy in "
        "both readings, intervals, tokens; also the first prompt and the stop texts.",
        "samples.jsonl": "One object per answer: `id`, `sample`, `system`, `prompt`, `output`, `gold`, "
        "`strict` and `flexible` (the answer in each reading), `correct`, `correct_flexible`, `outcome`.",
        "harness.json": "What lm-evaluation-harness returned. Only of kind lm_eval.",
    },
}
"""Stage → file or folder → what is in it."""
MANIFEST = {
    "stage, variant, key": "Which step the artifact is of, and its key.",
    "identity": "What the key is a digest of: settings, keys of the inputs, digests of rows and weights.",
    "inputs": "Step → key of each artifact that was read.",
    "summary": "The step's figures, such as `active_share` and `frozen_drift` of training.",
    "provenance": "Whole config, versions, command, machine, seconds, peak memory, and `plan`'s estimates.",
    "files": "Digest and size of each file.",
    "seal": "Digest of the manifest itself.",
}
"""Fields of `manifest.json`, which every artifact has."""
