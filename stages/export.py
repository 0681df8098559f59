"""Export a trained adapter as plain PEFT files, or the merged model: with a tokenizer whose chat template has
the modes, and a card."""

import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from stages.config import Config
from stages.errors import ConfigError, OutputError, ServerError, first_line
from stages.models.base import save_merged
from stages.prompts.chat_template import with_modes
from stages.report.card import Form, card
from stages.store.artifacts import Artifact, make_readable, refuse_store


def write(
    trained: Artifact, config: Config, out: Path, form: Form, evaluated: Sequence[Artifact] = ()
) -> None:
    """Write a trained adapter into `out`, or the merged model, with the tokenizer and a card.

    evaluated: the evaluations, for the card. OutputError if `out` exists, or would lie among the artifacts of
    a run; ConfigError for a trained prompt, which cannot be merged.
    """
    if form == "merged" and config.baseline is not None and config.baseline.method != "ia3":
        raise ConfigError(
            f"--merged: {config.baseline.method} trains a prompt, which no weight can hold", "leave it out"
        )
    refuse_existing(out)
    refuse_store(out)
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        folder.mkdir(parents=True)
    except OSError as error:  # of the hidden folder, which nobody named
        raise OutputError(f"cannot write {out}: {error.strerror}") from None
    try:
        fill(folder, trained, config, form)
        text = card(config, trained, form, folder, evaluated)
        (folder / "README.md").write_text(text, encoding="utf-8")
        make_readable(folder)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fill(folder: Path, trained: Artifact, config: Config, form: Form) -> None:
    """Write weights and tokenizer; its chat template then has the modes, if there are any."""
    from transformers import AutoTokenizer

    from stages.lora.adapter import baselines
    from stages.models import cancellation

    adapter = trained.path / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(config.model.name, revision=config.model.revision)
    prompt = config.prompt_of(trained.manifest["stage"])
    if prompt.template == "chat":
        tokenizer.chat_template = with_modes(tokenizer.get_chat_template(), prompt, config.modes)
    if form == "merged":
        save_merged(config.model, adapter, folder)
        tokenizer.save_pretrained(folder)
        return
    for file in adapter.iterdir():
        if file.name != baselines.STATE:
            shutil.copyfile(file, folder / file.name)  # without the modes of a run that may be read-only
    tokenizer.save_pretrained(folder)
    cancellation.rewrite(folder, folder)  # whoever serves it may round it to 16 bits
    if not config.model.may_be_on_hub:  # with the base's whole path the adapter loads from any folder
        file = folder / "adapter_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = str(Path(config.model.name).absolute())
        file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


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
