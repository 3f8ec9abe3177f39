"""`PRESET [--flags]`, read with tyro over the configuration dataclasses."""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro

from switchmoe.parallel import MeshConfig
from switchmoe.parallel.processes import ClusterError, LaunchConfig
from switchmoe.train.config import TrainConfig
from switchmoe.train.errors import RunError
from switchmoe.train.presets import PRESETS, preset

Flags = TypeVar("Flags")


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """Train a language model; the same command goes on with a run that was stopped.

    Attributes:
      config: what to train.
      mesh: how the run is split over devices; the same run on another mesh goes on where it was.
      launch: how several processes find each other, where no engine tells them.
      out: folder that the run's folder, NAME-HASH/SEED, is made in.
      tensorboard: write TensorBoard event files too (needs tensorboardX).
      wandb: send metrics to Weights & Biases too (needs wandb).
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    mesh: MeshConfig = MeshConfig()
    launch: LaunchConfig = LaunchConfig()
    out: str = "runs"
    tensorboard: bool = False
    wandb: bool = False


def parse(arguments: Sequence[str], program: str) -> CommandLine:
    """Read a command line: the name of a preset, then flags that change it.

    `--help`, before or after a preset, prints help and exits with code 0.

    Raises:
      RunError: one sentence, for an unknown preset or flag (with the nearest name) or a wrong value.
    """
    names = ", ".join(PRESETS)
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(f"usage: {program} PRESET [--flags]\n")
            for name, make in PRESETS.items():
                print(f"  {name:12} {_about(name, make)}")
            print(f"\n{program} PRESET --help shows the flags of a preset and their values.")
            raise SystemExit(0)
        raise RunError(f"the first argument must be a preset, one of {names}: {program} PRESET [--flags].")
    try:
        start = CommandLine(preset(arguments[0]))
    except ValueError as error:
        raise RunError(str(error)) from error
    return read_flags(arguments[1:], f"{program} {arguments[0]}", start)


def read_flags(
    arguments: Sequence[str], program: str, start: CommandLine, also: Sequence[str] = ()
) -> CommandLine:
    """Read flags that change `start`; none else may be left. `also` are flags of the program's own.

    Raises:
      RunError: one sentence, for an unknown flag (with the nearest name) or a wrong value.
    """
    parsed, unknown = read_known(CommandLine, arguments, program, start)
    if unknown:
        raise RunError(_about_unknown(unknown, start, also))
    return parsed


def read_known(
    kind: type[Flags], arguments: Sequence[str], program: str, start: Flags | None = None
) -> tuple[Flags, list[str]]:
    """Read the flags of a dataclass, from its defaults or a `start`, and hand back what is none of them.

    Raises:
      RunError: one sentence, for a wrong value or, where there is no `start`, one that is missing.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(
                kind,
                default=start,
                args=list(arguments),
                prog=program,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
            )
            assert parsed is not None  # which tyro's annotation admits
            return parsed, unknown
    except ValueError as error:  # from the parts of a configuration that fit each other only together
        raise RunError(str(error)) from error
    except SystemExit as ended:
        if ended.code:
            raise RunError(_sentence(said.getvalue())) from ended
        raise


def fail(error: RunError | ClusterError) -> int:
    """Say on stderr why a run can't go on, and return its exit code."""
    print(f"error: {error}", file=sys.stderr)
    return error.code


def _about(name: str, make: Any) -> str:
    base = name.removesuffix("-dense")
    if base != name:
        return f"The FLOP-matched dense twin of {base}."
    return make.__doc__.splitlines()[0]


def _about_unknown(unknown: list[str], start: CommandLine, also: Sequence[str]) -> str:
    flag = next((word for word in unknown if word.startswith("-")), None)
    if flag is None:
        return f"the argument {unknown[0]!r} belongs to no flag; write flags as --name VALUE."
    flag = flag.split("=")[0].replace("_", "-")
    if flag.startswith("--model.moe") and start.config.model.moe is None:
        name = start.config.name
        instead = "drop -dense from its name" if name in PRESETS else "start from a sparse one"
        return f"{flag} is for sparse models, but {name!r} is dense; {instead}."
    near = difflib.get_close_matches(flag, [*also, *_flags(start)], n=1, cutoff=0.4)
    guess = f"did you mean {near[0]}?" if near else "--help lists all flags."
    return f"there is no flag {flag}; {guess}"


def _flags(value: Any, prefix: str = "--") -> list[str]:
    """The flags of a dataclass, as tyro names them."""
    flags = []
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        name = prefix if field.name == "config" else f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(part):
            flags += _flags(part, name if field.name == "config" else f"{name}.")
        else:
            flags.append(name)
    return flags


def _sentence(box: str) -> str:
    """Take the message out of the frame that tyro draws around it, with lines or, in ASCII, without.

    Above the first rule stands at most a title, below the second one only help.
    """
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip().strip("│|").strip()
        if text.startswith("╭") or not text.strip("─-╰╯+"):
            parts.append([])
        else:
            parts[-1].append(text)
    message = " ".join(parts[1]) if len(parts) > 1 and parts[1] else " ".join(box.split())
    return re.sub(r"^Error parsing config[.\w]*: ", "", message)
