"""Seeded damage to a file: to its bytes, to the values in it, or something else in its place. `damage` is what tests call."""

import contextlib
import gzip
import io
import json
import lzma
import math
import os
import pickle
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow
import yaml
from google.protobuf.json_format import MessageToDict, ParseDict
from pyarrow import parquet
from sentencepiece.sentencepiece_model_pb2 import ModelProto

# A mutation takes a file's bytes and the dice, and gives other bytes.
Mutation = Callable[[bytes, random.Random], bytes]


class Damage(NamedTuple):
    """What was done to a file.

    Attributes:
        how: in words.
        what: "bytes", "values" (the file is whole in its format) or "place" (the file is gone, or is no file).
    """

    how: str
    what: str


def damage(file: Path, dice: random.Random) -> Damage:
    """Damage a file that is whole."""
    content, what = file.read_bytes(), dice.choices(("place", "bytes", "values"), (15, 35, 50))[0]
    if what == "place":
        how = dice.choice(list(PLACES))
        file.unlink()
        PLACES[how](file)
        return Damage(how, what)
    mutation = dice.choice(BYTES) if what == "bytes" else VALUES_OF.get(file.suffix, change_words)
    file.write_bytes(next(changed for changed in _tries(mutation, content, dice) if changed != content))
    return Damage(mutation.__name__.replace("_", " ") if what == "bytes" else f"a value in {file.suffix}", what)


def _tries(mutation: Mutation, content: bytes, dice: random.Random) -> Iterator[bytes]:
    for _ in range(100):
        with contextlib.suppress(Exception):  # each format refuses some values, with an error of its own
            yield mutation(content, dice)


# Something else in a file's place.
PLACES: dict[str, Callable[[Path], None]] = {
    "gone": lambda file: None,
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a link to itself": lambda file: file.symlink_to(file),
    "a link to nothing": lambda file: file.symlink_to("nothing"),
    "a link to a device": lambda file: file.symlink_to("/dev/zero"),
    "a link to its folder": lambda file: file.symlink_to("."),
}


# --- bytes ----------------------------------------------------------------------------------------------------------


def place_in(content: bytes, dice: random.Random) -> int:
    """Near the front, where headers are, or anywhere."""
    return dice.randrange(min(len(content), dice.choice((64, 1024, len(content)))))


def flip_bits(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 20))):
        changed[place_in(content, dice)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def put_number(content: bytes, dice: random.Random) -> bytes:
    """As formats keep sizes and places: little-endian, in 1 to 8 bytes."""
    size, first = dice.choice((1, 2, 4, 8)), place_in(content, dice)
    number = dice.choice((0, 1, 255, 1 << 31, (1 << 63) - 1, (1 << 64) - 1, dice.getrandbits(12))) % (1 << 8 * size)
    return content[:first] + number.to_bytes(size, "little") + content[first + size :]


def truncate(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content))]


def extend(content: bytes, dice: random.Random) -> bytes:
    return content + dice.choice((bytes(64), dice.randbytes(64), content[:64], b"\n\n{}"))


def fill_with_zeros(content: bytes, dice: random.Random) -> bytes:
    first, size = place_in(content, dice), dice.choice((1, 8, 512))
    return content[:first] + bytes(len(content[first : first + size])) + content[first + size :]


def swap_chunks(content: bytes, dice: random.Random) -> bytes:
    size = dice.choice((1, 8, 512))
    a, b = sorted((place_in(content, dice), place_in(content, dice)))
    chunks = content[:a], content[a : a + size], content[a + size : b], content[b : b + size], content[b + size :]
    return b"".join((chunks[0], chunks[3], chunks[2], chunks[1], chunks[4])) if a + size <= b else content


def empty(content: bytes, dice: random.Random) -> bytes:
    return b""


BYTES = (flip_bits, put_number, truncate, extend, fill_with_zeros, swap_chunks, empty)


# --- values ---------------------------------------------------------------------------------------------------------

# Texts that stand in JSON as they are, which json.dumps would not write; and what marks a key that is there twice.
DIGITS, NESTED, TWICE = "9" * 5000, "[" * 100_000 + "]" * 100_000, "\0twice"
VALUES = [
    None, True, 0, 1, -1, 7, 10**9, 2**31, 2**63, 10**40, 0.5, -1e-300, 1e308, math.nan, math.inf, "", "x", "7", "None",
    "\x1b[31mred", "[/bold]", "../../etc/passwd", "\ud800", "x" * 100_000, [], {}, [[]], [1, "x", None], {"x": 1}, DIGITS, NESTED,
]  # fmt: skip


def change_value(tree: object, dice: random.Random) -> object:
    """Dictionaries and lists with one value, key or item changed; deep ones are as likely as all others together."""
    if not isinstance(tree, (dict, list)) or not tree or dice.random() < 0.15:
        return dice.choice(VALUES)
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    key = dice.choice(list(tree)) if isinstance(tree, dict) else dice.randrange(len(tree))
    how = dice.choice(("inside", "inside", "inside", "inside", "removed", "renamed", "twice"))
    if how == "removed":
        del changed[key]
    elif how == "renamed" and isinstance(changed, dict):
        changed[dice.choice((f"{key}x", "", "\x1b[31m"))] = changed.pop(key)
    elif how == "twice" and isinstance(changed, dict):
        changed[f"{key}{TWICE}"] = dice.choice((changed[key], dice.choice(VALUES)))
    elif how == "twice":
        changed.insert(key, changed[key])
    else:
        changed[key] = change_value(changed[key], dice)
    return changed


def to_text(tree: object) -> bytes:
    """JSON, with what is no JSON where `change_value` asks for it."""
    text = json.dumps(tree).replace(json.dumps(TWICE)[1:-1], "")
    for raw in (DIGITS, NESTED):
        text = text.replace(json.dumps(raw), raw)
    return text.encode()


def change_json(content: bytes, dice: random.Random) -> bytes:
    return to_text(change_value(json.loads(content), dice))


def change_json_lines(content: bytes, dice: random.Random) -> bytes:
    lines = content.splitlines()
    number = dice.randrange(len(lines))
    lines[number] = change_json(lines[number], dice)
    return b"\n".join(lines) + b"\n"


def change_compressed(
    decompress: Callable[[bytes], bytes], compress: Callable[[bytes], bytes], content: bytes, dice: random.Random
) -> bytes:
    return compress(change_json_lines(decompress(content), dice))


def compress_zst(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def decompress_zst(content: bytes) -> bytes:
    return pyarrow.input_stream(io.BytesIO(content), compression="zstd").read()


# A list in lists, each twice in the next: small in memory, 2⁴⁰ items when it is printed; and what YAML alone has.
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)) + "seed: *a39\n"
ONLY_YAML = (BOMB, "seed: &a [*a]\n", "seed: !!python/object/apply:os.getpid []\n", "\t- x\n")


def change_yaml(content: bytes, dice: random.Random) -> bytes:
    """As JSON, which is YAML too."""
    if dice.random() < 0.2:
        return content + dice.choice(ONLY_YAML).encode()
    return to_text(change_value(yaml.safe_load(content), dice))


def change_words(content: bytes, dice: random.Random) -> bytes:
    """A number or word of any text, replaced by a value as Python writes it, or as it is."""
    text, value = content.decode(), dice.choice(VALUES)
    word = dice.choice(list(re.finditer(r"-?[\w.]+", text)))
    written = value if isinstance(value, str) and dice.random() < 0.7 else repr(value)
    return f"{text[: word.start()]}{written}{text[word.end() :]}".encode()


def change_header(content: bytes, dice: random.Random) -> bytes:
    """Of safetensors: names, types, shapes and places, in front of the tensors."""
    (size,) = struct.unpack("<Q", content[:8])
    header = change_json(content[8 : 8 + size], dice)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def change_pickle(content: bytes, dice: random.Random) -> bytes:
    """One operation removed, doubled, or replaced by a value; bytes, which are a pickle again, damaged as bytes are."""
    steps = list(pickletools.genops(content))
    ends = [place for _, _, place in steps[1:]] + [len(content)]
    # Without frames, whose sizes would no longer be right.
    parts = [
        (content[place:end], value)
        for (code, value, place), end in zip(steps, ends, strict=True)
        if code.name != "FRAME"
    ]
    which = dice.randrange(len(parts))
    part, value = parts[which]
    new = dice.choice(BYTES)(value, dice) if isinstance(value, bytes) and value else dice.choice(VALUES)
    written = pickle.dumps(new, protocol=3)[2:-1]  # without its first and last operation
    parts[which] = dice.choice((b"", part * 2, written, written, written)), None
    return b"".join(part for part, _ in parts)


def change_archive(content: bytes, dice: random.Random) -> bytes:
    """Of a .pth: the pickle in it."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        for name in old.namelist():
            new.writestr(name, change_pickle(old.read(name), dice) if name.endswith("data.pkl") else old.read(name))
    return written.getvalue()


def change_sentencepiece(content: bytes, dice: random.Random) -> bytes:
    """Of a tokenizer's .model: a field of the protocol buffer."""
    tree = change_value(MessageToDict(ModelProto.FromString(content)), dice)
    return ParseDict(tree, ModelProto()).SerializePartialToString()


def change_table(content: bytes, dice: random.Random) -> bytes:
    """Of Parquet: a column or a value in it."""
    written = io.BytesIO()
    parquet.write_table(pyarrow.table(change_value(parquet.read_table(io.BytesIO(content)).to_pydict(), dice)), written)
    return written.getvalue()


# By the ending of a file's name; in others, words are changed.
VALUES_OF: dict[str, Mutation] = {
    ".json": change_json,
    ".jsonl": change_json_lines,
    ".gz": partial(change_compressed, gzip.decompress, gzip.compress),
    ".xz": partial(change_compressed, lzma.decompress, lzma.compress),
    ".zst": partial(change_compressed, decompress_zst, compress_zst),
    ".parquet": change_table,
    ".yaml": change_yaml,
    ".safetensors": change_header,
    ".pkl": change_pickle,
    ".pth": change_archive,
    ".model": change_sentencepiece,
}
