"""Generation on simulated devices, to be compared with what one device said."""

import jax
import numpy as np

from switchmoe.infer import generate
from switchmoe.parallel import Layout, make_mesh
from tests.infer.worlds import PROMPTS, model_of


def check(file: str, configs: dict) -> None:
    """Prints the names of models that generate here what the file says; of four rows one only fills up."""
    layout = Layout(make_mesh(data=2, fsdp=1, expert=2, tensor=2))
    expected = np.load(file)
    for name, config in configs.items():
        done = generate(model_of(name), PROMPTS, config, key=jax.random.key(7), layout=layout)
        np.testing.assert_array_equal(done.tokens_BN, expected[f"{name}_tokens"])
        np.testing.assert_allclose(done.log_probs_BN, expected[f"{name}_log_probs"], atol=1e-5)
        print(name)
