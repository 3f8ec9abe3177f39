"""Generating with a model."""

from switchmoe.infer.config import GenerateConfig
from switchmoe.infer.forms import prepare, quantize
from switchmoe.infer.generate import generate, stream
from switchmoe.infer.memory import MemoryTable, memory_table
from switchmoe.infer.offload import OffloadStats
from switchmoe.infer.offloaded import OffloadedModel
from switchmoe.infer.prompts import TextStream, Tokenizer, bucket_length
from switchmoe.infer.results import Generated, NewTokens

__all__ = [
    "GenerateConfig",
    "Generated",
    "MemoryTable",
    "NewTokens",
    "OffloadStats",
    "OffloadedModel",
    "TextStream",
    "Tokenizer",
    "bucket_length",
    "generate",
    "memory_table",
    "prepare",
    "quantize",
    "stream",
]
