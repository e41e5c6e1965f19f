"""Tokenizers: the published checkpoints' SentencePiece model as a transformers fast tokenizer, and its training."""

import base64
import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pldr.files import check_regular, one_line, read_json, whole_file

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from transformers import PreTrainedTokenizerFast

# Ids of the published tokenizer's control pieces.
PAD, UNK, START, END = 0, 1, 2, 3
CONTROL_PIECES = {"pad": "[PAD]", "unk": "[UNK]", "bos": "[START]", "eos": "[END]"}

# Piece types of the SentencePiece format that can be found in text: NORMAL and USER_DEFINED.
_FOUND_IN_TEXT = (1, 4)
# Model types of the format.
_UNIGRAM, _BPE = 1, 2
# Lines that a tokenizer is trained on at most, a random sample of more: what keeps memory small.
_MOST_LINES = 2_000_000
# Characters of the longest piece and, of any but small vocabularies, of a piece in the mean. SentencePiece makes pieces of 16
# unless asked for more, and never of more than 512.
_LONGEST_PIECE, _MEAN_PIECE, _SLACK = 512, 16, 1 << 16
# Only one thread at a time listens to what is printed.
_STDERR = threading.Lock()
# Characters that SentencePiece's "nfkc" tables leave alone, each with a noncharacter that no text holds.
_NOT_NFKC = {"\uff5e": "\ufdd0", "\u0344": "\ufdd1"}


def load_tokenizer(path: str | os.PathLike[str]) -> "PreTrainedTokenizerFast":
    """A transformers fast tokenizer from a model folder or a SentencePiece ``.model`` file.

    Args:
        path: a folder with ``tokenizer.json`` (preferred) or one ``*.model`` file, or such a file.

    Raises:
        FileNotFoundError: there is no tokenizer at `path`.
        OSError: see `pldr.files.check_regular`.
        ValueError: a damaged tokenizer, or a SentencePiece file of an unsupported kind.
    """
    path = Path(path)
    if path.exists():
        check_regular(path)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return _from_folder(path)
        candidates = sorted(path.glob("*.model"))
        if len(candidates) != 1:
            found = f"{len(candidates)} *.model files" if candidates else "no *.model file"
            raise FileNotFoundError(f"{path}: no tokenizer.json and {found}; name a tokenizer")
        path = candidates[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file")
    return from_sentencepiece(path)


def _from_folder(folder: Path) -> "PreTrainedTokenizerFast":
    from transformers import AutoConfig, AutoTokenizer  # which bring torch

    from pldr.configuration_pldr import PldrConfig

    AutoConfig.register("pldrllm", PldrConfig, exist_ok=True)  # or it warns of a type that it does not know
    try:
        fields, settings = read_json(folder / "tokenizer.json"), folder / "tokenizer_config.json"
        vocabulary = fields["model"]["vocab"]  # a dictionary, or a list of pieces with their scores
        _check_lengths(vocabulary if isinstance(vocabulary, dict) else (piece for piece, _ in vocabulary))
        for table in _tables(fields.get("normalizer")):
            _check_table(table)
        if settings.exists():
            check_text(json.dumps(read_json(settings), ensure_ascii=False), "settings")
        with _panics():
            # With a configuration it reads none, which may be of any model and hold anything.
            tokenizer = AutoTokenizer.from_pretrained(folder, config=PldrConfig(), trust_remote_code=False)
            tokenizer("settings of other types show up here")
            return tokenizer
    except Exception as error:  # noqa: BLE001 (damaged files raise anything; each is the file's fault)
        raise ValueError(f"{folder}: damaged or unsupported tokenizer ({one_line(error)})") from None


def _tables(normalizer: Any) -> Iterator[bytes]:
    """The tables of characters in a normalizer of a tokenizer.json."""
    if isinstance(normalizer, dict):
        if isinstance(table := normalizer.get("precompiled_charsmap"), str):
            yield base64.b64decode(table)
        for step in normalizer.get("normalizers") or ():
            yield from _tables(step)


def _check_table(table: bytes) -> None:
    """Look at all that the tokenizers library follows, out of bounds too, when it meets a text that leads there.

    A table is the length of a trie in bytes, the trie, and the texts that its leaves point to, each with a NUL behind it. The
    trie is a double array of 32-bit numbers: a node's children begin at its own place XOR its offset, each a byte further.

    Raises:
        ValueError: it ends before its trie does, or a node or leaf of it points to what is not there.
    """
    length = int.from_bytes(table[:4], "little")
    if length < 4 or length % 4 or length > len(table) - 4:
        raise ValueError("a table of characters that is cut off")
    trie, texts = np.frombuffer(table[4 : 4 + length], "<u4").astype(np.int64), table[4 + length :]
    inner = np.flatnonzero((trie >> 31 == 0) | (np.arange(len(trie)) == 0))
    nodes = trie[inner]
    children = inner ^ ((nodes >> 10) << ((nodes & (1 << 9)) >> 6))
    if (children | 255).max() >= len(trie):
        raise ValueError("a table of characters that leads out of itself")
    leaves = trie[children[nodes >> 8 & 1 == 1]] & ((1 << 31) - 1)
    starts = {0, *(place + 1 for place, byte in enumerate(texts) if byte == 0)}
    texts.decode("utf-8")
    if not starts.issuperset(leaves.tolist()):
        raise ValueError("a table of characters that leads to no text")


def _check_lengths(pieces: Iterable[str]) -> None:
    """
    Raises:
        ValueError: pieces so long that a small file would take much memory: some 400 bytes for each of their characters.
    """
    lengths = [len(piece) for piece in pieces]
    if max(lengths, default=0) > _LONGEST_PIECE or sum(lengths) > _MEAN_PIECE * len(lengths) + _SLACK:
        raise ValueError(
            f"pieces of {max(lengths)} characters, {sum(lengths) / len(lengths):.0f} in the mean; at most {_LONGEST_PIECE} and "
            f"{_MEAN_PIECE} are read"
        )


@contextmanager
def _panics() -> Iterator[None]:
    """Make a panic of the tokenizers library, which is no Exception and prints pages by itself, an error like others.

    Raises:
        ValueError: the library panicked.
    """
    with _STDERR, tempfile.TemporaryFile() as printed:
        try:
            stderr = os.dup(2)
        except OSError:  # it is closed
            stderr = os.open(os.devnull, os.O_WRONLY)
        os.dup2(printed.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            printed.truncate(0)
            raise ValueError(one_line(error)) from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            printed.seek(0)
            os.write(2, printed.read())  # what else was said meanwhile


def from_sentencepiece(path: str | os.PathLike[str]) -> "PreTrainedTokenizerFast":
    """The fast tokenizer that gives the same ids as SentencePiece does for this unigram or BPE model.

    Control pieces written out in a text ("[END]") are text, as in SentencePiece; the model's own end-of-text token can
    not be smuggled in by a prompt.

    Raises:
        ValueError: not a SentencePiece model, or one of another kind.
    """
    model = _read_sentencepiece(path)
    try:
        with _panics():
            tokenizer = _fast_tokenizer(model)
    except Exception as error:  # noqa: BLE001 (the Rust library's own kinds of error, and pieces that are not UTF-8)
        raise ValueError(f"{path}: damaged SentencePiece model ({one_line(error)})") from None
    tokenizer.name_or_path = str(path)
    return tokenizer


def _fast_tokenizer(model: "ModelProto") -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    _check_lengths(piece.piece for piece in model.pieces)
    tokenizer = Tokenizer(_unigram(model) if model.trainer_spec.model_type == _UNIGRAM else _bpe(model))
    tokenizer.normalizer = _normalizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = {f"{name}_token": model.pieces[index].piece for name, index in _special_ids(model).items() if index >= 0}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **control, split_special_tokens=True, clean_up_tokenization_spaces=False,
        padding_side="left",
    )  # fmt: skip


def _read_sentencepiece(path: str | os.PathLike[str]) -> "ModelProto":
    """Raises ValueError: not a SentencePiece model, a damaged one, or one of another kind than unigram and BPE."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(Path(path).read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path}: not a SentencePiece model ({error})") from None
    if not model.pieces:
        raise ValueError(f"{path}: not a SentencePiece model (it has no pieces)")
    if model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise ValueError(f"{path}: only SentencePiece unigram and BPE models are supported")
    outside = any(index >= len(model.pieces) for index in _special_ids(model).values())
    if outside or model.trainer_spec.unk_id < 0 or not all(math.isfinite(piece.score) for piece in model.pieces):
        raise ValueError(f"{path}: damaged SentencePiece model (scores, or ids of its special pieces)")
    return model


def _special_ids(model: "ModelProto") -> dict[str, int]:
    """By transformers' names; -1 where the model has none."""
    spec = model.trainer_spec
    return {"pad": spec.pad_id, "unk": spec.unk_id, "bos": spec.bos_id, "eos": spec.eos_id}


def _unigram(model: "ModelProto") -> models.Unigram:
    scores = [(piece.piece, piece.score) for piece in model.pieces]
    return models.Unigram(scores, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)


def _bpe(model: "ModelProto") -> models.BPE:
    spec = model.trainer_spec
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    merges = _merges({piece.piece: piece.score for piece in model.pieces if piece.type in _FOUND_IN_TEXT})
    unknown = model.pieces[spec.unk_id].piece
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model, best first: every pair of pieces that makes a piece."""
    ranks = {piece: rank for rank, piece in enumerate(sorted(scores, key=lambda piece: -scores[piece]))}
    pairs = [
        (ranks[piece], ranks[piece[:cut]], ranks[piece[cut:]], piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]


def _normalizer(model: "ModelProto") -> normalizers.Normalizer | None:
    """What SentencePiece does to a text first: its table of characters, then its rules for spaces."""
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        if "nfkc" in spec.name:
            # SentencePiece composes wherever its table matches, tokenizers only whole short grapheme clusters. The
            # table is NFKC but for these two, so that composing first makes the two agree on decomposed text.
            steps += [normalizers.Replace(character, aside) for character, aside in _NOT_NFKC.items()]
            steps.append(normalizers.NFKC())
            steps += [normalizers.Replace(aside, character) for character, aside in _NOT_NFKC.items()]
        _check_table(spec.precompiled_charsmap)
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return normalizers.Sequence(steps) if steps else None


def _pre_tokenizer(model: "ModelProto") -> pre_tokenizers.PreTokenizer:
    """Spaces become ▁ at the front of words, which are looked at one by one."""
    scheme = "always" if model.normalizer_spec.add_dummy_prefix else "never"
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=True)
    ]
    if model.trainer_spec.model_type == _UNIGRAM:  # in BPE no merge leads to them
        # SentencePiece finds control and byte pieces in no text; tokenizers would. A cut behind their first character
        # keeps them apart from a text that spells one out.
        hidden = [piece.piece for piece in model.pieces if piece.type not in _FOUND_IN_TEXT and len(piece.piece) > 1]
        cuts = "|".join(f"{re.escape(piece[0])}(?={re.escape(piece[1:])})" for piece in hidden)
        steps.append(pre_tokenizers.Split(Regex(cuts), "merged_with_previous"))
    return pre_tokenizers.Sequence(steps)


def encode(tokenizer: "PreTrainedTokenizerFast", texts: str | list[str]) -> Any:
    """The ids of a text, or of each of several, without special tokens.

    Raises:
        ValueError: the tokenizer fails at a text (it is named): a pattern in it is one that takes too long, say.
    """
    try:
        with _panics():
            return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # noqa: BLE001 (the Rust library's own kinds of error)
        raise ValueError(f"{tokenizer.name_or_path or 'tokenizer'}: fails at a text ({one_line(error)})") from None


def check_text(text: str, name: str) -> str:
    """`text` itself, where it can be written as UTF-8.

    Raises:
        ValueError: it cannot: it was made from bytes that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: not valid UTF-8 at character {error.start}") from None
    return text


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", prompt: str, *, may_be_empty: bool = True) -> list[int]:
    """Token ids of a prompt, without special tokens; an empty one is [END], behind which texts begin, as published.

    Raises:
        ValueError: the prompt is not valid UTF-8; or it is empty, and the tokenizer has no [END] or it may not be.
    """
    ids: list[int] = encode(tokenizer, check_text(prompt, "prompt"))
    if not ids and may_be_empty and tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    if not ids:
        raise ValueError("prompt: is empty; G_LM needs at least one token")
    return ids


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> None:
    """Raises ValueError: the tokenizer is of another vocabulary size than the model."""
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"tokenizer: has {len(tokenizer)} tokens, the model has vocab_size={vocab_size}; name the tokenizer that "
            f"the model was trained with (--tokenizer), in place of {tokenizer.name_or_path or 'this one'}"
        )


def train_sentencepiece(
    texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int = 32000, model_type: str = "unigram"
) -> Path:
    """Train a SentencePiece model with the published settings (byte fallback, single digits, ids 0 [PAD] … 3 [END]).

    Args:
        texts: training texts; long ones are cut into lines.
        path: file to write; appears only when whole.
        vocab_size: number of pieces.
        model_type: "unigram" (as published) or "bpe".

    Returns:
        The path.

    Raises:
        ValueError: another model type; no text; SentencePiece cannot make that many pieces of these texts.
    """
    import sentencepiece

    if model_type not in ("unigram", "bpe"):
        raise ValueError(f"tokenizer: the model type must be unigram or bpe, got {model_type!r}")
    path = Path(path)
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    control: dict[str, Any] = {f"{name}_piece": piece for name, piece in CONTROL_PIECES.items()}
    try:
        with whole_file(path) as partial, partial.open("wb") as stream:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=lines, model_writer=stream, model_type=model_type, vocab_size=vocab_size,
                pad_id=PAD, unk_id=UNK, bos_id=START, eos_id=END, **control,
                byte_fallback=True, split_digits=True, max_sentence_length=1 << 16, minloglevel=2,
                input_sentence_size=_MOST_LINES, shuffle_input_sentence=True,
            )  # fmt: skip
    except RuntimeError as error:
        # Of SentencePiece's error the last sentence is for people, what stands before it for its authors.
        reason = str(error).rpartition("] ")[2].partition(" or decrease")[0] or error
        raise ValueError(f"vocab_size: {vocab_size} does not work for this text: {reason}") from None
    return path
