"""Old names of settings, which the error for an unknown setting translates."""

_TRAIN = {
    "lr": "learning_rate",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "epochs": "num_train_epochs",
    "warmup": "warmup_ratio",
    "loraplus_ratio": "loraplus_lr_ratio",
    "loss": "loss_type",
    "micro_batch": "per_device_train_batch_size",
    "dropout": "lora_dropout",
}
RENAMED = {
    "lora": {"alpha": "lora_alpha", "rslora": "use_rslora"},
    "sft": _TRAIN,
    "rl": {
        **_TRAIN,
        "group": "num_generations",
        "iterations": "num_iterations",
        "max_prompt": "max_prompt_length",
        "max_completion": "max_completion_length",
        "kl_beta": "beta",
        "kl_bias_correction": "use_bias_correction_kl",
        "importance_sampling": "importance_sampling_level",
        "resample": "dynamic_sampling",
        "shared_prompts": "prefix_sharing",
        "drift_prompts": "kl_probe_prompts",
        "drift_steps": "kl_probe_steps",
        "max_equal_steps": "max_zero_signal_steps",
    },
    "rl.rollouts": {
        "gpu_memory": "gpu_memory_utilization",
        "tensor_parallel": "tensor_parallel_size",
        "sleep": "enable_sleep_mode",
    },
}
"""Renamed settings: section → old name → current name, which is that of TRL, PEFT or vLLM."""
