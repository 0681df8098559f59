"""Cache-key parts for inputs from outside of a run: data, models, voters, and a person's own files."""

import json
from pathlib import Path
from typing import Any

from stages.config import UNVOTED, BenchmarkSection, Config, ModelSection, SourceSection, Voter
from stages.data.hub import resolve_commit
from stages.data.rows import local_file, shots_source
from stages.errors import MissingInputError, sought
from stages.models.bundled import MAKERS
from stages.store.digests import DigestCache

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


def of_voters(config: Config, cache: DigestCache) -> dict[str, Any]:
    """Cache-key part of the voters: their models, the files of examples, and the model that a voter plays.

    If no voter labels the rows: the digest of the file of known labels, if there is one.
    """
    section = config.classify
    if section.strategy in UNVOTED:
        file = section.labels_file if section.strategy == "known" else None
        if file and not Path(file).is_file():
            raise MissingInputError(f"no file {file} of labels", "see classify.labels_file")
        return of_file("labels", file, cache)
    files = [section.held_out, *(voter.shots_path for voter in section.voters)]
    examples = [name and of_source(SourceSection(path=name), cache) for name in files] if any(files) else []
    return {
        **({"judged": examples} if examples else {}),
        "voters": [_of_voter(voter, config, cache) for voter in section.voters],
        "target": config.model.title,
    }


def _of_voter(voter: Voter, config: Config, cache: DigestCache) -> str:
    """Cache-key part of a voter: the name of a remote model, else the digest of its weights.

    With the settings that change its answers, if there are any.
    """
    if voter.urls:
        assert voter.model is not None
        return voter.model
    model = voter.voting_model(config.model)
    settings = _answer_changing({**config.server.vllm, **voter.vllm}) if voter.engine == "vllm" else {}
    if model.dtype != "auto":
        settings = {"dtype": model.dtype, **settings}
    weights = of_model(model, cache)
    return f"{weights} {json.dumps(settings, sort_keys=True)}" if settings else weights


def _answer_changing(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in SCALE}


def of_server(config: Config) -> dict[str, Any]:
    """Cache-key part of the server that evaluation starts, if any: the arguments that change its answers."""
    arguments = _answer_changing(config.server.vllm) if config.eval.engine == "vllm" else {}
    return {"server": arguments} if arguments else {}


def of_source(source: SourceSection, cache: DigestCache) -> str:
    """Digest of a file's content, or the commit of a hub data set."""
    file = local_file(source)
    return cache.file(file) if file else resolve_commit("dataset", str(source.path), source.revision)


def of_shots(benchmark: BenchmarkSection, cache: DigestCache) -> dict[str, str]:
    return {"shots": of_source(shots_source(benchmark), cache)} if benchmark.shots else {}


def model_part(config: Config, cache: DigestCache) -> dict[str, str]:
    return {"model": of_model(config.model, cache)}


def rewards_part(config: Config, cache: DigestCache) -> dict[str, str]:
    """Cache-key part of the base, and of the file with a person's own rewards."""
    return {**model_part(config, cache), **of_file("rewards_file", config.rl.rewards_file, cache)}


def of_file(name: str, path: str | None, cache: DigestCache) -> dict[str, str]:
    """Digest of a person's own file, if there is one."""
    return {name: cache.file(Path(path))} if path else {}


def of_model(model: ModelSection, cache: DigestCache) -> str:
    """sha256 over the files of a local folder, or the commit that a hub revision points to."""
    path = Path(model.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingInputError(f"{path} is not a model folder: no config.json")
        return cache.folder(path)
    bundled = path.name in MAKERS and path.parent.name == "models"  # elsewhere it may be one of the hub's
    if not model.may_be_on_hub or bundled:
        hint = (
            f"lorapar fetch {path.name} makes it, in models/" if bundled else "a hub id is NAME or OWNER/NAME"
        )
        raise MissingInputError(f"no model folder {sought(model.name)}", hint)
    return resolve_commit("model", model.name, model.revision)
