"""The next token of each sequence, chosen on the device: `ops.decode.choose` and `choose_highest` in Triton."""

import torch
import triton
import triton.language as tl

from pldr.ops.decoding.launch import dependent, release, wait
from pldr.ops.decoding.reference import Choice, State

# The largest vocabulary that `choose` holds in registers.
MOST_LOGITS = 65536


def choose_highest(logits: torch.Tensor, state: State, column: int) -> None:
    sequences, vocabulary = logits.shape
    block = 2048
    blocks = triton.cdiv(vocabulary, block)
    best = torch.empty(sequences, blocks, dtype=torch.float32, device=logits.device)
    where = torch.empty(sequences, blocks, dtype=torch.int32, device=logits.device)
    _highest_of_block[(blocks, sequences)](logits, best, where, vocabulary, BLOCK=block, **dependent(logits))
    choose_of_blocks(best, where, state, column)


def choose_of_blocks(best: torch.Tensor, where: torch.Tensor, state: State, column: int) -> None:
    sequences, blocks = best.shape
    _highest_of_row[(sequences,)](
        best, where, *_places(state, column), blocks, BLOCK=triton.next_power_of_2(blocks), **_widths(state),
        num_warps=4, **dependent(best),
    )  # fmt: skip


def _places(state: State, column: int) -> tuple[torch.Tensor | int | float, ...]:
    """The arguments of `_advance`, but for the row and its token."""
    return (
        state.tokens, state.positions, state.chosen, state.x, state.table, state.scale, state.length,
        state.chosen.stride(0), column,
    )  # fmt: skip


def _widths(state: State) -> dict[str, int]:
    width = state.x.shape[-1]
    return {"WIDTH": width, "COLUMNS": triton.next_power_of_2(width)}


@triton.jit
def _highest_of_block(logits, best, where, vocabulary, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    release(PDL)
    wait(PDL)
    block, row = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    x = tl.load(logits + row.to(tl.int64) * vocabulary + columns, mask=inside, other=0.0).to(tl.float32)
    damage = tl.sum(x * 0.0, 0)  # NaN where one is NaN or infinite; a maximum could pass over it
    x = tl.where(inside, x, -float("inf"))
    highest, index = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    at = row * tl.num_programs(0) + block
    tl.store(best + at, highest + damage)
    tl.store(where + at, block * BLOCK + index)


@triton.jit
def _highest_of_row(  # type: ignore[no-untyped-def]
    best, where, tokens, positions, chosen, x, table, scale, length, steps, column, blocks,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    wait(PDL)
    row = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    values = tl.load(best + row * blocks + block, mask=block < blocks, other=0.0)
    damage = tl.sum(values * 0.0, 0)
    values = tl.where(block < blocks, values, -float("inf"))
    index = tl.minimum(tl.argmax(values, 0, tie_break_left=True), blocks - 1)  # NaN may point past the last
    token = tl.where(damage == 0.0, tl.load(where + row * blocks + index), -1)
    _advance(tokens, positions, chosen, x, table, scale, length, steps, column, row, token, WIDTH, COLUMNS)


@triton.jit
def _advance(  # type: ignore[no-untyped-def]
    tokens, positions, chosen, x, table, scale, length, steps, column, row, token,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`State.advance` of one row."""
    token = token.to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    embedded = tl.load(table + tl.maximum(token, 0) * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    tl.store(x + row * WIDTH + columns, embedded * scale, mask=columns < WIDTH)
    tl.store(tokens + row, token)
    tl.store(chosen + row * steps + column, token)
    tl.store(positions + row, tl.minimum(tl.load(positions + row) + 1, length - 1))


def choose(logits: torch.Tensor, state: State, column: int, choice: Choice) -> None:
    sequences, vocabulary = logits.shape
    seen = choice.seen if choice.seen is not None else state.tokens
    _choose[(sequences,)](
        logits, choice.uniform, choice.temperature, choice.top_k, choice.top_p, choice.penalty, seen,
        *_places(state, column), state.logprobs, vocabulary,
        SEEN=choice.seen is not None, BLOCK=triton.next_power_of_2(vocabulary), **_widths(state), num_warps=32,
        **dependent(logits),
    )  # fmt: skip


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits, uniform, temperature, top_k, top_p, penalty, seen,
    tokens, positions, chosen, embedded, table, scale, length, steps, column, logprobs, vocabulary,
    SEEN: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row, all of it in registers; see `reference.draw`."""
    release(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < vocabulary
    at = row * vocabulary + columns
    raw = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    damage = tl.sum(raw * 0.0, 0)
    x = tl.where(inside, raw, -float("inf"))
    highest = tl.max(x, 0)
    mass_of_all = tl.sum(tl.exp(x - highest), 0)
    if SEEN:
        p = tl.load(penalty + row)
        marked = tl.load(seen + at, mask=inside, other=0) > 0
        x = tl.where(marked, tl.where(x > 0, x / p, x * p), x)
    t = tl.load(temperature + row)
    if t == 0.0:
        token = tl.argmax(x, 0, tie_break_left=True)
    else:
        x = x / t
        mass = tl.exp(x - tl.max(x, 0))
        # Integers in the order of the floats, so that a threshold is found bit by bit, exactly.
        bits = x.to(tl.int32, bitcast=True)
        order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        lowest = tl.full([], -2147483648, tl.int32)
        k = tl.load(top_k + row)
        if k > 0:
            lowest = _threshold(order, tl.where(inside, 1.0, 0.0), tl.minimum(k, vocabulary).to(tl.float32))
        mass = tl.where(inside & (order >= lowest), mass, 0.0)
        share = tl.load(top_p + row)
        if share < 1.0:
            lowest = tl.maximum(lowest, _threshold(order, mass, share * tl.sum(mass, 0)))
            mass = tl.where(order >= lowest, mass, 0.0)
        cumulated = tl.cumsum(mass, 0)
        target = tl.load(uniform + row * steps + column) * tl.sum(mass, 0)
        found = (cumulated > target) & (mass > 0.0)
        token = tl.min(tl.where(found, columns, BLOCK), 0)
        # Where rounding leaves no such place, the last token with any mass.
        token = tl.where(token == BLOCK, tl.max(tl.where(mass > 0.0, columns, 0), 0), token)
    token = tl.minimum(token, vocabulary - 1)  # NaN may point past the last
    logit = tl.sum(tl.where(columns == token, raw, 0.0), 0)
    choice = tl.where(damage == 0.0, token, -1)
    _advance(tokens, positions, chosen, embedded, table, scale, length, steps, column, row, choice, WIDTH, COLUMNS)
    tl.store(logprobs + row * steps + column, logit - highest - tl.log(mass_of_all))
    if SEEN:
        tl.store(seen + row * vocabulary + token, 1)


@triton.jit
def _threshold(order, mass, wanted):  # type: ignore[no-untyped-def]
    """The largest integer at or above which the mass is at least what is wanted: from the highest bit down."""
    lowest = tl.full([], -2147483648, tl.int32)
    if tl.sum(tl.where(order >= 0, mass, 0.0), 0) >= wanted:
        lowest = tl.full([], 0, tl.int32)
    for step in range(31):
        tried = lowest + (1 << (30 - step))
        if tl.sum(tl.where(order >= tried, mass, 0.0), 0) >= wanted:
            lowest = tried
    return lowest
