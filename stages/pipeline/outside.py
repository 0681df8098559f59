"""Digests of what a run reads from outside, by the names that stages give it (`Planned.reads`).

`model`: the base. `voter:N`: the model of a voter. `server`: arguments of the server that evaluation starts.
`rows:NAME`: the rows to train on (`train`), a benchmark's, or those in the file of a setting.
`shots:NAME`: the worked examples of a benchmark. `file:SETTING`: a person's own file.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stages.config import Config, ModelSection, SourceSection
from stages.data.hub import resolve_commit
from stages.data.rows import local_file, shots_source
from stages.errors import MissingInputError, sought
from stages.models.bundled import MAKERS
from stages.pipeline.stage import TRAIN, setting_at
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


def digests(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """The identity of each of these, computed once."""
    cache = DigestCache(Path(config.runs_dir) / ".digests.json")
    parts = {name: name.partition(":") for name in names}
    return {name: READERS[kind](config, place, cache) for name, (kind, _, place) in parts.items()}


def _of_base(config: Config, _: str, cache: DigestCache) -> str:
    return of_model(config.model, cache)


def _of_voter(config: Config, number: str, cache: DigestCache) -> str:
    """The name of a remote model, else the digest of its weights, with settings that change its answers."""
    voter = config.classify.voters[int(number)]
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


def _of_server(config: Config, _: str, cache: DigestCache) -> dict[str, Any]:
    return _answer_changing(config.server.vllm)


def _of_rows(config: Config, place: str, cache: DigestCache) -> str:
    if place == TRAIN:
        return of_source(config.data, cache)
    if "." in place:
        return of_source(SourceSection(path=setting_at(config, place)), cache)
    return of_source(config.eval.benchmarks[place], cache)


def _of_shots(config: Config, benchmark: str, cache: DigestCache) -> str:
    return of_source(shots_source(config.eval.benchmarks[benchmark]), cache)


def of_source(source: SourceSection, cache: DigestCache) -> str:
    """Digest of a file's content, or the commit of a hub data set."""
    file = local_file(source)
    return cache.file(file) if file else resolve_commit("dataset", str(source.path), source.revision)


def _of_file(config: Config, setting: str, cache: DigestCache) -> str:
    file = Path(setting_at(config, setting))
    if not file.is_file():
        raise MissingInputError(f"no file {file}", f"see {setting}")
    return cache.file(file)


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


READERS: dict[str, Callable[[Config, str, DigestCache], Any]] = {
    "model": _of_base,
    "voter": _of_voter,
    "server": _of_server,
    "rows": _of_rows,
    "shots": _of_shots,
    "file": _of_file,
}
