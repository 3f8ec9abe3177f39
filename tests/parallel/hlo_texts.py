"""Small programs as XLA prints them, for tests that read them."""

from jax.sharding import AbstractMesh

MESH = AbstractMesh((2, 4), ("data", "expert"))  # Place 4 * data + expert: expert differs within 0..3.


def program(body: str, before: str = "") -> str:
    return (
        f"HloModule test, is_scheduled=true, num_partitions=8\n\n{before}\n"
        f"ENTRY %main (x: f32[4,8]) -> f32[4,8] {{\n  %x = f32[4,8]{{1,0}} parameter(0)\n{body}}}\n"
    )


def computation(name: str, body: str) -> str:
    return f"%{name} (p: f32[4,8]) -> f32[4,8] {{\n  %p = f32[4,8]{{1,0}} parameter(0)\n{body}}}\n\n"


REDUCE = "replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add"
