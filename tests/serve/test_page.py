"""The page in a real browser: user actions, saved across a reload and a new profile."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect

import crosslayer
import crosslayer as xl
from crosslayer.bundles.annotations import Label
from crosslayer.bundles.bundle import load_features
from crosslayer.graphs.interchange import read_graph_file, to_file, write_graph_file
from serve.served import Served

WEB = Path(crosslayer.__file__).parents[2] / "web" / "src"
STATIC = Path(crosslayer.__file__).parent / "serve" / "static"
HARM = "<img src=x onerror=\"document.title='harmed'\">"


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    one = Served(root)
    yield one
    one.stop()


class Watched:
    """A page that fails the test if it loads from elsewhere, logs an error, or breaks its content security policy."""

    def __init__(self, page: Page, base: str) -> None:
        self.page, self.base, self.complaints = page, base, list[str]()
        page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: self.complaints.append(str(e)))
        page.on("request", lambda r: None if self._ours(r.url) else self.complaints.append(f"asked {r.url}"))

    def _ours(self, url: str) -> bool:
        return url.startswith((self.base, "data:", f"blob:{self.base}"))

    def open(self, path: str = "") -> Page:
        self.page.goto(f"{self.base}/#/{path}")
        self.page.wait_for_selector("main:not([aria-busy])")
        return self.page


@contextmanager
def profile(browser: Browser, served: Served, *, refusals: int = 0, **options: object) -> Iterator[Watched]:
    """A new browser profile. `refusals`: number of 4xx answers that the browser may log."""
    settings = {"accept_downloads": True, "viewport": {"width": 1280, "height": 900}, **options}
    context = browser.new_context(**settings)  # type: ignore[arg-type]
    context.set_default_timeout(15_000)
    watched = Watched(context.new_page(), served.url)
    yield watched
    logged = [c for c in watched.complaints if "status of 4" in c]
    assert len(logged) <= refusals, logged
    assert [c for c in watched.complaints if c not in logged] == []
    context.close()


@pytest.fixture
def visit(browser: Browser, served: Served) -> Iterator[Watched]:
    with profile(browser, served) as watched:
        yield watched


def test_built_page_matches_the_sources():
    digest = hashlib.sha256()
    for path in sorted(p.relative_to(WEB).as_posix() for p in WEB.rglob("*") if p.is_file()):
        digest.update(path.encode() + b"\0" + (WEB / path).read_bytes() + b"\0")
    assert (STATIC / "built-from.txt").read_text().strip() == digest.hexdigest(), "run `npm run build` in web/"


def test_library_and_growing_curves_of_a_run(visit: Watched, root: Path):
    page = visit.open()
    for name in ("runs/mine", "runs/mine/features", "runs/mine/graphs/one.json"):
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()
    manifest, log = root / "runs" / "mine" / "run.json", root / "runs" / "mine" / "log.jsonl"
    saved = manifest.read_text(), log.read_text()
    manifest.write_text(json.dumps({"state": "training", "config": {"l0": 8}, "step": 2}))
    page.get_by_role("link", name="runs/mine", exact=True).click()
    expect(page.get_by_role("status").first).to_contain_text("training")
    expect(page.get_by_text("from 2 to 1.5")).to_be_visible()
    log.write_text(saved[1] + 'ss": 0.25}\n')
    expect(page.get_by_text("from 2 to 0.25")).to_be_visible()
    page.get_by_text("Model card").click()
    expect(page.get_by_text("# A card")).to_be_visible()
    page.get_by_text("Settings").click()
    expect(page.get_by_role("row", name="l0 8")).to_be_visible()
    manifest.write_text(saved[0])
    log.write_text(saved[1])


def test_features_are_sorted_filtered_and_searched(visit: Watched, served: Served, made):
    page = visit.open(f"bundle/{served.id('bundle')}")
    rows = page.locator("table.features tbody tr")
    page.get_by_role("button", name="density").click()
    densest = made.bundle.page("density", descending=True, limit=1)[0]
    expect(rows.first.get_by_role("link")).to_have_text(f"L{densest.layer}/{densest.index}")
    page.get_by_label("Layer", exact=True).select_option("1")
    expect(rows.first.get_by_role("link")).to_have_text(re.compile("L1/"))
    expect(rows).to_have_count(24)
    page.get_by_label("Density from").fill("0.05")
    page.get_by_label("Density from").press("Enter")
    expect(rows).to_have_count(len(made.bundle.page(limit=100, filters={"layer": (1, 1), "density": (0.05, None)})))
    page.reload()
    expect(rows.first.get_by_role("link")).to_have_text(re.compile("L1/"))
    word = made.bundle.page("auroc", descending=True, limit=1)[0].fires[0].strip()
    page.goto(f"{served.url}/#/bundle/{served.id('bundle')}")
    page.get_by_label("Search").fill(f"fires:{word}")
    expect(page.get_by_text(re.compile(r"\d+ match"))).to_be_visible()
    assert word in rows.first.inner_text()
    page.get_by_label("Search").fill("nothinghasthisname")
    expect(page.get_by_text("none match")).to_be_visible()
    page.get_by_label("Search").fill('") OR (SELECT 1; --')
    expect(page.get_by_role("status").nth(1)).to_be_visible()


def test_feature_is_labelled_pinned_and_tried(browser: Browser, visit: Watched, served: Served, made):
    at = f"bundle/{served.id('bundle')}/2/7"
    page = visit.open(at)
    titles = (
        "Examples",
        "Activations",
        "Promoted tokens (positive logits)",
        "Suppressed tokens (negative logits)",
        "Decoder norm per layer",
        "Clusters",
        "Similar decoders",
        "Strongest upstream",
    )
    for title in titles:
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
    assert page.locator(".example").count() == len(made.bundle.feature(2, 7).examples)
    hot = page.locator(".example .token.peak").first
    assert "rgba" in hot.get_attribute("style")  # type: ignore[operator]
    assert re.search(r"\d", hot.get_attribute("title") or "")
    page.get_by_label("Your label").fill(HARM)
    page.get_by_role("button", name="Save label").click()
    expect(page.locator("#label")).to_have_text(HARM)
    page.get_by_role("button", name="Pin").click()
    expect(page.get_by_role("button", name="Pin")).to_have_attribute("aria-pressed", "true")
    page.get_by_label("Text").fill("def return")
    page.get_by_role("button", name="Test activation").click()
    expect(page.get_by_text("max here")).to_be_visible(timeout=60_000)
    page.reload()
    expect(page.locator("#label")).to_have_text(HARM)
    assert page.title() != "harmed"
    with profile(browser, served) as fresh:
        other = fresh.open(at)
        expect(other.locator("#label")).to_have_text(HARM)
        expect(other.get_by_role("button", name="Pin")).to_have_attribute("aria-pressed", "true")
        other.get_by_label("Your label").fill("")
        other.get_by_role("button", name="Save label").click()
        expect(other.locator("#label")).not_to_have_text(HARM)


def test_model_label_is_shown_with_scores_beside_the_users_label(visit: Watched, served: Served, root: Path):
    scores = {"detection": {"balanced_accuracy": 0.85, "balanced_accuracy_low": 0.64, "balanced_accuracy_high": 0.95}}
    bundle = load_features(root / "runs" / "mine" / "features")
    bundle.user.set_label(Label(bundle.id(1, 2), "some-model", "says zebra", "Fires on stripes.", scores))
    bundle.close()
    page = visit.open(f"bundle/{served.id('bundle')}/1/2")
    expect(page.locator("#label")).to_have_text("says zebra")
    expect(page.get_by_text("autointerp label by some-model (detection 0.85 [0.64, 0.95])")).to_be_visible()
    expect(page.get_by_text("Fires on stripes.")).to_be_visible()
    page.get_by_label("Your label").fill("mine")
    page.get_by_role("button", name="Save label").click()
    expect(page.locator("#label")).to_have_text("mine")
    page.reload()
    expect(page.locator("#label")).to_have_text("mine")
    expect(page.get_by_text("says zebra")).to_be_visible()


def test_tokens_of_many_spaces_do_not_widen_the_page(visit: Watched, served: Served):
    def widened(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(
            response=answer, json=answer.json() | {"suppresses": [{"token": " " * 60, "value": -3.0, "z": -2.0}]}
        )

    visit.page.route("**/features/2/7", widened)
    page = visit.open(f"bundle/{served.id('bundle')}/2/7")
    expect(page.get_by_text("z -2.0")).to_be_visible()
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= seen


@pytest.mark.parametrize("at", ["nonsense", "run/..%2f..", "run/..", "bundle/%2e%2e/0/1", "graph/..%5c.."])
def test_unknown_address_shows_not_found(visit: Watched, at: str):
    page = visit.open(at)
    expect(page.get_by_role("heading", name="This cannot be shown")).to_be_visible()
    expect(page.get_by_text("There is no page #/")).to_be_visible()


def test_features_active_on_a_text(visit: Watched, served: Served):
    page = visit.open(f"bundle/{served.id('bundle')}")
    page.get_by_label("Text").fill("def return")
    page.get_by_role("button", name="Which features are active?").click()
    expect(page.locator(".tokens button").last).to_have_attribute("aria-pressed", "true", timeout=60_000)
    expect(page.locator("ol.list li a").first).to_have_text(re.compile(r"L\d+/\d+"))
    page.locator("ol.list li a").first.click()
    expect(page.get_by_role("heading", name="Examples")).to_be_visible()


def test_feature_map_is_searched_and_opens_features(visit: Watched, served: Served):
    page = visit.open(f"bundle/{served.id('bundle')}/map")
    canvas = page.locator("canvas.map[data-points]")
    assert int(canvas.get_attribute("data-points") or 0) > 20
    page.get_by_label("Colour by").select_option("cluster")
    page.get_by_label("Clusters").select_option("0")
    page.get_by_role("searchbox").fill("quagga")
    expect(page.get_by_text("0 match")).to_be_visible()
    page.get_by_role("searchbox").fill("")
    box = canvas.bounding_box()
    assert box is not None
    # From the centre outwards, until the pointer is over a point.
    for x, y in ((0.5 + dx / 60, 0.5 + dy / 60) for r in range(30) for dx in range(-r, r + 1) for dy in (-r, r)):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        if canvas.evaluate("c => c.style.cursor") == "pointer":
            break
    page.mouse.down()
    page.mouse.up()
    expect(page.get_by_role("heading", name="Examples")).to_be_visible()
    assert re.search(r"#/bundle/[^/]+/\d+/\d+$", page.url)


def graph_page(watched: Watched, graph: Traced) -> Page:
    page = watched.open(f"graph/{graph.id}")
    page.wait_for_selector(".stage[data-nodes]")
    return page


def find(page: Page, text: str) -> None:
    page.get_by_label("Find a node").fill(text)
    page.get_by_label("Find a node").press("Enter")
    expect(page.locator(".side h2")).to_be_visible()


class Traced(NamedTuple):
    """A graph per test, so that tests do not share saved views."""

    id: str
    features: list[str]
    """Names of features, the most influential first."""


@pytest.fixture
def graph(root: Path, served: Served) -> Iterator[Traced]:
    folder = root / "runs" / "mine" / "graphs"
    name = f"g{time.time_ns()}"
    for kind in ("json", "safetensors"):
        shutil.copy(folder / f"one.{kind}", folder / f"{name}.{kind}")
    id = served.id("graph", name)
    served.put(f"graphs/{id}/views/default", {"value": {"node_threshold": 1.0, "edge_threshold": 1.0}})
    nodes = served.get(f"graphs/{id}?node_threshold=1&edge_threshold=1")["nodes"]  # type: ignore[index]
    order = sorted(range(len(nodes["id"])), key=lambda i: -nodes["influence"][i])
    yield Traced(id, [nodes["name"][i] for i in order if nodes["kind"][i] == "feature"])
    for kind in ("json", "safetensors"):
        (folder / f"{name}.{kind}").unlink()


def test_graph_with_pointer_and_keyboard(visit: Watched, graph: Traced):
    page = graph_page(visit, graph)
    find(page, graph.features[0])
    expect(page.locator(".side")).to_contain_text("of influence")
    for title in ("Inputs", "Outputs", "Examples"):
        expect(page.locator(".side").get_by_role("heading", name=title)).to_be_visible()
    x, y = map(float, (page.locator(".stage").get_attribute("data-at") or "").split())
    assert re.search(r"node=\d+", page.url)
    page.locator("canvas.over").hover(position={"x": x, "y": y})
    expect(page.locator(".tip")).to_contain_text(graph.features[0])
    page.locator("canvas.over").click(position={"x": 3, "y": 3})
    expect(page.locator(".side h2")).to_have_count(0)
    page.locator("canvas.over").click(position={"x": x, "y": y})
    chosen = page.locator(".side h2").inner_text()
    page.locator(".side .edges button").first.click()
    assert page.locator(".side h2").inner_text() != chosen
    page.locator("canvas.over").focus()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".side h2")).to_be_visible()
    page.keyboard.press("p")
    expect(page.locator(".box")).to_have_count(1)


def test_thresholds_apply_immediately(visit: Watched, served: Served, graph: Traced):
    page = graph_page(visit, graph)
    nodes = page.locator(".stage")
    before = int(nodes.get_attribute("data-nodes") or 0)
    page.get_by_label("Nodes").evaluate("e => { e.value = 0.3; e.dispatchEvent(new Event('input')); }")
    expect(nodes).not_to_have_attribute("data-nodes", str(before))
    expect(page.get_by_text("saved", exact=True)).to_be_visible()
    page.reload()
    page.wait_for_selector(".stage[data-nodes]")
    assert int(nodes.get_attribute("data-nodes") or 0) < before
    errors = page.get_by_label("errors")
    errors.uncheck()
    expect(page.get_by_text("saved", exact=True)).to_be_visible()
    page.reload()
    expect(errors).not_to_be_checked()


def test_circuit_is_pinned_grouped_named_moved_and_saved(
    browser: Browser, visit: Watched, served: Served, graph: Traced
):
    page = graph_page(visit, graph)
    for name in (graph.features[0], graph.features[1], graph.features[2]):
        find(page, name)
        page.get_by_role("button", name="Pin to subgraph").click()
        expect(page.get_by_role("button", name="Unpin from subgraph")).to_be_visible()
    expect(page.locator(".box")).to_have_count(3)
    expect(page.get_by_text("3 pinned features alone")).to_be_visible()
    page.get_by_text("Group pinned nodes").click()
    for name in graph.features[:2]:
        page.get_by_role("checkbox", name=name).check()
    page.get_by_label("Name of the supernode").fill("say self")
    page.get_by_role("button", name="Group", exact=True).click()
    expect(page.locator(".box")).to_have_count(2)
    group = page.locator(".box.super")
    expect(group).to_contain_text("say self (2)")
    place = group.bounding_box()
    assert place is not None
    page.mouse.move(place["x"] + 40, place["y"] + 15)
    page.mouse.down()
    page.mouse.move(place["x"] + 120, place["y"] + 55, steps=5)
    page.mouse.up()
    moved = group.get_attribute("transform")
    group.click()
    page.locator(".side").get_by_label("Name of the supernode").fill(HARM)
    page.get_by_role("button", name="Rename").click()
    expect(group).to_contain_text("<img src=x")
    expect(page.get_by_text("saved", exact=True)).to_be_visible()
    page.get_by_label("Name of the view").fill("first look")
    page.get_by_role("button", name="Save as").click()
    expect(page.get_by_text("saved as “first look”")).to_be_visible()
    address = page.url
    assert "view=first" in address
    with profile(browser, served) as fresh:
        other = fresh.page
        other.goto(address)
        other.wait_for_selector(".stage[data-nodes]")
        expect(other.locator(".box")).to_have_count(2)
        expect(other.locator(".box.super")).to_have_attribute("transform", moved or "")
        assert other.title() != "harmed"
        other.locator(".box.super").click()
        other.get_by_role("button", name="Ungroup").click()
        expect(other.locator(".box")).to_have_count(3)
        expect(other.get_by_text("saved", exact=True)).to_be_visible()
    page.reload()
    expect(page.locator(".box")).to_have_count(3)


def test_suggested_supernodes_are_added(visit: Watched, served: Served, graph: Traced):
    page = graph_page(visit, graph)
    suggested = served.get(f"graphs/{graph.id}/suggestions?node_threshold=1")
    page.get_by_role("button", name="Suggest").click()
    if not suggested:
        expect(page.get_by_text("no two features shown are similar enough")).to_be_visible()
        return
    page.get_by_role("button", name="Add", exact=True).first.click()
    expect(page.locator(".box.super")).to_have_count(1)


def test_feature_is_labelled_in_the_graph(visit: Watched, graph: Traced):
    page = graph_page(visit, graph)
    find(page, graph.features[0])
    page.get_by_label("Your label").fill("hands on")
    page.get_by_role("button", name="Save label").click()
    expect(page.get_by_text("label saved")).to_be_visible()
    page.reload()
    expect(page.locator(".side h2")).to_have_text("hands on")


def test_intervention_and_prediction_by_edges(visit: Watched, graph: Traced):
    page = graph_page(visit, graph)
    find(page, graph.features[1])
    page.get_by_role("button", name="Pin to subgraph").click()
    find(page, graph.features[2])
    page.get_by_role("button", name="Ablate").click()
    page.get_by_role("button", name="Run").click()
    table = page.get_by_role("table", name="Next token")
    expect(table).to_be_visible(timeout=60_000)
    expect(page.get_by_role("table", name="Pinned features: activation change")).to_contain_text(graph.features[1])
    page.get_by_label("Factor or activation").fill("")
    page.get_by_role("button", name="= Set").click()
    expect(page.get_by_text("type a number first")).to_be_visible()


def test_new_graph_from_a_prompt_and_comparison_of_two(visit: Watched, served: Served, root: Path):
    page = visit.open()
    page.get_by_label("Prompt").fill("return value def class")
    page.get_by_label("Name", exact=True).fill("another")
    page.get_by_role("button", name="Trace").click()
    page.wait_for_url(re.compile("#/graph/another"), timeout=60_000)
    page.wait_for_selector(".stage[data-nodes]")
    expect(page.locator(".prompt")).to_have_text("return value def class")
    page.get_by_label("Compare with another graph").select_option(label="runs/mine/graphs/one.json")
    expect(page.get_by_role("heading", name=re.compile(r"In both: \d+"))).to_be_visible()
    page.locator("tbody tr").first.hover()
    assert page.locator("canvas").count() == 2
    for kind in ("json", "safetensors"):
        (root / "runs" / "mine" / "graphs" / f"another.{kind}").unlink()


DROP = """text => {
    const given = new DataTransfer();
    given.items.add(new File([text], "theirs.json", { type: "application/json" }));
    document.dispatchEvent(new DragEvent("drop", { dataTransfer: given, bubbles: true, cancelable: true }));
}"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "theirs.json: it is not a complete JSON object; download or export it again"),
        ("[]", "theirs.json: it is not a complete JSON object"),
        ('{"nodes": [], "links": []}', "theirs.json is no graph file: metadata: Field required"),
    ],
)
def test_file_that_is_not_a_graph_is_refused(browser: Browser, served: Served, text: str, message: str):
    with profile(browser, served, refusals=1) as visit:
        visit.open().evaluate(DROP, text)
        expect(visit.page.get_by_text(message)).to_be_visible()


def test_dropped_file_is_imported_with_its_circuit(visit: Watched, root: Path, tmp_path: Path):
    graph = xl.Graph.load(root / "runs" / "mine" / "graphs" / "one")
    top = [int(n) for n in (-graph.influence_N[: graph.n_features]).argsort()[:3]]
    file = to_file(graph, "theirs", 0.9, 0.98, {}, top, [("a pair", top[:2])])
    write_graph_file(file, tmp_path / "theirs.json")
    page = visit.open()
    page.evaluate(DROP, (tmp_path / "theirs.json").read_text())
    page.wait_for_selector(".stage[data-nodes]")
    assert page.locator(".stage").get_attribute("data-nodes") == str(len(file.nodes))
    expect(page.locator(".box.super")).to_contain_text("a pair (2)")
    expect(page.locator(".box")).to_have_count(2)
    expect(page.get_by_text("its scores cannot be computed")).to_be_visible()
    (root / "graphs" / "theirs.json").unlink()


def test_exports_contain_the_circuit(visit: Watched, graph: Traced, tmp_path: Path):
    page = graph_page(visit, graph)
    find(page, graph.features[0])
    page.get_by_role("button", name="Pin to subgraph").click()
    page.get_by_text("Group pinned nodes").click()
    page.get_by_role("checkbox", name=graph.features[0]).check()
    page.get_by_label("Name of the supernode").fill("mine")
    page.get_by_role("button", name="Group", exact=True).click()
    expect(page.get_by_text("saved", exact=True)).to_be_visible()
    saved = {}
    for kind in ("JSON", "SVG", "PNG"):
        with page.expect_download() as download:
            page.get_by_role("button", name=kind, exact=True).click()
        saved[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[kind])
    file = read_graph_file(saved["JSON"])
    (pinned,) = file.qParams.pinnedIds
    place = re.fullmatch(r"L(\d+)/(\d+) @(\d+)", graph.features[0])
    assert place is not None
    assert pinned == "_".join(place.groups())
    assert file.qParams.supernodes == [["mine", pinned]]
    assert saved["SVG"].read_text().startswith("<svg")
    assert saved["PNG"].read_bytes().startswith(b"\x89PNG")
    assert saved["PNG"].stat().st_size > 10_000


def test_two_tabs_do_not_overwrite_each_other(browser: Browser, served: Served, graph: Traced):
    with profile(browser, served, refusals=1) as watched:
        one = graph_page(watched, graph)
        two = watched.page.context.new_page()
        two.goto(one.url)
        two.wait_for_selector(".stage[data-nodes]")
        find(one, graph.features[0])
        one.get_by_role("button", name="Pin to subgraph").click()
        expect(one.get_by_text("saved", exact=True)).to_be_visible()
        find(two, graph.features[1])
        two.get_by_role("button", name="Pin to subgraph").click()
        expect(two.get_by_role("alert")).to_contain_text("changed elsewhere")
        two.get_by_role("button", name="Save mine as a copy").click()
        expect(two.get_by_text("saved as")).to_be_visible()
        assert len(served.get(f"graphs/{graph.id}/views")) == 2  # type: ignore[arg-type]
        one.reload()
        expect(one.locator(".box")).to_have_count(1)
        find(one, graph.features[0])
        expect(one.get_by_role("button", name="Unpin from subgraph")).to_be_visible()


def test_saved_views_survive_a_killed_server(browser: Browser, root: Path, graph: Traced):
    served = Served(root)
    with profile(browser, served) as watched:
        page = graph_page(watched, graph)
        find(page, graph.features[0])
        page.get_by_role("button", name="Pin to subgraph").click()
        expect(page.get_by_text("saved", exact=True)).to_be_visible()
        served.stop(signal.SIGKILL)
        find(page, graph.features[1])
        page.get_by_role("button", name="Pin to subgraph").click()
        expect(page.get_by_role("alert")).to_contain_text("is it still running?")
        watched.complaints = [c for c in watched.complaints if "ERR_CONNECTION" not in c]
    served.start()
    with profile(browser, served) as watched:
        page = graph_page(watched, graph)
        expect(page.locator(".box")).to_have_count(1)
    served.stop()


def test_job_is_stopped_from_the_page(visit: Watched, served: Served):
    page = visit.open(f"bundle/{served.id('bundle')}/2/7")
    page.get_by_label("Text").fill("def return")
    page.route("**/events", lambda route: (time.sleep(0.2), route.continue_()))
    page.get_by_role("button", name="Test activation").click()
    stop = page.get_by_role("button", name="Stop")
    try:
        stop.click(timeout=1500)
    except Exception:  # noqa: BLE001
        expect(page.get_by_text("max here")).to_be_visible()
        return
    expect(page.get_by_text(re.compile("stopped|max here"))).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_accessible(browser: Browser, served: Served, scheme: str):
    bundle, graph = served.id("bundle"), served.id("graph", "one")
    features = [f"bundle/{bundle}", f"bundle/{bundle}/2/7", f"bundle/{bundle}/map"]
    views = ["", f"run/{served.id('run')}", *features, f"graph/{graph}?node=3", f"compare/{graph}/{graph}"]
    with profile(browser, served, color_scheme=scheme) as watched:
        for view in views:
            page = watched.open(view)
            page.wait_for_timeout(150)
            found = Axe().run(page).response["violations"]
            serious = [v for v in found if v["impact"] in ("serious", "critical")]
            assert serious == [], (view, [(v["id"], v["nodes"][0]["html"]) for v in serious])


def test_phone_needs_no_horizontal_scrolling(browser: Browser, served: Served):
    bundle = served.id("bundle")
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    for view in ("", f"bundle/{bundle}", f"bundle/{bundle}/2/7", f"graph/{served.id('graph', 'one')}"):
        page.goto(f"{served.url}/#/{view}")
        page.wait_for_selector("main:not([aria-busy])")
        assert page.evaluate("document.documentElement.scrollWidth") <= 391, view
    context.close()


def test_address_that_does_not_exist(browser: Browser, served: Served):
    with profile(browser, served, refusals=4) as watched:
        for view in ("nowhere/x", "graph/none", "bundle/none", "run/%3Cb%3E"):
            page = watched.open(view)
            expect(page.get_by_role("heading", name="This cannot be shown")).to_be_visible()
            expect(page.get_by_role("link", name="Back to the library")).to_be_visible()
