"""Meshes: sizes filled in, devices in their places, and a sentence for every impossible one."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from switchmoe.parallel import MeshConfig, make_layout, make_mesh
from tests.checks import unchecked
from tests.parallel.described import eight


def shape(mesh):
    return tuple(mesh.shape.values())


def ids(mesh):
    return np.vectorize(lambda device: device.id)(mesh.devices)


@pytest.mark.parametrize(
    "sizes, found",
    [
        (dict(), (8, 1, 1, 1)),
        (dict(expert=4), (2, 1, 4, 1)),
        (dict(data=-1, fsdp=2, expert=2, tensor=2), (1, 2, 2, 2)),
        (dict(data=2, expert=-1), (2, 1, 4, 1)),
        (dict(data=1, fsdp=-1, tensor=2), (1, 4, 1, 2)),
        (dict(data=2, fsdp=2, tensor=-1), (2, 2, 1, 2)),
        (dict(data=1, expert=4), (1, 1, 4, 1)),  # 4 of the 8
        (dict(data=3, expert=2), (3, 1, 2, 1)),
        (dict(data=1), (1, 1, 1, 1)),
    ],
)
def test_sizes_are_filled_in_and_a_mesh_takes_the_first_devices(sizes, found):
    mesh = make_mesh(**sizes, devices=eight())
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor") and shape(mesh) == found
    np.testing.assert_array_equal(ids(mesh).ravel(), np.arange(np.prod(found)))  # the last axis is innermost
    assert shape(make_layout(MeshConfig(**sizes), devices=eight()).mesh) == found


def test_the_axes_are_of_the_type_that_is_asked_for():
    assert make_mesh(devices=eight()).axis_types == (AxisType.Auto,) * 4
    assert make_mesh(devices=eight(), axis_types="explicit").axis_types == (AxisType.Explicit,) * 4
    with unchecked(), pytest.raises(ValueError, match="axis_types='explict' is not known; did you mean 'exp"):
        make_mesh(devices=eight(), axis_types="explict")  # pyright: ignore[reportArgumentType]


def test_all_devices_there_are_unless_said():
    assert set(make_mesh().devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        (dict(data=16), r"The mesh (data=16) needs 16 devices, but there are 8; lower a size"),
        (dict(data=4, expert=4), r"The mesh (data=4, expert=4) needs 16 devices, but there are 8; lower"),
        (dict(expert=16), r"The mesh (expert=16) needs 16 devices, but there are 8; lower a size"),
        (dict(expert=3), r"The mesh (expert=3) does not divide the 8 devices, so data=-1 has no size"),
        (dict(data=3, fsdp=-1), r"The mesh (data=3) does not divide the 8 devices, so fsdp=-1 has no size"),
        (dict(expert=-1), "data and expert are -1, but only one axis can take the devices that are left"),
        (dict(data=0), "data is 0, but must be at least 1, or -1 for the devices that are left"),
        (dict(tensor=-2), "tensor is -2, but must be at least 1, or -1 for the devices that are left"),
    ],
)
def test_an_impossible_mesh_gets_its_sentence(sizes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        make_mesh(**sizes, devices=eight())
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(expert=-1), "mesh.data and mesh.expert are -1, but only one axis"),
        (dict(fsdp=0), "mesh.fsdp is 0, but must be at least 1, or -1"),
        (dict(executor="all_to_al"), "executor='all_to_al' is not known; did you mean 'all_to_all'?"),
        (dict(chunks=0), "chunks is 0, but must be at least 1"),
        (
            dict(ragged_buffer_factor=0.0),
            "ragged_buffer_factor is 0.0, but must be a finite number above 0; None has",
        ),
        (
            dict(ragged_buffer_factor=float("nan")),
            "ragged_buffer_factor is nan, but must be a finite number above 0",
        ),
    ],
)
def test_a_config_checks_itself(fields, sentence):
    with unchecked(), pytest.raises(ValueError, match=re.escape(sentence)):
        MeshConfig(**fields)


def test_data_goes_across_slices_and_everything_else_stays_inside():
    devices = eight(in_slice=lambda n: n % 2)  # their numbers take turns
    mesh = make_mesh(data=4, expert=2, devices=devices)
    assert shape(mesh) == (4, 1, 2, 1)
    np.testing.assert_array_equal(ids(mesh)[:, 0, :, 0], [[0, 2], [4, 6], [1, 3], [5, 7]])
    mesh = make_mesh(fsdp=2, tensor=2, devices=devices)
    for inside in ids(mesh).reshape(2, 4):
        assert len(set(inside % 2)) == 1
    with pytest.raises(ValueError, match="data=1 with 8 devices does not go across 2 slices of 4"):
        make_mesh(expert=8, devices=devices)


def test_a_process_without_a_device_gets_a_sentence():
    devices = eight(process=lambda n: n // 4)
    assert shape(make_mesh(expert=4, devices=devices)) == (2, 1, 4, 1)
    with pytest.raises(ValueError, match="mesh 1 x 1 x 4 x 1 leaves process 1 without a device; use all 8"):
        make_mesh(data=1, expert=4, devices=devices)


def test_on_a_torus_every_device_has_one_place():
    devices = eight(coords=lambda n: (n % 2, n // 2 % 2, n // 4))
    for sizes in ((8, 1, 1, 1), (2, 1, 4, 1), (2, 2, 2, 1), (1, 2, 1, 4)):
        mesh = make_mesh(*sizes, devices=devices)
        assert shape(mesh) == sizes and sorted(ids(mesh).ravel()) == list(range(8))


def test_on_a_torus_fewer_devices_are_a_mesh_too():
    devices = eight(coords=lambda n: (n % 2, n // 2 % 2, n // 4))
    mesh = make_mesh(data=3, expert=2, devices=devices)  # of which the first 6 are no cuboid
    assert shape(mesh) == (3, 1, 2, 1) and sorted(ids(mesh).ravel()) == list(range(6))


@pytest.mark.parametrize("sizes, first", [(dict(data=6), 4), (dict(), 5)])
def test_slices_that_are_not_used_equally_get_a_sentence(sizes, first):
    with pytest.raises(ValueError, match="slice.*; "):
        make_mesh(**sizes, devices=eight(in_slice=lambda n: n // first))
