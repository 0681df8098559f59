"""Model cards of exported adapters and models, and their results in the hub's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from stages import escaping
from stages.config import Config, ModelSection
from stages.errors import ArtifactError, ConfigError, validation_messages
from stages.records import read_json
from stages.report import usage
from stages.report.comparison import Measures
from stages.report.views import View, view_of
from stages.store.artifacts import Artifact

Form = Literal["adapter", "merged"]


class _Metrics(BaseModel):
    """Fields of metrics.json that a card shows."""

    all: Measures = Measures()
    system1: Measures = Measures()
    system2: Measures = Measures()


LOAD_VIEWS = """model = PeftModel.from_pretrained(model, "fast", adapter_name="fast")
model.load_adapter("slow", adapter_name="slow")
model.set_adapter("slow")  # or "fast"
"""


def card(artifact: Artifact, form: Form, folder: Path, evaluated: Sequence[Artifact] = ()) -> str:
    """Compose a model card from the manifest of the adapter and the metrics of its evaluations.

    folder: holds the export.
    """
    manifest, view, config = artifact.manifest, view_of(artifact), _config(artifact)
    stage, summary, identity = manifest["stage"], manifest["summary"], manifest["identity"]["config"]
    dtype = manifest["provenance"].get("dtype", "")
    baseline, trained_by = identity["baseline"], identity[stage]
    sections = {"baseline": baseline} if baseline else {
        "partition": config.partition.model_dump(mode="json"), "lora": identity["lora"]
    }  # fmt: skip
    sections[stage] = {k: v for k, v in trained_by.items() if not isinstance(v, dict | list | None)}
    settings = {"base in": f"NF4, {dtype}" if config.model.load_in_4bit else dtype, "seed": config.seed}
    if not baseline:
        settings |= {"score.scorer": config.score.scorer}
    if stage == "rl":
        settings |= {"rl.rewards": config.rl.rewards, "rl.rewards_file": config.rl.rewards_file}
    # With their sections: both partition and rl have a `beta`.
    settings |= {f"{name}.{key}": value for name, part in sections.items() for key, value in part.items()}
    named = {name: str(value) for name, value in settings.items() if value is not None}
    rows = "\n".join("| {} | {} |".format(*map(escaping.markdown, item)) for item in named.items())
    subject = "The adapter" if form == "adapter" else "The merged model"
    trained = f"{summary['active']:,} of {summary['elements']:,} elements ({summary['active_share']:.1%})"
    return f"""---
{_base_model_line(config.model)}library_name: {"peft" if form == "adapter" else "transformers"}
tags: [lorapar, {baseline["method"] if baseline else "lora"}]
---

# {escaping.markdown(config.model.title)} after {_method_name(config)} {view.target}

{subject} of step `{view.step}` of lorapar (arXiv 2507.20999), artifact
`{manifest["key"]}`, made with lorapar {manifest["provenance"]["versions"]["lorapar"]}.
{trained} were trained in this step, in
{summary["steps"]} steps{_untrained_note(form, config)}.

{_results(evaluated)}{_usage(artifact, form, folder, config)}| setting | value |
|---|---|
{rows}
"""


def _usage(artifact: Artifact, form: Form, folder: Path, config: Config) -> str:
    """Write how to load the export, and where vLLM can, how to serve and ask it; before a blank line."""
    view, merged = view_of(artifact), form == "merged"
    load = "" if merged else 'model = PeftModel.from_pretrained(model, ".")\n'
    python = usage.code(artifact, config, folder, load)
    library = "transformers" if merged else "plain PEFT"
    text = f"In this folder, with {library}:\n\n```python\n{python}\n```\n\n"
    if not merged and (config.baseline or config.model.load_in_4bit):
        return text
    modules = {} if merged else {view.target: folder}
    try:
        server = usage.server_command(artifact, config, folder, modules, view.target if merged else "")
    except ConfigError:  # its rank is larger than vLLM serves
        return text
    return f"""{text}Or a server of vLLM, started in this folder:

```sh
{server}
```

A request to it, with the prompt of training:

```sh
{usage.request(view.target, config, view)}
```

{usage.ON_CPU}

"""


def _config(artifact: Artifact) -> Config:
    """The config that an artifact was made with; ArtifactError if its manifest has another thing there."""
    try:
        return Config.model_validate(artifact.manifest["provenance"]["config"])
    except ValidationError as error:
        reason = validation_messages(error)[0]
        raise ArtifactError(f"{artifact.path}: the config in its manifest is invalid: {reason}") from None


def _method_name(config: Config) -> str:
    """Name the training method as people do: `LoRA-PAR`, `LoRA`, or the baseline's own name."""
    if config.baseline:
        return config.baseline.method
    strategy = config.partition.strategy
    return {"importance": "LoRA-PAR", "all": "LoRA"}.get(strategy, f"LoRA-PAR ({strategy})")


def _untrained_note(form: Form, config: Config) -> str:
    """Continue the sentence on the trained elements: what became of the others, and of a base in 4 bits."""
    if form == "merged":
        note = ". Trained and evaluated on the base in 4 bits; merged into its weights before that"
        return note if config.model.load_in_4bit else ""
    if config.baseline:
        return "; all that the method has"
    return "; the others are those that it started from, to the bit"


def _base_model_line(base: ModelSection) -> str:
    """Write the metadata line of the base model, or nothing for a folder, which the hub would refuse."""
    return f"base_model: {base.name}\n" if base.may_be_on_hub else ""


def card_of_views(adapters: dict[str, Artifact], folder: Path, evaluated: Sequence[Artifact] = ()) -> str:
    """Compose the card of two adapters, `fast` and `slow`, that one server offers.

    folder: holds the adapters in subfolders of these names.
    """
    configs = {name: _config(artifact) for name, artifact in adapters.items()}
    views = {name: view_of(artifact) for name, artifact in adapters.items()}
    base, slow = configs["fast"].model, configs["slow"]
    server = usage.server_command(adapters["slow"], slow, folder, {name: folder / name for name in views})
    modes = "\n".join(
        f"| {name} | {_learned(view, configs[name])} | `{adapters[name].manifest['key']}` | "
        f"{adapters[name].manifest['summary']['active_share']:.1%} |"
        for name, view in views.items()
    )
    requests = "\n".join(usage.request(name, configs[name], view) for name, view in views.items())
    python = usage.code(adapters["slow"], slow, folder, LOAD_VIEWS)
    return f"""---
{_base_model_line(base)}library_name: peft
tags: [lorapar, lora]
---

# {escaping.markdown(base.title)}, fast and slow

Two modes of one model, made by lorapar (arXiv 2507.20999). One server, started in this folder, has both
beside the base model, and a request chooses by `model`, which is `fast` or `slow`:

```sh
{server}
```

Ask each mode as it was trained:

```sh
{requests}
```

{usage.ON_CPU} Do not ask for the base model there while an adapter answers: vLLM 0.31 then gives it the
adapter, too (its pull request 48421).

In this folder, with plain PEFT:

```python
{python}
```

| mode | | artifact | elements trained |
|---|---|---|---|
{modes}

{_results(evaluated)}"""


def _learned(view: View, config: Config) -> str:
    """Describe what a view is for, and the rows that its stage trained on."""
    section = getattr(config, view.stage)
    rows, then = f"System {view.system} rows", "then "
    if view.target != "sft2":
        then = "" if section.start_from == "init" else then
        mixed_in = section.system2_share if view.stage == "sft" else section.system1_share
        rows += f" and some of System {3 - view.system}" if mixed_in else ""
        rows = "all rows" if section.data == "all" else rows
    return f"{view.description}: {then}{view.method} on {rows}"


def _results(evaluated: Sequence[Artifact]) -> str:
    """Tabulate accuracies with their intervals in Markdown, before a blank line; "" if there are none."""
    lines = [r"| benchmark | accuracy, % \[95 % interval\] | items |", "|---|---|---|"]
    several = len({artifact.manifest["variant"].partition("@")[0] for artifact in evaluated}) > 1
    for artifact in evaluated:
        target, _, name = artifact.manifest["variant"].partition("@")
        name = escaping.markdown(f"{target}: {name}" if several else name)
        metrics = read_json(artifact.path / "metrics.json", _Metrics)
        groups = {"all": metrics.all, "System 1": metrics.system1, "System 2": metrics.system2}
        for group, measures in groups.items():
            if measures.value:
                lines.append(f"| {name}, {group} | {measures.value.text()} | {measures.n} |")
    return "\n".join(lines) + "\n\n" if len(lines) > 2 else ""
