"""The tokenizer of published weights, read from their tokenizer.json with the `tokenizers` library."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from switchmoe.data.tokenizer import ByteTokenizer, SpecialTokens


class FileTokenizer:
    """Turns text into the ids of a tokenizer.json, and back, without adding tokens at the ends of a text.

    What ends a document is `end_token`, or what tokenizer_config.json or generation_config.json beside the
    file say; T5's sentinels <extra_id_0>, <extra_id_1>, ... are found by their names, where there are any.
    Nothing is downloaded. In rows an id is kept as itself plus 1, so that 0 is padding and nothing else.

    Raises:
      ValueError: one sentence, if there is no such file, it is damaged, nothing says what ends a document, or
        the `tokenizers` library is not installed.
    """

    def __init__(self, path: str | Path, end_token: str | None = None) -> None:
        path = Path(path).expanduser()
        self.path = path / "tokenizer.json" if path.is_dir() else path
        if not self.path.is_file():
            raise ValueError(
                f'There is no tokenizer at {self.path}; give "bytes", or the folder of a tokenizer.json.'
            )
        self._tokenizer = _read(self.path)
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        pad, eos = self._pad(), self._end(end_token)
        sentinels = tuple(self._sentinels())
        # A pad token is often added beyond the vocabulary of a model that never reads one. It is needed where
        # a decoder starts from it; elsewhere it only stands at padding, which an id that all models have can.
        self.special = SpecialTokens(shift=1, pad=pad or 0 if sentinels else 0, eos=eos, sentinels=sentinels)
        self._silent = {eos} if pad is None else {eos, pad}  # without one, an id of 0 may well be text
        self.eos, self.pad = self.special.eos, self.special.pad

    @property
    def fingerprint(self) -> str:
        """Name what decides the ids of a text: the file and the special tokens."""
        digest = hashlib.sha256(self.path.read_bytes())
        digest.update(json.dumps(self.special).encode())
        return digest.hexdigest()

    def encode(self, text: str) -> Int32[np.ndarray, " N"]:
        """Give the text's tokens, without an end token."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_documents(self, documents: Sequence[bytes]) -> list[Int32[np.ndarray, " _"]]:
        """Give the tokens of texts that are known to be UTF-8, on all cores."""
        texts = [document.decode("utf-8") for document in documents]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Give the text of the tokens; end and padding say nothing, nor, without sentinels, special ones."""
        kept = [int(token) for token in ids if int(token) not in self._silent]
        return self._tokenizer.decode(kept, skip_special_tokens=not self.special.sentinels)

    def _sentinels(self) -> Iterable[int]:
        for number in range(self.vocab_size):
            token = self._tokenizer.token_to_id(f"<extra_id_{number}>")
            if token is None:
                return
            yield token

    def _pad(self) -> int | None:
        token = _content(self._beside("tokenizer_config.json").get("pad_token"))
        return None if token is None else self._tokenizer.token_to_id(token)

    def _end(self, asked: str | None) -> int:
        """Find the id of the token that ends a document."""
        named = asked or _content(self._beside("tokenizer_config.json").get("eos_token"))
        if named is not None:
            token = self._tokenizer.token_to_id(named)
            if token is None:
                raise ValueError(f"{self.path} has no token {named!r}; give data.end_token one that it has.")
            return token
        numbered = self._beside("generation_config.json").get("eos_token_id")
        numbered = numbered[0] if isinstance(numbered, list) and numbered else numbered
        if not isinstance(numbered, int):
            raise ValueError(
                f"Nothing beside {self.path} says which token ends a document; set data.end_token to it."
            )
        if not 0 <= numbered < self.vocab_size:
            raise ValueError(
                f"generation_config.json says that token {numbered} ends a document, but {self.path} has ids "
                f"0 to {self.vocab_size - 1}; set data.end_token to one that it has."
            )
        return numbered

    def _beside(self, name: str) -> dict[str, Any]:
        place = self.path.with_name(name)
        if not place.is_file():
            return {}
        try:
            found = json.loads(place.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{place} is not JSON ({error}); mend it or remove it.") from error
        return found if isinstance(found, dict) else {}


def load_tokenizer(name: str, end_token: str | None = None) -> ByteTokenizer | FileTokenizer:
    """Give the tokenizer of a name: "bytes", or a tokenizer.json or its folder (see `FileTokenizer`)."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name, end_token)


def _read(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"Reading {path} needs the package tokenizers; install it with: pip install '.[hf]'."
        ) from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # Whatever the library raises for a damaged file: it has no type of its own.
        raise ValueError(f"{path} can't be read as a tokenizer ({error}); get it again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _content(token: Any) -> str | None:
    """Read a token that tokenizer_config.json gives as a string, or as an object with its `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
