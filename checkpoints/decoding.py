"""From tokens back to text while they are still being written."""

from typing import Any


class TextStream:
    """Text of tokens as they come, without the character at its end that is not finished yet.

    What a token reads like depends on those before it, so tokens are decoded behind the last ones that made text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._read, self._known = 0, ""  # how many of the ids have been read, and their text

    def push(self, token: int) -> str:
        """What can be read now."""
        self._ids.append(token)
        made = self.rest()
        if not made or made.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._read :]
        self._read, self._known = len(self._ids), self._decode(self._ids)
        return made

    def rest(self) -> str:
        """What has not been read: where the text ends within a character, what there is of that."""
        text = self._decode(self._ids)
        if text.startswith(self._known):
            return text[len(self._known) :]
        return self._decode(self._ids[self._read :])  # some decoders read no byte of a row in which one is wrong

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
