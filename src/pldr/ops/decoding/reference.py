"""The steps of decoding in plain PyTorch: the oracle for the kernels of `ops.decoding`, and the path on CPU.

Shapes as in `ops.decode`.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from pldr.ops.reference import apply_rotary

# Rows of a product that count as few: the tokens of a batch, rather than a prompt.
FEW_ROWS = 32


class Norm(NamedTuple):
    """A LayerNorm's parameters: weight and bias [M], and epsilon."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


class Linear(NamedTuple):
    """A linear layer's parameters: weight [features, inputs] and bias [features]. Called, it is x Wᵀ + b."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        few = x.device.type == "cpu" and len(x) <= FEW_ROWS
        if few and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # oneDNN reads weights at the memory's speed: of 32,000 x 896, for one row on two cores, 3.7 ms where the
            # library behind F.linear (MKL, on an AMD EPYC) takes 8.2. But it keeps code of its own for each number of rows,
            # some 0.5 MB a product: of prompts of all lengths, hundreds of MB, for no gain in time.
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of what it is called with."""
        return self.weight.dtype


class Parts(NamedTuple):
    """Attention over parts of the cache: out [N, P, H, D], highest score and sum of exponentials [N, P, H]; float32."""

    out: torch.Tensor
    highest: torch.Tensor
    total: torch.Tensor


def embed(tokens: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    """[N] (int64), [V, M] → [N, M], float32."""
    return table[tokens].float() * scale


def norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """LayerNorm in float32. [N, M] → [N, M]."""
    return F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)


def silu_product(both: torch.Tensor) -> torch.Tensor:
    """silu of the first half of the columns times the second. [N, 2 F] → [N, F]."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


class Places(NamedTuple):
    """Where the new token of each of N sequences stands.

    Attributes:
        positions: [N] (int32).
        rotary: [2, C or more, D/2], cosines and sines, float32.
        seen: tokens of the longest sequence, the new one included. This and what follows is for the plain form, which has
            it once a step and not in each layer.
        cos, sin: [N, 1, 1, D/2], of the positions.
        mask: [N, 1, 1, seen], which places each sequence sees; None where they all see the same.
    """

    positions: torch.Tensor
    rotary: torch.Tensor
    seen: int = 0
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def places(positions: torch.Tensor, rotary: torch.Tensor) -> Places:
    """Like `ops.decode.places`, which see."""
    listed = positions.tolist()
    seen = max(listed) + 1
    cos, sin = rotary.index_select(1, positions)[:, :, None, None]
    mask = None
    if min(listed) + 1 < seen:
        mask = torch.arange(seen, device=positions.device) <= positions[:, None, None, None]
    return Places(positions, rotary, seen, cos, sin, mask)


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: Places,
    pairing: str,
    left: torch.Tensor,
    right: torch.Tensor | None,
) -> torch.Tensor:
    """Like `ops.decode.attend`, which see."""
    sequences, heads, dimensions = len(qkv), keys.shape[1], values.shape[-1]
    both, value = qkv.view(sequences, 3, heads, dimensions).split((2, 1), 1)  # [N, 2, H, D] and [N, 1, H, D]
    assert places.cos is not None
    assert places.sin is not None
    query, key = apply_rotary(both, places.cos, places.sin, pairing).unbind(1)  # each [N, H, D]
    query = (query[:, :, None] @ left[:sequences] if left.dim() == 4 else query[:, :, None] @ left).to(keys.dtype)
    if right is not None:
        key = (key[:, :, None] @ right)[:, :, 0]
    for cache, new in ((keys, key), (values, value[:, 0])):
        if places.mask is None:
            cache[:sequences, :, places.seen - 1] = new
        else:
            cache[torch.arange(sequences, device=qkv.device), :, places.positions.long()] = new.to(cache.dtype)
    output = F.scaled_dot_product_attention(
        query, keys[:sequences, :, : places.seen], values[:sequences, :, : places.seen], places.mask,
        scale=dimensions**-0.5,
    )  # fmt: skip
    return output.reshape(sequences, -1)


class State(NamedTuple):
    """Where each row of the caches stands; S rows, K steps.

    Attributes:
        tokens: [S] (int64), the newest token, which no cache holds yet.
        positions: [S] (int32), its place.
        chosen: [S, K] (int64), tokens by step; -1 where a logit was NaN or infinite.
        logprobs: [S, K] (float32), of the chosen tokens under the model's own distribution, where they are drawn.
        x: [S, M] (float32), the scaled embedding of the newest token, with which the next step begins.
        table, scale: [V, M], the embedding, and its scale.
        length: positions of the caches; a place past the last one stays there.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    chosen: torch.Tensor
    logprobs: torch.Tensor
    x: torch.Tensor
    table: torch.Tensor
    scale: float
    length: int

    def rows(self, rows: slice) -> "State":
        """The state of some of the rows, as views."""
        return self._replace(
            tokens=self.tokens[rows], positions=self.positions[rows], chosen=self.chosen[rows],
            logprobs=self.logprobs[rows], x=self.x[rows],
        )  # fmt: skip

    def advance(self, tokens: torch.Tensor, column: int) -> None:
        """Make a token of each of the first rows [N] the newest."""
        rows = len(tokens)
        self.tokens[:rows] = tokens
        self.x[:rows] = embed(tokens.clamp(min=0), self.table, self.scale)
        self.positions[:rows] = (self.positions[:rows] + 1).clamp(max=self.length - 1)
        self.chosen[:rows, column] = tokens


def choose_highest(logits: torch.Tensor, state: State, column: int) -> None:
    """Like `ops.decode.choose_highest`, which see."""
    finite = (logits * 0).sum(-1) == 0
    state.advance(logits.argmax(-1).where(finite, -1), column)


class Choice(NamedTuple):
    """How to draw the token of each row: [S] where nothing else is said.

    Attributes:
        uniform: [S, K] (float32) in [0, 1), by step: the place in the cumulated probabilities that is drawn.
        temperature: float32; 0 takes the most probable token.
        top_k: int32; 0 or less keeps all.
        top_p: float32 in (0, 1]; 1 keeps all.
        penalty: float32, the repetition penalty of tokens that were seen: a positive logit is divided by it, a negative
            one multiplied.
        seen: [S, V] (uint8), 1 for each token of the sequence so far; the drawn token is added. None where no row has a
            penalty.
    """

    uniform: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    penalty: torch.Tensor
    seen: torch.Tensor | None = None

    def rows(self, rows: slice) -> "Choice":
        """The same of some of the rows, as views."""
        return Choice(
            self.uniform[rows], self.temperature[rows], self.top_k[rows], self.top_p[rows], self.penalty[rows],
            None if self.seen is None else self.seen[rows],
        )  # fmt: skip


def choose(logits: torch.Tensor, state: State, column: int, choice: Choice) -> None:
    """Like `ops.decode.choose`, which see."""
    rows = len(logits)
    per_row = choice.rows(slice(rows))
    tokens, logprobs = draw(logits, per_row._replace(uniform=per_row.uniform[:, column]))
    state.advance(tokens, column)
    state.logprobs[:rows, column] = logprobs


def draw(logits: torch.Tensor, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token of each row: penalty, temperature, then top-k, then top-p, as transformers orders them.

    Tokens that tie with the last one kept are kept, too. The drawn one is the first, in the order of ids, at which the
    kept probability cumulates to more than `uniform` of all that is kept.

    Args:
        logits: [N, V].
        choice: how; `uniform` is [N], and the other parts have N rows.

    Returns:
        tokens [N] (int64), -1 where a logit is NaN or infinite; and the log-probability of each under the model's own
        distribution, before penalty and temperature, [N] (float32).
    """
    logits = logits.float()
    finite = torch.isfinite(logits).all(-1)
    x = logits
    if choice.seen is not None:
        penalty = choice.penalty[:, None]
        x = torch.where(choice.seen.bool(), torch.where(x > 0, x / penalty, x * penalty), x)
    greedy = choice.temperature == 0
    highest = x.argmax(-1)
    x = x / choice.temperature.where(~greedy, 1.0)[:, None]
    vocabulary = x.shape[1]
    order = x.sort(-1, descending=True).values
    k = choice.top_k.long().clamp(max=vocabulary)
    k = k.where(k > 0, vocabulary)[:, None]
    order = order.masked_fill(torch.arange(vocabulary, device=x.device) >= k, -torch.inf)
    x = x.masked_fill(x < order.gather(1, k - 1), -torch.inf)
    mass = (order - order[:, :1]).exp()
    cumulated = mass.cumsum(-1)
    # The first place where the mass reaches top_p of all that top_k left is the last token kept.
    last = (cumulated < choice.top_p[:, None] * cumulated[:, -1:]).sum(-1, keepdim=True).clamp(max=vocabulary - 1)
    last = last.where(choice.top_p[:, None] < 1, k - 1)
    x = x.masked_fill(x < order.gather(1, last), -torch.inf)
    kept = (x - x.amax(-1, keepdim=True)).exp()
    cumulated = kept.cumsum(-1)
    drawn = cumulated > choice.uniform[:, None] * cumulated[:, -1:]
    # Where rounding leaves no such place, the last token with any mass.
    last_kept = vocabulary - 1 - (kept > 0).flip(-1).to(torch.uint8).argmax(-1)
    drawn = torch.where(drawn.any(-1), drawn.to(torch.uint8).argmax(-1), last_kept)
    tokens = torch.where(greedy, highest, drawn)
    logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    if choice.seen is not None:
        choice.seen.scatter_(1, tokens[:, None], 1)
    return tokens.where(finite, -1), logprobs
