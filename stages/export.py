"""Export a trained adapter as plain PEFT files, or merged into its base model, with a card, and check it."""

from __future__ import annotations

import importlib.util
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages import gguf
from stages.config import Config, ModelSection
from stages.data.rows import read
from stages.engines import Completion, Engine, EngineCache, EngineSpec, GenerateRequest, Sampling
from stages.errors import AnswerError, ConfigError, OutputError, ServerError, first_line
from stages.models.base import save_merged
from stages.records import Labelled
from stages.report.card import Form, card, card_of_views, hub_results
from stages.report.views import View, prompt_of, view_of, views_of
from stages.store.artifacts import Artifact, make_readable, refuse_store

LONGEST = 32
"""Most tokens that a check generates for an answer."""


def write(
    artifact: Artifact,
    config: Config,
    out: Path,
    form: Form,
    base_dtype: bool = False,
    evaluated: Sequence[Artifact] = (),
    llama_cpp: Path | None = None,
) -> None:
    """Write the adapter of a committed sft or rl artifact into `out`, or the merged model with its tokenizer.

    Either comes with a README.md. base_dtype: cast the adapter's float32 weights to the dtype of the base
    model. evaluated: the evaluations, for the card and, where the data set is on the hub, `.eval_results/`.
    llama_cpp: a clone of llama.cpp, to write GGUF files, too; see `gguf.write`. OutputError if `out` exists;
    ConfigError for a trained prompt, which cannot be merged.
    """
    if form == "merged" and config.baseline is not None and config.baseline.trains_prompt:
        raise ConfigError(
            f"--merged: {config.baseline.method} trains a prompt, which no weight can hold", "leave it out"
        )
    with _building(out, evaluated) as partial:
        _fill(partial, artifact, config, form, base_dtype)
        text = card(artifact, form, partial, evaluated, base_dtype)
        if llama_cpp:
            view = view_of(artifact)
            text += gguf.write(partial, {view.target: (view, partial)}, config, llama_cpp)
        (partial / "README.md").write_text(text, encoding="utf-8")


def write_views(
    trained: dict[str, Artifact],
    config: Config,
    out: Path,
    base_dtype: bool = False,
    evaluated: Sequence[Artifact] = (),
    llama_cpp: Path | None = None,
) -> None:
    """Write `fast/`, the adapter of SFT, and `slow/`, that of RL or of SFT's second round, with a card.

    The card says how to serve both. trained: their artifacts by target. The other parameters and errors are
    those of `write`; also ConfigError for a baseline, which no server loads as a LoRA module, and for
    adapters of a 4-bit base.
    """
    if not config.served_by_vllm:
        cause = f"baseline {config.baseline.method}" if config.baseline else "the 4-bit base of this adapter"
        raise ConfigError(
            f"--views are served by vLLM, which cannot serve {cause}",
            "a mode at a time, --target sft, then the slow one, with --merged (vLLM) or --gguf (llama.cpp)",
        )
    with _building(out, evaluated) as partial:
        views = {name: trained[view.target] for name, view in views_of(config).items()}
        for name, artifact in views.items():
            (partial / name).mkdir()
            _fill(partial / name, artifact, config, "adapter", base_dtype)
        text = card_of_views(views, partial, evaluated)
        if llama_cpp:
            modes = {name: (view, partial / name) for name, view in views_of(config).items()}
            text += gguf.write(partial, modes, config, llama_cpp)
        (partial / "README.md").write_text(text, encoding="utf-8")


def refuse_existing(out: Path) -> None:
    """Raise OutputError if there is such a folder."""
    if out.exists():
        raise OutputError(f"{out} exists", "name a folder that does not")


@contextmanager
def _building(out: Path, evaluated: Sequence[Artifact]) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, renamed to `out` on success, with the results for the hub.

    OutputError if `out` exists, or would lie among the artifacts of a run.
    """
    refuse_existing(out)
    refuse_store(out)
    try:
        partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}") from None
    try:
        yield partial
        if text := hub_results(evaluated):  # in the folder that the hub reads them from
            (partial / ".eval_results").mkdir()
            (partial / ".eval_results/lorapar.yaml").write_text(text, encoding="utf-8")
        make_readable(partial, (file for file in partial.rglob("*") if file.is_file()))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(folder: Path, artifact: Artifact, config: Config, form: Form, base_dtype: bool) -> None:
    from stages.lora.adapter import adapter, baselines
    from stages.models import cancellation

    trained = artifact.path / "adapter"
    if form == "merged":
        save_merged(config.model, trained, folder)
        return
    shutil.copytree(trained, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(baselines.STATE))
    cancellation.rewrite(folder, folder)  # whoever serves it may round it to 16 bits
    if not config.model.may_be_on_hub:
        _name_base(folder / "adapter_config.json", Path(config.model.name))
    if base_dtype:
        _cast(folder / adapter.ADAPTER, config.model)


def _name_base(file: Path, base: Path) -> None:
    """Write the base folder's whole path into PEFT's file: the adapter then loads from any folder."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = str(base.absolute())
    file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _cast(file: Path, model: ModelSection) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from stages.models.load_errors import load_config

    # Not the type in which this machine computes: a CPU may use float32 for a checkpoint of 16 bits.
    stored: str = model.dtype
    if stored == "auto":
        stored = str(load_config(model).dtype).removeprefix("torch.")
    if not hasattr(torch, stored):
        raise ConfigError("--base-dtype: the base's config.json names no dtype", "set model.dtype")
    dtype = getattr(torch, stored)
    # SHiRA stores integer positions in the same file: 16 bits could not hold them.
    weights = {n: w.to(dtype) if w.is_floating_point() else w for n, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to a hub repository and return the repository's URL.

    A new repository is private. ServerError if the hub cannot be reached or refuses the upload.
    """
    import httpx
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repo = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder)
    except (httpx.HTTPError, OSError, ValueError) as error:  # the base classes of huggingface_hub's errors
        first = first_line(error)
        raise ServerError(
            f"cannot push to {repository}: {first}",
            f"{folder} stays; log in with hf auth login, then upload it: hf upload {repository} {folder}",
        ) from None
    return str(repo)


def engines(config: Config) -> list[str]:
    """List the engines that can serve the export on this machine."""
    vllm = importlib.util.find_spec("vllm") and config.served_by_vllm
    return ["transformers", "vllm"] if vllm else ["transformers"]


class _Trial:
    """The first training prompts, rendered as the view's stage renders its training rows."""

    def __init__(self, config: Config, view: View, number: int) -> None:
        from stages.models.tokenizer import load_tokenizer
        from stages.prompts.renderer import RenderedPrompt, Renderer

        examples = read(config.data.model_copy(update={"limit": number}))
        labels = [Labelled(example, int(view.system), {}) for example in examples]
        self.renderer = Renderer(load_tokenizer(config.model), prompt_of(config, view), labels)
        texts = [self.renderer.prompt(example.prompt, example=example) for example in examples]
        self.prompts = [RenderedPrompt(text, self.renderer.ids(text)) for text in texts]

    def answers(self, engine: Engine) -> dict[int, Completion]:
        """Generate greedy answers of at most LONGEST tokens."""
        requests = [GenerateRequest(prompt.ids) for prompt in self.prompts]
        return dict(engine.generate(requests, Sampling(LONGEST, tuple(self.renderer.stop_ids))))

    def compared(
        self,
        answers: dict[int, Completion],
        model: ModelSection,
        artifact: Artifact,
        hint: str,
        say: Callable[[str], None],
    ) -> dict[str, Any]:
        """Compare answers with those of the trained adapter in plain PEFT; see `parity.check`."""
        from stages.eval import parity
        from stages.eval.answer_cache import CachedAnswer

        given = [
            (prompt, CachedAnswer(ids=answers[i].ids, complete=answers[i].complete), range(0))
            for i, prompt in enumerate(self.prompts)
        ]
        return parity.check(given, model, artifact.path / "adapter", self.renderer.tokenizer, hint, say)


def check(
    artifact: Artifact, config: Config, out: Path, form: Form, prompts: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Let the export answer the first `prompts` training prompts, and compare with the trained adapter.

    Each available engine serves the export once. Yields one row per engine: the number of tokens, the share
    of them within the tolerance of the adapter's own choice, and the largest gap in logits. AnswerError if
    the export is not what was trained.
    """
    trial = _Trial(config, view_of(artifact), prompts)
    base = config.model.model_copy(update={"load_in_4bit": False}) if form == "merged" else config.model
    model = base.model_copy(update={"name": str(out)}) if form == "merged" else base
    hint = f"do not use {out}: remove it and export again"
    for engine in engines(config):
        spec = EngineSpec(engine, model, None if form == "merged" else out)
        with EngineCache() as cache:
            # A variable for the engine would keep it in memory beside the next one.
            answers = trial.answers(cache.get(spec, config.server, say))
        yield {"engine": engine, **trial.compared(answers, base, artifact, hint, say)}


def check_views(
    trained: dict[str, Artifact], config: Config, out: Path, prompts: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Serve both views by one vLLM server, send requests to both at once, and check which adapter answered.

    The prompts of a view are those of its training. Its answers are compared with the trained adapter's in
    plain PEFT, and must differ from another model's to the same prompts: fast's from the base's, slow's from
    fast's. Yields one row per view, as `check` does; that of slow has `differ_from_fast`, the number of
    answers that differ. AnswerError if a view does not answer as its adapter does, or as the other model
    where its adapter would not; a warning where the prompts cannot tell the two apart.
    """
    from stages.engines.vllm import open_modules
    from stages.models.dtype import resolve

    views = views_of(config)
    trials = {name: _Trial(config, view, prompts) for name, view in views.items()}
    references = {"fast": config.model.name, "slow": "fast"}
    with (
        open_modules(config.model, {name: out / name for name in views}, config.server, say) as clients,
        ThreadPoolExecutor(len(views) + 1) as threads,
    ):
        # The base answers first, alone: on CPU, vLLM applies an adapter to requests for the base that are
        # batched with requests for adapters (its PR 48421).
        of_base = trials["fast"].answers(clients[config.model.name])
        futures = {name: threads.submit(trials[name].answers, clients[name]) for name in views}
        of_fast = threads.submit(trials["slow"].answers, clients["fast"])
        answers = {name: future.result() for name, future in futures.items()}
        reference_answers = {"fast": of_base, "slow": of_fast.result()}
    hint = f"do not serve {out}: remove it and export again"
    # At the size of logits a 16-bit float resolves an eighth: within that, the choice of a token is chance.
    rounding = 1e-3 if resolve(config.model) == "float32" else 0.125
    for name, view in views.items():
        row = trials[name].compared(answers[name], config.model, trained[view.target], hint, say)
        number = len(answers[name])
        differing = sum(answers[name][i].ids != reference_answers[name][i].ids for i in range(number))
        if not differing:
            message = f"all {number} answers of {name} are those of {references[name]}"
            moved = trained[view.target].manifest["summary"]["moved"]
            if moved and row["worst_gap"] > rounding:  # the adapter itself would have answered otherwise
                raise AnswerError(message, hint)
            why = "check more prompts to tell them apart" if moved else f"{view.target} moved no element"
            say(f"warning: {message}, and its adapter's own: {why}")
        from_fast = {"differ_from_fast": differing} if references[name] == "fast" else {}
        yield {"engine": f"vllm, {name}", **row, **from_fast}
