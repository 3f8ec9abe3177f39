"""Distil a sparse model into a dense one that learns from the text and from what the teacher thinks of it.

Question: none of its own; it is the tool that distils.
Command:  python experiments/distill.py --from TEACHER [--student FOLDER] [--flags], for instance
              python experiments/distill.py --from runs/tiny-1a2b3c4d/0 --train.steps 400
              python experiments/distill.py --from runs/tiny-1a2b3c4d/0 --width 272 --no-copy
          TEACHER is a folder of weights as finetune.py takes them. Unless --student names weights to go on
          from, the student is the teacher with a dense FFN of --width features (an expert's, unless said) in
          place of each sparse layer; all that both have is copied (--no-copy: all of it is drawn).
          --from TEACHER --help lists all flags.
Cost:     a third more than training the student alone times the teacher's size over the student's.
Result:   OUT/NAME-student-HASH/SEED, a run like those of pretrain.py, of a dense model; the same command goes
          on with it. `loss` there is that against the text.

The loss is 0.75 hard and 0.25 soft (Switch Transformers, section 4.2; --tune.soft-share changes it). Settings
that are not said are those of the teacher's run.

Exit codes: those of pretrain.py.
"""

import dataclasses
import sys

import jax

from switchmoe.train import Teacher, TrainConfig
from switchmoe.transfer import Params, student_config, student_of

if __package__:  # imported as experiments.distill
    from experiments import tuning
else:
    import tuning


@dataclasses.dataclass(frozen=True)
class Flags:
    """Who teaches whom.

    Attributes:
      teacher: folder of the teacher's weights.
      student: folder of weights that the student starts from, instead of those that are made for it.
      width: hidden features of the FFN that stands for a sparse layer; None is those of an expert.
      copy: whether the student starts with what it shares with the teacher.
    """

    teacher: tuning.From
    student: tuning.Folder | None = None
    width: int | None = None
    copy: bool = True


def plan(flags: Flags) -> tuning.Job:
    """Find the student's shape, and say how its weights and the teacher's are had."""
    config = tuning.settings_after(flags.teacher, "student")
    if flags.student is not None:
        if flags.width is not None or not flags.copy:
            raise ValueError("--width and --no-copy are for a student that is made, not for --student.")
        shape, _ = tuning.read_settings(flags.student)
        shape = dataclasses.replace(shape, param_dtype="float32", scan_layers=True)
    else:
        shape = student_config(config.model, d_ff_sparse=flags.width)

    def weights(chosen: TrainConfig) -> tuple[Params | None, Teacher]:
        params, own = tuning.read_weights(flags.teacher)
        start = None
        if flags.student is not None:
            start, _ = tuning.read_weights(flags.student)
        elif flags.copy:
            key = jax.random.key(chosen.train.seed)
            start, _ = student_of(params, own, d_ff_sparse=flags.width, key=key)
        return start, Teacher(params, own)

    return tuning.Job(dataclasses.replace(config, model=shape), weights)


def main(arguments: list[str]) -> int:
    """Distil what the command line says; returns the exit code."""
    return tuning.main(arguments, "distill.py", __doc__ or "", Flags, plan)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
