"""sft: supervised training of the active System 1 elements, by TRL's SFTTrainer."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import DataSection, LoraSection, ModelSection, PromptSection, SftSection
from stages.language.prompts import Renderer, load_tokenizer
from stages.lora import adapter, training
from stages.lora.masks import Masks
from stages.records import Example, Labelled, of_system, read_labels

if TYPE_CHECKING:
    from stages.pipeline import Progress


def run(
    model: ModelSection,
    data: DataSection,
    prompt: PromptSection,
    lora: LoraSection,
    sft: SftSection,
    seed: int,
    classify_dir: Path,
    score_dir: Path,
    partition_dir: Path,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Write `adapter/` (plain PEFT, loads on the plain base model) and `history.json`; returns what was trained."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    renderer = Renderer(load_tokenizer(model), sft.prompt or prompt)
    examples = _examples(read_labels(classify_dir / "labels.jsonl"), sft, seed)
    rows, long = renderer.rows(examples, data)
    active = Masks.load(partition_dir / "masks.safetensors").sft
    steps = training.steps_of(math.ceil(len(rows) / sft.batch_size), sft)
    peft_model = adapter.attach(adapter.load_base(model), lora, score_dir / "init", sft.dropout)
    trainer = SFTTrainer(
        model=peft_model,
        args=SFTConfig(
            **training.arguments(sft, steps, seed, out / "trainer"),
            per_device_train_batch_size=sft.micro_batch,
            gradient_accumulation_steps=sft.batch_size // sft.micro_batch,
            max_length=None,  # rows are cut, dropped or refused by the renderer
            packing=False,
            loss_type="nll",
        ),
        train_dataset=Dataset.from_list([{"input_ids": r.input_ids, "labels": r.labels} for r in rows]),
        processing_class=renderer.tokenizer,
    )
    watch = training.Watch(progress, f"sft on {len(rows)} rows", steps, ("loss", "learning_rate"))
    trainer.add_callback(watch)
    summary = training.train(trainer, peft_model, active, score_dir / "init", out, model.name)
    (out / "history.json").write_text(json.dumps(watch.history, indent=1))
    return {"rows": len(rows), "too_long": long, "prompt": renderer.digest(), **summary}


def _examples(labels: list[Labelled], sft: SftSection, seed: int) -> list[Example]:
    """System 1 examples and the cold start's share of System 2 ones, or all, in file order."""
    if sft.data == "all":
        return [row.example for row in labels]
    fast = of_system(labels, 1)
    wanted = round(sft.system2_share * len(fast))
    slow = of_system(labels, 2) if wanted else []
    chosen = {e.id for e in fast} | {e.id for e in random.Random(f"{seed} cold start").sample(slow, min(wanted, len(slow)))}
    return [row.example for row in labels if row.example.id in chosen]
