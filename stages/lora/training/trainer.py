"""The base of both trainers: exact resume, checks of health, learning rates.

A checkpoint has the whole state of a trainer, which is restored to the last bit. Nothing is unpickled:
weights and optimizer state are safetensors, the rest is JSON. The library's own resume reads pickles, skips
the `default` adapter if there is a second one, and lets GRPO's sampler start again with the first epoch.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from stages.errors import ArtifactError, OutOfMemoryError, UnusableResult, is_out_of_memory
from stages.lora.adapter import adapter, baselines
from stages.lora.adapter.elements import sparse_layers
from stages.packing import support, trainer_inputs
from stages.store.checkpoints import Checkpoints

SHOWN_ROWS = 8


class ResumableTrainer:
    """Mixin that comes before SFTTrainer or GRPOTrainer among the bases of a trainer.

    Each method of the library is overridden once, here or in the trainer below, in the order of a run. A loss
    or gradient that is not finite stops the run before the optimizer's step, so the adapter and the last
    checkpoint stay sound.
    """

    BATCH_KEYS = ("input_ids", "attention_mask")
    """Keys of a batch: the token ids by which a row is found, and their mask, (rows, tokens) each."""
    checkpoints: Checkpoints
    """Set by `loop.train`."""
    accelerator: Any
    args: Any
    lr_scheduler: Any
    model: Any
    optimizer: Any
    state: Any

    def __init__(
        self, *, row_ids: Callable[[], dict[tuple[int, ...], str]], memory_hint: str, **arguments: Any
    ) -> None:
        """row_ids: makes the table of token ids → row id; it is called only when a run has failed.

        memory_hint: settings that lower the use of memory.
        """
        super().__init__(**arguments)
        self.row_ids, self.memory_hint = row_ids, memory_hint
        self.window: list[dict[str, Any]] = []
        """Prepared batches since the last optimizer step."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The library's schedule, but that warm-up step i of w has i/w of the peak rate.

        The library has (i - 1)/w there, so that its first step does nothing.
        """
        if self.lr_scheduler is None:
            schedule = super().create_scheduler(num_training_steps, optimizer)
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            factor = schedule.lr_lambdas[0]  # the same for every group

            def share_of_peak(steps_done: int) -> float:
                return (steps_done + 1) / warmup_steps if steps_done < warmup_steps else factor(steps_done)

            self.lr_scheduler = LambdaLR(schedule.optimizer, share_of_peak)
        return self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """ArtifactError unless every weight then has its saved value."""
        folder, layers = Path(resume_from_checkpoint), sparse_layers(self.model)
        if not layers:
            baselines.load(self.model, folder)
            return
        stored = adapter.read(folder)
        if stored.keys() != layers.keys():
            raise ArtifactError(f"{folder} does not fit the adapter")
        for name, layer in layers.items():
            layer.load_state_dict({"weight": stored[name]})
            if not torch.equal(layer.weight.detach().cpu(), stored[name]):
                raise ArtifactError(f"{folder}: {name} was not restored to its saved values")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        content = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
        state: dict[int, dict[str, Any]] = {int(index): values for index, values in content["state"].items()}
        for name, value in load_file(folder / "optimizer.safetensors").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": content["groups"]})
        self.lr_scheduler.load_state_dict(content["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self.state.save_steps = self.args.save_steps  # the library has taken it from the checkpoint
        state = json.loads(self._random_file(checkpoint).read_text(encoding="utf-8"))
        torch.random.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.random.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, words, *counters = state["numpy"]
        np.random.set_state((kind, np.array(words, dtype=np.uint32), *counters))
        self.restore_counters()

    def _random_file(self, folder: str) -> Path:
        """The states of the random generators of Python, NumPy and torch in this process."""
        return Path(folder) / f"random-{self.args.process_index}.json"

    def restore_counters(self) -> None:
        """Set what a trainer counts besides its state, after a checkpoint was loaded."""
        raise NotImplementedError

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        self.window.append(prepared)
        return prepared

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.memory():
            loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise self._non_finite("loss", float(loss), self.window[-1:])
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if not torch.isfinite(torch.as_tensor(norm)):
            raise self._non_finite("gradient norm", float(norm), self.window)
        self.window = []
        return norm

    def _non_finite(self, quantity: str, value: float, batches: list[dict[str, Any]]) -> UnusableResult:
        """The error for a loss or gradient norm that is not finite, which names the rows of these batches."""
        ids, (tokens, mask) = self.row_ids(), self.BATCH_KEYS
        texts = [row for b in batches for row in trainer_inputs.token_lists(b[tokens], b[mask])]
        rows = list(dict.fromkeys(ids.get(tuple(text), "unknown") for text in texts))
        omitted = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        names = ", ".join(rows[:SHOWN_ROWS]) + omitted
        return UnusableResult(
            f"{quantity} is {value} in step {self.state.global_step + 1}, rows {names}",
            "this step was not applied; look at these rows, or lower the learning rate",
        )

    @contextmanager
    def memory(self, where: str | None = None) -> Iterator[None]:
        """Turn a lack of memory inside into an error that names the settings. where: None in a step."""
        batches = len(self.window)
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if where is None:
                prepared = len(self.window) > batches
                batch = _shapes(self.window[-1]) if prepared else "while completions were sampled"
                where = f"in step {self.state.global_step + 1}, {batch}"
            raise OutOfMemoryError(f"out of memory {where}", f"lower {self.memory_hint}") from error

    def _supports_packing(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> bool:
        """True if packed rows give this model's own results; tried on the first row of the batch."""
        (first,) = trainer_inputs.token_lists(input_ids[:1], attention_mask[:1])
        return support.supports_packing(self.accelerator.unwrap_model(model), first)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            self.checkpoints.seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the trained adapter alone: no reference adapter, no tokenizer, no pickled arguments."""
        write = adapter.write if sparse_layers(self.model) else baselines.save
        write(self.model, Path(output_dir or self.args.output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the tensors of the optimizer's state as safetensors, its numbers and the schedule as JSON."""
        if not self.args.should_save:
            return
        folder, state = Path(output_dir), self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, dict[str, Any]] = {}
        for index, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
                else:
                    numbers.setdefault(str(index), {})[name] = value
        save_file(tensors, folder / "optimizer.safetensors")
        schedule = self.lr_scheduler.state_dict()
        content = {"groups": state["param_groups"], "state": numbers, "scheduler": schedule}
        (folder / "optimizer.json").write_text(json.dumps(content), encoding="utf-8")

    def _save_rng_state(self, output_dir: str) -> None:
        kind, words, *counters = np.random.get_state(legacy=True)
        state = {
            "torch": torch.random.get_rng_state().tolist(),
            "cuda": torch.cuda.random.get_rng_state().tolist() if torch.cuda.is_available() else None,
            "python": random.getstate(),
            "numpy": [kind, np.asarray(words).tolist(), *counters],
        }
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # the first process to come here makes it
        self._random_file(output_dir).write_text(json.dumps(state), encoding="utf-8")


def _shapes(batch: dict[str, Any]) -> str:
    """Sizes of the token ids in a batch, for an error message."""
    ids = {n: value for n, value in batch.items() if n.endswith("_ids") and isinstance(value, Tensor)}
    return ", ".join(f"{name} of {' × '.join(map(str, value.shape))} tokens" for name, value in ids.items())
