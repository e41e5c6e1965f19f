"""Prompts and single tokens through a model, over caches of fixed size: what runs under `Engine`.

The weights are packed once, in the form that `ops.decode` takes; a layer's G_LM is a constant of the model or, of a
learned operator, computed from each prompt and kept in that sequence's row. On CUDA a step is a graph that is recorded
once for each number of rows and replayed; elsewhere the same functions run as they stand.

Shapes as in `ops.decode`: S rows of the caches, C positions; T tokens of a prompt, L layers.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from pldr.modeling_pldr import PldrDecoderLayer, PldrForCausalLM
from pldr.operator import GatedLinearUnit, LearnedOperator, ResidualUnit
from pldr.ops import decode, reference
from pldr.ops.decode import Choice, Linear, Norm, Parts, State, Stream
from pldr.ops.decoding.reference import FEW_ROWS
from pldr.ops.quantized import quantized

# Most steps of one `run`.
STEPS = 32
# Most steps of one graph: while one runs on the device, the next is launched.
_GRAPH_STEPS = 4
# Sizes of batch that graphs are recorded for; a batch between two runs in the larger.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
# Likewise of prompts, in tokens.
PROMPT_SIZES = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# Inner widths are padded to so many elements, so that kernels work on whole tiles.
_ALIGNMENT = 64

Attention = Callable[[int, torch.Tensor], torch.Tensor | Parts]


class Unit(NamedTuple):
    """A gated linear unit: W1 over W2 [2 F, M], and W3 [M, F]."""

    gate_up: Linear
    down: Linear


class Metric(NamedTuple):
    """A metric learner: its first LayerNorm; of its U residual units the G gated linear units, [U, G, 2 F, D] and
    [U, G, D, F], and the norms, [U, D].
    """

    input_norm: Norm
    glus: Unit
    norms: Norm
    operator: LearnedOperator  # of W, b, p, a and b_a


class Layer(NamedTuple):
    """One decoder layer, from the norm before it to the residual sum that the next norm takes."""

    norm: Norm
    qkv: Linear
    output: Linear
    middle_norm: Norm
    unit: Unit
    left: torch.Tensor | None  # [H, D, R]; None where G_LM is learned
    right: torch.Tensor | None
    metric: Metric | None


class Decoder:
    """A model over the rows of its caches.

    Attributes:
        rows, length: S and C.
        state: which token each row stands at (see `State`).
        choice: how the next token of each row is drawn, where one is drawn (see `Choice`).
        newest: logits that the last tokens were chosen by [N, V], where they were drawn, and not in a replayed graph.

    Args:
        model: its weights are read now, later changes are not seen.
        rows: most sequences at once.
        length: positions of each, at most the context.
        quantize: "int8" for weights of 8 bits.
        graphs: record and replay CUDA graphs; by default wherever the model is on CUDA.
    """

    def __init__(
        self,
        model: PldrForCausalLM,
        rows: int,
        length: int,
        *,
        quantize: str | None = None,
        graphs: bool | None = None,
    ) -> None:
        config = model.config
        self.config, self.rows, self.length = config, rows, length
        self.device, self.dtype = model.device, model.dtype
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        self.heads, self.dimensions = config.num_attention_heads, config.head_dim
        embedding = model.model
        self.table, self.scale = embedding.embed_tokens.weight.detach(), math.sqrt(config.hidden_size)
        self.rotary = embedding.rotary_embedding.table
        self.layers = pack_layers(model, quantize)
        last = cast(PldrDecoderLayer, embedding.layers[-1])
        self.last_norm, self.head = _norm(last.post_feedforward_layernorm), _linear(model.lm_head)
        if quantize is not None:
            self.head = quantized(self.head)
        self._allocate()

    def _allocate(self) -> None:
        shape = (self.rows, self.heads, self.length)
        new = {"device": self.device, "dtype": self.dtype}
        ranks = [self.dimensions if layer.left is None else layer.left.shape[-1] for layer in self.layers]
        self.keys = [torch.zeros(*shape, rank, **new) for rank in ranks]
        self.values = [torch.zeros(*shape, self.dimensions, **new) for _ in ranks]
        # G_LM of each row, where it is learned: of no use until a prompt brings one.
        square = (self.rows, self.heads, self.dimensions, self.dimensions)
        self.operators = [torch.zeros(square, **new) if layer.left is None else layer.left for layer in self.layers]

        def per_row(dtype: torch.dtype, *steps: int) -> torch.Tensor:
            return torch.zeros(self.rows, *steps, dtype=dtype, device=self.device)

        self.state = State(
            per_row(torch.int64), per_row(torch.int32), per_row(torch.int64, STEPS), per_row(torch.float32, STEPS),
            per_row(torch.float32, self.config.hidden_size), self.table, self.scale, self.length,
        )  # fmt: skip
        self.choice = Choice(
            per_row(torch.float32, STEPS), per_row(torch.float32), per_row(torch.int32), per_row(torch.float32) + 1,
            per_row(torch.float32) + 1,
        )  # fmt: skip
        self.newest = torch.empty(0)
        self._recorded: dict[tuple[object, ...], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self._prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._place = torch.zeros(2, dtype=torch.int64, device=self.device)  # row and tokens of a prompt

    # --- single tokens -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(self, rows: int) -> torch.Tensor:
        """Logits behind the newest token of each of the first rows: [N, V]. Its key and value go into the caches."""
        embedded = decode.embed(self.state.tokens[:rows], self.table, self.scale)
        return self._head(self._layers(embedded, self._attend_cache(rows)))

    @torch.inference_mode()
    def run(self, rows: int, steps: int, *, draw: bool, eager: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose a token a step for the first rows, and go on with it.

        Args:
            rows: N, at least 1.
            steps: at most `STEPS`; a power of two where graphs are used.
            draw: by `choice`; else the most probable one.
            eager: in no graph, so that `newest` is there.

        Returns:
            Tokens [N, steps] (int64), -1 where logits were not finite, and their log-probabilities (float32), which
            are computed where tokens are drawn. Both on the device, and good until the next call.
        """
        recorded, size = self.graphs and not eager, rows
        if recorded:
            size = next((size for size in SIZES if rows <= size), -(-rows // 64) * 64)
            size = min(size, self.rows)
            self.state.positions[rows:size] = 0  # what runs along has as little to read as can be

        def work(begin: int, count: int) -> None:
            for column in range(begin, begin + count):
                self._step(size, column, draw)

        if recorded:
            count = min(steps, _GRAPH_STEPS)
            for begin in range(0, steps, count):
                name = ("steps", size, begin, count, draw, draw and self.choice.seen is not None)
                self._replay(name, partial(work, begin, count))
        else:
            work(0, steps)
        return self.state.chosen[:rows, :steps], self.state.logprobs[:rows, :steps]

    def _step(self, rows: int, column: int, draw: bool) -> None:
        stream = self._layers(Stream(self.state.x[:rows]), self._attend_cache(rows))
        if draw:
            self._choose(self._head(stream), 0, column, draw)
        else:
            decode.norm_highest(stream, self.last_norm, self.head, self.state, column)

    def _choose(self, logits: torch.Tensor, row: int, column: int, draw: bool) -> None:
        """Go on with a token for each row from `row` on."""
        self.newest = logits
        state = self.state.rows(slice(row, None))
        if draw:
            decode.choose(logits, state, column, self.choice.rows(slice(row, None)))
        else:
            decode.choose_highest(logits, state, column)

    def _layers(self, stream: Stream, attend: Attention) -> Stream:
        for index, layer in enumerate(self.layers):
            qkv, h = decode.norm_linear(stream, layer.norm, layer.qkv)
            stream = decode.linear_add(attend(index, qkv), layer.output, h)
            inner, h = decode.norm_gated(stream, layer.middle_norm, layer.unit.gate_up)
            stream = decode.linear_add(inner, layer.unit.down, h)
        return stream

    def _head(self, stream: Stream) -> torch.Tensor:
        return decode.norm_linear(stream, self.last_norm, self.head)[0]

    def _attend_cache(self, rows: int) -> Attention:
        """Attention of one new token for each of the first rows, over what they have cached."""
        places = decode.places(self.state.positions[:rows], self.rotary)

        def attend(index: int, qkv: torch.Tensor) -> torch.Tensor | Parts:
            layer, caches = self.layers[index], (self.keys[index], self.values[index])
            return decode.attend(qkv, *caches, places, self.config.rope_pairing, self.operators[index], layer.right)

        return attend

    # --- prompts -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def begin(
        self, row: int, prompts: Sequence[Sequence[int]], *, draw: bool, logits: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read prompts of one length into the rows from `row` on, and choose the first token of each; see `run`.

        Args:
            row, prompts, draw: which, and how.
            logits: [prompts, V], behind prompts that are read already.

        Returns:
            Tokens [prompts] (int64) and log-probabilities (float32), good until the next call.
        """
        self._choose(self.prefill(row, prompts) if logits is None else logits, row, 0, draw)
        rows = slice(row, row + len(prompts))
        return self.state.chosen[rows, 0], self.state.logprobs[rows, 0]

    @torch.inference_mode()
    def prefill(self, row: int, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read prompts of one length into the rows from `row` on.

        Returns:
            Logits behind the last token of each, [prompts, V]; good until the next call.
        """
        tokens = len(prompts[0])
        ids = torch.tensor(prompts, device=self.device)
        self.state.positions[row : row + len(prompts)] = tokens - 1
        size = next((size for size in PROMPT_SIZES if tokens <= size <= self.length), None)
        if not self.graphs or len(prompts) > 1 or size is None:
            last = torch.arange(1, len(prompts) + 1, device=self.device) * tokens - 1
            rows = torch.arange(row, row + len(prompts), device=self.device)
            return self._read(ids.flatten(), self._attend_prompt(rows, tokens, None), last)
        if size not in self._prompt:
            self._prompt[size] = (
                torch.zeros(size, dtype=torch.int64, device=self.device),
                torch.empty(1, self.config.vocab_size, device=self.device),
            )
        given, logits = self._prompt[size]
        given[:tokens] = ids[0]
        self._place.copy_(torch.tensor([row, tokens]))

        def read() -> None:
            attend = self._attend_prompt(self._place[:1], size, self._place[1])
            logits.copy_(self._read(given, attend, self._place[1:] - 1))

        self._replay(("prompt", size), read)
        return logits

    def _read(self, tokens: torch.Tensor, attend: Attention, last: torch.Tensor) -> torch.Tensor:
        """Logits behind the tokens at the places `last`."""
        x = self._layers(decode.embed(tokens, self.table, self.scale), attend).sum()
        return self._head(Stream(x[last]))

    def _attend_prompt(self, rows: torch.Tensor, tokens: int, used: torch.Tensor | None) -> Attention:
        """Attention of whole prompts, which keeps keys, values and G_LM in the rows [B].

        Args:
            rows: [B].
            tokens: T of each.
            used: how many of them are no padding; None where all are.
        """
        cos, sin = self.rotary[:, :tokens]
        padding = None if used is None else torch.arange(tokens, device=self.device)[None] < used

        def attend(index: int, qkv: torch.Tensor) -> torch.Tensor:
            layer = self.layers[index]
            shape = (len(rows), tokens, 3, self.heads, self.dimensions)
            query, key, value = qkv.to(self.dtype).view(shape).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
            query = reference.apply_rotary(query, cos, sin, self.config.rope_pairing)
            key = reference.apply_rotary(key, cos, sin, self.config.rope_pairing)
            if layer.metric is not None:
                G_LM = energy_curvature(layer.metric, query, padding)
                self.operators[index].index_copy_(0, rows, G_LM.to(self.dtype))
                query = query @ G_LM.to(self.dtype)
            else:
                query = query @ self.operators[index]
            if layer.right is not None:
                key = key @ layer.right
            self.keys[index][:, :, :tokens].index_copy_(0, rows, key)
            self.values[index][:, :, :tokens].index_copy_(0, rows, value)
            output = F.scaled_dot_product_attention(
                query, key, value, is_causal=tokens > 1, scale=self.dimensions**-0.5
            )  # [B, H, T, D]
            return output.transpose(1, 2).reshape(len(rows) * tokens, -1)

        return attend

    @torch.inference_mode()
    def read(self, row: int, prompt: Sequence[int]) -> torch.Tensor:
        """Read a prompt into a row: the logits behind each of its tokens, [T, V]."""
        rows = torch.tensor([row], device=self.device)
        attend = self._attend_prompt(rows, len(prompt), None)
        self.state.positions[row] = len(prompt) - 1
        tokens = torch.tensor(prompt, device=self.device)
        return self._head(Stream(self._layers(decode.embed(tokens, self.table, self.scale), attend).sum()))

    # --- rows --------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def reserve(self, tokens: int) -> None:
        """Take the memory now that would else be taken as texts come: on a CPU the system hands out the caches' as rows are
        first written, and oneDNN keeps code for each number of rows.

        Args:
            tokens: of prompts that will be read together; at least one of the longest.
        """
        for part in (*self.keys, *self.values):
            part.zero_()
        if self.device.type == "cpu":
            for rows in range(1, min(self.rows, FEW_ROWS) + 1):
                self.run(rows, 1, draw=False)
            longest = [0] * (self.length - 1)
            self.prefill(0, [longest] * min(self.rows, max(1, tokens // len(longest))))
            self.read(0, longest)
            self.state.positions.zero_()

    def move(self, source: int, target: int) -> None:
        """Put a row in another's place, caches and operator with it."""
        learned = [G for G, layer in zip(self.operators, self.layers, strict=True) if layer.left is None]
        state = (
            self.state.tokens,
            self.state.positions,
            self.state.x,
            *(part for part in self.choice[1:] if part is not None),
        )
        for part in (*self.keys, *self.values, *learned, *state):
            part[target] = part[source]

    def keep_seen(self) -> None:
        """Begin to count which tokens each row has seen: [S, V]."""
        if self.choice.seen is None:
            seen = torch.zeros(self.rows, self.config.vocab_size, dtype=torch.uint8, device=self.device)
            self.choice = self.choice._replace(seen=seen)

    # --- graphs ------------------------------------------------------------------------------------------------------

    def _replay(self, name: tuple[object, ...], work: Callable[[], object]) -> None:
        """Run what a graph holds; record it first where it is new."""
        if name not in self._recorded:
            self._recorded[name] = self._record(work)
        self._recorded[name].replay()

    def _record(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """A graph of `work`; what the runs before it do to the state is undone, cache entries apart."""
        begun = (self.state.tokens, self.state.positions, self.state.x)
        kept = [part.clone() for part in begun]
        seen = None if self.choice.seen is None else self.choice.seen.clone()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # kernels are compiled, and libraries made ready, outside the graph
            for _ in range(2):
                work()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        for part, value in zip(begun, kept, strict=True):
            part.copy_(value)
        if seen is not None:
            cast(torch.Tensor, self.choice.seen).copy_(seen)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph


# --- packing --------------------------------------------------------------------------------------------------------


def pack_layers(model: PldrForCausalLM, quantize: str | None = None) -> list[Layer]:
    """The layers' weights as the steps of decoding take them; matrices that need no change are shared."""
    align = _ALIGNMENT if model.device.type == "cuda" or quantize is not None else 1
    layers, norm = [], _norm(model.model.embed_norm)
    for module in cast(list[PldrDecoderLayer], model.model.layers):
        attention = module.self_attn
        left = right = metric = None
        if isinstance(attention.operator, LearnedOperator):
            metric = _metric(attention.operator, align)
        else:
            left, right = attention.operator.factors()
        layers.append(
            Layer(
                norm, _stacked(attention.q_proj, attention.k_proj, attention.v_proj), _linear(attention.o_proj),
                _norm(module.post_attention_layernorm), _unit(module.mlp, align), left, right, metric,
            )
        )  # fmt: skip
        if quantize is not None:
            layers[-1] = _quantized(layers[-1])
        norm = _norm(module.post_feedforward_layernorm)
    return layers


def _quantized(layer: Layer) -> Layer:
    """Its products with weights of 8 bits; those of the metric learner, which a prompt needs once, stay as they are."""
    unit = Unit(quantized(layer.unit.gate_up), quantized(layer.unit.down, outliers=True))
    return layer._replace(qkv=quantized(layer.qkv), output=quantized(layer.output), unit=unit)


def _norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight.detach(), module.bias.detach(), module.eps)


def _linear(module: nn.Linear) -> Linear:
    return Linear(module.weight.detach(), module.bias.detach())


def _stacked(*modules: nn.Linear) -> Linear:
    return Linear(*(torch.cat([getattr(m, name).detach() for m in modules]) for name in ("weight", "bias")))


def _unit(module: GatedLinearUnit, align: int) -> Unit:
    """With an inner width that is a multiple of `align`: what is added is silu(0) · 0 = 0, and meets zero weights."""
    missing = -module.gate_proj.out_features % align
    gate, up, down = _linear(module.gate_proj), _linear(module.up_proj), _linear(module.down_proj)
    weights = [F.pad(part.weight, (0, 0, 0, missing)) for part in (gate, up)]
    biases = [F.pad(part.bias, (0, missing)) for part in (gate, up)]
    padded = Linear(F.pad(down.weight, (0, missing)) if missing else down.weight, down.bias)
    return Unit(Linear(torch.cat(weights), torch.cat(biases)), padded)


def _metric(operator: LearnedOperator, align: int) -> Metric:
    units = cast(list[ResidualUnit], operator.metric_learner)
    glus = [_unit(glu, align) for unit in units for glu in cast(list[GatedLinearUnit], unit.glus)]

    def stacked(linears: Sequence[Linear]) -> Linear:
        return Linear(*(torch.stack(parts).unflatten(0, (len(units), -1)) for parts in zip(*linears, strict=True)))

    norms = [_norm(unit.norm) for unit in units]
    weight, bias = (torch.stack([getattr(norm, name) for norm in norms]) for name in ("weight", "bias"))
    gate_up, down = ([getattr(glu, name) for glu in glus] for name in Unit._fields)
    return Metric(
        _norm(operator.input_norm), Unit(stacked(gate_up), stacked(down)), Norm(weight, bias, norms[0].eps), operator
    )


def energy_curvature(metric: Metric, query: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """G_LM of prompts: rotated queries [B, H, T, D] → [B, H, D, D]; `padding` [B, T] is False at padding."""
    A = reference.density_matrix(query, padding)
    shape = A.shape
    u = decode.norm(Stream(A.reshape(-1, shape[-1])), metric.input_norm, query.dtype)
    u = decode.residual_network(u, metric.glus.gate_up, metric.glus.down, metric.norms)
    return metric.operator.energy_curvature(u.view(shape)).G_LM
