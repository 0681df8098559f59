"""rl: GRPO on the active System 2 elements, by TRL's GRPOTrainer, from the SFT adapter."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.config import LoraSection, ModelSection, PromptSection, RlSection
from stages.engines import Sampling
from stages.errors import DataError, MeaninglessError
from stages.language.prompts import Renderer, load_tokenizer
from stages.language.rewards import rewards
from stages.lora import adapter, training
from stages.lora.masks import Masks
from stages.lora.merged import MergedCopy
from stages.records import Example, Labelled, of_system, read_labels

if TYPE_CHECKING:
    from datasets import Dataset

    from stages.pipeline import Progress

log = logging.getLogger(__name__)


def run(
    model: ModelSection,
    prompt: PromptSection,
    lora: LoraSection,
    rl: RlSection,
    seed: int,
    classify_dir: Path,
    partition_dir: Path,
    sft_dir: Path,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Write `adapter/` and `history.json`; returns what was trained and the rewards of the first and last quarter."""
    renderer = Renderer(load_tokenizer(model), rl.prompt or prompt)
    examples = _examples(read_labels(classify_dir / "labels.jsonl"), rl)
    rows, dropped = _rows(examples, renderer, rl)
    active = Masks.load(partition_dir / "masks.safetensors").rl
    steps = training.steps_of(len(rows) // rl.prompts_per_step, rl, rl.iterations)
    base = adapter.load_base(model)
    base.generation_config.eos_token_id = renderer.stop_ids  # where TRL looks for it
    copy = MergedCopy(base) if base.device.type == "cpu" else None
    peft_model = adapter.attach(base, lora, sft_dir / "adapter", rl.dropout)
    trainer = _trainer(peft_model, renderer, rows, rl, steps, seed, out, copy)
    if rl.kl_beta and rl.kl_reference == "base":
        peft_model.delete_adapter("ref")  # TRL then takes the model without adapter
    watch = training.Watch(
        progress, f"rl on {len(rows)} prompts", steps, ("reward", "frac_reward_zero_std", "completions/mean_length")
    )
    trainer.add_callback(watch)
    summary = training.train(trainer, peft_model, active, sft_dir / "adapter", out, model.name)
    (out / "history.json").write_text(json.dumps(watch.history, indent=1))
    earned = [row["reward"] for row in watch.history if "reward" in row]
    quarter = max(1, len(earned) // 4)
    return {
        "prompts": len(rows),
        "dropped_prompts": dropped,
        "prompt": renderer.digest(),
        "reward_first_quarter": sum(earned[:quarter]) / quarter,
        "reward_last_quarter": sum(earned[-quarter:]) / quarter,
        **summary,
    }


def _examples(labels: list[Labelled], rl: RlSection) -> list[Example]:
    examples = of_system(labels, 2) if rl.data == "system2" else [row.example for row in labels]
    needed = [name for name in rl.rewards if name == "correctness"]
    without = [e.id for e in examples if e.gold is None]
    if needed and without:
        raise DataError(
            f"reward correctness needs a gold answer, and {len(without)} of {len(examples)} RL rows have none "
            f"(first: {without[0]})",
            "rows need `gold`, or a response that ends in `#### answer`",
        )
    return examples


def _rows(examples: list[Example], renderer: Renderer, rl: RlSection) -> tuple[Dataset, int]:
    """TRL's rows: the rendered prompt and the columns that rewards read. Prompts that are too long are dropped."""
    from datasets import Dataset

    kept = [e for e in examples if len(renderer.prompt_ids(e.prompt)) <= rl.max_prompt]
    dropped = len(examples) - len(kept)
    if dropped:
        log.warning("%d of %d prompts are longer than rl.max_prompt %d", dropped, len(examples), rl.max_prompt)
    if len(kept) < rl.prompts_per_step:
        raise DataError(
            f"{len(kept)} RL prompts ({dropped} too long) are fewer than rl.prompts_per_step {rl.prompts_per_step}",
            "lower it, raise rl.max_prompt, or bring more System 2 rows",
        )
    style = renderer.section.answer_format
    columns = [
        {"prompt": renderer.prompt(e.prompt), "question": e.prompt, "gold": e.gold, "answer_format": style} for e in kept
    ]
    return Dataset.from_list(columns), dropped


def _trainer(peft_model, renderer: Renderer, rows, rl: RlSection, steps: int, seed: int, out: Path, copy: MergedCopy | None):  # type: ignore[no-untyped-def]
    """GRPOTrainer with our token ids and, on CPU, our rollouts.

    On CPU completions are sampled from a merged copy of the model; TRL's own way is to generate through the LoRA layers.
    """
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(GRPOTrainer):
        def _tokenize_prompts(self, prompts: list[str]):  # type: ignore[no-untyped-def]
            # The renderer's ids: TRL would let the tokenizer add its special tokens to a rendered chat a second time.
            return [questions[prompt] for prompt in prompts], None, {}

        def _generate_single_turn(self, prompt_ids, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
            if copy is None:
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
            from stages.engines.transformers import continuations

            copy.refresh(peft_model)
            made = continuations(copy.model, renderer.tokenizer, prompt_ids, sampling)
            return [answer.ids for answer in made], None

    sampling = Sampling(rl.max_completion, tuple(renderer.stop_ids), rl.temperature, rl.top_p)
    questions = {row["prompt"]: renderer.prompt_ids(row["question"]) for row in rows}
    samples = rl.prompts_per_step * rl.group
    return Trainer(
        model=peft_model,
        reward_funcs=[_checked(name) for name in rl.rewards],
        args=GRPOConfig(
            **training.arguments(rl, steps, seed, out / "trainer"),
            per_device_train_batch_size=rl.micro_batch,
            gradient_accumulation_steps=samples // rl.micro_batch,
            num_generations=rl.group,
            num_iterations=rl.iterations,
            max_completion_length=rl.max_completion,
            temperature=rl.temperature,
            top_p=rl.top_p,
            top_k=0,
            beta=rl.kl_beta,
            loss_type=rl.loss,
            scale_rewards=rl.scale_rewards,
            reward_weights=list(rl.rewards.values()),
            epsilon=0.2,
            mask_truncated_completions=False,
            use_vllm=False,
            log_completions=False,
        ),
        train_dataset=rows,
        processing_class=renderer.tokenizer,
    )


def _checked(name: str):  # type: ignore[no-untyped-def]
    """The reward called `name`; one that raises or returns no finite number stops the run with its name and sample."""
    function = rewards.pick(name)

    def reward(completions: list[str], **columns: Any) -> list[float]:
        try:
            values = function(completions=completions, **columns)
        except Exception as error:
            raise MeaninglessError(
                f"reward {name} raised {type(error).__name__}: {error}; first completion: {completions[0]!r}"
            ) from error
        for text, value in zip(completions, values, strict=True):
            if not torch.isfinite(torch.tensor(float(value))):
                raise MeaninglessError(f"reward {name} is {value} for {text!r}")
        return values  # type: ignore[no-any-return]

    reward.__name__ = name
    return reward
