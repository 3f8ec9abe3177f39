"""What a run may not be given, and what it may not ask for: a sentence each, before anything else."""

import dataclasses

import numpy as np
import pytest

from switchmoe.train import RunError, Teacher, TuneConfig, fingerprint, run_training
from switchmoe.train.given import Given, check_given, with_given
from switchmoe.train.model import join

from .worlds import made_up_state, small_config, small_model


def tuned(config, **tune):
    return dataclasses.replace(config, tune=TuneConfig(**tune))


def given_of(config, **wrong):
    start = made_up_state(config).everything()
    return Given(join(start, wrong.pop("start", {})), wrong.pop("teacher", None))


@pytest.mark.parametrize(
    ("tune", "wrong", "sentence"),
    [
        (
            {},
            dict(start={"head_DV": np.zeros((32, 259), np.float32)}),
            r"weights to start from are not those of the model \(head_DV is none of the model's\); leave",
        ),
        (
            {},
            dict(start={"final_norm": {"scale_D": np.zeros(31, np.float32)}}),
            r"final_norm.scale_D is \[31\] there and \[32\] in the model",
        ),
        (
            {},
            dict(start={"final_norm": {"scale_D": np.zeros(32, np.int8)}}),
            "hold int8 in final_norm.scale_D, which can't be trained",
        ),
        (
            {},
            dict(teacher=Teacher({}, small_model())),
            r"the teacher's weights .* is missing.*, and \d+ more",
        ),
        (dict(part="lora", lora_rank=33), {}, "the adapters' rank is 33, but that of w_in_EDF is 32"),
    ],
)
def test_what_is_given_and_does_not_fit_is_one_sentence_before_anything_is_written(
    tune, wrong, sentence, tmp_path
):
    config = small_config(tmp_path)
    given = given_of(config, **wrong)
    with pytest.raises(RunError, match=sentence) as raised:
        run_training(tuned(config, **tune), tmp_path / "runs", start=given.start, teacher=given.teacher)
    assert raised.value.code == 2 and not (tmp_path / "runs").exists()


def test_a_teacher_reads_the_same_tokens_and_fits_the_rows(tmp_path):
    config = small_config(tmp_path)
    for changes, sentence in (
        (dict(vocab_size=300), "the teacher has 300 tokens and the student 259"),
        (dict(moe=dataclasses.replace(config.model.moe, sequences_per_group=3)), "the teacher does not fit"),
    ):
        model = dataclasses.replace(config.model, **changes)
        params = made_up_state(
            dataclasses.replace(config, model=dataclasses.replace(model, moe=config.model.moe))
        )
        with pytest.raises(ValueError, match=sentence):
            check_given(config, Given(None, Teacher(params.everything(), model)), None)


def test_weights_that_a_configuration_names_have_to_be_there(tmp_path):
    config = small_config(tmp_path)
    start = made_up_state(config).everything()
    asked = tuned(config, weights="0123456789abcdef")
    for given, there in (
        (Given(), "there is none"),
        (Given(start), f"the one given is {fingerprint(start)}"),
    ):
        with pytest.raises(RunError, match=f"fingerprint 0123456789abcdef, but {there}"):
            with_given(asked, given)
    named = tuned(config, weights=fingerprint(start))
    assert with_given(named, Given(start)) == named


def test_a_share_of_a_teacher_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RunError, match="soft_share is 0.5, but there is no teacher"):
        with_given(tuned(small_config(tmp_path), soft_share=0.5), Given())
