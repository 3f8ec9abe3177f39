"""Which families of Hugging Face's models there are, and which of them a configuration or a model is."""

from pathlib import Path
from typing import Any

from switchmoe.config import did_you_mean
from switchmoe.interop.decoders import LLAMA, MIXTRAL, OLMOE, QWEN3_MOE
from switchmoe.interop.errors import WeightsError
from switchmoe.interop.family import Family
from switchmoe.interop.settings import Settings
from switchmoe.interop.source import read_json
from switchmoe.interop.switch import SWITCH
from switchmoe.models import LMConfig

FAMILIES = {family.model_type: family for family in (SWITCH, MIXTRAL, OLMOE, QWEN3_MOE, LLAMA)}


def read_config(folder: str | Path) -> LMConfig:
    """Read the config.json of a folder of Hugging Face's as a configuration of ours.

    Raises:
      WeightsError: there is none, or a model that it describes can't be had here.
    """
    return read_family(Path(folder))[1]


def read_family(folder: Path) -> tuple[Family, LMConfig]:
    """Read which family a folder holds, and its configuration; see `read_config`."""
    values = read_json(folder / "config.json")
    what = str(folder / "config.json")
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise WeightsError(
            f"{what} has model_type={model_type!r}, which is not supported"
            f"{did_you_mean(str(model_type), FAMILIES)}."
        )
    family = FAMILIES[model_type]
    try:
        return family, family.read(Settings(values, what))
    except WeightsError:
        raise
    except ValueError as error:  # what LMConfig and MoEConfig say
        raise WeightsError(f"{what}: {error}") from error


def write_config(config: LMConfig, dtype: str) -> tuple[Family, dict[str, Any]]:
    """Choose the family that a model belongs to, and describe the model as its config.json does.

    Token ids are null: a model of ours does not know which token begins, ends or pads a text.

    Raises:
      WeightsError: the model belongs to none.
    """
    family = _choose(config)
    about = {"architectures": [family.architecture], "model_type": family.model_type, "dtype": dtype}
    nobody = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return family, about | family.write(config) | nobody


def _choose(config: LMConfig) -> Family:
    """Take the one family that a model can belong to, by what no setting of the family's could change."""
    if config.encoder_layers > 0:
        return SWITCH
    if config.moe is None:
        return LLAMA
    return {"full": OLMOE, "head": QWEN3_MOE, "none": MIXTRAL}[config.qk_norm]
