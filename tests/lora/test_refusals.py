"""Settings of training that do not go together, and what is said of them before anything is loaded."""

import pytest

from stages.errors import ConfigError

FOUR_BITS = "model.load_in_4bit=true;model.dtype=bfloat16;eval.targets=[sft]"
BASELINE = "eval.targets=[base,sft,rl];baseline.method="
PROTECT = "partition.protect=OLD"
COLOCATED = "rl.rollouts.engine=vllm_colocate"
INT8 = "rl.rollouts.int8=true"
REFUSED = [
    # where RL's elements are scored again
    ("rl.rescore=taylor2;rl.start_from=init", "rl starts from the initial adapter"),
    ("rl.rescore=taylor2;baseline.method=dora", "a baseline is trained whole"),
    ("rl.rescore=taylor2;partition.strategy=all", "strategy all reads no scores"),
    ("score.scorer=grpo_sign", "set rl.rescore=grpo_sign for RL's elements"),
    # a base of 4 bits
    (f"{FOUR_BITS};lora.init=pissa", "load_in_4bit: PEFT cannot make init pissa over 4 bits; use normal"),
    (f"{FOUR_BITS};sft.launch.backend=fsdp2", "sft.launch.backend fsdp2 cannot divide 4 bits; use ddp"),
    (f"{FOUR_BITS};baseline.method=ia3", "is for LoRA: TRL would round baseline ia3 to bfloat16"),
    (f"{FOUR_BITS};{COLOCATED}", "what vllm would serve has other base weights; use engine transformers"),
    # elements
    ("partition.rl_density=0.1;partition.rl_elements=all", "rl_density takes"),
    ("partition.rl_density=0.1;partition.strategy=random_half", "rl_density takes"),
    ("lora.init=default", "lora.init default has B = 0, so every importance is zero"),
    ("partition.strategy=all;partition.alpha=0.5", "strategy all trains all shared elements, got alpha 0.5"),
    ("lora.init=orthogonal;lora.r=3", "init orthogonal needs an even r, got 3"),
    (f"{PROTECT};partition.strategy=random", "protect it would train more"),
    (f"{PROTECT};partition.rl_elements=random_within", "protect it would train more"),
    (f"{PROTECT};baseline.method=dora", "baseline dora is trained whole; leave out partition.protect"),
    (f"{PROTECT};lora.init=default;partition.strategy=all", "every importance is zero"),
    # rounds and orders
    ("eval.targets=[sft2]", "sft2 is the adapter of a second round of SFT; set sft.rounds=2"),
    ("sft.rounds=2;sft.data=all", "data all trains on both systems in one round"),
    ("sft.rounds=2;rl.rescore=taylor2", "the second round of SFT trains the same elements before it"),
    ("sft.rounds=2;eval.targets=[sft2,auto]", "between the answers of sft and sft2; name both"),
    ("sft.start_from=rl", "sft and rl start from each other"),
    ("rl.keep_steps=[1];eval.targets=[rl-2]", "rl-2: RL keeps that adapter only if rl.keep_steps names"),
    ("rl.max_steps=3;rl.keep_steps=[4]", "keep_steps: 4 is more than max_steps 3"),
    # optimizers and losses
    ("rl.optim=adafactor", "adafactor works on whole matrices, and lorapar trains single elements"),
    ("sft.optim=sgdm", "unknown optimizer 'sgdm'"),
    ("rl.importance_sampling_level=sequence", "dapo would weigh a completion by its length"),
    ("rl.loss_type=cispo", "loss_type cispo clips the ratio itself, at epsilon_high; set it"),
    (f"rl.top_p=0.9;{COLOCATED}", "leave them at 1 and 0, or set rollouts.correction"),
    (f"rl.top_k=20;{COLOCATED}", "leave them at 1 and 0, or set rollouts.correction"),
    (f"rl.top_k=20;{INT8}", "leave them at 1 and 0, or set rollouts.int8: false"),
    (f"rl.num_iterations=2;{INT8}", "int8 goes with num_iterations 1, got 2"),
    (f"rl.lora_dropout=0.1;{INT8}", "int8 goes with lora_dropout 0, got 0.1"),
    (f"{INT8};{COLOCATED}", "int8 goes with engine transformers"),
    # steps of both systems, and groups that are drawn again
    ("rl.system1_share=0.1", "system1_share 0.1 of 4 prompts is 0"),
    ("rl.system1_share=0.9", "system1_share 0.9 of 4 prompts is 4"),
    ("rl.system1_share=0.5;rl.data=all", "system1_share goes with data system2"),
    (
        f"rl.dynamic_sampling=1;{COLOCATED};rl.rollouts.tensor_parallel_size=2",
        "dynamic_sampling needs rollouts that each process samples for itself",
    ),
    (
        f"rl.dynamic_sampling=1;{COLOCATED};rl.rollouts.enable_sleep_mode=true;rl.launch.backend=fsdp2",
        "dynamic_sampling with rollouts.enable_sleep_mode and launch.backend fsdp2",
    ),
    ("rl.rollouts.engine=vllm_server", "base_url goes with engine vllm_server"),
    # baselines
    ("baseline.method=ia3;eval.targets=[init]", "ia3 has no scored initial adapter; take init out of eval"),
    ("baseline.method=ia3;eval.targets=[rl,shared]", "no scored initial adapter; take shared out of eval"),
    (f"{BASELINE}ia3;eval.engine=vllm", "vllm cannot serve baseline ia3; use engine transformers"),
    (f"{BASELINE}ia3;sft.loraplus_lr_ratio=4", "ia3 has no LoRA factors; leave out loraplus_lr_ratio"),
    (f"{BASELINE}ia3;rl.kl_reference=sft", "ia3 can hold on to the base alone; use rl.kl_reference=base"),
    (f"{BASELINE}dora;rl.launch.backend=fsdp2", "needs whole weights for the copy that RL starts from"),
    (
        f"{BASELINE}prefix_tuning;sft.gradient_checkpointing=true",
        "prefix_tuning does not train under gradient_checkpointing, which drops the prefix",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_does_not_go_together_is_refused(smoke, demo_data, settings, message):
    with pytest.raises(ConfigError, match=message):
        smoke(*settings.replace("OLD", str(demo_data / "train.jsonl")).split(";"))


def test_what_goes_together_is_not(smoke, demo_data):
    smoke(*BASELINE.split(";")[:1], "baseline.method=dora", "sft.launch.backend=fsdp2")
    smoke(f"partition.protect={demo_data / 'train.jsonl'}", "partition.protect_theta=0")
