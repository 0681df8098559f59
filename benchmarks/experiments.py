"""Arms and contrasts of the experiments whose answers are kept; `replicates.py` makes their tables."""

Contrast = tuple[str, str, tuple[str, ...]]
"""What is compared: its name, the arm, and the arms of which the best one is subtracted.

`ARM:1` and `ARM:2` are an arm's answers to the items of that system alone.
"""

DEMO: tuple[Contrast, ...] = (
    ("`auto` minus the better mode (slow in each)", "auto", ("sft", "rl")),
    ("slow minus SFT under slow's message: RL's own", "rl", ("rl-1",)),
    ("slow, rollouts in 8 bits minus float32", "rl int8", ("rl",)),
    ("`auto`, the same", "auto int8", ("auto",)),
    ("all elements minus LoRA-PAR: `auto`", "auto all", ("auto",)),
    ("the same, slow", "rl all", ("rl",)),
    ("the same, fast", "sft all", ("sft",)),
    ("all elements at 1e-3 minus LoRA-PAR (at 2e-3), k = 53 to 55: `auto`", "auto all 1e-3", ("auto",)),
    ("the same, slow", "rl all 1e-3", ("rl",)),
    ("the same, fast", "sft all 1e-3", ("sft",)),
)
DEMO_ARMS = {"base": "base, four shots", "sft": "fast", "rl": "slow", "auto": "`auto`"}
MODES: tuple[Contrast, ...] = (
    ("(a) slow minus fast, one step", "rl slow:1", ("rl fast:1",)),
    ("the same, two steps", "rl slow:2", ("rl fast:2",)),
    ("(b) auto minus no modes", "rl auto", ("rl none",)),
    ("(c) RL's gain in auto", "rl auto", ("sft auto",)),
    ("(c) slow minus the better plain SFT", "rl slow", ("sft plain 96", "sft plain 180")),
    ("the same, auto", "rl auto", ("sft plain 96", "sft plain 180")),
    ("(d) auto minus a random mixture of fast and slow with as many tokens", "rl auto", ("mixture",)),
)
MODES_ARMS = {
    "base": "base, four examples",
    "sft auto": "`auto` after SFT",
    "rl fast": "`fast` after RL",
    "rl auto": "`auto`",
    "rl slow": "`slow`",
    "rl none": "no modes",
    "sft plain 96": "plain SFT, 96 steps",
    "sft plain 180": "180 steps",
}
RAFT: tuple[Contrast, ...] = (
    ("D1. GRPO minus RAFT", "rl", ("rl raft",)),
    ("D2. LoRA-PAR minus all elements, after GRPO", "rl", ("rl all",)),
    ("D3. GRPO minus longer SFT, for as many minutes", "rl", ("sft long",)),
    ("D4. GRPO of all elements after longer SFT, minus that SFT", "rl long", ("sft long",)),
    ("D5. GRPO minus GRPO of random elements within each weight", "rl", ("rl within",)),
    ("GRPO minus SFT", "rl", ("sft",)),
    ("RAFT minus SFT", "rl raft", ("sft",)),
    ("RAFT at 3e-4 minus SFT, k = 25 alone", "rl raft 3e-4", ("sft",)),
    ("all elements: GRPO minus SFT", "rl all", ("sft all",)),
    ("all elements: GRPO minus longer SFT", "rl all", ("sft long",)),
    ("D2 on System 1's items", "rl:1", ("rl all:1",)),
    ("D2 on System 2's items", "rl:2", ("rl all:2",)),
    ("LoRA-PAR minus all elements, after SFT", "sft", ("sft all",)),
    ("SFT on all rows worked minus all elements after GRPO", "sft ceiling", ("rl all",)),
)
COUNTS: tuple[Contrast, ...] = (
    ("E1. random within each weight minus important", "sft within", ("sft important",)),
)
RAFT_ARMS = {
    "sft": "SFT",
    "rl": "GRPO",
    "rl raft": "RAFT",
    "rl within": "GRPO, random within each weight",
    "sft all": "all elements: SFT",
    "rl all": "all elements: GRPO",
    "sft long": "longer SFT",
    "rl long": "longer SFT, then GRPO",
    "sft ceiling": "SFT, all rows worked",
}
COUNTS_ARMS = {"sft important": "important", "sft within": "random within each weight"}
DEFAULT: tuple[Contrast, ...] = (
    ("H1. random within each weight minus important", "sft within", ("sft important",)),
)
PROTECT: tuple[Contrast, ...] = (
    ("F1. protected minus random frozen", "sft protect", ("sft random",)),
    ("F2. protected minus the low rate", "sft protect", ("sft low",)),
    ("F3. protected minus replay", "sft protect", ("sft replay",)),
    ("F4. protected minus half the rate", "sft protect", ("sft half",)),
    ("protected minus none at 2e-3", "sft protect", ("sft high",)),
    ("the low rate minus none at 2e-3", "sft low", ("sft high",)),
    ("protected minus the low rate, old items", "sft protect:1", ("sft low:1",)),
    ("the same, new items", "sft protect:2", ("sft low:2",)),
    ("replay minus none at 2e-3", "sft replay", ("sft high",)),
    ("protected minus replay, old items", "sft protect:1", ("sft replay:1",)),
    ("the same, new items", "sft protect:2", ("sft replay:2",)),
    ("protected minus half the rate, old items", "sft protect:1", ("sft half:1",)),
    ("the same, new items", "sft protect:2", ("sft half:2",)),
)
PROTECT_ARMS = {
    "sft protect": "protected, 2e-3",
    "sft random": "random frozen, 2e-3",
    "sft low": "none, 5e-4",
    "sft half": "none, 1e-3",
    "sft high": "none, 2e-3",
    "sft replay": "replay, 2e-3",
}
UNLIKE: tuple[Contrast, ...] = (
    ("G1. LoRA-PAR minus all elements, two checkpoints each", "two split", ("two all",)),
    ("G2. LoRA-PAR, two checkpoints minus one adapter", "two split", ("rl split",)),
    ("G3. LoRA-PAR minus random elements, two checkpoints each", "two split", ("two within",)),
    ("all elements, two checkpoints minus one adapter", "two all", ("rl all",)),
    ("LoRA-PAR minus all elements, SFT alone", "sft split", ("sft all",)),
    ("LoRA-PAR, RL minus SFT on chains", "rl split:2", ("sft split:2",)),
    ("all elements, RL minus SFT on chains", "rl all:2", ("sft all:2",)),
)
UNLIKE_ARMS = {
    "sft split": "LoRA-PAR: SFT",
    "rl split": "LoRA-PAR: one adapter",
    "two split": "LoRA-PAR: two checkpoints",
    "sft all": "all elements: SFT",
    "rl all": "all elements: one adapter",
    "two all": "all elements: two checkpoints",
    "two within": "random: two checkpoints",
}
