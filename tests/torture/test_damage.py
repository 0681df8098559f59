"""No damaged file is believed, and no odd config, row or reply gives a traceback or a hang."""

import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import hypothesis
import pytest
from conftest import ROOT, make_steps, paths
from hypothesis import strategies as st
from tally import FULL, SEED, Tally

from stages.config import Config
from stages.config.listing import setting_names
from stages.data.rows import read
from stages.errors import LoraparError
from stages.pipeline.resolve import load, resolved
from stages.pipeline.state import state
from stages.pipeline.steps import plan_steps
from stages.store.artifacts import Store

pytestmark = pytest.mark.slow
TIMES = 10 if FULL else 1
LIMIT_S = 10


class Hang(Exception):
    """It took longer than LIMIT_S."""


@contextmanager
def trying(tally: Tally, title: str) -> Iterator[None]:
    """One try: an error of ours is an answer, any other exception is a traceback."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    tally.tried += 1
    try:
        yield
    except LoraparError:
        pass
    except Hang:
        tally.hangs.append(title)
    except Exception as error:
        tally.tracebacks.append(f"{title}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def store(tiny, demo_data, tmp_path_factory) -> Config:
    """A config of which every artifact is there, with journals of votes and of answers."""
    folder = tmp_path_factory.mktemp("damage")
    settings = [
        *paths(tiny, demo_data, folder), "data.limit=24", "score.examples=4", "sft.max_steps=2",
        "rl.max_steps=2", "rl.max_completion_length=4", "eval.benchmarks.demo.limit=4",
    ]  # fmt: skip
    config = resolved(load(ROOT / "configs/smoke.yaml", settings))
    make_steps(config)
    return config


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a bit flipped, cut, longer, with a hole, or others; or JSON of another shape."""
    if rng.random() < 0.4 and (other := misshapen(data, rng)) is not None:
        return other
    if not data:
        return rng.randbytes(rng.randint(1, 9))
    at = rng.randrange(len(data))
    return rng.choice([
        data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
        data[:at], data + rng.randbytes(rng.randint(1, 9)), data[:at] + bytes(len(data) - at),
        rng.randbytes(len(data)), b"",
    ])  # fmt: skip


def misshapen(data: bytes, rng: random.Random) -> bytes | None:
    """Well-formed JSON, or JSON Lines, in which one value is odd, twice, or gone; None if it is neither."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines)) if len(lines) > 1 and b"{" in lines[0] and b"}" in lines[0] else None
    try:
        tree = [json.loads(data if at is None else lines[at])]
    except ValueError:
        return None
    place, key = tree, 0
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    how = rng.randrange(4)
    if how == 0 and place is not tree:
        del place[key]
    elif how == 1:
        place[key] = [place[key], place[key]]
    elif how == 2 and isinstance(place, dict):
        place[rng.choice(["", "more", "seal", "0"])] = place[key]
    else:
        place[key] = rng.choice(PIECES)
    text = json.dumps(tree[0]).encode()
    return text if at is None else b"".join([*lines[:at], text + b"\n", *lines[at + 1 :]])


def test_damaged_files(store, tally):
    """Artifacts: manifests and what they list. The step is then not current, whatever it is called."""
    root = store.root
    steps = list(plan_steps(store).values())
    files = [f for f in root.rglob("*") if f.is_file() and not f.is_symlink() and not f.name.startswith(".")]
    files = [f for f in files if f.parent != root and "checkpoints" not in f.parts]
    whole = {now.artifact.path for s in steps if (now := state(Store(root), s)).state == "current"}
    assert whole == {root / Path(*f.relative_to(root).parts[:2]) for f in files}
    assert len(whole) == len(steps) == 11
    for _ in range(500 * TIMES):
        file = tally.random.choice(files)
        before = file.read_bytes()
        after = spoilt(before, tally.random)
        with suppress(ValueError):  # of a manifest the content is sealed: it may have one more line break
            if after == before or (file.name == "manifest.json" and json.loads(before) == json.loads(after)):
                continue
        file.write_bytes(after)
        folder = root / Path(*file.relative_to(root).parts[:2])
        with trying(tally, str(file)):
            now = {s.name: state(Store(root), s) for s in steps}
            believed = [n for n, s in now.items() if s.state == "current" and s.artifact.path == folder]
            tally.lost += [f"{file}: {name} was believed" for name in believed]
        file.write_bytes(before)


ODD = [
    "", "null", "true", "-1", "0", "1e400", ".inf", ".nan", "9" * 30, "9" * 5000, "x", "[]", "[1]", "{}",
    "{a: 1}", "2020-01-01", "'\\0'", '"\\ud800"', "!!python/object:os.system x", "*a", "&a [*a]", "[" * 200,
    "{" * 200, "- -", "\t", "!!binary x", "0x7fffffffffffffff", "1_000", "1:30", "~", "é" * 3000, "[[[[]]]]",
    "{1: 2}", "{null: null}", "|", ">",
]  # fmt: skip
"""Values as a person may type them."""


def test_odd_settings(tiny, demo_data, tmp_path, tally):
    """Every setting with every odd value; and damaged files of settings."""
    known = [*paths(tiny, demo_data, tmp_path), "data.limit=4"]
    pairs = [(name, value) for name in setting_names(Config) for value in ODD]
    for name, value in pairs if FULL else tally.random.sample(pairs, 500):
        with trying(tally, f"{name}={value[:40]}"):
            config = load(ROOT / "configs/smoke.yaml", [*known, f"{name}={value}"])
            json.dumps(config.model_dump(mode="json"), allow_nan=False)
    for _ in range(250 * TIMES):
        (tmp_path / "config.yaml").write_bytes(
            spoilt((ROOT / "configs/demo.yaml").read_bytes(), tally.random)
        )
        with trying(tally, "a file"):
            load(tmp_path / "config.yaml", [])


PIECES: list[object] = [
    None, True, 0, -1, 10**30, 1.5, "", " ", "x", "\0", "\u2028", "#### 7", "####", "a" * 70000, " " * 70000,
    [], [1], {}, {"role": "user"}, [{"role": "user", "content": "x"}], [{"role": "user", "content": None}],
    "9" * 5000, "1/0", "½",
]  # fmt: skip
FIELDS = ["question", "answer", "instruction", "input", "output", "context", "response", "messages", "prompt",
          "completion", "gold", "id", "system", "intended"]  # fmt: skip


TEXT = st.text(st.characters(exclude_categories=[]), max_size=12)
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(PIECES)
JSON = st.recursive(LEAF, lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXT, part, max_size=3))


def test_odd_rows(tmp_path, tally):
    """Rows from a grammar, half of them in a damaged file."""
    file = tmp_path / "rows.jsonl"
    source = Config.model_validate({"model": {"name": "m"}, "data": {"path": str(file)}}).data
    row = st.dictionaries(st.sampled_from(FIELDS) | TEXT, JSON, max_size=5)

    @hypothesis.seed(SEED)
    @hypothesis.settings(max_examples=2000 if FULL else 200, deadline=None, database=None)
    @hypothesis.given(st.lists(row | JSON, min_size=1, max_size=4), st.booleans())
    def check(rows, damaged):
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file.write_bytes(spoilt(data, random.Random(len(data))) if damaged else data)
        with trying(tally, repr(rows)[:300]):
            read(source)

    check()


def test_odd_places(tiny, model_copy, demo_data, tmp_path, tally):
    """Paths that lead nowhere, in circles, or to what is no file."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder.jsonl").mkdir()
    (model_copy / "config.json").unlink()
    names = ("loop", "dangling", "pipe", "folder.jsonl", "model", "none", "a" * 300)
    odd = [tmp_path / name for name in names]
    odd += [Path("/dev/null"), Path("/proc/self/mem"), Path("/"), Path("x" * 5000), Path("/dev/zero/x")]
    known = [*paths(tiny, demo_data, tmp_path), "classify.strategy=known"]
    for name in ("model.name", "data.path", "classify.labels_file", "eval.benchmarks.demo.path", "runs_dir"):
        for path in odd:
            with trying(tally, f"{name}={path}"[:200]), suppress(OSError):  # the edge has a sentence for each
                plan_steps(resolved(load(ROOT / "configs/smoke.yaml", [*known, f"{name}={path}"])))
