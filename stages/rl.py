"""rl: GRPO on the active System 2 elements, by TRL's GRPOTrainer, from the SFT adapter."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stages import sandbox as sandboxes
from stages import team
from stages.config import BaselineSection, LoraSection, ModelSection, PromptSection, RlSection, SandboxSection
from stages.engines import Sampling
from stages.engines.generation import continuations
from stages.errors import DataError
from stages.language import reward_functions
from stages.language.prompts import Renderer
from stages.lora import packed, rehearsal, rollouts, training, unpadded
from stages.lora.health import Healthy, Vitals, Watch, row_ids
from stages.lora.merged import MergedCopy
from stages.lora.optimizers import LoraPlus, WarmUp
from stages.lora.resume import ExactRollouts
from stages.lora.unpadded import SharedPrompts
from stages.models.base import load_base
from stages.models.tokenizer import load_tokenizer
from stages.records import Example, decided, of_system, problems, read_labels
from stages.store.checkpoints import Checkpoints

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOConfig

    from stages.pipeline.job import Job
    from stages.progress import Progress
    from stages.sandbox import Sandbox

log = logging.getLogger(__name__)

PINNED: dict[str, Any] = {
    "remove_unused_columns": False,  # rewards read these columns
    "shuffle_dataset": True,
    "disable_dropout": False,
    "cast_lm_head_to_fp32": False,
    "min_p": None,
    "repetition_penalty": 1.0,
    "cache_implementation": None,
    "use_transformers_continuous_batching": False,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "multi_objective_aggregation": "sum_then_normalize",
    "mask_truncated_completions": False,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "sync_ref_model": False,
}
"""The other arguments of GRPOTrainer on which a result may depend; see `training.PINNED`."""


def run(
    job: Job,
    model: ModelSection,
    prompt: PromptSection,
    lora: LoraSection,
    baseline: BaselineSection | None,
    rl: RlSection,
    seed: int,
    sandbox: SandboxSection | None = None,
) -> dict[str, Any]:
    """Write `adapter/` and `history.json`; returns what was trained and what rewards it earned."""
    renderer = Renderer(load_tokenizer(model), rl.prompt or prompt)
    labels = read_labels(job.labels)
    examples = of_system(labels, 2) if rl.data == "system2" else decided(labels)
    functions = {name: reward_functions.load(name, rl.rewards_file) for name in rl.rewards}
    rows, tokens, known, long = _rows(examples, renderer, rl, functions)
    start = training.Start.of("rl", job.adapter("sft", "score"), job.masks)
    steps = training.steps_of(len(rows) // rl.prompts_per_step, rl, rl.iterations)
    rollouts.prepare(rl.rollouts, model.name)
    base = load_base(model)
    base.generation_config.eos_token_id = renderer.stop_ids  # where TRL looks for it
    copy = rollouts.copy_of(base, rl.rollouts, model, baseline)
    peft_model = start.attach(base, lora, baseline, rl.dropout, seed)
    arguments = _arguments(rl, steps, seed, job.checkpoints, renderer.stop_ids)
    rewards = _checked(functions, rl, sandbox, job.progress)
    trainer = _trainer(peft_model, renderer, rows, tokens, rl, rewards, arguments, copy)
    if rl.rollouts.engine != "transformers":
        rollouts.from_base(trainer, peft_model)
    trainer.sharing = rl.shared_prompts == "auto" and unpadded.may_share(peft_model)
    unpadded.accept(base)
    if rl.kl_beta and rl.kl_reference == "base":
        peft_model.delete_adapter("ref")  # TRL then uses the model without its adapter as the reference
    names = row_ids(lambda: known, "prompt_ids", "prompt_mask")
    knobs = f"rl.micro_batch from {rl.micro_batch}, or rl.max_completion from {rl.max_completion}"
    trainer.vitals = Vitals(names, knobs)
    shown = ("reward", "frac_reward_zero_std", "completions/mean_length")
    trainer.add_callback(rehearsal.of_rl(trainer, [list(ids) for ids in known], rl))
    trainer.add_callback(Watch(job.progress, f"rl on {len(rows)} prompts", steps, shown, rl.max_equal_steps))
    summary = training.train(trainer, peft_model, start, job.out, model.name, job.checkpoints)
    return {
        "prompts": len(rows),
        "cut_prompts" if rl.too_long == "truncate_left" else "dropped_prompts": long,
        "prompt": renderer.digest(),
        **_earned(training.history(trainer)),
        **summary,
    }


def _earned(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean reward in the first and last quarter of the steps, and how many steps had only equal rewards."""
    earned = [row["reward"] for row in history if "reward" in row]
    quarter = max(1, len(earned) // 4)
    return {
        "equal_reward_steps": sum(row.get("frac_reward_zero_std") == 1 for row in history),
        "reward_first_quarter": sum(earned[:quarter]) / quarter,
        "reward_last_quarter": sum(earned[-quarter:]) / quarter,
    }


def _rows(
    examples: list[Example], renderer: Renderer, rl: RlSection, functions: dict[str, Callable[..., Any]]
) -> tuple[Dataset, dict[str, list[int]], dict[tuple[int, ...], str], int]:
    """The rows for TRL: the rendered prompts and the columns that rewards read.

    Also returns the token ids of each prompt, the row id that belongs to each list of token ids, and the
    number of prompts that are too long.
    """
    from datasets import Dataset

    style = renderer.section.answer_format
    rows = [
        {
            **e.extra,
            "id": e.id,
            "question": e.prompt,
            "gold": e.gold,
            "response": e.response,
            "answer_format": style,
        }
        for e in examples
    ]
    needed = {name: reward_functions.columns(name, function) for name, function in functions.items()}
    reward_functions.require(needed, rows)
    for row in rows:
        row["prompt"] = renderer.prompt(row["question"])
    tokens = {row["prompt"]: renderer.ids(row["prompt"]) for row in rows}
    kept, long = _fitting(rows, tokens, rl)
    known = {tuple(tokens[row["prompt"]]): row["id"] for row in kept}
    read = {"prompt", "question", *(column for columns in needed.values() for column in columns)}
    return Dataset.from_list([{name: row[name] for name in read} for row in kept]), tokens, known, long


def _fitting(
    rows: list[dict[str, Any]],
    tokens: dict[str, list[int]],
    rl: RlSection,
) -> tuple[list[dict[str, Any]], int]:
    """The rows to train on, and the number of rows whose prompt is too long.

    `rl.too_long` says whether those are an error, are left out, or are cut, which changes `tokens`.
    """
    kept = [row for row in rows if len(tokens[row["prompt"]]) <= rl.max_prompt]
    long = len(rows) - len(kept)
    if long and rl.too_long == "error":
        lengths = {row["id"]: len(tokens[row["prompt"]]) for row in rows}
        raise problems(
            f"longer than rl.max_prompt {rl.max_prompt}",
            [f"{name} has {length} tokens" for name, length in lengths.items() if length > rl.max_prompt],
            "raise it, or --set rl.too_long=drop (or truncate_left)",
        )
    if long:
        log.warning("%d of %d prompts are longer than rl.max_prompt %d", long, len(rows), rl.max_prompt)
    if rl.too_long == "truncate_left":
        kept = rows
        tokens.update({prompt: ids[-rl.max_prompt :] for prompt, ids in tokens.items()})
    if len(kept) < rl.prompts_per_step:
        raise DataError(
            f"{len(kept)} RL prompts ({long} too long) are fewer than "
            f"rl.prompts_per_step {rl.prompts_per_step}",
            "lower it, raise rl.max_prompt, or bring more System 2 rows",
        )
    return kept, long


def _checked(
    functions: dict[str, Callable[..., Any]],
    rl: RlSection,
    sandbox: SandboxSection | None,
    progress: Progress,
) -> list[Callable[..., Any]]:
    """The rewards as GRPOTrainer calls them. Those that run code are given the sandbox."""
    box = sandboxes.of(sandbox, progress.say) if sandbox else None

    def fixed(name: str) -> dict[str, Sandbox | None]:
        return {"sandbox": box} if reward_functions.needs_sandbox(name, rl.rewards_file) else {}

    return [reward_functions.checked(name, function, **fixed(name)) for name, function in functions.items()]


def _arguments(
    rl: RlSection, steps: int, seed: int, checkpoints: Checkpoints, stops: list[int]
) -> GRPOConfig:
    from trl import GRPOConfig

    accumulation = training.accumulation(rl.prompts_per_step * rl.group, rl.micro_batch)
    return GRPOConfig(
        **training.arguments(rl, steps, seed, checkpoints, rl.iterations),
        **PINNED,
        per_device_train_batch_size=rl.micro_batch,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        num_generations=rl.group,
        num_iterations=rl.iterations,
        max_completion_length=rl.max_completion,
        temperature=rl.temperature,
        top_p=rl.top_p,
        top_k=rl.top_k,
        beta=rl.kl_beta,
        use_bias_correction_kl=rl.kl_bias_correction,
        loss_type=rl.loss,
        scale_rewards=rl.scale_rewards,
        reward_weights=list(rl.rewards.values()),
        **rollouts.arguments(rl.rollouts, rl.max_prompt + rl.max_completion, stops),
        log_completions=False,
    )


def _trainer(
    peft_model: Any,
    renderer: Renderer,
    rows: Dataset,
    tokens: dict[str, list[int]],
    rl: RlSection,
    functions: list[Callable[..., Any]],
    arguments: GRPOConfig,
    copy: MergedCopy | None,
) -> Any:
    """GRPOTrainer that takes the token ids of each prompt from `tokens` and samples from the merged `copy`.

    Without a copy it samples as TRL does: by vLLM, or by generating through the adapter.
    """
    from trl import GRPOTrainer

    class Trainer(Healthy, ExactRollouts, LoraPlus, WarmUp, SharedPrompts, GRPOTrainer):
        ratio = rl.loraplus_ratio

        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            # TRL would have the tokenizer add its special tokens to a rendered chat a second time.
            return [tokens[prompt] for prompt in prompts], None, {}

        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            if copy is None:
                with packed.fixed(peft_model):
                    return super()._generate_single_turn(prompt_ids, *args, **kwargs)
            copy.refresh(peft_model)
            rng = random.Random(f"{self.args.seed} rollouts {self.state.global_step} {team.rank()}")
            seeds = [rng.getrandbits(62) for _ in prompt_ids]
            made = dict(continuations(copy.model, renderer.tokenizer, prompt_ids, sampling, (), seeds))
            return [made[i].ids for i in range(len(prompt_ids))], None

    sampling = Sampling(rl.max_completion, tuple(renderer.stop_ids), rl.temperature, rl.top_p, rl.top_k)
    return Trainer(
        model=peft_model,
        reward_funcs=functions,
        args=arguments,
        train_dataset=rows,
        processing_class=renderer.tokenizer,
    )
