"""Generation on a mesh of 8 devices is that of one."""

import jax
import numpy as np
import pytest

from switchmoe.infer import generate
from tests.devices import run_on_devices
from tests.infer.worlds import CAPACITY, DRAWN, DROPLESS, GREEDY, PROMPTS, model_of


@pytest.mark.timeout(200)
def test_a_mesh_says_what_one_device_says(tmp_path):
    file, ways = tmp_path / "expected.npz", {DROPLESS: "DRAWN", CAPACITY: "GREEDY"}
    expected = {}
    for name, config in ((DROPLESS, DRAWN), (CAPACITY, GREEDY)):
        done = generate(model_of(name), PROMPTS, config, key=jax.random.key(7))
        expected |= {f"{name}_tokens": done.tokens_BN, f"{name}_log_probs": done.log_probs_BN}
    np.savez(file, **expected)
    configs = ", ".join(f"{name!r}: {config}" for name, config in ways.items())
    imports = "from tests.infer.on_a_mesh import *; from tests.infer.worlds import *; "
    body = imports + f"check({str(file)!r}, {{{configs}}})"
    assert run_on_devices(8, body, timeout=180).split() == list(ways)
