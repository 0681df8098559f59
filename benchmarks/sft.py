"""What an SFT step costs: lorapar's without padding and TRL's on plain LoRA, side by side in one process.

    python benchmarks/sft.py MODEL ROWS [--batch 16] [--micro-batch 8] [--pairs 10] [--share 0.4]

Theirs: an untouched `trl.SFTTrainer` on plain LoRA by PEFT, of which every element trains. Ours: the mixin
of `lorapar sft`, with `--share` of the elements packed (random masks). Both stand on the weights of
one base model, which is frozen, and both train on rows as `lorapar sft` renders them from ROWS.

A step is what `Trainer.train` does from the begin to the end of an epoch of one step: data, all micro
batches, clipping, AdamW, logging. In each pair both do one step on the same rows, in an order drawn at
random; one step each before warms up, and its losses are printed. The ratio is theirs / ours, the median of
pairs, with a bootstrap interval. The peak is that of a process, or of the device, which trains only one way.
"""

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from measure import in_turns, machine, now, options, peaks, random_masks, ratio, twin
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import SFTTrainer

from stages.config import DataSection, LoraSection, ModelSection, PromptSection, SftSection
from stages.data.rows import read
from stages.lora.adapter import adapter
from stages.lora.adapter.elements import sparsify
from stages.models.base import load_base
from stages.models.tokenizer import load_tokenizer
from stages.packing import trainer_inputs
from stages.prompts.renderer import Renderer, Row
from stages.runtime import resources
from stages.sft import run as sft
from stages.sft.run import SftTrainer
from stages.store.checkpoints import Checkpoints

SIDES = ("TRL", "lorapar")


class Side(TrainerCallback):
    """One trainer, and the seconds of its last step."""

    def __init__(
        self, name: str, base: Any, renderer: Renderer, given: argparse.Namespace, folder: str
    ) -> None:
        section = SftSection(
            max_steps=1,
            batch_size=given.batch,
            per_device_train_batch_size=given.micro_batch,
            warmup_ratio=0,
            lr_scheduler_type="constant",
        )
        arguments = sft._arguments(section, 1, 0, Checkpoints(Path(folder), ""))
        arguments.save_strategy = SaveStrategy.NO
        model = adapter.initial(base, LoraSection(), seed=0)
        given_to_both = {
            "model": model,
            "args": arguments,
            "train_dataset": table([Row("", [1, 2], [1, 2])]),
            "processing_class": renderer.tokenizer,
        }
        if name == "TRL":
            self.trainer = SFTTrainer(**given_to_both)
        else:
            self.trainer = SftTrainer(**given_to_both, row_ids=dict, memory_hint="", share_prefix=True)
            trainer_inputs.accept_packed(base)
            sparsify(model, random_masks(adapter.lora_layers(model), given.share))
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(self)

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.begun = now()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds = now() - self.begun

    def step(self, rows: list[Row]) -> float:
        """Seconds."""
        self.trainer.train_dataset = table(rows)
        self.trainer.train()
        return self.seconds

    def loss(self) -> float:
        return next(row["loss"] for row in self.trainer.state.log_history if "loss" in row)  # type: ignore[no-any-return]


def table(rows: list[Row]) -> Dataset:
    return Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


def main() -> None:
    defaults = {"batch": 16, "micro_batch": 8, "pairs": 10, "share": 0.4}
    parser = options(__doc__, "model", "rows", **defaults, dtype="float32", attention="eager")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()

    section = ModelSection(name=given.model, dtype=given.dtype, attention=given.attention)
    base = load_base(section)
    renderer = Renderer(load_tokenizer(section), PromptSection())
    data = DataSection(path=given.rows)
    rows, _ = renderer.rows(read(data), data)
    random.Random(0).shuffle(rows)
    batches = [rows[i * given.batch : (i + 1) * given.batch] for i in range(given.pairs + 1)]
    assert len(batches[-1]) == given.batch, f"{len(rows)} rows are too few"

    with tempfile.TemporaryDirectory() as folder:
        if given.only:
            side = Side(given.only, base, renderer, given, folder)
            for batch in batches[:2]:
                side.step(batch)
            print(resources.peak_device_memory())
            return
        sides = {name: Side(name, twin(base), renderer, given, folder) for name in SIDES}

        def step(name: str, number: int) -> float:
            seconds = sides[name].step(batches[number])
            if number == 0:
                print(f"{name} loss {sides[name].loss():.5f}")
            return seconds

        theirs, ours = in_turns(SIDES, given.pairs, step).values()
    print("ratio", ratio(theirs, ours))
    tokens = statistics.fmean(len(row.input_ids) for batch in batches[1:] for row in batch)
    print(
        f"{given.model}, {given.dtype}, attention {given.attention}, steps of {given.batch} rows, "
        f"micro batches of {given.micro_batch}, rows of {tokens:.0f} tokens, "
        f"{given.share:g} of the elements active, {given.pairs} pairs, {machine(base.device)}"
    )
    print(f"TRL {statistics.median(theirs):.3g} s, lorapar {statistics.median(ours):.3g} s")
    if given.memory:
        del sides, base
        resources.release_memory()
        print(peaks(__file__))


if __name__ == "__main__":
    main()
