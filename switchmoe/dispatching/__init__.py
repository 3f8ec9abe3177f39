"""A decision to tokens at their experts, and back."""

from switchmoe.dispatching.einsum import combine_einsum, dispatch_einsum
from switchmoe.dispatching.gather import combine, dispatch
from switchmoe.dispatching.seats import capacity, expected_drop, expected_drop_table
from switchmoe.dispatching.slots import SlotPlan, assign_slots

__all__ = [
    "SlotPlan",
    "assign_slots",
    "capacity",
    "combine",
    "combine_einsum",
    "dispatch",
    "dispatch_einsum",
    "expected_drop",
    "expected_drop_table",
]
