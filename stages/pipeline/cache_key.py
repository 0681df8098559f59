"""The identity of what lies outside of a run: data, models, voters, and a person's own files."""

import json
from pathlib import Path
from typing import Any

from stages.config import BenchmarkSection, Config, ModelSection, SourceSection, Voter
from stages.data.hub import commit
from stages.data.rows import local_file, shots_source
from stages.errors import MissingInputError
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
    """What answers for each voter, the files of its prompt and threshold, and the model that it plays."""
    section = config.classify
    if section.strategy != "vote":
        file = section.labels_file if section.strategy == "known" else None
        if file and not Path(file).is_file():
            raise MissingInputError(f"no file {file} of labels", "see classify.labels_file")
        return of_file("labels", file, cache)
    files = [section.held_out, *(voter.shots_path for voter in section.voters)]
    judged = [name and of_source(SourceSection(path=name), cache) for name in files] if any(files) else []
    return {
        **({"judged": judged} if judged else {}),
        "voters": [_of_voter(voter, config, cache) for voter in section.voters],
        "target": config.model.title,
    }


def _of_voter(voter: Voter, config: Config, cache: DigestCache) -> str:
    """What answers: the name under which it is served, or the digest of its weights and what changes them."""
    if voter.urls:
        assert voter.model is not None
        return voter.model
    model = voter.asks(config.model)
    changing = _changing({**config.server.vllm, **voter.vllm}) if voter.engine == "vllm" else {}
    if model.dtype != "auto":
        changing = {"dtype": model.dtype, **changing}
    weights = of_model(model, cache)
    return f"{weights} {json.dumps(changing, sort_keys=True)}" if changing else weights


def _changing(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a vLLM server that change its answers."""
    return {name: value for name, value in arguments.items() if name not in SCALE}


def of_server(config: Config) -> dict[str, Any]:
    """What changes the answers of the server that evaluation starts, if it starts one."""
    changing = _changing(config.server.vllm) if config.eval.engine == "vllm" else {}
    return {"server": changing} if changing else {}


def of_source(source: SourceSection, cache: DigestCache) -> str:
    """Digest of a file's content, or the commit of a hub data set."""
    if (
        isinstance(source, BenchmarkSection) and source.tasks
    ):  # data of the evaluation harness: path holds task files
        return cache.folder(Path(source.path)) if source.path else ""
    file = local_file(source)
    return cache.file(file) if file else commit("dataset", str(source.path), source.revision)


def of_shots(benchmark: BenchmarkSection, cache: DigestCache) -> dict[str, str]:
    """Where the worked examples of a benchmark's prompt come from, if there are any.

    The evaluation harness has its own.
    """
    named = benchmark.shots and not benchmark.tasks
    return {"shots": of_source(shots_source(benchmark), cache)} if named else {}


def of_file(name: str, path: str | None, cache: DigestCache) -> dict[str, str]:
    """Digest of a person's own file, if there is one."""
    return {name: cache.file(Path(path))} if path else {}


def of_model(model: ModelSection, cache: DigestCache) -> str:
    """sha256 over a local folder's files, or the commit that a hub revision stands for."""
    path = Path(model.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingInputError(f"{path} is not a model folder: no config.json")
        return cache.folder(path)
    made = path.name in MAKERS and path.parent.name == "models"  # elsewhere it may be one of the hub's
    if not model.of_hub or made:
        hint = f"lorapar fetch {path.name} makes it, in models/" if made else "a hub id is NAME or OWNER/NAME"
        raise MissingInputError(f"no model folder {model.name}", hint)
    return commit("model", model.name, model.revision)
