"""The story model writes in a process of its own, while this one imports torch: two threads would wait for each other."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any


class EarlyWriter:
    """`pldr.studio.story` in its process: one text at a time.

    Attributes:
        facts: as of `Workbench`; empty until `wait` has returned, and where the process does not come up.
    """

    operators = ("cached",)

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._closed = False
        self._busy = threading.Lock()
        self._process = self._begun()

    def _begun(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "pldr.studio.story"]
        # The other cores import torch.
        one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        return subprocess.Popen(
            command, env=os.environ | one, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            start_new_session=True,  # Ctrl-C is not for it: it ends when this one's end of the pipe is closed
        )  # fmt: skip

    def wait(self) -> None:
        """Until it writes."""
        self.facts = self._line()

    def _line(self) -> dict[str, Any]:
        """What it says next; nothing, where it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {}

    @property
    def free(self) -> bool:
        return bool(self.facts) and not self._busy.locked()

    def generate(self, prompt: str | None, ids: list[int] | None, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The tokens of the prompt, those of the text, and why it ended. Raises ValueError: settings outside their ranges."""
        with self._busy:
            if self._closed:
                raise ValueError("the text broke off; ask again")
            ended = False
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps({"prompt": prompt, "ids": ids, "options": options}) + "\n")
                self._process.stdin.flush()
                while not ended:
                    step = self._line()
                    ended = "error" in step or "finish_reason" in step
                    if "error" in step or not step:
                        raise ValueError(step.get("error", "the text broke off; ask again"))
                    yield step
            finally:
                if not ended:  # nobody reads on
                    self._process.kill()
                    self._process.wait()
                    if not self._closed:
                        self._process = self._begun()
                        self.wait()

    def retire(self) -> None:
        """End it once its text has ended."""
        with self._busy:
            self.close()

    def close(self) -> None:
        """End it; a text that it is at breaks off."""
        self._closed = True
        self._process.kill()
        self._process.wait()
