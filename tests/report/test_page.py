"""The page as a whole, read back with an HTML parser."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from switchmoe.report import write_report
from tests.report.worlds import arm, routing_of, two_layers


class Page(HTMLParser):
    """Tags with their attributes, the text, and the characters of every snippet as (shown, class, title)."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.texts, self.snippets, self._span = [], [], [], None
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "pre":
            self.snippets.append([])
        self._span = attrs if tag == "span" and "title" in attrs else None

    def handle_data(self, data):
        self.texts.append(data)
        if self._span is not None:
            self.snippets[-1].append((data, self._span["class"], self._span["title"]))
            self._span = None

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    arms = [arm("dense", 1.6, params_total=1_000_000), arm("switch", 1.5, flops_per_token=2_040_000.0)]
    path = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    written = write_report(
        path, title="Two arms", arms=arms, routing=two_layers(), notes=["Same batches."], device="CPU"
    )
    assert written == path
    return Page(path)


def test_the_page_loads_nothing(full):
    assert not full.all("img") and not full.all("iframe") and not full.all("object")
    assert [attrs["href"] for attrs in full.all("link")] == ["data:,"]  # No request for a favicon either.
    for tag, attrs in full.tags:
        assert "src" not in attrs, tag
        target = attrs.get("href", attrs.get("xlink:href", "data:,"))
        assert target.startswith(("#", "data:")), (tag, target)
    assert "@import" not in full.source
    assert set(re.findall(r"url\((.)", full.source)) == {"#"}
    assert "://" not in full.source


def test_references_inside_the_figures_resolve_and_ids_are_unique(full):
    ids = [attrs["id"] for _, attrs in full.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = re.findall(r'(?:href="#|url\(#)([^")]+)', full.source)
    assert wanted and set(wanted) <= set(ids)


def test_the_summary_says_the_result(full):
    assert (
        "After 20 steps each, Switch has a validation loss of 1.500 nats per token against 1.600 for Dense: "
        "0.100 lower. The useful FLOPs per token are matched, 2.04 M against 2.00 M (2.0% apart), "
        "while Switch holds 3.0 times the parameters." in full.text
    )
    assert "Same batches." in full.text


def test_the_sections_are_there(full):
    for heading in ("By steps", "By FLOPs", "By seconds", "Expert load", "Load by domain", "MaxVio"):
        assert heading in full.text
    # Three loss charts, one chart of drops, and a load chart a layer, each with a label to be read aloud.
    labels = [attrs["aria-label"] for attrs in full.all("svg") if attrs.get("role") == "img"]
    assert len(labels) == 6
    assert all(labels)
    assert "expert 0 0.50, expert 1 1.00, expert 2 1.50" in labels[3]


def test_layer_statistics(full):
    # Layer 1: two of six tokens dropped, floor 0.13%, loads 1, 2, 3 of mean 2.
    # Layer 2: one of six, loads 3, 2, 1.
    assert "1 33.3% 0.13% 0.50 0 2 16.7% 0.13% 0.50 0" in full.text


def test_characters_are_coloured_by_expert_and_drops_marked(full):
    one, two = full.snippets
    assert one == [
        ("h", "e0", "expert 0, weight 0.10"),
        ("é", "e1 x", "expert 1, weight 0.20 (dropped); first of 2 bytes"),
        ("<", "e1", "expert 1, weight 0.20"),
    ]
    assert two == [("a", "e2", "expert 2, weight 0.30"), ("b", "e2 x", "expert 2, weight 0.30 (dropped)")]
    for i, colour in enumerate(("243 188 64", "166 134 252", "179 226 253")):
        assert f".e{i} {{ --c: {colour}; }}" in full.source
    assert re.search(r"pre \.x[^}]*line-through", full.source)


def test_the_script_can_recolour_every_layer(full):
    data = re.search(r'id="routing-data">(.*?)</script>', full.source).group(1)
    assert "<" not in data
    snippets = json.loads(data)
    assert [s["expert"][1] for s in snippets] == [[[1], [0], [0]], [[0], [1]]]
    layers = [attrs for attrs in full.all("input") if attrs.get("name") == "layer"]
    assert [attrs["value"] for attrs in layers] == ["0", "1"]
    assert ["checked" in attrs for attrs in layers] == [True, False]


def test_markup_in_names_and_text_is_escaped(tmp_path):
    evil = '</script><script>alert("x")</script>&amp;'
    routing = routing_of({evil: evil}, [[[0] * len(evil)]], [[[True] * len(evil)]], num_experts=1)
    page = Page(write_report(
        tmp_path / "r.html", title=evil, arms=[arm(evil), arm("b")], routing=routing, notes=[evil],
        command=evil, device=evil, commit=evil,
    ))  # fmt: skip
    # The two scripts are the data and ours; a third would be the text's.
    assert len(page.all("script")) == 2
    assert "alert" not in re.sub(r"alert\(&#34;x|alert\(&quot;x", "", page.source)
    assert page.text.count(evil) >= 6
    assert "".join(shown for shown, _, _ in page.snippets[0]) == evil


def test_one_arm_without_routing(tmp_path):
    page = Page(write_report(tmp_path / "r.html", title="One", arms=[arm("dense", 1.6)]))
    assert "Dense reaches a validation loss of 1.600 nats per token after 20.5 k tokens." in page.text
    assert "No routing was recorded for this page" in page.text
    assert "difference" not in page.text and not page.all("script")


def test_worse_and_unmatched_is_said(tmp_path):
    arms = [arm("dense", 1.5), arm("switch", 1.6, flops_per_token=4_000_000.0, steps=30)]
    page = Page(write_report(tmp_path / "r.html", title="Worse", arms=arms))
    assert "After different numbers of steps (Dense 20, Switch 30), Switch has" in page.text
    assert "0.100 higher" in page.text
    assert "not matched, 4.00 M against 2.00 M (100.0% apart)" in page.text


def test_what_was_not_recorded_is_left_out(tmp_path):
    rows = [{"step": step, "loss": 3.0 - step} for step in (1, 2)]
    bare = dataclasses.replace(arm("dense"), metrics=rows, summary={"val_loss": 1.0})
    page = Page(write_report(tmp_path / "r.html", title="Bare", arms=[bare]))
    assert "There is no chart by FLOPs or seconds: the metrics do not hold it." in page.text
    assert "Training tokens" not in page.text
    assert "nan" not in page.text.lower() and "None" not in page.text
    assert Page(write_report(tmp_path / "e.html", title="Empty")).text.startswith("Empty")


def test_nothing_dropped_and_no_floor(tmp_path):
    record = two_layers()
    whole = dataclasses.replace(
        record,
        kept_LE=record.load_LE,
        dropped_fraction_L=np.zeros(2),
        dropped_floor_L=np.full(2, np.nan),
        dropped_by_position_LP=np.zeros((2, 4)),
    )
    page = Page(write_report(tmp_path / "r.html", title="Whole", arms=[arm()], routing=whole))
    assert "No choice was dropped in this text." in page.text
    assert "The chance floor of dropping was not recorded." in page.text
    assert "1 0.0% — 0.50 0" in page.text


def test_a_large_page_stays_small(tmp_path):
    # 12 layers, 64 experts, 5 rows of 512 bytes: well beyond the quickstart.
    rng = np.random.default_rng(0)
    texts = {f"domain_{n}": "x" * 512 for n in range(5)}
    kept = (rng.random((12, 5, 512)) < 0.9).tolist()
    routing = routing_of(texts, rng.integers(0, 64, (12, 5, 512)).tolist(), kept, 64)
    path = write_report(tmp_path / "r.html", title="Large", arms=[arm()], routing=routing)
    assert path.stat().st_size < 3_000_000
    assert "more experts than colours one can tell apart" in path.read_text(encoding="utf-8")
