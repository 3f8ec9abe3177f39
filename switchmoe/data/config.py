"""Which text to train on, and how it is cut into rows."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, and how it becomes rows of tokens.

    Attributes:
      source: "bundled", or a folder of .txt and .txt.xz files in UTF-8, one file a domain, a form feed
        between two documents.
      sequence_length: tokens that the model reads in a row.
      validation_fraction: share of every domain's text, from its end, that is held out.
      seed: of the order of the rows.
      cache_dir: where packed rows are kept; None means $SWITCHMOE_CACHE, or ~/.cache/switchmoe where that is
        not set.

    Raises:
      ValueError: for a sequence_length below 8, a validation_fraction outside (0, 1) or a seed that is not in
        [0, 2**32).
    """

    source: str = "bundled"
    sequence_length: int = 256
    validation_fraction: float = 0.05
    seed: int = 0
    cache_dir: str | None = None

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

    def cache_folder(self) -> Path:
        """Give the folder under which packed rows are kept."""
        chosen = self.cache_dir or os.environ.get("SWITCHMOE_CACHE") or "~/.cache/switchmoe"
        return Path(chosen).expanduser()
