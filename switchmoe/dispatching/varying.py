"""What `jax.shard_map` wants to know of an array: over which axes of the mesh it differs."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import mlir

from switchmoe.shapes import Array


def vary_alike(*arrays: Array) -> list[Array]:
    """Let all arrays vary over the same mesh axes inside shard_map, which checks it; elsewhere do nothing.

    What a loop carries, and what goes into a function with a gradient rule of its own, has to: there jax
    does not see to it by itself.
    """
    varying = [varying_axes(array) for array in arrays]
    missing = [tuple(frozenset().union(*varying) - axes) for axes in varying]
    return [lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True)]


def varying_axes(array: Array) -> frozenset[str]:
    """Name the mesh axes over which an array varies inside a shard_map that checks them."""
    kind = jax.typeof(array)
    # jax 0.10 keeps it one level deeper than the versions before it.
    return frozenset(kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma)


def out_of_sight(function: Callable[..., Array]) -> Callable[..., Array]:
    """Let a function be used inside shard_map although it does not say over which axes its result varies.

    Kernels of jax's own do not, and are refused there. What `function` does is written down in another
    thread, where no shard_map is, and stays one closed operation until the program is lowered; its result
    varies like the arguments, which all vary alike. It has no gradient, so there must be a rule around it.
    """

    @functools.wraps(function)
    def run(*arrays: Array, **options) -> Array:
        if not jax.sharding.get_abstract_mesh().manual_axes:
            return function(*arrays, **options)
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        # Settings that hold in a `with` of this thread do not in another one by themselves.
        settings: Any = jax.config
        precision, wide = settings.jax_default_matmul_precision, settings.jax_enable_x64

        def write_down():
            with jax.default_matmul_precision(precision), jax.enable_x64(wide):
                return jax.make_jaxpr(functools.partial(function, **options))(*shapes)

        with ThreadPoolExecutor(1) as elsewhere:
            program = elsewhere.submit(write_down).result()
        return _closed.bind(*arrays, written=_Written(program))

    return run


class _Written:
    """A program that jax takes for a plain value, and does not look into."""

    def __init__(self, program: ClosedJaxpr) -> None:
        self.program = program


_closed = Primitive("out_of_sight")


@_closed.def_impl
def _run(*arrays, written):
    return jax.jit(jaxpr_as_fun(written.program))(*arrays)[0]


@_closed.def_abstract_eval
def _result(*arrays, written):
    (result,) = written.program.out_avals
    return arrays[0].update(shape=result.shape, dtype=result.dtype)


def _lower(context, *arrays, written):
    # With the shapes that the program was written down for, which vary over nothing.
    program = written.program
    context = context.replace(avals_in=program.in_avals, avals_out=program.out_avals)
    return mlir.lower_fun(jaxpr_as_fun(program), multiple_results=True)(context, *arrays)


mlir.register_lowering(_closed, _lower)
