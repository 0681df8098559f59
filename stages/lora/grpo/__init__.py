"""GRPO: its prompts, its rollouts and its trainer."""
