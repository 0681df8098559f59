"""Digests of what a run reads from outside, by the names that stages give it (`Planned.reads`).

`model`: the base. `voter:N`: the model of a voter. `server`: arguments of the server that evaluation starts.
`rows:NAME`: the rows to train on (`train`), a benchmark's, or those in the file of a setting.
`shots:NAME`: the worked examples of a benchmark. `file:SETTING`: a person's own file.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.config import Config, ModelSection, SourceSection, Voter
from stages.data.hub import resolve_commit
from stages.data.rows import local_file, shots_source
from stages.errors import MissingInputError, sought
from stages.models.bundled import MAKERS
from stages.pipeline.stage import TRAIN, setting_at
from stages.store.digests import DigestCache

SCALE = {
    "tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size", "distributed_executor_backend",
    "gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "enforce_eager",
    "enable_prefix_caching",
}  # fmt: skip
"""Arguments of vLLM that decide where and how fast a model runs, not what it answers."""


def digests(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """The identity of each of these, computed once."""
    cache = DigestCache(Path(config.runs_dir) / ".digests.json")
    return {name: _digest(config, name, cache) for name in names}


def _digest(config: Config, name: str, cache: DigestCache) -> Any:
    match name.split(":", 1):
        case ["model"]:
            return of_model(config.model, cache)
        case ["voter", number]:
            return _of_voter(config, config.classify.voters[int(number)], cache)
        case ["server"]:
            return _answer_changing(config.server.vllm)
        case ["rows", place] if place == TRAIN:
            return of_source(config.data, cache)
        case ["rows", place] if "." in place:
            return of_source(SourceSection(path=setting_at(config, place)), cache)
        case ["rows", benchmark]:
            return of_source(config.eval.benchmarks[benchmark], cache)
        case ["shots", benchmark]:
            return of_source(shots_source(config.eval.benchmarks[benchmark]), cache)
        case ["file", setting]:
            file = Path(setting_at(config, setting))
            if not file.is_file():
                raise MissingInputError(f"no file {file}", f"see {setting}")
            return cache.file(file)
    raise KeyError(name)


def _of_voter(config: Config, voter: Voter, cache: DigestCache) -> str:
    """The name of a remote model, else the digest of its weights, with settings that change its answers."""
    if voter.base_url:
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


def of_source(source: SourceSection, cache: DigestCache) -> str:
    """Digest of a file's content, or the commit of a hub data set."""
    file = local_file(source)
    return cache.file(file) if file else resolve_commit("dataset", str(source.path), source.revision)


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
