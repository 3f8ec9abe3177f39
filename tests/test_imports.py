"""Imports go one way, and the functional core stands without a trainer."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

import switchmoe as sm

ROOT = Path(__file__).resolve().parents[1]
CORE = (
    "shapes",
    "config",
    "seats",
    "trace",
    "routing",
    "dispatching",
    "experts",
    "execution",
    "inputs",
    "replay",
    "sorted_experts",
    "served_execution",
    "served_experts",
    "quantized",
    "layer",
    "parallel",
)
LAYERS = (*CORE[1:], "nn", "models", "data", "train", "report", "infer", "interop", "transfer")


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    """Holds the package in a folder against the contracts in its pyproject.toml."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
    ]
    env = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [*command, "--no-cache"], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )


def test_the_package_keeps_its_contracts():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


# Each line is an arrow that must not be drawn: the module, and what it would import.
FORBIDDEN_ARROWS = [
    ("config", "import switchmoe.routing"),
    ("seats", "import switchmoe.routing"),
    ("routing", "import switchmoe.dispatching"),
    ("dispatching", "import switchmoe.experts"),
    ("experts", "import switchmoe.execution"),
    ("execution", "import switchmoe.layer"),
    ("layer", "import switchmoe.nn"),
    ("layer", "import flax.nnx"),
    ("layer", "import switchmoe.parallel"),
    ("parallel", "import switchmoe.nn"),
    ("parallel", "import flax.nnx"),
    ("nn", "import switchmoe.models"),
    ("data", "import switchmoe.models"),
    ("models", "import switchmoe.data"),
    ("report", "import switchmoe.train"),
    ("train", "import switchmoe.report"),
    ("infer", "import switchmoe.interop"),
    ("interop", "import switchmoe.train"),
    ("transfer", "import switchmoe.train"),
    ("train", "import switchmoe.transfer"),
    ("models", "import experiments.pretrain"),
]


@pytest.mark.parametrize("module, line", FORBIDDEN_ARROWS)
def test_the_contracts_catch_a_forbidden_arrow(tmp_path, module, line):
    # A skeleton of the package with one arrow drawn: if it passed, the contract would guard nothing.
    package = tmp_path / "switchmoe"
    package.mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("__init__", "shapes", *LAYERS):
        (package / f"{name}.py").write_text("")
    assert lint_imports(tmp_path).returncode == 0
    (package / f"{module}.py").write_text(f"{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1 and "BROKEN" in result.stdout, result.stdout + result.stderr


def test_the_core_imports_only_jax_einops_jaxtyping_and_numpy():
    graph = grimp.build_graph("switchmoe", include_external_packages=True, cache_dir=None)
    core = {f"switchmoe.{name}" for name in CORE}
    core |= {child for module in core for child in graph.find_descendants(module)}
    imported = {name for module in core for name in graph.find_modules_directly_imported_by(module)}
    outside = {name for name in imported if not name.startswith("switchmoe")} - sys.stdlib_module_names
    assert outside <= {"jax", "einops", "jaxtyping", "numpy"}, outside
    assert "jax" in outside  # An empty graph would pass the line above.


def test_one_layer_call_imports_no_trainer():
    code = """
import sys, jax
import switchmoe as sm
config = sm.MoEConfig(d_model=8, d_ff=16, num_experts=2)
params = sm.init_moe(jax.random.key(0), config)
y, aux = sm.moe(params, jax.random.normal(jax.random.key(1), (1, 32, 8)), config)
assert y.shape == (1, 32, 8)
sm.summarize(aux)
print(sorted({"flax", "optax", "orbax", "grain", "tyro", "rich", "matplotlib", "jinja2"} & set(sys.modules)))
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]", f"the core imported {result.stdout}"


def test_type_checkers_see_the_names_that_are_loaded_lazily():
    stub = ast.parse((ROOT / "switchmoe" / "__init__.pyi").read_text())
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sm.__all__
    for name, home in seen.items():
        module, _, attribute = home.rpartition(".")
        if module != "switchmoe":  # the packages themselves may need an extra
            assert getattr(sm, name) is getattr(importlib.import_module(module), attribute)
