"""Weights onto meshes of eight simulated devices, each device its part, and back."""

from pathlib import Path

from tests.devices import run_on_devices


def test_each_device_gets_its_part_and_experts_are_read_once(tmp_path):
    script = Path(__file__).with_name("mesh_steps.py")
    assert run_on_devices(8, script, environment={"WORK": str(tmp_path)}).split() == ["done"]
