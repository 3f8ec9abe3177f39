"""Experts split over the devices of a mesh: the layer across devices, and what a model is told about them."""

from switchmoe.parallel.checks import check_divides, check_layout, choose_executor
from switchmoe.parallel.executors import DISPATCHED, EXECUTORS, RETURNED
from switchmoe.parallel.layer import moe, moe_with_trace
from switchmoe.parallel.layout import Layout, constrain, make_layout
from switchmoe.parallel.mesh import MeshConfig, make_mesh
from switchmoe.parallel.rules import Rules
from switchmoe.parallel.weights import GATHERED, dimensions, gather_weight, gather_weights, stored_as
from switchmoe.parallel.wire import Collective, collectives, wire_table

__all__ = [
    "Collective",
    "collectives",
    "wire_table",
    "DISPATCHED",
    "EXECUTORS",
    "GATHERED",
    "RETURNED",
    "Layout",
    "MeshConfig",
    "Rules",
    "check_divides",
    "check_layout",
    "choose_executor",
    "constrain",
    "dimensions",
    "gather_weight",
    "gather_weights",
    "make_layout",
    "make_mesh",
    "moe",
    "moe_with_trace",
    "stored_as",
]
