"""The story model in NumPy, in a process of its own: it writes while `EarlyWriter`'s process imports torch.

G_LM comes from the prompt and is kept. Only the model that ships with pldr is read here: what others made goes through the checks of
`pldr.load_model`. Shapes: H heads, T tokens, D head dimension, M model width, V vocabulary.
"""

import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from pldr.engine.options import Options, new_tokens
from pldr.engine.text import TokenTexts
from pldr.files import one_line, read_json
from pldr.models.shipped import STORIES
from pldr.studio.pieces import CONSTANTS, OWN, RANK_STEP, given, written
from pldr.tokenizer import encode_prompt

Array = NDArray[np.float32]
Caches = list[tuple[Array, Array, Array]]  # of each layer: keys and values [H, T, D], G_LM [H, D, D]


class Story:
    """What `Workbench` does of texts, with the operator "cached", for the model that ships with pldr."""

    def __init__(self) -> None:
        self.config = read_json(STORIES / "config.json")
        self._weights: dict[str, Array] = {}
        for file in sorted(STORIES.glob("*.safetensors")):
            self._weights |= {name: tensor.astype(np.float32) for name, tensor in load_file(file).items()}
        self.tokenizer = cast(Any, _Pieces(STORIES))
        self.texts = TokenTexts(self.tokenizer)
        self.heads, self.width = self.config["num_attention_heads"], self.config["hidden_size"]
        self.dimensions, self.layers = self.width // self.heads, self.config["num_hidden_layers"]

    def facts(self) -> dict[str, Any]:
        """As of `Workbench`."""
        return {
            "name": STORIES.name, "kind": "learned", "layers": self.layers, "heads": self.heads,
            "head_dim": self.dimensions, "context": self.config["max_position_embeddings"],
            "parameters": sum(tensor.size for tensor in self._weights.values()),
            "operators": [*OWN, *CONSTANTS], "largest_rank": self.dimensions, "rank_step": RANK_STEP,
        }  # fmt: skip

    def encode(self, text: str) -> list[int]:
        return encode_prompt(self.tokenizer, text)

    def tokens(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        return given(self.texts, ids)

    def generate(self, ids: Sequence[int], options: Options) -> Iterator[dict[str, Any]]:
        """As of `Workbench`, and with a seed the same text. Raises ValueError: settings or ids outside their ranges."""
        wrong = next((token for token in ids if not 0 <= token < self.config["vocab_size"]), None)
        if wrong is not None:
            raise ValueError(f"prompt: token {wrong} is none of the model's {self.config['vocab_size']}")
        count = new_tokens(len(ids), self.config["max_position_embeddings"], options.max_new_tokens)
        return written(self.texts, self._steps(ids, count, options))

    def _steps(self, ids: Sequence[int], count: int, options: Options) -> Iterator[tuple[Any, ...]]:
        dice = np.random.RandomState(None if options.seed is None else options.seed % 2**32)  # torch's generator
        caches: Caches = []
        new, seen = list(ids), set(ids)
        for _ in range(count):
            logits = self.logits(new, caches)
            drawn = (int(dice._bit_generator.random_raw()) & (1 << 24) - 1) / (1 << 24)
            token = choose(logits, options, drawn, sorted(seen))
            logprobs = logits - _log_sum(logits)
            top = np.argsort(-logprobs, kind="stable")[: options.top_logprobs]
            others = [(int(t), float(logprobs[t])) for t in top]
            yield token, float(logprobs[token]), others, "end" if token == self.config["eos_token_id"] else None
            new = [token]
            seen.add(token)

    # --- tokens to logits -----------------------------------------------------------------------------------------------

    def logits(self, ids: Sequence[int], caches: Caches) -> Array:
        """Behind the last of new tokens, [V]; the caches take them in."""
        h = self._norm(
            "model.embed_norm", self._weights["model.embed_tokens.weight"][list(ids)] * math.sqrt(self.width)
        )
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            attended = self._attention(f"{name}.self_attn", h, layer, caches)
            h = self._norm(f"{name}.post_attention_layernorm", attended + h)
            h = self._norm(f"{name}.post_feedforward_layernorm", self._gated(f"{name}.mlp", h) + h)
        return self._linear("lm_head", h[-1])

    def _attention(self, name: str, h: Array, layer: int, caches: Caches) -> Array:
        tokens = len(h)
        query, key, value = (
            self._linear(f"{name}.{part}_proj", h).reshape(tokens, self.heads, -1).transpose(1, 0, 2) for part in "qkv"
        )
        before = caches[layer][0].shape[1] if layer < len(caches) else 0
        query, key = self._rotated(query, before), self._rotated(key, before)
        if layer == len(caches):
            caches.append((key, value, self._operator(f"{name}.operator", query)))
        else:
            keys, values, G_LM = caches[layer]
            caches[layer] = (np.concatenate((keys, key), 1), np.concatenate((values, value), 1), G_LM)
        keys, values, G_LM = caches[layer]
        scores = query @ G_LM @ keys.transpose(0, 2, 1) * self.dimensions**-0.5  # [H, T, all tokens]
        scores += np.triu(np.full(scores.shape[1:], -np.inf, np.float32), before + 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        output = weights / weights.sum(-1, keepdims=True) @ values
        return self._linear(f"{name}.o_proj", output.transpose(1, 0, 2).reshape(tokens, -1))

    def _operator(self, name: str, query: Array) -> Array:
        """G_LM from rotated queries: [H, T, D] → [H, D, D]."""
        W, b, p, a, b_a = (
            self._weights[f"{name}.{part}"]
            for part in ("metric_weight", "metric_bias", "exponent", "energy_weight", "energy_bias")
        )
        A = self._norm(f"{name}.input_norm", query.transpose(0, 2, 1) @ query)
        for unit in range(self.config["metric_learner_units"]):
            u = A
            for glu in range(self.config["metric_learner_glus"]):
                u = self._gated(f"{name}.metric_learner.{unit}.glus.{glu}", u)
            A = self._norm(f"{name}.metric_learner.{unit}.norm", u + A)
        z = W @ A + b
        A_LM = z * _silu(z) + np.float32(1e-9)  # METRIC_EPSILON of pldr.ops.reference
        return cast(Array, a @ A_LM**p + b_a)

    def _rotated(self, x: Array, before: int) -> Array:
        """Pairs of dimensions (2i, 2i + 1) by the angle of their position, the first of which is `before`."""
        places = np.arange(before, before + x.shape[1], dtype=np.float32)
        steps = np.arange(0, self.dimensions, 2, dtype=np.float32) / self.dimensions
        angles = places[:, None] * (1 / np.float32(self.config["rope_theta"]) ** steps)
        cos, sin, first, second = np.cos(angles), np.sin(angles), x[..., ::2], x[..., 1::2]
        pairs = np.stack((first * cos - second * sin, second * cos + first * sin), -1)
        return cast(Array, pairs.reshape(x.shape))

    def _linear(self, name: str, x: Array) -> Array:
        return cast(Array, x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"])

    def _gated(self, name: str, x: Array) -> Array:
        return self._linear(
            f"{name}.down_proj", _silu(self._linear(f"{name}.gate_proj", x)) * self._linear(f"{name}.up_proj", x)
        )

    def _norm(self, name: str, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        size = np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.float32(self.config["layer_norm_eps"]))
        return cast(Array, centred / size * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"])


def choose(logits: Array, options: Options, drawn: float, seen: Sequence[int]) -> int:
    """As `pldr.ops.decode.choose`: the token of one row, where `drawn` in [0, 1) is its place in the cumulated probabilities."""
    x = logits.copy()
    if options.repetition_penalty != 1:
        penalty = np.float32(options.repetition_penalty)
        x[seen] = np.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    if not options.samples:
        return int(x.argmax())
    x /= np.float32(options.temperature or 1.0)
    order = np.sort(x)[::-1][: options.top_k or None]
    cumulated = _cumulated(np.exp(order - order[0]))
    least = order[-1]
    if options.top_p is not None and options.top_p < 1:
        least = order[min(int((cumulated < np.float32(options.top_p) * cumulated[-1]).sum()), len(order) - 1)]
    cumulated = _cumulated(np.where(x >= least, np.exp(x - order[0]), 0))
    return int((cumulated > np.float32(drawn) * cumulated[-1]).argmax())


def _cumulated(mass: Array) -> Array:
    """In float32, added up in float64, as torch does."""
    return np.cumsum(mass, dtype=np.float64).astype(np.float32)


def _silu(x: Array) -> Array:
    return cast(Array, x / (1 + np.exp(-x)))


def _log_sum(x: Array) -> Any:
    highest = x.max()
    return highest + np.log(np.exp(x - highest).sum())


class _Pieces:
    """A tokenizer.json as `TokenTexts` and `encode_prompt` ask of a tokenizer of transformers, without importing it."""

    def __init__(self, folder: Path) -> None:
        self.name_or_path = str(folder)
        self._own = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._own.encode_special_tokens = True  # in a text they are text
        self.all_special_ids = [token for token, added in self._own.get_added_tokens_decoder().items() if added.special]
        self.eos_token_id = read_json(folder / "config.json")["eos_token_id"]

    def __len__(self) -> int:
        return int(self._own.get_vocab_size())

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self._own.encode(text, add_special_tokens=False).ids}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(self._own.decode(ids, skip_special_tokens=skip_special_tokens))

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self._own.id_to_token(token)


def main() -> None:
    """Say what the model is; then answer each line of standard input, a request of prompt or ids and options, in lines."""

    def say(line: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end without a word where nobody reads on
    story = Story()
    say(story.facts())
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            ids = story.encode(asked["prompt"]) if asked["ids"] is None else asked["ids"]
            steps = story.generate(ids, Options(**asked["options"]))
            say({"prompt": story.tokens(ids)})
            for step in steps:
                say(step)
        except ValueError as error:
            say({"error": one_line(error)})


if __name__ == "__main__":
    main()
