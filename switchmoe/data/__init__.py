"""From text to batches: corpora, a byte tokenizer, packed rows on disk and batches addressed by step.

Only numpy is needed until `batches` or `evaluation_batches` is touched; those come with grain.
"""

from typing import TYPE_CHECKING, Any

from switchmoe.data.batch import Batch, make_batch
from switchmoe.data.config import DataConfig
from switchmoe.data.packing import PackedCorpus, Rows, corpus_fingerprint, load_packed
from switchmoe.data.spans import SpanCorruption, make_span_batch
from switchmoe.data.tokenizer import ByteTokenizer, SpecialTokens
from switchmoe.data.tokenizer_file import FileTokenizer, load_tokenizer

if TYPE_CHECKING:
    from switchmoe.data.pipeline import batches, evaluation_batches

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "FileTokenizer",
    "PackedCorpus",
    "Rows",
    "SpanCorruption",
    "SpecialTokens",
    "batches",
    "corpus_fingerprint",
    "evaluation_batches",
    "load_packed",
    "load_tokenizer",
    "make_batch",
    "make_span_batch",
]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and grain with it, the first time that one of its functions is asked for."""
    if name in ("batches", "evaluation_batches"):
        from switchmoe.data import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
