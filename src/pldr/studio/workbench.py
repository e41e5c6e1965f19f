"""What the studio's page asks of a model: texts token by token, the operator's tensors, and the model with other operators."""

import base64
import copy
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerFast

from pldr.checkpoints.load import load_predefined_G
from pldr.data.rows import read_passages
from pldr.data.sources import Source
from pldr.deductive import deductive_outputs, log_determinant, numerical_rank
from pldr.engine import Engine, Options
from pldr.engine.text import TokenTexts, continuation
from pldr.modeling_pldr import PldrForCausalLM
from pldr.models.shipped import HELD_OUT
from pldr.operator import DeductiveOutputs, factor, freeze, stored_operator
from pldr.studio.pieces import CONSTANTS, OWN, RANK_STEP, given, written
from pldr.study.certify import losses_of
from pldr.study.compress import Factors, factors_of, moments_of
from pldr.tokenizer import check_text, encode_prompt

TENSORS = ("A", "A_LM", "A_P", "G_LM")
# Passages that an operator is frozen from, and their length.
_PASSAGES, _LENGTH = 4, 256
# Texts whose tensors, and operators whose models, are kept.
_KEPT = 8


class Workbench:
    """A model, and the same weights with other operators. One request at a time works on it.

    Attributes:
        operators: those that can be chosen by name; besides, "factored:R" and those that `add_operator` gives.
    """

    def __init__(self, model: PldrForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.config = model.config
        self.learned = self.config.operator == "learned"
        self.operators = [*(OWN if self.learned else ["stored"]), *CONSTANTS]
        self.texts = TokenTexts(tokenizer)
        self.lock = threading.RLock()
        self._models: OrderedDict[str, PldrForCausalLM] = OrderedDict()
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._outputs: OrderedDict[tuple[str, tuple[int, ...]], DeductiveOutputs] = OrderedDict()
        self._given: OrderedDict[str, torch.Tensor] = OrderedDict()  # operators from files, the last few
        self._files = 0
        self._factors: list[Factors] | None = None

    def warm_up(self) -> None:
        """Make what the first switches would wait for."""
        for operator in self.operators[:3]:
            with self.lock:
                self._engine(operator)
        for operator in self.operators:
            with self.lock:
                self.with_operator(operator)
        with self.lock:
            whole, passages = self._copy(self._whole()), self._passages()
        factors = _factors_from(whole, passages)  # which takes seconds of a large model, and nobody waits for it
        with self.lock:
            self._factors = factors

    def facts(self) -> dict[str, Any]:
        c = self.config
        return {
            "name": self.name, "kind": c.operator, "layers": c.num_hidden_layers, "heads": c.num_attention_heads,
            "head_dim": c.head_dim, "context": c.max_position_embeddings, "parameters": self.model.num_parameters(),
            "operators": [*self.operators, *self._given], "largest_rank": c.head_dim, "rank_step": RANK_STEP,
        }  # fmt: skip

    # --- texts --------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Raises ValueError: not valid, or longer than the context."""
        ids = encode_prompt(self.tokenizer, check_text(text, "text"))
        if len(ids) > self.config.max_position_embeddings:
            raise ValueError(
                f"text: has {len(ids)} tokens, the model's context is {self.config.max_position_embeddings}"
            )
        return ids

    def tokens(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        return given(self.texts, ids)

    def write(
        self, prompt: str | None, ids: list[int] | None, operator: str, options: Options
    ) -> Iterator[dict[str, Any]]:
        """The tokens of a prompt or of ids, then as `generate`."""
        ids = self.encode(prompt or "") if ids is None else ids
        steps = self.generate(ids, operator, options)
        first = next(steps)  # what is wrong shows here
        yield {"prompt": self.tokens(ids)}
        yield first
        yield from steps

    def generate(self, ids: list[int], operator: str, options: Options) -> Iterator[dict[str, Any]]:
        """One token after the other, with the most probable ones at its place; last, why it ended.

        "learned" works G_LM out anew for every token, from all before it; "cached" keeps the prompt's.

        Raises:
            ValueError: settings or ids outside their ranges; before the first token.
        """
        steps = self._anew(ids, options) if operator == "learned" else self._cached(ids, operator, options)
        return written(self.texts, steps)

    def _cached(self, ids: list[int], operator: str, options: Options) -> Iterator[tuple[Any, ...]]:
        with self.lock:
            engine = self._engine(operator)
            request = engine.submit(ids, options)
        seen = 0
        try:
            while request.finish_reason is None or seen < len(request.token_ids):
                with self.lock:
                    if request.finish_reason is None:
                        engine.step()
                if request.error is not None:
                    raise request.error
                while seen < len(request.token_ids):
                    ended = request.finish_reason if seen == len(request.token_ids) - 1 else None
                    yield request.token_ids[seen], request.logprobs[seen], request.top_logprobs[seen], ended
                    seen += 1
        finally:
            with self.lock:
                engine.cancel(request)

    def _anew(self, ids: list[int], options: Options) -> Iterator[tuple[Any, ...]]:
        fields = {name: getattr(options, name) for name in options.__dataclass_fields__}
        room = self.config.max_position_embeddings - len(ids)
        for place in range(min(options.max_new_tokens or room, room)):
            seed = None if options.seed is None else options.seed + place
            with self.lock:
                engine = self._engine("cached")
                [one] = engine.generate([ids], Options(**fields | {"max_new_tokens": 1, "seed": seed}))
            assert one.logprobs is not None
            assert one.top_logprobs is not None
            yield one.token_ids[0], one.logprobs[0], one.top_logprobs[0], one.finish_reason
            ids = [*ids, one.token_ids[0]]

    # --- the same weights with another operator -----------------------------------------------------------------------

    def add_operator(self, file: Path) -> str:
        """An operator from a file, under the name that it can be chosen by. Raises ValueError: not one that fits."""
        G_LM = load_predefined_G(file)
        with self.lock:
            freeze(self._copy(), G_LM=G_LM)  # to be refused now, if at all
            self._files += 1
            name = f"file:{self._files}"
            _kept(self._given, name, lambda: G_LM)
        return name

    def with_operator(self, operator: str) -> PldrForCausalLM:
        """The model with an operator by name; its other weights are shared. Raises ValueError: there is none of this name."""
        if operator in ("learned", "cached", "stored") and operator in self.operators:
            return self.model
        return _kept(self._models, operator, lambda: self._made(operator))

    def _made(self, operator: str) -> PldrForCausalLM:
        kind, _, which = operator.partition(":")
        if operator in self._given:
            return freeze(self._copy(), G_LM=self._given[operator])
        if kind == "factored" and which.isascii() and which.isdigit() and 1 <= int(which) <= self.config.head_dim:
            rank = min(-(-int(which) // RANK_STEP) * RANK_STEP, self.config.head_dim)
            return factor(self._copy(), [layer.cut(rank) for layer in self._all_factors()])
        if operator == "frozen" and self.learned:
            return freeze(self._copy(), self._passages())
        shape = (
            self.config.num_hidden_layers,
            self.config.num_attention_heads,
            self.config.head_dim,
            self.config.head_dim,
        )
        dice = torch.Generator().manual_seed(0)
        if operator == "identity":
            return freeze(self._copy(), G_LM=torch.eye(shape[-1]).expand(shape))
        if operator == "uniform":
            return freeze(self._copy(), G_LM=torch.rand(shape, generator=dice))
        if operator == "normal":
            return freeze(self._copy(), G_LM=torch.randn(shape, generator=dice))
        raise ValueError(
            f"operator: there is no {operator!r}; there are {', '.join([*self.operators, *self._given])} and factored:R"
        )

    def _copy(self, model: PldrForCausalLM | None = None) -> PldrForCausalLM:
        """The model, or another one, with modules of its own and the same parameters."""
        model = model or self.model
        return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})

    def _passages(self) -> torch.Tensor:
        length = min(_LENGTH, self.config.max_position_embeddings)
        return read_passages(Source([str(HELD_OUT)]), self.tokenizer, length, _PASSAGES).to(self.model.device)

    def _all_factors(self) -> list[Factors]:
        if self._factors is None:
            self._factors = _factors_from(self._whole(), self._passages())
        return self._factors

    def _whole(self) -> PldrForCausalLM:
        """The model with the constant operator that is factored."""
        return self.with_operator("frozen" if self.learned else "stored")

    def _engine(self, operator: str) -> Engine:
        name = "cached" if operator == "learned" else operator
        return _kept(self._engines, name, lambda: Engine(self.with_operator(name), self.tokenizer, max_batch=2), 3)

    # --- tensors ------------------------------------------------------------------------------------------------------

    def outputs(self, ids: Sequence[int], operator: str) -> DeductiveOutputs:
        """See `pldr.deductive_outputs`, of one sequence: each [L, H, D, D], on the CPU, or None."""
        model = self.with_operator(operator)

        def compute() -> DeductiveOutputs:
            found = deductive_outputs(model, torch.tensor([list(ids)], device=model.device))
            A, A_LM, A_P, G_LM = (None if X is None else X[:, 0].float().cpu() for X in found)
            assert G_LM is not None
            return DeductiveOutputs(A, A_LM, A_P, G_LM)

        of = tuple(ids) if model.config.operator == "learned" else ()
        return _kept(self._outputs, (operator, of), compute, 32)

    def operator(self, text: str, layer: int, head: int, length: int | None, operator: str) -> dict[str, Any]:
        """The tensors of a head for the first `length` tokens of a text, with what can be said of each in a number."""
        with self.lock:
            ids = self._first(self.encode(text), None)
            now, last = self.outputs(self._first(ids, length), operator), self.outputs(ids, operator)
            self._check_head(layer, head)
            tensors = {name: None if X is None else _described(X[layer, head]) for name, X in now._asdict().items()}
            G, settled = now.G_LM[layer, head], last.G_LM[layer, head]
        return {"tokens": len(ids), "tensors": tensors, "settled": _relative(G, settled)}

    def grid(self, text: str, tensor: str, length: int | None, operator: str) -> dict[str, Any]:
        """One tensor of every head."""
        with self.lock:
            X = getattr(self.outputs(self._first(self.encode(text), length), operator), tensor)
        if X is None:
            raise ValueError(f"tensor: with the operator {operator} there is no {tensor}, only G_LM")
        return all_heads(X)

    def attention(self, text: str, operator: str, layer: int, head: int) -> dict[str, Any]:
        """Attention weights of a head [T, T], and those without G_LM from the same queries and keys."""
        with self.lock:
            self._check_head(layer, head)
            ids, model = self._first(self.encode(text), None), self.with_operator(operator)
            seen: list[torch.Tensor] = []
            module = model.model.layers[layer].self_attn.operator  # type: ignore[union-attr]
            hook = module.register_forward_hook(lambda _, given, made: seen.extend((*given[:2], *made[:2])))  # type: ignore[union-attr]
            try:
                with torch.no_grad():
                    model.model(torch.tensor([ids], device=model.device), use_cache=False)
            finally:
                hook.remove()
        query, key, with_g, its_key = (x[0, head].float() for x in seen)
        weights = (_attended(with_g, its_key, self.config.head_dim), _attended(query, key, self.config.head_dim))
        return {"tokens": self.tokens(ids), "with_g": _packed(weights[0]), "without_g": _packed(weights[1])}

    def compare(self, text: str, prompt: str, operators: Sequence[str], count: int) -> dict[str, Any]:
        """Greedy continuations of a prompt, what comes next, and the loss on a text, with each operator."""
        scored, ids = self.encode(text), self._first(self.encode(prompt), None)
        first = self.operators[0]
        with self.lock:
            reference = self._next(ids, first)
            own = self.outputs(scored, first).G_LM if scored else None
        return {"rows": [self._compared(name, scored, ids, count, reference, own) for name in operators]}

    def _compared(
        self, operator: str, scored: list[int], ids: list[int], count: int, reference: torch.Tensor,
        own: torch.Tensor | None,
    ) -> dict[str, Any]:  # fmt: skip
        begun = time.perf_counter()
        steps = self.generate(ids, operator, Options(max_new_tokens=count, logprobs=True, top_logprobs=1))
        text = continuation(self.tokenizer, ids, [step["id"] for step in steps if "id" in step])
        with self.lock:
            log = self._next(ids, operator)
            top = log.topk(10)
            loss = self._loss(scored, operator)
            change = None if own is None else _relative(self.outputs(scored, operator).G_LM, own)
        return {
            "operator": operator, "text": text, "loss": loss, "divergence": float((reference.exp() * (reference - log)).sum()),
            "next": [{"id": t, "text": self.texts.of(t)[0], "probability": math.exp(p)}
                     for t, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)],
            "change": change, "seconds": time.perf_counter() - begun,
        }  # fmt: skip

    @torch.no_grad()
    def _next(self, ids: list[int], operator: str) -> torch.Tensor:
        """Log-probabilities of the token behind a prompt, [V], float64."""
        model = self.with_operator(operator)
        logits = model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1).logits
        return logits[0, -1].double().log_softmax(0).cpu()

    @torch.no_grad()
    def _loss(self, ids: list[int], operator: str) -> float | None:
        """Mean, in nats per token; None where there is no second token."""
        if len(ids) < 2:
            return None
        model, rows = self.with_operator(operator), torch.tensor([ids], device=self.model.device)
        return float(losses_of(model(rows, use_cache=False).logits.float(), rows).mean())

    def _first(self, ids: list[int], length: int | None) -> list[int]:
        """Raises ValueError: no such length."""
        if length is not None and not 1 <= length <= len(ids):
            raise ValueError(f"length: must be between 1 and the text's {len(ids)} tokens, got {length}")
        return ids[:length]

    def _check_head(self, layer: int, head: int) -> None:
        for name, value, count in (
            ("layer", layer, self.config.num_hidden_layers),
            ("head", head, self.config.num_attention_heads),
        ):
            if not 0 <= value < count:
                raise ValueError(f"{name}: must be between 0 and {count - 1}, got {value}")


def _factors_from(whole: PldrForCausalLM, passages: torch.Tensor) -> list[Factors]:
    moments = moments_of(whole, passages)
    return [factors_of(*layer) for layer in zip(stored_operator(whole).to(whole.device), *moments, strict=True)]


def all_heads(X: torch.Tensor) -> dict[str, Any]:
    """A tensor of every head [L, H, D, D], with ranks and determinants."""
    X = X.float()
    layers, heads, size, _ = X.shape
    _, log = log_determinant(X)
    return {"layers": layers, "heads": heads, "size": size, "values": _packed(X),
            "rank": numerical_rank(X).tolist(), "log10_determinant": _numbers(log)}  # fmt: skip


K = TypeVar("K")
V = TypeVar("V")


def _kept(store: OrderedDict[K, V], key: K, make: Callable[[], V], most: int = _KEPT) -> V:
    """What is kept under a key, made if need be; the one that was not asked for longest goes."""
    if key not in store:
        store[key] = make()
        if len(store) > most:
            store.popitem(last=False)
    store.move_to_end(key)
    return store[key]


def _packed(X: torch.Tensor) -> str:
    """base64 of float32, row by row, the least significant byte first."""
    return base64.b64encode(X.float().contiguous().cpu().numpy().astype("<f4").tobytes()).decode()


def _numbers(X: torch.Tensor) -> Any:
    """As lists, None in place of what JSON has no number for."""
    return X.tolist() if bool(torch.isfinite(X).all()) else torch.where(torch.isfinite(X), X, torch.nan).tolist()


def _described(X: torch.Tensor) -> dict[str, Any]:
    _, log = log_determinant(X)
    return {
        "size": len(X), "values": _packed(X), "rms": float(X.double().square().mean().sqrt()),
        "log10_determinant": float(log), "rank": int(numerical_rank(X)),
        "singular_values": torch.linalg.svdvals(X.double()).tolist(),
    }  # fmt: skip


def _relative(X: torch.Tensor, reference: torch.Tensor) -> float:
    """The difference's size over the reference's."""
    size = float(reference.double().norm())
    return float((X.double() - reference.double()).norm()) / size if size else 0.0


def _attended(query: torch.Tensor, key: torch.Tensor, head_dim: int) -> torch.Tensor:
    scores = query @ key.T * head_dim**-0.5
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)
