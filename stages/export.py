"""Export a trained adapter as plain PEFT files, or merged into its base model, with a card; and check it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import Config, ModelSection
from stages.data.rows import read
from stages.engines import Pool, Question, Sampling, Served
from stages.errors import ConfigError, OutputError, ServerError
from stages.models.base import save_merged
from stages.report.card import Form, card, hub_results
from stages.store.artifacts import Artifact

if TYPE_CHECKING:
    from stages.language.prompts import Renderer

LONGEST = 32
"""How many tokens of each answer a check generates."""


def write(
    artifact: Artifact,
    config: Config,
    out: Path,
    form: Form,
    base_dtype: bool = False,
    evaluated: Sequence[Artifact] = (),
) -> None:
    """Write the adapter of a committed sft or rl artifact into `out`, or the merged model with its tokenizer.

    Either comes with a README.md. base_dtype: cast the adapter's float32 weights to the type of the base
    model. evaluated: its evaluations, for the card and, of data sets on the hub, for `.eval_results/`.
    OutputError if `out` exists; ConfigError for a trained prompt, which cannot be merged.
    """
    if out.exists():
        raise OutputError(f"{out} exists", "name a folder that does not")
    if form == "merged" and config.baseline is not None and config.baseline.method != "ia3":
        raise ConfigError(
            f"--merged: {config.baseline.method} trains a prompt, which no weight can hold", "leave it out"
        )
    from stages.lora import adapter, baselines

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}") from None
    trained = artifact.path / "adapter"
    if form == "merged":
        save_merged(config.model, trained, partial)
    else:
        shutil.copytree(trained, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(baselines.STATE))
        if base_dtype:
            _cast(partial / adapter.ADAPTER, config.model)
    (partial / "README.md").write_text(card(artifact, form, evaluated), encoding="utf-8")
    if text := hub_results(evaluated):
        (partial / ".eval_results").mkdir()
        (partial / ".eval_results/lorapar.yaml").write_text(text, encoding="utf-8")
    partial.rename(out)


def _cast(file: Path, model: ModelSection) -> None:
    from safetensors.torch import load_file, save_file

    from stages.models.base import load_base

    dtype = load_base(model).dtype
    weights = {name: weight.to(dtype) for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def push(folder: Path, repository: str) -> str:
    """Upload what `write` wrote into a hub repository; returns its address.

    A new repository is private. ServerError if the hub cannot be reached or refuses the upload.
    """
    import httpx
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        where = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=where.repo_id, folder_path=folder)
    except (httpx.HTTPError, OSError, ValueError) as error:  # base classes of the library's own errors
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ServerError(
            f"cannot push to {repository}: {first}", f"{folder} stays; log in with: hf auth login"
        ) from None
    return str(where)


def engines(config: Config) -> list[str]:
    """The engines that can serve the export on this machine."""
    vllm = importlib.util.find_spec("vllm") and config.served_by_vllm
    return ["transformers", "vllm"] if vllm else ["transformers"]


def check(
    artifact: Artifact, config: Config, out: Path, form: Form, prompts: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Ask the export the first `prompts` training prompts and check its answers with the trained adapter.

    Each available engine serves the export once. Yields one row per engine: the number of tokens, the share
    of them within the tolerance of the adapter's own choice, and the largest gap in logits. AnswerError if
    the export is not what was trained.
    """
    from stages.benchmarks import parity
    from stages.benchmarks.replies import Recorded
    from stages.language.prompts import Asked, Renderer
    from stages.models.tokenizer import load_tokenizer

    renderer: Renderer = Renderer(load_tokenizer(config.model), config.prompt)
    examples = read(config.data.model_copy(update={"limit": prompts}))
    asked = [Asked(renderer.prompt(e.prompt), renderer.prompt_ids(e.prompt)) for e in examples]
    sampling = Sampling(LONGEST, tuple(renderer.stop_ids))
    base = config.model.model_copy(update={"load_in_4bit": False}) if form == "merged" else config.model
    model = base.model_copy(update={"name": str(out)}) if form == "merged" else base
    hint = f"do not use {out}: remove it and export again"
    for engine in engines(config):
        served = Served(engine, model, None if form == "merged" else out)
        with Pool() as pool:
            ready = pool.get(served, config.server, say)
            made = dict(ready.generate([Question(one.ids) for one in asked], sampling))
        pairs = [(one, Recorded(ids=made[i].ids, complete=made[i].complete)) for i, one in enumerate(asked)]
        found = parity.check(pairs, base, artifact.path / "adapter", renderer.tokenizer, hint, say)
        yield {"engine": engine, **found}
