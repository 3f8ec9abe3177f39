"""Continue texts with a trained model, one of a run of ours or one in Hugging Face's files.

Question: none of its own; it shows what a model says.
Command:  python experiments/generate.py MODEL --prompt TEXT ... [--flags], for instance
              python experiments/generate.py runs/quickstart/switch-*/0 --prompt "And it came to pass "
              python experiments/generate.py FOLDER --prompt "Once upon" --temperature 0 --max-new-tokens 100
          MODEL is a run folder, a folder of Hugging Face's (config.json, *.safetensors), or one that
          convert.py wrote. A run reads bytes; another folder's texts go through its tokenizer.json (which
          needs the library tokenizers), and without one prompts are token ids: --prompt "12 5 103".
          --help lists the flags.
Cost:     seconds for a small model on two CPU cores, most of them compiling.
Result:   prompt and text on the terminal as they come; elsewhere, or with --no-stream, one line a prompt in
          which newlines are written \\n. A prompt's text is the same whatever other prompts stand beside it.
          A model with an encoder reads the prompts and writes the answers.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro

from switchmoe.data import ByteTokenizer, load_tokenizer
from switchmoe.infer import GenerateConfig, TextStream, Tokenizer, generate, prepare, quantize, stream
from switchmoe.models import TransformerLM
from switchmoe.parallel import Layout, MeshConfig, make_layout
from switchmoe.train import RunError, load_model
from switchmoe.train.command_line import fail

if __package__:
    from experiments import weights
else:
    import weights


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Continue texts with a trained model.

    Attributes:
      model: a run folder, or a folder with config.json and safetensors.
      prompt: the texts to go on from, one or more.
      max_new_tokens: length of what is added, at most.
      temperature: 0 takes the most probable token each time; 1 draws by the model's own probabilities.
      top_k: draw from the so many most probable tokens only.
      top_p: draw from the smallest set of most probable tokens only whose probabilities add up to it.
      seed: of the draws.
      experts: whether a prompt's tokens may be dropped where an expert is full ("capacity") or not
        ("dropless"); what the model's own configuration says unless given.
      quantize: round the experts' weights to so many bits first, which takes a quarter or an eighth of their
        float32 memory.
      stream: print tokens as they come; on a terminal unless said otherwise.
      mesh: how model and rows are split over devices.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    prompt: tuple[str, ...]
    max_new_tokens: int = 128
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    experts: Literal["dropless", "capacity"] | None = None
    quantize: Literal[8, 4] | None = None
    stream: bool = dataclasses.field(default_factory=sys.stdout.isatty)
    mesh: MeshConfig = MeshConfig(data=1)


class Speaker(NamedTuple):
    """A model and what is known about its tokens."""

    model: TransformerLM
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...] = ()
    banned_tokens: tuple[int, ...] = ()
    start_token: int = 0

    def read(self, text: str) -> list[int]:
        """Give the tokens of a prompt; what an encoder reads has an end token behind it, as in training."""
        ids, end = list(self.tokenizer.encode(text)), list(self.stop_tokens[:1])
        as_it_is = self.model.config.encoder_layers == 0 or isinstance(self.tokenizer, IdTokenizer)
        return ids if as_it_is or not ids or ids[-1:] == end else ids + end


class IdTokenizer:
    """Token ids as text, where there is no tokenizer: numbers with spaces between them."""

    def encode(self, text: str) -> list[int]:
        """Read the numbers."""
        try:
            return [int(word) for word in text.replace(",", " ").split()]
        except ValueError:
            raise ValueError(
                f"The model's folder has no tokenizer.json, so prompts are token ids, but there is {text!r}; "
                "write ids with spaces between them, or put the tokenizer.json there."
            ) from None

    def decode(self, ids: list[int]) -> str:
        """Write the numbers, a space in front of each."""
        return "".join(f" {token}" for token in ids)


class FileTokenizer:
    """A tokenizer.json, read by the library tokenizers."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise RunError(
                f"{path} needs the library tokenizers; pip install 'switchmoe[hf]', or move the file away "
                "and write prompts as token ids."
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more particular
            raise RunError(f"{path} can't be read as a tokenizer: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text, with the special tokens that the file puts around it."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        """Give the text of ids, without special tokens."""
        return self._tokenizer.decode(ids)


def load(folder: Path, layout: Layout | None = None) -> Speaker:
    """Read a model, whatever kind of folder it is in.

    Raises:
      RunError, ValueError: one sentence, if it is none or can't be read.
    """
    if weights.tell_kind(folder) == "run":
        model, trained = load_model(folder)
        tokenizer = load_tokenizer(trained.data.tokenizer, trained.data.end_token)
        if not isinstance(tokenizer, ByteTokenizer):
            return Speaker(model, tokenizer, (tokenizer.eos,), start_token=tokenizer.pad)
        return speak_bytes(model)
    model = weights.read_model(folder, layout=layout)
    named = (folder / "tokenizer.json").is_file()
    if model.config.vocab_size in BYTES and not named:
        return speak_bytes(model)
    settings = _read(folder / "config.json") | _read(folder / "generation_config.json")
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return Speaker(
        model,
        FileTokenizer(folder / "tokenizer.json") if named else IdTokenizer(),
        stop_tokens=tuple(end for end in ends if isinstance(end, int) and 0 <= end < model.config.vocab_size),
        start_token=settings.get("decoder_start_token_id") or 0,
    )


BYTES = (ByteTokenizer.vocab_size, ByteTokenizer.vocab_size_with_sentinels)


def speak_bytes(model: TransformerLM) -> Speaker:
    """Say what tokens mean to a model that was trained on bytes."""
    tokenizer = ByteTokenizer()
    return Speaker(model, tokenizer, (tokenizer.eos,), (tokenizer.pad, tokenizer.unk), tokenizer.pad)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is no JSON: {error}") from error


def main(arguments: Arguments) -> int:
    """Print what the model adds to each prompt; returns the exit code."""
    try:
        wanted = GenerateConfig(
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            experts=arguments.experts,
        )
        layout = None if arguments.mesh == MeshConfig(data=1) else make_layout(arguments.mesh)
        speaker = load(arguments.model.expanduser(), layout)
        model = speaker.model
        if arguments.quantize is not None:
            model = quantize(model, arguments.quantize)
        if layout is None:
            model = prepare(model, free=True)
        speaker = speaker._replace(model=model)
        config = dataclasses.replace(
            wanted,
            stop_tokens=speaker.stop_tokens,
            banned_tokens=speaker.banned_tokens,
            start_token=speaker.start_token,
        )
        options = dict(tokenizer=speaker.tokenizer, key=jax.random.key(arguments.seed), layout=layout)
        (print_as_it_comes if arguments.stream else print_lines)(speaker, arguments.prompt, config, options)
    except (RunError, ValueError, OSError) as error:
        return fail(error if isinstance(error, RunError) else RunError(str(error)))
    return 0


def print_lines(speaker: Speaker, prompts: tuple[str, ...], config: GenerateConfig, options: dict) -> None:
    """Generate all rows together, and print a line for each."""
    between = _between(speaker.model)
    texts = generate(speaker.model, [speaker.read(prompt) for prompt in prompts], config, **options).texts
    for prompt, text in zip(prompts, texts, strict=True):
        print(repr(prompt + between + text)[1:-1])


def print_as_it_comes(
    speaker: Speaker, prompts: tuple[str, ...], config: GenerateConfig, options: dict
) -> None:
    """Generate one row after the other, since a terminal has one cursor; the texts are the same."""
    for row, prompt in enumerate(prompts):
        pieces = stream(speaker.model, [speaker.read(prompt)], config, row_ids=[row], **options)
        print(prompt, end=_between(speaker.model), flush=True)
        text = TextStream(speaker.tokenizer)
        for piece in pieces:
            token = int(piece.tokens_B[0])
            if token not in config.stop_tokens:
                print(text.add(token), end="", flush=True)
        print(text.end())


def _between(model: TransformerLM) -> str:
    """What stands between a prompt and what is said to it: nothing, unless it is an answer."""
    return " -> " if model.config.encoder_layers else ""


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
