"""Experts split over the devices of a mesh: the layer across devices, and what a model is told about them."""

from switchmoe.parallel.checks import check_divides, check_layout, choose_executor
from switchmoe.parallel.executors import DISPATCHED, EXECUTORS, RETURNED
from switchmoe.parallel.layer import moe, moe_with_trace
from switchmoe.parallel.layout import Layout, constrain, make_layout
from switchmoe.parallel.mesh import MeshConfig, make_mesh
from switchmoe.parallel.processes import (
    ClusterError,
    LaunchConfig,
    cluster_errors,
    initialize,
    is_main,
    process_count,
    stop_requested,
)
from switchmoe.parallel.rules import Rules
from switchmoe.parallel.weights import GATHERED, dimensions, gather_weight, gather_weights, stored_as
from switchmoe.parallel.wire import Collective, collectives, wire_table

__all__ = [
    "DISPATCHED",
    "EXECUTORS",
    "GATHERED",
    "RETURNED",
    "ClusterError",
    "Collective",
    "LaunchConfig",
    "Layout",
    "MeshConfig",
    "Rules",
    "check_divides",
    "check_layout",
    "choose_executor",
    "cluster_errors",
    "collectives",
    "constrain",
    "dimensions",
    "gather_weight",
    "gather_weights",
    "initialize",
    "is_main",
    "make_layout",
    "make_mesh",
    "moe",
    "moe_with_trace",
    "process_count",
    "stop_requested",
    "stored_as",
    "wire_table",
]
