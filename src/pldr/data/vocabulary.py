"""Documents to a tokenizer."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from pldr.data.sources import BadRows, Source, names_of, read_pieces
from pldr.files import whole_folder
from pldr.tables import Printable, Text
from pldr.tokenizer import load_tokenizer, train_sentencepiece


@dataclass(frozen=True)
class TrainedTokenizer(Printable):
    """A tokenizer that was trained and saved.

    Attributes:
        folder: where it is, as SentencePiece model and as transformers fast tokenizer.
        model: "unigram" or "bpe".
        vocab_size: its tokens.
        skipped: what was skipped of the data, in one line; "" if every row was good.
    """

    folder: Path
    model: str
    vocab_size: int
    skipped: str

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"folder": str(self.folder)}

    def __rich__(self) -> RenderableType:
        return Text(f"{self.folder}: {self.vocab_size:,} pieces ({self.model})")


def train_tokenizer(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    vocab_size: int = 32000,
    model: str = "unigram",
    text_column: str = "text",
    split: str = "train",
    interval: str = "",
    strict: bool = False,
    overwrite: bool = False,
) -> TrainedTokenizer:
    """Train a SentencePiece model with the published settings, and save it as a transformers fast tokenizer too.

    Args:
        sources: names of files or hub data sets, see `pldr.recipe.DataRecipe.train`.
        output: folder to write.
        vocab_size: number of pieces.
        model: "unigram" (as published) or "bpe".
        text_column: of JSON lines, Parquet files and hub data sets.
        split: of hub data sets.
        interval: which documents, "start:stop" by index or percent; "" for all.
        strict: refuse bad rows (no text, empty, not valid UTF-8, too long) rather than skip and count them.
        overwrite: replace a folder that is not empty.

    Raises:
        FileNotFoundError: a source matches no file.
        ValueError: damaged data or, with `strict`, a bad row; another model type; no text, or too little for that many
            pieces.
        FileExistsError, OSError: the folder can not be written.
    """
    names = names_of(sources)
    with whole_folder(output, overwrite=overwrite) as folder:
        source = Source(names, text_column, split, interval)
        skipped = train_pieces(source, folder / "tokenizer.model", vocab_size, model, strict=strict)
        tokenizer = load_tokenizer(folder / "tokenizer.model")
        tokenizer.save_pretrained(folder)
    return TrainedTokenizer(Path(output), model, len(tokenizer), skipped)


def train_pieces(
    source: Source,
    file: Path,
    vocab_size: int,
    model: str = "unigram",
    *,
    strict: bool = False,
    streaming: bool = False,
) -> str:
    """Train a SentencePiece model into a file that appears only when whole; options as for `train_tokenizer`.

    Returns:
        What was skipped of the data, in one line; "" if every row was good.
    """
    bad = BadRows(strict)
    pieces = read_pieces(source, bad, streaming=streaming)
    train_sentencepiece((piece.text for piece in pieces), file, vocab_size, model)
    return bad.summary()
