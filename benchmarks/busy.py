"""What a wait of OpenMP's threads costs, alone and beside two busy loops: votes, an SFT step, a GRPO step.

    python benchmarks/busy.py MODEL ROWS [--spins 10000] [--rounds 5] [--units 3] [--limit 120] [--quick]

`default` is the library's own GOMP_SPINCOUNT; `--spins` are others: lorapar's is 10000, if a person has set
none. The library reads it when it is loaded, so that each measurement is a process of its own. It loads the
model, does one unit of work to warm up, and then `--units`: 64 votes of the in-process engine, an SFT step
of 16 rows, a GRPO step of 8 prompts by 8 completions. In each round every work is measured with every setting
in an order drawn at random, and in the first round beside busy loops, too. A time is the median of a
process's units; one that takes longer than `--limit` seconds is cut, and is a lower bound. The ratio is
default / other, of pairs in one round.

`--quick` is two rounds of one unit: about ten minutes on two cores, three of them for what is cut.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from measure import now, options, ratio

from stages.runtime import process_guard

WORKS = ("votes", "sft", "rl")
VOTES, LOOPS = 64, 2
CUT = "cut"
WAITS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
Measured = tuple[float, bool]
"""Seconds of a unit, and whether it was cut."""


def votes(given: argparse.Namespace) -> Callable[[], object]:
    from stages.config import ModelSection, ServerSection
    from stages.data.rows import read
    from stages.engines import EngineCache, EngineSpec
    from stages.labelling.personas import PersonaContext, personas

    brief = PersonaContext(given.model, False)
    examples = read(_data(given))[:VOTES]
    ballots = [personas.pick("effort")(example, brief) for example in examples]
    model = ModelSection(name=given.model, attention="eager")
    engine = EngineCache().get(EngineSpec("transformers", model), ServerSection(), lambda _: None)
    return lambda: list(engine.choose_words(ballots))


def sft(given: argparse.Namespace, folder: str) -> Callable[[], object]:
    from sft import Side

    from stages.config import ModelSection, PromptSection
    from stages.data.rows import read
    from stages.models.base import load_base
    from stages.models.tokenizer import load_tokenizer
    from stages.prompts.renderer import Renderer

    model = ModelSection(name=given.model, attention="eager")
    renderer = Renderer(load_tokenizer(model), PromptSection())
    rows, _ = renderer.rows(read(_data(given)), _data(given))
    shape = argparse.Namespace(batch=16, micro_batch=16, share=0.4)
    side = Side("lorapar", load_base(model), renderer, shape, folder)
    return lambda: side.step(rows[: shape.batch])


def rl(given: argparse.Namespace, folder: str) -> Callable[[], object]:
    from grpo import Bench, Shape

    shape = Shape(prompts=8, group=8, prompt=64, completion=(8, 40), micro_batch=32)
    asked = {"dtype": "auto", "attention": "eager", "prompts_file": None, "equal": 0, "share": 0.4}
    bench = Bench(argparse.Namespace(model=given.model, **asked), Path(folder))
    batches = bench.batches(shape, 1)
    side = bench.side("lorapar", bench.base, shape, batches)
    return lambda: side.step(batches[0])


def _data(given: argparse.Namespace):  # type: ignore[no-untyped-def]
    from stages.config import DataSection

    return DataSection(path=given.rows)


def one(given: argparse.Namespace) -> None:
    """Print the seconds of each unit, the one that warms up first."""
    with tempfile.TemporaryDirectory() as folder:
        unit = votes(given) if given.only == "votes" else {"sft": sft, "rl": rl}[given.only](given, folder)
        begun = now()

        def cut(*_: object) -> None:
            print(time.perf_counter() - begun, CUT, flush=True)
            os._exit(0)

        signal.signal(signal.SIGALRM, cut)
        for _ in range(given.units + 1):
            begun = now()
            signal.alarm(given.limit)
            unit()
            print(now() - begun, flush=True)
        signal.alarm(0)


def measured(given: argparse.Namespace, work: str, spins: str) -> Measured:
    environment = {name: value for name, value in os.environ.items() if name not in WAITS}
    if spins != "default":
        environment["GOMP_SPINCOUNT"] = spins
    command = [sys.executable, __file__, *sys.argv[1:], "--only", work]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    whole = [float(line[0]) for line in lines[1:] if CUT not in line]
    return (statistics.median(whole), False) if whole else (float(lines[-1][0]), CUT in lines[-1])


@contextlib.contextmanager
def busy() -> Iterator[None]:
    loop = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(loop, preexec_fn=process_guard.end_with_parent) for _ in range(LOOPS)]
    try:
        yield
    finally:
        for process in loops:
            process.kill()
            process.wait()


def shown(times: list[Measured]) -> str:
    return f"{'> ' if any(cut for _, cut in times) else ''}{statistics.median(t for t, _ in times):.2f}"


def main() -> None:
    parser = options(__doc__, "model", "rows", rounds=5, units=3, limit=120)
    parser.add_argument("--spins", nargs="+", default=["10000"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=WORKS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.units, given.limit = 2, 1, 60
    if given.only:
        one(given)
        return
    settings = ["default", *given.spins]
    times: dict[tuple[str, str, str], list[Measured]] = {}
    for number in range(given.rounds):
        for where, context in (("alone", contextlib.nullcontext), ("busy", busy))[: 2 if number == 0 else 1]:
            for work in WORKS:
                for spins in random.sample(settings, len(settings)):
                    with context():
                        result = measured(given, work, spins)
                    times.setdefault((where, work, spins), []).append(result)
                    print(f"round {number}, {where}, {work}, {spins}: {shown([result])} s", flush=True)
    print(f"\n{given.model}, {given.rounds} rounds, {given.units} units each, {os.cpu_count()} cores")
    print("| work | where | default, s | spins | s | default / spins |\n|---|---|---|---|---|---|")
    for (where, work, spins), others in times.items():
        if spins != "default":
            usual = times[where, work, "default"]
            least = "> " if any(cut for _, cut in usual) else ""
            ratios = ratio((seconds for seconds, _ in usual), (seconds for seconds, _ in others))
            print(f"| {work} | {where} | {shown(usual)} | {spins} | {shown(others)} | {least}{ratios} |")


if __name__ == "__main__":
    main()
