"""The routes on real folders, and requests that the guard must refuse."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

import crosslayer as xl
from crosslayer.core.errors import ConfigError
from crosslayer.graphs import to_file, write_graph_file
from crosslayer.serve.app import create_app
from crosslayer.serve.guard import COOKIE, MOST_BODY
from made_bundle import CONTEXT, Made

BASE = "http://127.0.0.1:8000"


@pytest.fixture
def client(root: Path) -> Iterator[TestClient]:
    with TestClient(create_app([root]), base_url=BASE) as client:
        yield client


def ids(client: TestClient) -> dict[str, str]:
    return {e["kind"]: e["id"] for e in client.get("/api/library").json()}


def test_library_lists_exactly_the_runs_bundles_and_graphs(client: TestClient, root: Path):
    found = client.get("/api/library").json()
    assert [(e["kind"], e["name"]) for e in found] == [
        ("bundle", "runs/mine/features"),
        ("graph", "runs/mine/graphs/one.json"),
        ("run", "runs/mine"),
    ]
    assert len({e["run"] for e in found}) == 1
    with pytest.raises(ConfigError, match="nothing at"):
        create_app([root / "no"])


def test_run_and_its_growing_log(client: TestClient, root: Path):
    run = ids(client)["run"]
    got = client.get(f"/api/runs/{run}").json()
    assert (got["manifest"]["config"], got["evaluation"], got["card"]) == ({"l0": 8}, None, "# A card")
    log = client.get(f"/api/runs/{run}/log").json()
    assert [x["step"] for x in log["lines"]] == [1, 2]
    path = root / "runs" / "mine" / "log.jsonl"
    whole = path.read_text()
    path.write_text(whole + 'ss": 1.0}\n')
    more = client.get(f"/api/runs/{run}/log", params={"after": log["next"]}).json()
    assert [x["step"] for x in more["lines"]] == [3]
    path.write_text('{"step": 1}\n')
    cut = client.get(f"/api/runs/{run}/log", params={"after": more["next"]}).json()
    assert (cut["restarted"], [x["step"] for x in cut["lines"]]) == (True, [1])
    path.write_text(whole)


def test_feature_list_search_and_single_feature(client: TestClient, made: Made):
    at = f"/api/bundles/{ids(client)['bundle']}"
    bundle = client.get(at).json()
    assert (bundle["n_layers"], bundle["context"], bundle["levels"]) == (3, CONTEXT, 4)
    listed = client.get(f"{at}/features", params={"sort": "density", "descending": True, "limit": 5}).json()
    assert [(x["layer"], x["index"]) for x in listed] == [
        (x.layer, x.index) for x in made.bundle.page("density", descending=True, limit=5)
    ]
    only = client.get(f"{at}/features", params={"filter": ["layer:1:1", "density:0.01:"]}).json()
    assert only
    assert {x["layer"] for x in only} == {1}
    assert client.get(f"{at}/search", params={"q": '") OR ('}).status_code == 200
    feature = client.get(f"{at}/features/2/7").json()
    own = made.bundle.feature(2, 7)
    assert (feature["density"], feature["label"], feature["count"]) == (own.density, own.label, own.count)
    assert [e["tokens"] for e in feature["examples"]] == [e.tokens for e in own.examples]
    assert [(x["layer"], x["index"]) for x in feature["neighbours"]["decoder"]] == [
        (x.layer, x.index) for x in made.bundle.neighbours(2, 7, "decoder")
    ]
    for path, words in (
        ("features?sort=colour", "cannot be sorted by"),
        ("features?filter=colour:1:2", "cannot be filtered by"),
        ("features?filter=density:x:", "is invalid"),
        ("features/9/0", "no layer 9"),
        ("features/0/9999", "no feature L0/9999"),
    ):
        answer = client.get(f"{at}/{path}")
        assert answer.status_code == 422
        assert words in answer.json()["detail"]


def test_feature_map_as_bytes(client: TestClient, made: Made):
    raw = client.get(f"/api/bundles/{ids(client)['bundle']}/map", params={"level": 1}).content
    (n,) = struct.unpack("<I", raw[:4])
    assert len(raw) == 4 + 20 * n
    feature, x, y = (
        np.frombuffer(raw, "<u4", n, 4),
        np.frombuffer(raw, "<f4", n, 4 + 4 * n),
        np.frombuffer(raw, "<f4", n, 4 + 8 * n),
    )
    np.testing.assert_array_equal(np.stack([x, y], 1), made.bundle.array("map")[feature])
    np.testing.assert_array_equal(np.frombuffer(raw, "<i4", n, 4 + 12 * n), made.bundle.array("group")[feature, 1])


def test_labels_and_pins_are_saved(client: TestClient):
    at = f"/api/bundles/{ids(client)['bundle']}"
    answer = client.put(f"{at}/features/0/4/label", json={"label": "<b>Zebra</b>"}).json()
    assert answer == {"label": "<b>Zebra</b>", "label_from": "person"}
    assert client.put(f"{at}/features/0/4/pin", json={"pinned": True}).status_code == 200
    feature = client.get(f"{at}/features/0/4").json()
    assert (feature["label"], feature["pinned"], feature["labels"][0]["source"]) == ("<b>Zebra</b>", True, "person")
    assert [(x["layer"], x["index"]) for x in client.get(f"{at}/search", params={"q": "zebra"}).json()] == [(0, 4)]
    assert [(x["layer"], x["index"]) for x in client.get(f"{at}/pins").json()] == [(0, 4)]
    assert client.put(f"{at}/features/0/4/label", json={"label": "x" * 501}).status_code == 422
    assert client.put(f"{at}/features/0/4/label", json={"label": 5}).status_code == 422


def test_graph_as_columns_with_labels(client: TestClient, root: Path):
    client.put(f"/api/bundles/{ids(client)['bundle']}/features/2/7/label", json={"label": "always"})
    graph = xl.Graph.load(root / "runs" / "mine" / "graphs" / "one")
    at = f"/api/graphs/{ids(client)['graph']}"
    got = client.get(at, params={"node_threshold": 0.7, "edge_threshold": 0.9}).json()
    pruned = graph.prune(0.7, 0.9)
    kept = np.flatnonzero(pruned.node_N)
    assert got["nodes"]["id"] == kept.tolist()
    assert got["nodes"]["name"] == [graph.name(int(n)) for n in kept]
    edges = {
        (kept[s], kept[t]): w
        for s, t, w in zip(*(got["edges"][k] for k in ("source", "target", "weight")), strict=True)
    }
    assert set(edges) == set(zip(pruned.source_E.tolist(), pruned.target_E.tolist(), strict=True))
    for n, layer, index, label in zip(*(got["nodes"][k] for k in ("id", "layer", "index", "label")), strict=True):
        if n < graph.n_features:
            assert (layer, index) == (graph.arrays.layer_F[n], graph.arrays.index_F[n])
            assert (label == "always") == ((layer, index) == (2, 7))
    assert got["scores"]["replacement"]["value"] == pytest.approx(graph.scores().replacement.value)
    exported = client.get(f"{at}/export").json()
    assert "always" in {n["clerp"] for n in exported["nodes"]}
    for threshold in ("1.5", "nan", "x"):
        assert client.get(at, params={"node_threshold": threshold}).status_code == 422
    assert client.post(f"{at}/scores", json={"nodes": [0, 1]}).json()["replacement"]["value"] <= 1
    assert client.get(f"{at}/suggestions").status_code == 200


def test_views_survive_a_server_restart(client: TestClient, root: Path):
    at = f"/api/graphs/{ids(client)['graph']}/views"
    value = {"pins": [1, 2], "supernodes": [{"name": "say", "members": [1, 2]}], "places": {"s say": [10.0, 20.5]}}
    first = client.put(f"{at}/first look", json={"value": value, "over": ""}).json()["revision"]
    with TestClient(create_app([root]), base_url=BASE) as again:
        assert again.get(at).json() == ["first look"]
        saved = again.get(f"{at}/first look").json()
        assert saved["revision"] == first
        assert {k: saved["value"][k] for k in value} == value
        assert again.get(f"{at}/none").json() == {"value": None, "revision": ""}
        # Another tab must not overwrite changes that it has not loaded.
        second = again.put(f"{at}/first look", json={"value": value | {"pins": [3]}, "over": first}).json()["revision"]
    stale = client.put(f"{at}/first look", json={"value": value, "over": first})
    assert stale.status_code == 409
    assert "changed elsewhere" in stale.json()["detail"]
    assert client.get(f"{at}/first look").json()["revision"] == second
    for bad in ({"pins": ["x"]}, {"pins": list(range(3000))}, {"more": 1}, {"node_threshold": 2}):
        assert client.put(f"{at}/first look", json={"value": bad}).status_code == 422
    assert client.put(f"{at}/{'x' * 81}", json={"value": value}).status_code == 422
    assert client.delete(f"{at}/first look").status_code == 200
    assert client.get(at).json() == []


def test_wanted_nodes_are_not_pruned(client: TestClient, root: Path):
    graph = xl.Graph.load(root / "runs" / "mine" / "graphs" / "one")
    at = f"/api/graphs/{ids(client)['graph']}"
    least = int(graph.influence_N[: graph.n_features].argmin())
    assert least not in client.get(at).json()["nodes"]["id"]
    got = client.get(at, params={"wanted": least}).json()
    assert least in got["nodes"]["id"]
    assert client.get(at, params={"wanted": 10**6}).status_code == 422
    client.put(f"{at}/views/v", json={"value": {"pins": [least], "supernodes": [{"name": "<b>", "members": [least]}]}})
    file = client.get(f"{at}/export", params={"view": "v"}).json()
    assert file["qParams"]["pinnedIds"][0] in {n["node_id"] for n in file["nodes"]}
    assert file["qParams"]["supernodes"] == [["<b>", file["qParams"]["pinnedIds"][0]]]
    client.delete(f"{at}/views/v")


def test_label_changed_elsewhere_is_not_overwritten(client: TestClient):
    at = f"/api/bundles/{ids(client)['bundle']}/features/1/3/label"
    assert client.put(at, json={"label": "one", "over": ""}).status_code == 200
    assert client.put(at, json={"label": "two", "over": ""}).status_code == 409
    assert client.put(at, json={"label": "two", "over": "one"}).json()["label"] == "two"
    client.put(at, json={"label": ""})


def test_import_of_valid_and_invalid_files(client: TestClient, root: Path, tmp_path: Path):
    graph = xl.Graph.load(root / "runs" / "mine" / "graphs" / "one")
    write_graph_file(to_file(graph, "theirs"), tmp_path / "theirs.json")
    file = json.loads((tmp_path / "theirs.json").read_text())
    before = sorted(p.name for p in root.iterdir())
    for bad in (
        {},
        {"metadata": {}, "nodes": [], "links": []},
        file | {"links": [{"source": "x", "target": "y", "weight": 1}]},
    ):
        answer = client.post("/api/graphs", params={"name": "bad"}, json=bad)
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith("bad.json")
        assert str(root) not in answer.text
        assert not (root / "graphs" / "bad.json").exists()
    answer = client.post("/api/graphs", params={"name": "../../their graph"}, json=file)
    assert answer.status_code == 200, answer.text
    got = client.get(f"/api/graphs/{answer.json()['id']}").json()
    assert got["imported"]
    assert got["scores"] is None
    assert len(got["nodes"]["id"]) >= len(file["nodes"])
    assert sorted(p.name for p in root.iterdir()) == sorted({*before, "graphs"})
    assert "already" in client.post("/api/graphs", params={"name": "../../their graph"}, json=file).json()["detail"]


@pytest.mark.parametrize("name", ["..", "../../etc/passwd", "%2e%2e%2fsecret.txt", "/etc/passwd", "one", "x" * 3000])
def test_no_name_becomes_a_path(client: TestClient, name: str):
    for kind in ("runs", "bundles", "graphs"):
        answer = client.get(f"/api/{kind}/{name}")
        assert answer.status_code in (404, 405, 422)
        assert "secret" not in answer.text.replace("secret.txt", "")


def test_other_hosts_origins_and_bodies_are_refused(client: TestClient, root: Path):
    app = create_app([root])
    with TestClient(app, base_url="http://evil.example:8000") as other:
        assert other.get("/api/library").status_code == 421
    assert client.get("/api/library", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/api/library", headers={"origin": BASE}).status_code == 200
    label = f"/api/bundles/{ids(client)['bundle']}/features/0/0/label"
    assert client.put(label, json={"label": "x"}, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert (
        client.put(label, content=b"x" * (MOST_BODY + 1), headers={"content-type": "application/json"}).status_code
        == 413
    )

    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    # A gigabyte, and a graph of 10^7 links, are refused by their declared size.
    for path in (label, "/api/graphs?name=large"):
        claimed = client.request(
            "PUT" if path == label else "POST", path, content=b"{", headers={"content-length": str(10**9)}
        )
        assert claimed.status_code == 413
    assert client.put(label, json={"label": "x" * 100_000}).status_code == 422
    assert client.put(label, content=endless(), headers={"content-type": "application/json"}).status_code == 413
    answer = client.get("/api/library")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_token_is_required_on_public_addresses(root: Path):
    with TestClient(create_app([root], token="s3cret"), base_url=BASE) as client:
        assert client.get("/api/library").status_code == 401
        assert client.get("/api/library", params={"token": "wrong"}).status_code == 401
        assert client.get("/api/library", headers={"authorization": "Bearer s3cret"}).status_code == 200
        first = client.get("/api/library", params={"token": "s3cret"})
        assert first.status_code == 200
        assert "HttpOnly" in first.headers["set-cookie"]
        assert "SameSite=Strict" in first.headers["set-cookie"]
        assert client.cookies[COOKIE] == "s3cret"
        assert client.get("/api/library").status_code == 200


def finished(client: TestClient, job: int) -> dict:
    """Return the last event of a job's stream."""
    with client.stream("GET", f"/api/jobs/{job}/events") as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert events[0]["state"] == "waiting"
    return events[-1]


def test_jobs_trace_intervene_and_compute_features(client: TestClient, root: Path):
    here = ids(client)
    asked = {"run": here["run"], "prompt": "def return list", "name": "two words"}
    made = finished(client, client.post("/api/jobs/trace", json=asked).json()["job"])
    assert made["state"] == "done", made
    assert Path(made["result"]["path"]).name == "two-words.json"
    assert "runs/mine/graphs/two-words.json" in {e["name"] for e in client.get("/api/library").json()}
    assert "already" in client.post("/api/jobs/trace", json=asked).json()["detail"]
    bad = finished(client, client.post("/api/jobs/trace", json=asked | {"name": "x", "targets": ["@99"]}).json()["job"])
    assert bad["state"] == "failed"
    assert "target" in bad["error"]
    seen = finished(
        client, client.post("/api/jobs/activations", json={"run": here["run"], "text": "def return"}).json()["job"]
    )
    assert seen["state"] == "done", seen
    assert len(seen["result"]["tokens"]) == len(seen["result"]["active"])
    one = finished(
        client,
        client.post(
            "/api/jobs/activations", json={"run": here["run"], "text": "def return", "layer": 2, "index": 7}
        ).json()["job"],
    )
    assert one["result"]["activations"][-1] > 0
    graph = next(e["id"] for e in client.get("/api/library").json() if e["name"].endswith("graphs/one.json"))
    held = xl.Graph.load(root / "runs" / "mine" / "graphs" / "one")
    watch = [n for n in range(held.n_features) if held.arrays.layer_F[n] == 2][:5]
    done = finished(
        client,
        client.post(
            "/api/jobs/intervene",
            json={"graph": graph, "changes": [{"node": 0, "scale": 0}], "watch": watch, "freeze": "both"},
        ).json()["job"],
    )
    assert done["state"] == "done", done
    assert [w["node"] for w in done["result"]["watched"]] == watch
    assert sum(t["before"] for t in done["result"]["tokens"]) <= 1.0001
    for bad in ({"node": 10**6, "scale": 0}, {"node": 0}, {"node": 0, "scale": 1, "set": 2}):
        assert client.post("/api/jobs/intervene", json={"graph": graph, "changes": [bad]}).status_code == 422


def test_job_can_be_stopped_and_another_started(client: TestClient):
    here = ids(client)
    first = client.post("/api/jobs/activations", json={"run": here["run"], "text": "def"}).json()["job"]
    second = client.post("/api/jobs/activations", json={"run": here["run"], "text": "def"}).json()["job"]
    while client.get(f"/api/jobs/{first}").json()["state"] == "waiting":
        time.sleep(0.01)
    assert client.delete(f"/api/jobs/{first}").json() == {"state": "cancelled"}
    assert finished(client, second)["state"] == "done"
    assert client.get(f"/api/jobs/{first}").json()["state"] == "cancelled"
    assert client.get("/api/jobs/99").status_code == 404


@pytest.mark.parametrize("name", ["..", ".", "/", "  "])
def test_graph_needs_a_name(client: TestClient, root: Path, name: str):
    before = sorted(p.name for p in (root / "runs" / "mine").rglob("*"))
    asked = {"run": ids(client)["run"], "prompt": "def", "name": name}
    assert client.post("/api/jobs/trace", json=asked).status_code == 422
    assert sorted(p.name for p in (root / "runs" / "mine").rglob("*")) == before


def test_name_with_a_dot_and_name_of_a_waiting_job(client: TestClient, root: Path):
    asked = {"run": ids(client)["run"], "prompt": "def", "name": "qwen-0.6b"}
    first = client.post("/api/jobs/trace", json=asked).json()
    again = client.post("/api/jobs/trace", json=asked)
    assert again.status_code == 422
    assert "already" in again.json()["detail"]
    assert finished(client, first["job"])["state"] == "done"
    assert first["graph"] in {e["id"] for e in client.get("/api/library").json()}
    for kind in ("json", "safetensors"):
        (root / "runs" / "mine" / "graphs" / f"qwen-0-6b.{kind}").unlink()


def test_cancelled_job_stays_cancelled(client: TestClient):
    here = ids(client)
    job = client.post("/api/jobs/activations", json={"run": here["run"], "text": "def"}).json()["job"]
    assert client.delete(f"/api/jobs/{job}").json() == {"state": "cancelled"}
    time.sleep(0.5)
    assert client.get(f"/api/jobs/{job}").json()["state"] == "cancelled"


def test_links_in_a_run_are_not_followed(client: TestClient, root: Path):
    card = root / "runs" / "mine" / "clt" / "README.md"
    saved = card.read_text()
    card.unlink()
    card.symlink_to(root / "secret.txt")
    assert client.get(f"/api/runs/{ids(client)['run']}").json()["card"] is None
    card.unlink()
    card.write_text(saved)


def test_damaged_bundle_does_not_hide_a_graph(client: TestClient, root: Path):
    path = root / "runs" / "mine" / "features" / "manifest.json"
    whole = path.read_text()
    path.write_text(whole.replace('"whole":true', '"whole":false').replace('"whole": true', '"whole": false'))
    assert client.get(f"/api/graphs/{ids(client)['graph']}").status_code == 200
    path.write_text(whole)
