"""What a model needs on this machine: pieces of the stages' work, computed as they do, timed and weighed.

A piece is a batch of the size that the config asks for, of the longest rows. It is tried on as few rows as
make one (all completions of a prompt, a row for each of two batches), on twice as many, and so on. Where more
would take seconds, or more memory than there is, the last two trials tell of it.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from stages import footprint
from stages.config import Config, RlSection, SftSection
from stages.engines import Ballot, Sampling
from stages.engines.generation import continuations
from stages.engines.transformers import InProcess
from stages.errors import lacks_memory
from stages.language.prompts import Row
from stages.lora import adapter
from stages.lora.importance import moments
from stages.lora.unpadded import group_of, groups_of
from stages.models import flat
from stages.models.base import decoder_layers, load_base
from stages.models.layout import Flat
from stages.pipeline.cost import Memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONG, AT_MOST = 6.0, 20.0
"""Seconds; a piece that would take longer is not computed whole. Two sizes of it are tried, unless the second
would take longer than AT_MOST: what a pass takes beside its rows shows in their difference alone."""
BALLOTS = 64
"""So many votes are computed at most, of a batch of more."""
SHORT = 0.3
"""Seconds; a piece that takes less is computed twice, and the quicker one counts."""
FULL = 0.9
"""Nor one that would need more than this share of the memory."""
NEW = 16
"""Tokens that are written after a prompt, to find out what one takes."""


@dataclass(frozen=True)
class Piece:
    """A batch of work."""

    seconds: float
    mib: float
    """The most memory that was used meanwhile, with the model and all libraries."""
    cache: float = 0.0
    """How much of it is room for keys and values that are kept."""


class Probe:
    """The base model of a config with an adapter, on this process's device."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, trains: bool) -> None:
        """trains: there will be pieces of a training stage."""
        self.trainer = _trainer() if trains else Piece(0.0, 0.0)
        """The library of the trainers, which the other stages do without."""
        footprint.forget()
        begun = time.perf_counter()
        self.config, self.tokenizer = config, tokenizer
        self.base: PreTrainedModel = load_base(config.model)
        self.loading = Piece(time.perf_counter() - begun, footprint.peak())
        self.room = footprint.room()
        weights = {p.data_ptr(): p.nbytes for p in self.base.parameters()}
        self.weights_mib = sum(weights.values()) / footprint.MIB
        layers = [p.nbytes for layer in decoder_layers(self.base) for p in layer.parameters()]
        self.layers_mib = sum(layers) / footprint.MIB
        """What fsdp2 divides."""
        self.adapting = 0.0
        """Seconds that the adapter took to be put in, where a piece has needed it."""
        self._adapted: Any = None

    def choosing(self, ballots: list[Ballot]) -> tuple[Piece, int]:
        """A batch of votes, of engine transformers, and how many of these votes that is."""
        engine = InProcess(self.base, self.tokenizer, self.config.server.batch_size)
        number = engine.at_once(ballots)
        return self._grown(lambda n: list(engine.choose(ballots[:n])), number, most=BALLOTS), number

    def reading(self, prompts: Sequence[list[int]]) -> Piece:
        """Prompts to be read, with the first token of each answer."""
        return self._grown(lambda n: self._write(prompts[:n], 1), len(prompts))

    def writing(self, prompts: Sequence[list[int]], tokens: int) -> tuple[Piece, Piece]:
        """See `reading`; then one more token of every answer.

        tokens: of the longest answer; the second piece has room for it.
        """
        read = self.reading(prompts)
        # Behind one prompt, which is read once, so that the time to read does not hide that of a token.
        same = [sorted(prompts, key=len)[len(prompts) // 2]] * len(prompts)
        first = self._grown(lambda n: self._write(same[:n], 1), len(prompts))
        some = self._grown(lambda n: self._write(same[:n], NEW + 1), len(prompts))
        room = len(prompts) * (max(map(len, prompts)) + tokens) * self._kept_bytes() / footprint.MIB
        peak = max(read.mib, some.mib + room)
        return read, Piece(max(0.0, some.seconds - first.seconds) / NEW, peak, room)

    def comparing(self, ids: list[int]) -> Piece:
        """A prompt and its answer, by plain PEFT."""
        model, row = self._with_adapter().eval(), torch.tensor([ids], device=self.base.device)

        @torch.no_grad()
        def work(_: int) -> None:
            model(input_ids=row)

        return self._grown(work, 1)

    def scoring(self, rows: Sequence[Row]) -> Piece:
        """Two batches of score, the gradients of each row by itself.

        The second does not quite fit where the first was, which takes memory.
        """
        model = self._with_adapter()
        layers, pad = adapter.lora_layers(model), self.tokenizer.pad_token_id

        def work(n: int) -> None:
            model.requires_grad_(False)
            model.eval()
            batches = [list(rows[: n // 2]), list(rows[n // 2 : n])]
            moments(model, layers, batches, lambda _: None, pad)

        return self._grown(work, len(rows), step=2, lengths=[len(row.input_ids) for row in rows])

    def tuning(self, rows: Sequence[Row], sft: SftSection) -> Piece:
        """A micro batch of SFT, forward and backward."""
        pairs = [(row.input_ids, row.labels) for row in rows]

        def row(n: int) -> Flat:
            ids, labels = (list(part) for part in zip(*pairs[:n], strict=True))
            return Flat.of([group_of(ids, labels, shares=not sft.dropout)], self.base.device)

        made = row if sft.padding_free == "auto" else None
        return self._trained(made, [list(ids) for ids, _ in pairs], sft)

    def steering(self, prompts: Sequence[list[int]], rl: RlSection) -> Piece:
        """A micro batch of GRPO, forward and backward: one of `prompts` for each of its completions.

        A completion repeats its prompt, as in `stages.lora.rehearsal`, and is as long as may be.
        """
        tokens = rl.max_completion
        answers = [(ids * (1 + -(-tokens // len(ids))))[:tokens] for ids in prompts]

        def row(n: int) -> Flat:
            return Flat.of(groups_of(list(prompts[:n]), answers[:n]), self.base.device)

        whole = [[*ids, *answer] for ids, answer in zip(prompts, answers, strict=True)]
        shared = shares_prompts(rl)
        made, step = (row, rl.group) if shared else (None, 1)
        return self._trained(made, whole, rl, step)

    def _trained(
        self,
        row: Callable[[int], Flat] | None,
        padded: list[list[int]],
        section: SftSection | RlSection,
        step: int = 1,
    ) -> Piece:
        """row: so many rows without padding; None: as the library computes them. padded: all rows."""
        model, checkpointing = self._with_adapter(), section.gradient_checkpointing
        unpadded = row is not None and flat.fits(model, padded[0])

        def work(n: int) -> None:
            model.train()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(model.prefix in name)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                model.enable_input_require_grads()
            if row and unpadded:
                flat.choose(model, row(n)).log_probs.sum().backward()
            else:
                width = max(map(len, padded))
                ids = torch.tensor([(ids * width)[:width] for ids in padded[:n]], device=self.base.device)
                model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()
            if checkpointing:
                model.gradient_checkpointing_disable()

        with adapter.dropping_out(model, section.dropout):  # which is kept for the backward pass
            return self._grown(work, len(padded), step, lengths=list(map(len, padded)) if unpadded else ())

    def _with_adapter(self) -> Any:
        """How the adapter begins does not matter here."""
        if self._adapted is None:
            lora = self.config.lora
            rank = lora.r * (2 if lora.compensated else 1)
            lora = lora.model_copy(update={"init": "normal", "compensate": False, "r": rank})
            begun = time.perf_counter()
            self._adapted = adapter.initial(self.base, lora, self.config.seed)
            self.adapting = time.perf_counter() - begun
        return self._adapted

    def copy_mib(self) -> float:
        """The copy of the base that rollouts on a CPU merge the adapter into."""
        return 0.0 if self.config.model.load_in_4bit else self.second_mib()

    def second_mib(self) -> float:
        """The base once more: on a GPU no stage holds it twice."""
        return self.weights_mib if self.base.device.type == "cpu" else 0.0

    def optimizer_mib(self) -> float:
        """Gradients, Adam's two moments and the index of a packed adapter of which every element trains."""
        layers = adapter.lora_layers(self._with_adapter()).values()
        return sum(layer.weight.numel() for layer in layers) * 16 / footprint.MIB

    def memory(self, whole: float, optimizer: float = 0.0, cache: float = 0.0, copy: float = 0.0) -> Memory:
        """A peak by what fills it. copy: a second model."""
        layers = adapter.lora_layers(self._adapted).values() if self._adapted else ()
        adapted = sum(layer.weight.nbytes for layer in layers) / footprint.MIB
        libraries = max(0.0, self.loading.mib - self.weights_mib)
        return Memory(whole, self.weights_mib + adapted + copy, optimizer, cache, libraries)

    def _write(self, prompts: Sequence[list[int]], tokens: int) -> None:
        """By the merged copy, or where there is none through the adapter, if there is one by now."""
        merged = self._adapted.disable_adapter() if self._adapted and self.copy_mib() else nullcontext()
        model = self.base if self._adapted is None else self._adapted
        with merged:
            made = continuations(
                model, self.tokenizer, list(prompts), Sampling(tokens, ()), slots=len(prompts)
            )
            deque(made, maxlen=0)

    def _kept_bytes(self) -> int:
        """Keys and values of one token, in all layers."""
        config = self.base.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * width * self.base.dtype.itemsize)

    def _grown(
        self,
        work: Callable[[int], Any],
        whole: int,
        step: int = 1,
        most: float = math.inf,
        lengths: Sequence[int] = (),
    ) -> Piece:
        """What `work` on so many rows needs.

        step: how many rows belong together. most: how many are tried; what more need is told from these, by
        their tokens where `lengths` has those of each row.
        """
        upto = list(accumulate(lengths, initial=0)) if lengths else range(whole + 1)
        size = min(step, whole)
        work(size)  # the first pass of a kind takes longer
        tried = [(0, Piece(0.0, self.loading.mib)), (size, _weighed(functools.partial(work, size)))]
        while (now := tried[-1])[0] < whole:
            size = min(2 * now[0], whole)
            slow = size / now[0] * now[1].seconds > (LONG if len(tried) > 2 else AT_MOST)
            if slow or size > most or _line(tried, size, upto).mib > FULL * self.room:
                return _line(tried, whole, upto)
            try:
                tried.append((size, _weighed(functools.partial(work, size))))
            except Exception as error:
                if lacks_memory(error):
                    return _line(tried, whole, upto)
                raise
        return tried[-1][1]


def shares_prompts(rl: RlSection) -> bool:
    """Whether each prompt is computed once for all its completions, where the architecture allows it."""
    return rl.shared_prompts == "auto" and not rl.dropout


def _trainer() -> Piece:
    import peft  # noqa: F401  # all stages have it

    footprint.forget()
    before, begun = footprint.peak(), time.perf_counter()
    from trl import GRPOTrainer, SFTTrainer  # noqa: F401

    return Piece(time.perf_counter() - begun, footprint.peak() - before)


def _line(tried: list[tuple[int, Piece]], size: int, upto: Sequence[int]) -> Piece:
    """What is to be expected of so many rows after the last two trials. upto: how much so many rows are."""
    (few, less), (many, more) = tried[-2:]
    further = (upto[size] - upto[many]) / (upto[many] - upto[few])
    return Piece(
        more.seconds + further * max(0.0, more.seconds - less.seconds),
        more.mib + further * max(0.0, more.mib - less.mib),
    )


def _weighed(call: Callable[[], Any]) -> Piece:
    footprint.forget()
    seconds = _timed(call)
    if seconds < SHORT:
        seconds = min(seconds, _timed(call))
    return Piece(seconds, footprint.peak())


def _timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun
