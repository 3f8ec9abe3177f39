"""What README and CONTRIBUTING show must run, and what they point to must be there."""

import re
from pathlib import Path

import pytest

from switchmoe.routing import ROUTERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def test_readme_blocks_run_in_order():
    names: dict = {}
    blocks = python_blocks("README.md")
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["y"].shape == names["x"].shape and names["y_TD"].shape == names["x_TD"].shape


def test_contributing_example_is_a_router_that_passes_its_golden_case(monkeypatch):
    names: dict = {}
    for block in python_blocks("CONTRIBUTING.md"):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    monkeypatch.setitem(ROUTERS, "squared", names["squared"])
    names["test_golden_squared"]()


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_repository_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing, f"{page} links to {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_that_are_named_exist(page):
    named = set(re.findall(r"\bmake ([a-z]+)", (ROOT / page).read_text(encoding="utf-8"))) - {"sure"}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert {"test"} <= named <= targets, named - targets


def test_contributing_stays_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 60
