"""The helper that runs a body on simulated devices: it must give the devices, and it must be able to fail."""

import pytest

from tests.devices import run_on_devices


def test_the_body_sees_the_devices_and_its_output_comes_back(tmp_path):
    body = """
    import jax.numpy as jnp
    print(jax.device_count(), jnp.ones(3).sum())
    """
    assert run_on_devices(4, body).split() == ["4", "3.0"]
    script = tmp_path / "body.py"
    script.write_text("print(len(jax.devices()))")
    assert run_on_devices(2, script).strip() == "2"


def test_a_failing_or_hanging_body_is_an_error():
    with pytest.raises(AssertionError, match="exit code 1.*\n(.*\n)*.*the reason"):
        run_on_devices(1, "raise SystemExit('the reason')")
    with pytest.raises(AssertionError, match="longer than 5 s"):
        run_on_devices(1, "import time; time.sleep(60)", timeout=5)


def test_the_body_stands_under_the_shape_checks():
    body = """
    import jax.numpy as jnp
    from jaxtyping import TypeCheckError
    from switchmoe.routing import z_loss
    try:
        z_loss(jnp.ones(3), jnp.ones(4))
    except TypeCheckError:
        print("refused")
    """
    assert run_on_devices(1, body).strip() == "refused"
