"""What a GRPO step costs: lorapar's and TRL's on plain LoRA, side by side in one process.

    python benchmarks/rl.py MODEL [--prompts 8] [--group 8] [--prompt 64]
        [--prompts-file ROWS] [--completion 8-40]
        [--micro-batch 16] [--pairs 5] [--share 0.4] [--equal 0] [--int8] [--grow] [--no-memory]

Theirs: an untouched `trl.GRPOTrainer` on plain LoRA by PEFT, of which every element trains. Ours: the
trainer of `lorapar rl`, with `--share` of the elements packed (random masks), shared prompts, and on CPU a
merged copy to sample from. Both stand on the weights of one base model as lorapar loads it, so that what its
loading saves on CPU is saved for TRL, too. They have the same LoRA, the same GRPOConfig (no gradient
checkpointing, no KL term) and the same trivial reward: whether the length of a completion is odd.

A whole step is what `Trainer.train` does from the begin to the end of an epoch of one step: data, rollouts,
rewards, advantages, all micro batches, clipping, AdamW, the schedule, logging. No checkpoint is written. What
`train` does before and after that epoch does not count. The parts: rollouts, the trainer's call that samples
(ours merges the weights in it); loss + backward, `training_step` less what prepares its inputs; update, from
clipping to the optimizer's end; rest, all else. In each pair both do one step on the same prompts, in an
order drawn at random; one step each before warms up. In a share `--equal` of the groups all lengths are odd,
so that their completions earn the same. Ratios are theirs / ours, medians of pairs, with a bootstrap
interval.

Both write completions of the same lengths, uniform in `--completion`, drawn in advance for each row. The same
function sees to it on both sides: just before a token is drawn, it writes into the logits, so that no stop
token can come before the length and only one can come there. TRL's side gets it as the last logits processor
of `generate`, ours around the method that picks tokens; it writes a column of logits per token, and a row per
completion. That all lengths came out is asserted.

`--int8` adds a third side: ours with `rl.rollouts.int8`.

Peak memory: that of a process (of the device, on a GPU) which does two steps of one side only.

`--grow` instead makes a table of the whole step, by the size of the group (2 prompts) and by the length of
the prompts (one group of 8). Its micro batches are halved, for both, until they are no longer than
TOKENS.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from grpo import INT8, PARTS, SIDES, Bench, Shape
from measure import from_to, machine, options, peaks, ratio

from stages.runtime import resources

TOKENS = 4400
"""Of a micro batch in the table at most: TRL keeps 2.9 MB per token of SmolLM2-135M for the backward pass."""


def compared(
    seconds: dict[str, list[dict[str, float]]], part: str, name: str = SIDES[1]
) -> tuple[str, float, float]:
    """Theirs / ours, or the side `name`'s, and the median seconds of both."""
    theirs, ours = ([step[part] for step in seconds[side]] for side in (SIDES[0], name))
    return ratio(theirs, ours), statistics.median(theirs), statistics.median(ours)


def setting(bench: Bench) -> str:
    given = bench.given
    return (
        f"{given.model}, {given.dtype}, attention {given.attention}, {given.share:g} of the elements active, "
        f"{given.equal:g} of the groups with equal rewards, {given.pairs} pairs, "
        f"{machine(bench.base.device)}"
    )


def report(bench: Bench, shape: Shape) -> None:
    batches, seconds = bench.pairs(shape)
    print("ratio", compared(seconds, "whole step")[0])
    sizes = [len(ids) for batch in batches for ids in batch.prompts.values()]
    print(
        f"{shape}, prompts of {min(sizes)}-{max(sizes)} tokens, micro batches of {shape.micro_batch}; "
        f"{setting(bench)}"
    )
    for name in list(seconds)[1:]:
        for part in PARTS:
            ratios, theirs, ours = compared(seconds, part, name)
            print(f"{part:<15} {ratios}: TRL {theirs:.4g} s, {name} {ours:.4g} s")
    speeds = [
        statistics.median(sum(b.lengths) / step["rollouts"] for b, step in zip(batches, steps, strict=True))
        for steps in seconds.values()
    ]
    rates = zip(seconds, speeds, strict=True)
    print("rollouts:", *(f"{name} {speed:.0f} tokens/s;" for name, speed in rates))
    if bench.given.memory:
        del bench.base  # each process has its own
        resources.release_memory()
        print(peaks(__file__))


def grow(bench: Bench, shape: Shape) -> None:
    grown = [replace(shape, prompts=2, group=group, prompt=64) for group in (4, 8, 16, 32)]
    grown += [replace(shape, prompts=1, group=8, prompt=prompt) for prompt in (64, 256, 1024)]
    print(setting(bench))
    print("| prompts | tokens of one | group | micro batch | ratio of the whole step | TRL, s | lorapar, s |")
    print("|---|---|---|---|---|---|---|")
    for shape in grown:
        shape = replace(shape, micro_batch=min(shape.micro_batch, shape.prompts * shape.group))
        while shape.micro_batch * (shape.prompt + shape.completion[1]) > TOKENS:
            shape = replace(shape, micro_batch=shape.micro_batch // 2)
        ratios, theirs, ours = compared(bench.pairs(shape)[1], "whole step")
        cells = (shape.prompts, shape.prompt, shape.group, shape.micro_batch, ratios)
        print("|", *(f"{cell} |" for cell in cells), f"{theirs:.2f} | {ours:.2f} |", flush=True)


def main() -> None:
    rows = {"prompts": 8, "group": 8, "prompt": 64, "completion": "8-40", "micro_batch": 16, "pairs": 5}
    others = {"share": 0.4, "equal": 0.0, "dtype": "float32", "attention": "eager"}
    parser = options(__doc__, "model", **rows, **others)
    parser.add_argument("--prompts-file", help="JSON lines with a `question`, instead of random prompts")
    parser.add_argument("--grow", action="store_true", help="a table of ratios by group and prompt instead")
    parser.add_argument("--int8", action="store_true", help="ours once more, sampling in 8 bits")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--only", choices=(*SIDES, INT8), help=argparse.SUPPRESS)
    given = parser.parse_args()

    if round(given.equal * given.prompts) != given.equal * given.prompts or (given.equal and given.grow):
        parser.error("--equal must be a share of whole prompts, and is not for --grow")
    completion = from_to(given.completion)
    if completion[0] == completion[1]:
        parser.error("--completion: lengths that are all odd, or all even, earn the same; name a range")
    shape = Shape(given.prompts, given.group, given.prompt, completion, given.micro_batch)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        if given.only:
            batches = bench.batches(shape, 2)
            side = bench.side(given.only, bench.base, shape, batches)
            for batch in batches:
                side.step(batch)
            print(resources.peak_device_memory())
        elif given.grow:
            grow(bench, shape)
        else:
            report(bench, shape)


if __name__ == "__main__":
    main()
