"""Log-likelihoods of continuations, in each of the modes of `pldr.evaluation.modes`.

The mode decides what G_LM may see, and so what a score means: a learned one sees the very tokens whose probability is
asked for, a cached one the context alone, a frozen one neither. Sequential scoring lets a learned one see what stands before
each token and nothing after it, as generation without a cache does, at the price of a forward a token.

Sequences of one batch have one length, so that no score depends on padding. In the last two modes continuations of the
same context share one forward of it.
"""

import contextlib
import copy
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from itertools import chain
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import Cache, PreTrainedTokenizerFast

from pldr.cache import make_cache
from pldr.data.rows import choose_passages
from pldr.data.sources import Source
from pldr.engine import NOT_FINITE
from pldr.evaluation.journal import Journal
from pldr.evaluation.modes import SEQUENTIAL, model_in_mode, modes_of
from pldr.evaluation.processes import Processes
from pldr.modeling_pldr import PldrForCausalLM
from pldr.models.shipped import HELD_OUT

# Passages that G_LM is frozen from, if nothing else is said.
_CALIBRATION_PASSAGES = 4
# Tokens of a batch if its size is not given: what keeps two cores, or a GPU, busy; and the most logits of one.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}
_BATCH_LOGITS = 1 << 28
# Of what is scored token by token, the pairs and tokens between two lines of the journal.
_PART_PAIRS, _PART_TOKENS = 64, 2048


# A score in the journal.
_SCORE = {"log_likelihood": float, "is_greedy": bool}


class Score(NamedTuple):
    """Of a continuation: its log-likelihood in nats, and whether greedy decoding would give it."""

    log_likelihood: float
    is_greedy: bool


class Pair(NamedTuple):
    """Token ids of a context, at least one, and of its continuation, at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Scorer:
    """A model in one operator mode.

    Attributes:
        model: what scores; for "frozen" with a constant operator.
        mode: it.
        truncated: contexts so far that were too long for the model and lost their beginning.

    Args:
        model: in float32, float16 or bfloat16; its own dtype is used, and log-softmax in float32.
        mode: "learned", "cached", "frozen" or "sequential".
        calibration: [C, T], what a learned operator is frozen from (the mean over C); for "frozen" only.
        batch_size: sequences of a batch; "auto": as many as fit into some 2,000 tokens on a CPU, 65,000 on a GPU, fewer
            with a large vocabulary.
        processes: that share the batches, each with such a scorer; they must ask for the same scores.
        journal: keeps scores, and has those of an earlier run.

    Raises:
        ValueError: another mode; a constant operator in a mode that needs a learned one; no calibration passages; a batch
            size that is no positive number.
    """

    def __init__(
        self,
        model: PldrForCausalLM,
        mode: str,
        *,
        calibration: torch.Tensor | None = None,
        batch_size: int | str = "auto",
        processes: Processes = Processes(),  # noqa: B008 (a constant)
        journal: Journal | None = None,
    ) -> None:
        if batch_size != "auto" and not (str(batch_size).isdecimal() and int(batch_size) > 0):
            raise ValueError(f"batch_size: must be a positive number or auto, got {batch_size!r}")
        self.model = model_in_mode(model, mode, calibration)
        self.mode = mode
        self.processes = processes
        self.journal = journal or Journal()
        self.truncated = 0
        self.batch_size = None if batch_size == "auto" else int(batch_size)

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    def batches(self, items: Sequence[Any], tokens: int) -> Iterator[Sequence[Any]]:
        """Cut items of so many tokens each into batches."""
        budget = _BATCH_TOKENS["cpu" if self.model.device.type == "cpu" else "cuda"]
        budget = min(budget, _BATCH_LOGITS // self.model.config.vocab_size)
        size = self.batch_size or max(1, budget // tokens)
        for start in range(0, len(items), size):
            yield items[start : start + size]

    @torch.inference_mode()
    def score(
        self,
        pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
        *,
        done: Callable[[int], object] = lambda count: None,
    ) -> list[Score]:
        """Log-likelihood of each continuation after its context.

        Args:
            pairs: contexts and continuations, token ids. Of a context too long for the model the last tokens count.
            done: called with the number of pairs scored since the last call.

        Raises:
            ValueError: an empty context or continuation, or a continuation longer than the model's context.
            FloatingPointError: logits are NaN or infinite.
        """
        fitted = [self._fit(tuple(context), tuple(continuation)) for context, continuation in pairs]
        call = self.journal.call(self.mode, fitted)
        scores = {index: Score(**known) for index, known in self.journal.recall(call, _SCORE).items()}
        done(len(scores))
        score = {"learned": self._score_whole, SEQUENTIAL: self._score_sequential}.get(self.mode, self._score_shared)
        for found in score(fitted, frozenset(scores)):
            self.journal.add(call, {index: score._asdict() for index, score in found.items()})
            done(len(found.keys() - scores))
            scores |= found
        done(len(fitted) - len(scores))
        scores = self.processes.together(scores)
        return [scores[index] for index in range(len(fitted))]

    def _batches(self, by_length: dict[int, list[list[int]]]) -> Iterator[Sequence[list[int]]]:
        """Batches of groups of pairs, those of one length together, longest first."""
        for length, groups in sorted(by_length.items(), reverse=True):
            yield from self.batches(groups, length)

    def _mine(self, batches: Iterable[Sequence[list[int]]], known: Set[int]) -> Iterator[Sequence[list[int]]]:
        """This process's batches, but for those whose scores are all known."""
        return (batch for batch in self.processes.share(batches) if not known >= set(chain.from_iterable(batch)))

    def _fit(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> Pair:
        if not context or not continuation:
            raise ValueError("pairs: a context and a continuation need at least one token each")
        # The last token is only predicted, never read.
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"pairs: a continuation of {len(continuation)} tokens is longer than the context of {self.max_length}"
            )
        self.truncated += len(context) > room
        return Pair(context[-room:], continuation)

    def _score_whole(self, pairs: list[Pair], known: Set[int]) -> Iterator[dict[int, Score]]:
        """One forward of context and continuation, batches of one length, longest first."""
        by_length: dict[int, list[list[int]]] = defaultdict(list)
        # By continuation, because the head works on the longest's positions.
        for index, pair in sorted(enumerate(pairs), key=lambda item: len(item[1].continuation)):
            by_length[len(pair.context) + len(pair.continuation) - 1].append([index])
        for groups in self._mine(self._batches(by_length), known):
            batch = [*chain.from_iterable(groups)]
            ids = self._tensor([[*pairs[i].context, *pairs[i].continuation[:-1]] for i in batch])
            keep = max(len(pairs[index].continuation) for index in batch)
            logits = self.model(ids, use_cache=False, logits_to_keep=keep).logits
            yield {
                index: _score(row[-len(pairs[index].continuation) :].float(), pairs[index].continuation)
                for index, row in zip(batch, logits, strict=True)
            }

    def _score_sequential(self, pairs: list[Pair], known: Set[int]) -> Iterator[dict[int, Score]]:
        """One forward of what stands before each token of a continuation; equal beginnings share it."""
        for (part,) in self._mine(_parts(pairs), known):
            prefixes: dict[int, dict[tuple[int, ...], list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
            for index in part:
                context, continuation = pairs[index]
                for place in range(len(continuation)):
                    before = (*context, *continuation[:place])
                    prefixes[len(before)][before].append((index, place))
            tokens: dict[int, list[Score]] = defaultdict(list)
            for length, members in prefixes.items():
                for batch in self.batches(list(members.items()), length):
                    ids = self._tensor([before for before, _ in batch])
                    logits = self.model(ids, use_cache=False, logits_to_keep=1).logits.float()
                    for row, (_, places) in zip(logits, batch, strict=True):
                        for index, place in places:
                            tokens[index].append(_score(row, pairs[index].continuation[place : place + 1]))
            yield {
                index: Score(math.fsum(t.log_likelihood for t in found), all(t.is_greedy for t in found))
                for index, found in tokens.items()
            }

    def _score_shared(self, pairs: list[Pair], known: Set[int]) -> Iterator[dict[int, Score]]:
        """One forward of each context, then one of the continuations of a batch of contexts of one length."""
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, pair in enumerate(pairs):
            by_context[pair.context].append(index)
        by_length: dict[int, list[list[int]]] = defaultdict(list)
        for context, group in by_context.items():
            by_length[len(context)].append(group)
        for groups in self._mine(self._batches(by_length), known):
            cache = make_cache(self.model.config)
            contexts = self._tensor([pairs[group[0]].context for group in groups])
            first = self.model(contexts, past_key_values=cache, logits_to_keep=1).logits
            members = [(row, index) for row, group in enumerate(groups) for index in group]
            members.sort(key=lambda member: -len(pairs[member[1]].continuation))
            longest = len(pairs[members[0][1]].continuation)
            for part in self.batches(members, contexts.shape[1] + longest):
                rows = torch.tensor([row for row, _ in part], device=first.device)
                rest = self._continue(cache, rows, [pairs[index].continuation for _, index in part])
                logits = torch.cat((first[rows], rest), 1).float()
                yield {
                    index: _score(row[: len(pairs[index].continuation)], pairs[index].continuation)
                    for (_, index), row in zip(part, logits, strict=True)
                }

    def _continue(self, cache: Cache, rows: torch.Tensor, continuations: list[tuple[int, ...]]) -> torch.Tensor:
        """Logits behind each token but the last of continuations, [B, longest - 1, V], each after its row of the cache.

        Shorter ones are filled up at their end, where nothing earlier can see it.
        """
        longest = max(map(len, continuations))
        if longest == 1:
            return torch.empty(len(rows), 0, self.model.config.vocab_size, device=rows.device)
        branch = copy.copy(cache)
        branch.layers = [copy.copy(layer) for layer in cache.layers]
        branch.batch_select_indices(rows)
        ids = self._tensor([[*ids[:-1], *[0] * (longest - len(ids))] for ids in continuations])
        return self.model(ids, past_key_values=branch).logits

    def _tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)


def _parts(pairs: list[Pair]) -> Iterator[list[list[int]]]:
    """Pairs in parts, those of one context together: as many as `_PART_PAIRS` and `_PART_TOKENS` allow."""
    part: list[int] = []
    room = _PART_TOKENS
    for index in sorted(range(len(pairs)), key=lambda index: pairs[index].context):
        count = len(pairs[index].continuation)
        if part and (len(part) == _PART_PAIRS or count > room):
            yield [part]
            part, room = [], _PART_TOKENS
        part.append(index)
        room -= count
    if part:
        yield [part]


def _score(logits: torch.Tensor, continuation: Sequence[int]) -> Score:
    """Of logits [T, V] for a continuation of T tokens. Raises FloatingPointError: they are not finite."""
    ids = torch.tensor(continuation, device=logits.device)
    total = float(logits.log_softmax(-1).gather(1, ids[:, None]).double().sum())
    if not math.isfinite(total):
        raise FloatingPointError(NOT_FINITE)
    return Score(total, bool((logits.argmax(-1) == ids).all()))


def read_calibration(
    tokenizer: PreTrainedTokenizerFast, context: int, files: Sequence[str] | None = None, text_column: str = "text"
) -> torch.Tensor:
    """Passages to freeze G_LM from, [C, T]: of these files, or of the excerpts that ship with pldr.

    Raises:
        ValueError, FileNotFoundError: see `pldr.data.read_passages`.
    """
    source = Source(list(files), text_column) if files else Source([str(HELD_OUT)])
    return choose_passages(source, tokenizer, context, length=None, count=_CALIBRATION_PASSAGES)


def make_scorers(
    model: PldrForCausalLM,
    calibration: torch.Tensor | None = None,
    *,
    batch_size: int | str = "auto",
    processes: Processes = Processes(),  # noqa: B008 (a constant)
    journal: Journal | None = None,
) -> dict[str, Scorer]:
    """A scorer for each mode that the model has: all with a learned operator, "frozen" alone with a constant one.

    Args and raises: see `Scorer`.
    """
    return {
        mode: Scorer(model, mode, calibration=calibration, batch_size=batch_size, processes=processes, journal=journal)
        for mode in modes_of(model)
    }


def mode_disagreement(scorers: dict[str, Scorer], passages: torch.Tensor) -> float:
    """How much the log-likelihood of one continuation depends on the mode: at most, over these passages, in nats.

    The 32 tokens behind each passage's middle are scored after what stands before them. A quick look before scores are
    believed; `pldr certify` is the thorough one.

    Args:
        scorers: of the modes to compare.
        passages: [C, T], T ≥ 4.
    """
    middle = passages.shape[1] // 2
    pairs = [(row[:middle], row[middle : middle + 32]) for row in passages.tolist()]
    found = [[score.log_likelihood for score in scorer.score(pairs)] for scorer in scorers.values()]
    values = torch.tensor(found, dtype=torch.float64)
    return float((values.amax(0) - values.amin(0)).max())


@contextlib.contextmanager
def progress(title: str, total: int, *, disable: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal, and what moves it on."""
    console = Console(stderr=True)
    disable |= os.environ.get("RANK", "0") != "0"  # of several processes, one draws
    if disable or not console.is_terminal:  # a bar that is disabled leaves an empty line, in older releases of rich
        yield lambda count: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
