"""A decision to tokens at their experts, and back."""

from switchmoe.dispatching.chance import expected_drop, expected_drop_table
from switchmoe.dispatching.dropless import SortPlan, combine_sorted, dispatch_sorted, sort_choices
from switchmoe.dispatching.einsum import combine_einsum, dispatch_einsum
from switchmoe.dispatching.gather import combine, dispatch
from switchmoe.dispatching.overflow import take_next_choice
from switchmoe.dispatching.slots import SlotPlan, assign_slots

__all__ = [
    "SlotPlan",
    "SortPlan",
    "assign_slots",
    "combine",
    "combine_einsum",
    "combine_sorted",
    "dispatch",
    "dispatch_einsum",
    "dispatch_sorted",
    "expected_drop",
    "expected_drop_table",
    "sort_choices",
    "take_next_choice",
]
