"""Rejection-sampling SFT in place of GRPO: a control for what RL's advantages are worth.

    python benchmarks/raft.py run|rl CONFIG [--set KEY=VALUE]…

The arguments are those of `lorapar`, whose stage `rl` then learns every right completion with weight 1 and
no wrong one (RAFT, arXiv 2504.11343). Prompts, elements, sampling, steps and rate are those of the config,
and so are all keys: give it a `runs_dir` of its own, such as a copy of a run's folder without `rl/` and
`eval/`.
"""

from typing import Any

import torch
from torch import Tensor

from stages.lora.grpo.metrics import total_rewards
from stages.runtime import libraries

with libraries.hide_packages(*libraries.UNUSED, "vllm"):
    from stages.lora.grpo import trainer


class Raft(trainer.GrpoTrainer):
    """GRPO's trainer with 1 as the advantage of a right completion, and 0 of a wrong one."""

    _right: Tensor
    """(completions,), of this step and of all processes: whether it earned the whole reward."""

    def _calculate_rewards(self, *arguments: Any, **named: Any) -> Tensor:
        rewards = super()._calculate_rewards(*arguments, **named)
        best = self.reward_weights.sum().item()
        self._right = total_rewards(rewards, self.reward_weights).nan_to_num(0) >= best
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        assert len(self._right) == len(batch["advantages"]), "RAFT is for one process"
        return batch | {"advantages": self._right.to(torch.float32)}


if __name__ == "__main__":
    from lorapar_cli.app import main

    trainer.GrpoTrainer = Raft  # type: ignore[misc]
    main()
