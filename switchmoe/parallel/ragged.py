"""Rows of any number to each device and back: what dropless tokens need to travel to their experts.

`lax.ragged_all_to_all` where the platform has it; elsewhere (XLA:CPU) a stand-in of an all-gather and a
reduce-scatter, which gives the same rows and gradients, and sends every row to every device.
"""

import dataclasses
import functools
import logging

import jax.numpy as jnp
from jax import lax

from switchmoe.dispatching.varying import vary_alike
from switchmoe.shapes import Array, Float, Int, Num

_LOG = logging.getLogger("switchmoe.parallel")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """How many rows go where along one axis of a mesh; the same on every device of it.

    A device sends its rows in the order of the devices they go to, and finds what comes in the order of those
    it comes from.

    Attributes:
      axis: the mesh axis.
      rows_SN: rows from device S to device N of the axis.
      native: whether the platform has `lax.ragged_all_to_all`.
    """

    axis: str
    rows_SN: Int[Array, "S N"]
    native: bool

    def send(self, x_RD: Num[Array, "R D"], room: int) -> Num[Array, "P D"]:
        """Send each row to its device; returns what came, in a buffer of `room` rows, 0 behind the last."""
        if self.native:
            return self._native(x_RD, room, self.rows_SN)
        everything_RD = lax.all_gather(x_RD, self.axis, axis=0, tiled=True)
        return everything_RD.at[self._source(x_RD.shape[0], room)].get(mode="fill", fill_value=0)

    def send_back(self, y_PD: Float[Array, "P D"], num_rows: int) -> Float[Array, "R D"]:
        """Send what `send` brought back to where it came from, in its place among `num_rows` rows there."""
        if self.native:
            return self._native(y_PD, num_rows, self.rows_SN.T)
        devices = self.rows_SN.shape[0]
        home_P = self._source(num_rows, y_PD.shape[0])
        y_RD = jnp.zeros((devices * num_rows, y_PD.shape[1]), y_PD.dtype).at[home_P].set(y_PD, mode="drop")
        return lax.psum_scatter(y_RD, self.axis, scatter_dimension=0, tiled=True)

    def _native(self, x_RD: Array, room: int, rows_SN: Array) -> Array:
        me = lax.axis_index(self.axis)
        start_in_SN = jnp.cumsum(rows_SN, axis=1) - rows_SN
        start_out_SN = jnp.cumsum(rows_SN, axis=0) - rows_SN
        empty_PD, *_ = vary_alike(jnp.zeros((room, x_RD.shape[1]), x_RD.dtype), x_RD)
        rows = [start_in_SN[me], rows_SN[me], start_out_SN[me], rows_SN[:, me]]
        return lax.ragged_all_to_all(x_RD, empty_PD, *rows, axis_name=self.axis)

    def _source(self, num_rows: int, room: int) -> Int[Array, " P"]:
        """For each row of this device's buffer, its place among all devices' rows; out of range if none."""
        devices, me = self.rows_SN.shape[0], lax.axis_index(self.axis)
        start_in_S = (jnp.cumsum(self.rows_SN, axis=1) - self.rows_SN)[:, me]
        end_out_S = jnp.cumsum(self.rows_SN[:, me])
        row_P = jnp.arange(room)
        from_P = which_run(end_out_S, room)
        shift_S = jnp.arange(devices) * num_rows + start_in_S - (end_out_S - self.rows_SN[:, me])
        # Behind the last row `from_P` names no device, and the place is out of range whatever is added.
        return jnp.where(from_P < devices, row_P + jnp.append(shift_S, 0)[from_P], devices * num_rows)


def which_run(end_B: Int[Array, " B"], num_rows: int) -> Int[Array, " P"]:
    """Say for each row in which run it is, of those that end there; behind the last, how many there are."""
    return jnp.cumsum(jnp.zeros(num_rows, jnp.int32).at[end_B].add(1, mode="drop"))


def is_native(platform: str) -> bool:
    """Say whether a platform has `lax.ragged_all_to_all`, and once, if it has not, what stands in for it."""
    if platform == "cpu":
        _say_stand_in()
    return platform != "cpu"


@functools.cache
def _say_stand_in() -> None:
    _LOG.warning(
        "XLA:CPU has no ragged all-to-all, so an all-gather stands in for it: the same numbers, more traffic."
    )
