"""Export a trained adapter as plain PEFT files, both modes, or the merged model, with a card."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from stages.config import MODES, Config
from stages.errors import ConfigError, OutputError, ServerError, first_line
from stages.models.base import save_merged
from stages.report.card import Form, card
from stages.store.artifacts import Artifact, make_readable, refuse_store


def write(
    trained: dict[str, Artifact], config: Config, out: Path, form: Form, evaluated: Sequence[Artifact] = ()
) -> None:
    """Write the adapter of a target into `out`, or the merged model with its tokenizer, with a card.

    trained: the artifact by target. Those of both modes become `fast/`, the adapter of SFT, and `slow/`, that
    of RL; the card says how to serve both. evaluated: the evaluations, for the card.
    OutputError if `out` exists, or would lie among the artifacts of a run. ConfigError for a trained prompt,
    which cannot be merged, and for two modes that no server loads as LoRA modules: those of a baseline, and
    adapters of a 4-bit base.
    """
    views = len(trained) > 1
    if form == "merged" and config.baseline is not None and config.baseline.method != "ia3":
        raise ConfigError(
            f"--merged: {config.baseline.method} trains a prompt, which no weight can hold", "leave it out"
        )
    if views and not config.served_by_vllm:
        cause = f"baseline {config.baseline.method}" if config.baseline else "the 4-bit base of this adapter"
        raise ConfigError(
            f"--views are served by vLLM, which cannot serve {cause}",
            "a mode at a time, --target sft, then the slow one, with --merged",
        )
    refuse_existing(out)
    refuse_store(out)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}") from None
    try:
        for mode, target in MODES.items():
            if target in trained:
                folder = partial / mode if views else partial
                folder.mkdir(exist_ok=True)
                _fill(folder, trained[target], config, form)
        text = card(config, trained, form, partial, evaluated)
        (partial / "README.md").write_text(text, encoding="utf-8")
        make_readable(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to a repository of the hub, and return its URL; ServerError if it refuses."""
    import httpx
    from huggingface_hub import HfApi

    try:
        return str(HfApi().upload_folder(repo_id=repository, folder_path=folder).repo_url)
    except (httpx.HTTPError, OSError, ValueError) as error:  # the base classes of huggingface_hub's errors
        hint = f"{folder} stays; hf auth login, hf repos create {repository}, hf upload {repository} {folder}"
        raise ServerError(f"cannot push to {repository}: {first_line(error)}", hint) from None


def refuse_existing(out: Path) -> None:
    """Raise OutputError if there is such a folder."""
    if out.exists():
        raise OutputError(f"{out} exists", "name a folder that does not")


def _fill(folder: Path, artifact: Artifact, config: Config, form: Form) -> None:
    from stages.lora.adapter import baselines
    from stages.models import cancellation

    trained = artifact.path / "adapter"
    if form == "merged":
        save_merged(config.model, trained, folder)
        return
    shutil.copytree(trained, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(baselines.STATE))
    cancellation.rewrite(folder, folder)  # whoever serves it may round it to 16 bits
    if not config.model.may_be_on_hub:  # with the base's whole path the adapter loads from any folder
        file = folder / "adapter_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = str(Path(config.model.name).absolute())
        file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
