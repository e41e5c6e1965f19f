"""Is it safe to freeze? A certificate for pasted text, made in the background, and what can be downloaded then."""

import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pldr.data.sources import Source
from pldr.files import json_safe, one_line
from pldr.studio.workbench import Workbench
from pldr.study.certify import Thresholds, certificate_of, compare_modes, in_float32, spread_passages

# Passages to compare on, at least and at most, and those that G_LM is frozen from.
_LEAST, _MOST, _CALIBRATION = 2, 24, 2
# Tokens of a passage, at least and at most.
_SHORTEST, _LONGEST = 16, 256


class Freezing:
    """One run of `pldr.certify` on a text.

    Attributes:
        stage, done: what is being done, and which part of it is.
        certificate: what it found, in the end.
        error: why there is none.
    """

    def __init__(self, bench: Workbench, text: str) -> None:
        """Raises ValueError: a model without a learned operator, or too little text."""
        if not bench.learned:
            raise ValueError("certify: the model's operator is constant already; nothing is left to freeze")
        tokens = len(bench.tokenizer(text)["input_ids"])
        needed = (_LEAST + _CALIBRATION) * _SHORTEST
        if tokens < needed:
            raise ValueError(
                f"text: has {tokens} tokens; a verdict needs at least {needed}, and means more with thousands"
            )
        longest = min(_LONGEST, bench.config.max_position_embeddings)
        self._length = max(_SHORTEST, min(longest, tokens // (_MOST + _CALIBRATION)))
        self._passages = min(_MOST, tokens // self._length - _CALIBRATION)
        self._bench, self._text = bench, text
        self.folder = Path(tempfile.mkdtemp(prefix="pldr-studio-"))
        self.stage, self.done = "reading the text", 0.0
        self.error: str | None = None
        self.certificate: dict[str, Any] | None = None
        threading.Thread(target=self._run, daemon=True, name="certify").start()

    def state(self) -> dict[str, Any]:
        report = {} if self.certificate is None else self.certificate["report"]
        verdict = None if not report else "safe to freeze" if report["certified"] else "not safe to freeze"
        return {
            "stage": self.stage, "done": self.done, "error": self.error, "verdict": verdict,
            "reasons": report.get("reasons", []), "numbers": report,
        }  # fmt: skip

    @property
    def running(self) -> bool:
        return self.certificate is None and self.error is None

    @property
    def archive(self) -> Path:
        """A ZIP file with the frozen model, its tokenizer and its certificate, where it was certified."""
        return self.folder / "model.zip"

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self) -> None:
        try:
            self._certify()
        except Exception as error:  # noqa: BLE001 (the page shows it; in this thread there is nobody to raise it to)
            self.error = one_line(error)

    def _certify(self) -> None:
        bench, file = self._bench, self.folder / "text.txt"
        file.write_text(self._text, encoding="utf-8")
        rows = spread_passages(
            Source([str(file)]), bench.tokenizer, bench.model, self._passages + _CALIBRATION, self._length
        )
        self.stage = "comparing learned, cached and frozen"
        read, rows = in_float32(bench.model), rows.to(bench.model.device)
        report, frozen = compare_modes(
            read, rows[_CALIBRATION:], rows[:_CALIBRATION], thresholds=Thresholds(1e-5, 0.999), progress=self._watched
        )
        certificate = certificate_of(
            bench.model, bench.model, frozen, bench.tokenizer, report, sources=["pasted text"], rows=rows,
            calibration=_CALIBRATION,
        )  # fmt: skip
        found = json_safe(certificate.to_json())
        if certificate.certified:
            self.stage = "writing the frozen model"
            certificate.save(self.folder / "frozen")
            shutil.make_archive(str(self.folder / "model"), "zip", self.folder / "frozen")
        self.certificate, self.stage, self.done = found, "done", 1.0

    def _watched(self, items: Iterable[int]) -> Iterator[int]:
        """The passages, one after the other, with the model free for others between two."""
        items = list(items)
        for number, item in enumerate(items):
            self.done = number / len(items)
            yield item
