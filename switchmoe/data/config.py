"""Which text to train on, how it is cut into rows, and what of it is to be predicted."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from switchmoe.data.spans import SpanCorruption
from switchmoe.data.tokenizer import ByteTokenizer
from switchmoe.data.tokenizer_file import FileTokenizer, load_tokenizer

Objective = Literal["next_token", "span_corruption"]
# T5's proportions (Raffel et al. 2020, section 3.3.4, https://arxiv.org/abs/1910.10683).
NOISE_DENSITY, MEAN_SPAN = 0.15, 3.0


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, and how it becomes rows of tokens.

    Attributes:
      source: "bundled", or a folder of .txt and .txt.xz files in UTF-8, one file a domain, a form feed
        between two documents.
      sequence_length: tokens that the model reads in a row; with an encoder, those that the encoder reads.
      validation_fraction: share of every domain's text, from its end, that is held out.
      seed: of the order of the rows.
      cache_dir: where packed rows are kept; None means $SWITCHMOE_CACHE, or ~/.cache/switchmoe where that is
        not set.
      tokenizer: "bytes", or a tokenizer.json or its folder, as published weights come with (`FileTokenizer`).
      end_token: what ends a document in that; None for what the files beside it say.
      objective: what is predicted: every next token, by a decoder alone, or the spans that are cut out of a
        text, by a decoder behind an encoder.
      noise_density: share of a text's tokens that span corruption cuts out.
      mean_span: mean length of the spans, in tokens. Where a token is a byte, T5's 3 cuts out pieces of
        words; ByT5 takes 20.

    Raises:
      ValueError: for a sequence_length below 8, a validation_fraction outside (0, 1), a seed that is not in
        [0, 2**32), an unknown objective, a noise_density outside (0, 0.5], a mean_span below 1, either of
        them with an objective that does not read it, an end_token for bytes, or more spans than there are
        sentinels.
    """

    source: str = "bundled"
    sequence_length: int = 256
    validation_fraction: float = 0.05
    seed: int = 0
    cache_dir: str | None = None
    tokenizer: str = "bytes"
    end_token: str | None = None
    objective: Objective = "next_token"
    noise_density: float = NOISE_DENSITY
    mean_span: float = MEAN_SPAN

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError('source is empty; give "bundled" or a folder of .txt files.')
        if self.sequence_length < 8:
            raise ValueError(f"sequence_length is {self.sequence_length}; give at least 8 tokens.")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; give a share between 0 and 1, say 0.05."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"The data seed is {self.seed}; give a whole number from 0 to 2**32 - 1.")
        if self.objective not in get_args(Objective):
            known = " or ".join(f'"{name}"' for name in get_args(Objective))
            raise ValueError(f"The objective {self.objective!r} is not known; choose {known}.")
        if not 0.0 < self.noise_density <= 0.5:
            raise ValueError(f"noise_density is {self.noise_density}; give a share above 0, at most 0.5.")
        if not self.mean_span >= 1.0:
            raise ValueError(f"mean_span is {self.mean_span}; a span has at least 1 token.")
        if self.tokenizer == "bytes":
            self.check_sentinels(ByteTokenizer.num_sentinels)
        if self.tokenizer == "bytes" and self.end_token is not None:
            raise ValueError(
                f"end_token is {self.end_token!r}, but the byte tokenizer ends documents with a token of its "
                "own; leave it at None."
            )
        if self.corruption is None and (self.noise_density, self.mean_span) != (NOISE_DENSITY, MEAN_SPAN):
            raise ValueError(
                "noise_density and mean_span say how spans are cut out, which the objective "
                f'"{self.objective}" does not; leave them alone, or take objective="span_corruption".'
            )

    def load_tokenizer(self) -> ByteTokenizer | FileTokenizer:
        """Get the tokenizer, reading its file if it has one.

        Raises ValueError for a file that can't be read (see `FileTokenizer`) or lacks the sentinels of a row.
        """
        tokenizer = load_tokenizer(self.tokenizer, self.end_token)
        self.check_sentinels(len(tokenizer.special.sentinels))
        return tokenizer

    def check_sentinels(self, there_are: int) -> None:
        """Raise a ValueError if a row has more spans than there are sentinels to mark them."""
        if self.corruption is None:
            return
        spans = self.corruption.lengths(self.corruption.raw_length).spans
        if spans > there_are:
            what = f"the tokenizer {self.tokenizer!r} has" if self.tokenizer != "bytes" else "there are"
            raise ValueError(
                f"A source of {self.sequence_length} tokens has {spans} spans, but {what} {there_are} "
                "sentinels to mark them; raise mean_span, or lower noise_density or sequence_length."
            )

    @property
    def corruption(self) -> SpanCorruption | None:
        """What is cut out of a row of text; None where every next token is predicted."""
        if self.objective == "next_token":
            return None
        return SpanCorruption(self.noise_density, self.mean_span, self.sequence_length)

    @property
    def row_length(self) -> int:
        """Tokens of a packed row, from which the model's inputs and targets are made."""
        return self.sequence_length + 1 if self.corruption is None else self.corruption.raw_length

    @property
    def source_length(self) -> int | None:
        """Tokens that an encoder reads in a row; None where there is none."""
        return None if self.corruption is None else self.sequence_length

    @property
    def target_length(self) -> int:
        """Tokens that the decoder reads, and as many targets: sequence_length where there is no encoder."""
        return self.sequence_length if self.corruption is None else self.corruption.target_length

    @property
    def tokens_per_row(self) -> int:
        """Tokens that the model reads of a row, the encoder's and the decoder's, padding included."""
        return self.target_length + (self.source_length or 0)

    @property
    def vocab_size(self) -> int | None:
        """Ids that rows are made of: those of the bytes, with spans the sentinels' too; a file's: None."""
        if self.tokenizer != "bytes":
            return None
        return (
            ByteTokenizer.vocab_size if self.corruption is None else ByteTokenizer.vocab_size_with_sentinels
        )

    def cache_folder(self) -> Path:
        """Give the folder under which packed rows are kept."""
        chosen = self.cache_dir or os.environ.get("SWITCHMOE_CACHE") or "~/.cache/switchmoe"
        return Path(chosen).expanduser()
