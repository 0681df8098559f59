"""The identity of what lies outside of a run: data, models, voters, and a person's own files."""

import functools
import json
import re
from pathlib import Path
from typing import Any

from stages.config import BenchmarkSection, Config, ModelSection, SourceSection, Voter
from stages.data.rows import shots_source
from stages.errors import ConfigError, MissingInputError
from stages.store.digests import DigestCache


def identities(config: Config, stage: str, variant: str, cache: DigestCache) -> dict[str, Any]:
    """What a step reads from outside of the run: digests of data and models, resolved hub commits."""
    if stage == "partition":
        return {}
    if stage == "eval":
        benchmark = config.eval.benchmarks[variant.partition("@")[2]]
        shots = {"shots": source_identity(shots_source(benchmark), cache)} if benchmark.shots else {}
        return {"model": model_identity(config.model, cache), "rows": source_identity(benchmark, cache), **shots}
    if stage == "rl" and config.rl.rewards_file:
        return {"model": model_identity(config.model, cache), "rewards_file": cache.file(Path(config.rl.rewards_file))}
    if stage != "classify":
        return {"model": model_identity(config.model, cache)}
    rows = {"rows": source_identity(config.data if variant == "train" else config.eval.benchmarks[variant], cache)}
    if config.classify.strategy == "random":
        return rows
    voters = [_voter_identity(voter, config, cache) for voter in config.classify.voters]
    files = [config.classify.held_out, *(voter.shots_path for voter in config.classify.voters)]
    judged = {"judged": [name and source_identity(SourceSection(path=name), cache) for name in files]} if any(files) else {}
    return {**rows, **judged, "voters": voters, "target": config.model.title}


SCALE = {
    "tensor_parallel_size",
    "data_parallel_size",
    "pipeline_parallel_size",
    "distributed_executor_backend",
    "gpu_memory_utilization",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enforce_eager",
    "enable_prefix_caching",
}
"""Arguments of vLLM that decide where and how fast a model runs, not what it answers."""


def _voter_identity(voter: Voter, config: Config, cache: DigestCache) -> str:
    """What answers: the name it is served under, or the digest of its weights, with the arguments that change them."""
    if voter.urls:
        assert voter.model is not None
        return voter.model
    weights = model_identity(ModelSection(name=voter.model) if voter.model else config.model, cache)
    arguments = {**config.server.vllm, **voter.vllm} if voter.engine == "vllm" else {}
    changing = {name: value for name, value in arguments.items() if name not in SCALE}
    return f"{weights} {json.dumps(changing, sort_keys=True)}" if changing else weights


def source_identity(source: SourceSection, cache: DigestCache) -> str:
    if isinstance(source, BenchmarkSection) and source.tasks:  # data of the evaluation harness: path holds task files
        return cache.folder(Path(source.path)) if source.path else ""
    if source.path is None:
        raise ConfigError("data.path is not set", "--set data.path=FILE, or a hub id")
    path = Path(source.path)
    if path.is_file():
        return cache.file(path)
    if path.exists() or source.path.endswith((".jsonl", ".gz", ".json")) or source.path.count("/") != 1:
        raise MissingInputError(f"{path} is a folder, not a file" if path.is_dir() else f"no data file {path}")
    return _hub_commit("dataset", source.path, source.revision)


def model_identity(model: ModelSection, cache: DigestCache) -> str:
    """sha256 over a local folder's files, or the commit that a hub revision stands for."""
    path = Path(model.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingInputError(f"{path} is not a model folder: no config.json")
        return cache.folder(path)
    if path.is_absolute() or model.name.startswith(".") or model.name.count("/") > 1:
        raise MissingInputError(f"no model folder {model.name}", "fetch the demo's: lorapar fetch smollm2-135m-q4")
    return _hub_commit("model", model.name, model.revision)


@functools.cache
def _hub_commit(kind: str, name: str, revision: str) -> str:
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    reference = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "refs" / revision
    try:
        return str(HfApi().repo_info(name, repo_type=kind, revision=revision).sha)
    except Exception as error:  # offline, unknown, gated: each its own class, one meaning here
        if reference.is_file():
            return reference.read_text(encoding="utf-8").strip()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingInputError(f"no local folder and no hub {kind} {name!r} ({reason})") from None
