"""Train a model on, on another text or with other settings: all of it, a part of it, or adapters.

Question: none of its own; it is the tool that fine-tunes.
Command:  python experiments/finetune.py --from FOLDER [--flags], for instance
              python experiments/finetune.py --from runs/tiny-1a2b3c4d/0 --data.source letters/
              python experiments/finetune.py --from runs/tiny-1a2b3c4d/0 --tune.part rest
              python experiments/finetune.py --from Mixtral-8x7B-v0.1 --tune.part lora --tune.lora-rank 16
          FOLDER is a run's (OUT/NAME-HASH/SEED), Hugging Face's (config.json and safetensors), or one that
          convert.py or upcycle.py wrote. --tune.part says what is trained: all, experts (the sparse layers
          alone), rest (all but these: about as good, says ST-MoE), or lora (adapters of the experts).
          --model.moe.expert-dropout 0.4 with --model.dropout 0.1 is what Switch Transformers fine-tuned with.
          --from FOLDER --help lists all flags.
Cost:     that of training as many steps anew; less memory where less is trained.
Result:   OUT/NAME-finetune-HASH/SEED, a run like those of pretrain.py: the same command goes on with it, and
          its name depends on the weights too. Adapters are merged when the run is read: every command takes
          it as a plain model.

Settings that are not said are those of the run the weights come from, but for a tenth of its learning rate;
--data.seed 1 reads the same text in another order. Weights without a run (Hugging Face's) read text through
the tokenizer.json beside them, and bytes where there is none.

Exit codes: those of pretrain.py.
"""

import dataclasses
import sys

if __package__:  # imported as experiments.finetune
    from experiments import tuning
else:
    import tuning

# Of the learning rate that the weights were made with.
SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Flags:
    """Where to start.

    Attributes:
      start: folder of the weights to start from.
    """

    start: tuning.From


def plan(flags: Flags) -> tuning.Job:
    """Take the settings of the weights' run, more gently, and the weights themselves."""
    config = tuning.settings_after(flags.start, "finetune", share_of_rate=SHARE)
    return tuning.Job(config, lambda _: (tuning.read_weights(flags.start)[0], None))


def main(arguments: list[str]) -> int:
    """Fine-tune what the command line says; returns the exit code."""
    return tuning.main(arguments, "finetune.py", __doc__ or "", Flags, plan)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
