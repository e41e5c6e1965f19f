"""Text out of tokens as they come, and where it ends."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Settled tokens that later ones are decoded behind, so that a leading space is one.
_CONTEXT = 4


def continuation(tokenizer: "PreTrainedTokenizerFast", prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of `new` behind `prompt`: a decoder drops the space before a first word, which is none here."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    if not whole.startswith(before):  # the prompt ends inside a character, which the new tokens complete
        before = before.rstrip("\ufffd")
    return whole[len(before) :]


class GrowingText:
    """The text of a continuation, token by token.

    Attributes:
        text: what later tokens cannot change: a run of byte tokens decodes only as a whole.

    Args:
        tokenizer: of the model.
        prompt: token ids before the first new one.
        stops: texts that end the continuation.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.text = ""
        self._special = set(tokenizer.all_special_ids)
        self._before = self._whole(list(prompt))
        self._pending: list[int] = []
        self._shown = 0

    def _whole(self, ids: list[int]) -> list[int]:
        """The last few of `ids`, from a token on that begins a character of its own."""
        start = max(0, len(ids) - _CONTEXT)
        while start and not self._settles(ids[start]):
            start -= 1
        return ids[start:]

    def _settles(self, token: int) -> bool:
        return token not in self._special and not str(self.tokenizer.convert_ids_to_tokens(token)).startswith("<0x")

    def add(self, token: int) -> bool:
        """Take one more token; True where the text has now come to a stop, which is left out of it."""
        self._pending.append(token)
        if self._settles(token):
            text = continuation(self.tokenizer, self._before, self._pending)
            # Other tokenizers cut characters inside ordinary tokens; what is cut decodes to the replacement character.
            if not text.endswith("\ufffd"):
                return self._settle(text)
        return False

    def end(self) -> bool:
        """There will be no more tokens; True as for `add`."""
        return bool(self._pending) and self._settle(continuation(self.tokenizer, self._before, self._pending))

    def _settle(self, text: str) -> bool:
        searched = max(0, len(self.text) - max(map(len, self.stops), default=0))
        self.text += text
        self._before, self._pending = self._whole([*self._before, *self._pending]), []
        found = [place for stop in self.stops if (place := self.text.find(stop, searched)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def piece(self, *, last: bool) -> str:
        """What can be shown since the last call; unless it is the last, without what may turn out to begin a stop."""
        held = 0
        if not last:
            held = max(
                (n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0
            )
        start, self._shown = self._shown, max(self._shown, len(self.text) - held)
        return self.text[start : self._shown]


class TokenTexts:
    """Tokens one by one, as log-probabilities name them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = tokenizer
        special = set(tokenizer.all_special_ids)
        # A token behind another shows its leading space.
        self._before = next(
            i for i in range(len(tokenizer)) if i not in special and tokenizer.decode([i], skip_special_tokens=True)
        )
        self.of = lru_cache(maxsize=1 << 16)(self._of)

    def first(self, token: int) -> str:
        """The text of one that nothing stands before."""
        return self._tokenizer.decode([token]) or self.of(token)[0]

    def _of(self, token: int) -> tuple[str, bytes]:
        """Its text and bytes; the text of one that is part of a character names its byte."""
        text = continuation(self._tokenizer, [self._before], [token])
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if "\ufffd" in text and name.startswith("<0x"):
            byte = bytes.fromhex(name[3:5])
            return f"bytes:\\x{byte.hex()}", byte
        text = text or name  # special tokens have no text
        return text, text.encode("utf-8", "replace")
