"""Saved graphs are bitwise identical after loading; the viewers' JSON is read and written unchanged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crosslayer as xl
from crosslayer.core.errors import ConfigError, FormatError
from crosslayer.graphs import add_to_folder, read_graph_file, to_file, to_graph, write_graph_file
from crosslayer.graphs.interchange import open_graph, slug_of
from pairs import TOKENS, Pair


@pytest.fixture(scope="module")
def graph(pair: Pair) -> xl.Graph:
    return xl.attribute(*pair, TOKENS)


@pytest.fixture(scope="module")
def saved(graph: xl.Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graph.save(tmp_path_factory.mktemp("graphs") / "one")


def test_loaded_graph_is_bitwise_identical(graph: xl.Graph, saved: Path):
    assert {p.name for p in saved.parent.iterdir()} >= {"one.json", "one.safetensors"}
    for name in ("one", "one.json", "one.safetensors"):
        again = xl.Graph.load(saved.with_name(name))
        assert again.header.arrays
        assert again.header.model_copy(update={"arrays": None}) == graph.header
        for one, two in zip(again.arrays, graph.arrays, strict=True):
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)


def test_files_of_two_graphs_are_not_mixed(graph: xl.Graph, tmp_path: Path):
    """A save that was killed between its two files leaves the header of one graph beside the arrays of another."""
    graph.save(tmp_path / "one")
    other = xl.Graph(graph.header, graph.arrays._replace(activation_F=graph.arrays.activation_F * 2))
    other.save(tmp_path / "two")
    (tmp_path / "two.safetensors").replace(tmp_path / "one.safetensors")
    with pytest.raises(FormatError, match=r"is not the one that one\.json was written with"):
        xl.Graph.load(tmp_path / "one")


def test_other_files_are_not_overwritten(graph: xl.Graph, tmp_path: Path):
    (tmp_path / "run.json").write_text('{"state": "finished"}')
    with pytest.raises(ConfigError, match="is no saved graph"):
        graph.save(tmp_path / "run")
    assert (tmp_path / "run.json").read_text() == '{"state": "finished"}'
    assert not (tmp_path / "run.safetensors").exists()
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ConfigError, match="not a regular file"):
        graph.save(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="cannot be written"):
        graph.save(tmp_path / ("x" * 300))
    with pytest.raises(ConfigError, match="no file's name"):
        graph.save("")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_format_error_or_load(saved: Path, tmp_path: Path, data: st.DataObject):
    for p in saved.parent.glob("one.*"):
        shutil.copy(p, tmp_path / p.name)
    victim = tmp_path / data.draw(st.sampled_from(["one.json", "one.safetensors"]))
    content = bytearray(victim.read_bytes())
    if data.draw(st.booleans()):
        victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        at = data.draw(st.integers(0, min(len(content) - 1, 4000)))
        content[at] = data.draw(st.integers(0, 255))
        victim.write_bytes(content)
    record = None
    try:
        xl.Graph.load(tmp_path / "one").prune()
    except FormatError as error:
        record = str(error)
    assert record is None or ("one" in record and "\n" not in record)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "is of version 2, newer than 1; update crosslayer"),
        ({"format": "other"}, "is no graph of crosslayer"),
        ({"tokens": [1, 2]}, "does not fit one.json"),
        ({"targets": "none"}, "targets"),
    ],
)
def test_foreign_headers(saved: Path, tmp_path: Path, change: dict[str, Any], words: str):
    for p in saved.parent.glob("one.*"):
        shutil.copy(p, tmp_path / p.name)
    header = json.loads((tmp_path / "one.json").read_text())
    (tmp_path / "one.json").write_text(json.dumps(header | change))
    with pytest.raises(FormatError, match=words):
        xl.Graph.load(tmp_path / "one")


def test_missing_files_and_folders(saved: Path, tmp_path: Path, graph: xl.Graph):
    with pytest.raises(FormatError, match="there is no graph"):
        xl.Graph.load(tmp_path / "none")
    shutil.copy(saved, tmp_path / "one.json")
    with pytest.raises(FormatError, match=r"one\.safetensors is missing"):
        xl.Graph.load(tmp_path / "one")
    assert graph.save(tmp_path / "made" / "with parents" / "one").is_file()
    with pytest.raises(ConfigError, match=r"one\.json is a file, not a folder"):
        graph.save(tmp_path / "one.json" / "where")


def test_export_contains_the_pruned_graph(graph: xl.Graph, tmp_path: Path):
    file = to_file(graph, "a-slug", 0.8, 0.95)
    pruned = graph.prune(0.8, 0.95)
    write_graph_file(file, tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert len(record["nodes"]) == pruned.node_N.sum()
    assert len(record["links"]) == len(pruned.weight_E)
    assert {"slug", "scan", "transcoder_list", "prompt", "prompt_tokens", "node_threshold", "schema_version"} <= set(
        record["metadata"]
    )
    kinds: dict[str, dict[str, Any]] = {}
    for node in record["nodes"]:
        kinds.setdefault(node["feature_type"], node)
        assert {
            "node_id",
            "feature",
            "layer",
            "ctx_idx",
            "feature_type",
            "jsNodeId",
            "clerp",
            "influence",
            "activation",
        } <= set(node)
    layer, index, position = map(int, kinds["cross layer transcoder"]["node_id"].split("_"))
    node = kinds["cross layer transcoder"]
    assert node["feature"] == (layer + index) * (layer + index + 1) // 2 + index
    assert (node["layer"], node["ctx_idx"], node["jsNodeId"]) == (str(layer), position, f"{layer}_{index}-0")
    error = kinds["mlp reconstruction error"]
    assert error["node_id"] == f"{error['layer']}_-1_{error['ctx_idx']}"
    token = kinds["embedding"]
    assert token["node_id"] == f"E_{TOKENS[token['ctx_idx']]}_{token['ctx_idx']}"
    logit = kinds["logit"]
    assert logit["node_id"] == f"4_{logit['feature']}_6"
    assert logit["clerp"].startswith('Output "')
    assert " (p=0." in logit["clerp"]
    assert logit["influence"] is None or logit["feature_type"] == "logit"


def test_cumulative_influence_is_at_most_the_threshold_and_one_node(graph: xl.Graph):
    file = to_file(graph, "s", 0.7, 1.0)
    inner = sorted(
        n.influence or 0 for n in file.nodes if n.feature_type in ("cross layer transcoder", "mlp reconstruction error")
    )
    assert inner[-2] <= 0.7
    assert not file.raw_influence


def test_export_import_export_round_trip(graph: xl.Graph, tmp_path: Path):
    write_graph_file(to_file(graph, "s"), tmp_path / "a.json")
    write_graph_file(read_graph_file(tmp_path / "a.json"), tmp_path / "b.json")
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads((tmp_path / "b.json").read_text())
    back = to_graph(read_graph_file(tmp_path / "a.json"))
    pruned = graph.prune()
    assert back.n_features == pruned.node_N[: graph.n_features].sum()
    assert np.sort(back.arrays.weight_E) == pytest.approx(np.sort(pruned.weight_E))
    kept = np.flatnonzero(pruned.node_N[: graph.n_features])
    np.testing.assert_array_equal(back.arrays.index_F, graph.arrays.index_F[kept])
    best = int(np.argmax(back.influence_N[: back.n_features]))
    assert kept[best] == kept[np.argmax(graph.influence_N[kept])]
    with pytest.raises(ConfigError, match="imported from a pruned file"):
        back.scores()


def old_file() -> dict[str, Any]:
    """A file of circuit-tracer's older versions: errors `0_{layer}_{position}`, strings in qParams, raw influence."""

    def node(id_: str, layer: str, position: int, kind: str, feature: int, influence: float | None) -> dict[str, Any]:
        return {
            "node_id": id_,
            "feature": feature,
            "layer": layer,
            "ctx_idx": position,
            "feature_type": kind,
            "jsNodeId": id_,
            "clerp": "",
            "influence": influence,
            "activation": None,
        }

    feature, error = "cross layer transcoder", "mlp reconstruction error"
    nodes = [
        node("0_2_1", "0", 1, feature, 5, 0.5),
        node("1_7_1", "1", 1, feature, 43, 0.3),
        node("0_2_1", "2", 1, error, -1, 0.1),
        node("E_9_1", "E", 1, "embedding", 1, 0.6),
        node("4_3_1", "4", 1, "logit", 3, None) | {"token_prob": 0.9, "clerp": 'Output " x" (p=0.900)'},
    ]
    links = [
        {"source": "E_9_1", "target": "0_2_1", "weight": 1.0},
        {"source": "0_2_1", "target": "1_7_1", "weight": 2.0},
        {"source": "0_2_1", "target": "4_3_1", "weight": 3.0},
        {"source": "0_2_1", "target": "4_3_1", "weight": -4.0},
    ]
    q = {"pinnedIds": '["0_2_1"]', "supernodes": "[]", "linkType": "both", "clickedId": "", "sg_pos": ""}
    metadata = {
        "slug": "old",
        "scan": "s",
        "prompt": "p",
        "prompt_tokens": ["a", "b"],
        "transcoder_list": [],
        "node_threshold": 0.8,
    }
    return {"metadata": metadata, "qParams": q, "nodes": nodes, "links": links}


def test_old_ids_string_pins_and_raw_influence(tmp_path: Path):
    (tmp_path / "old.json").write_text(json.dumps(old_file()))
    file = read_graph_file(tmp_path / "old.json")
    assert file.raw_influence
    assert file.qParams.pinnedIds == ["0_2_1"]
    ids = [n.node_id for n in file.nodes]
    assert ids[:3] == ["0_2_1", "1_7_1", "2_-1_1"]
    assert sorted(x.source for x in file.links if x.target == "4_3_1") == ["0_2_1", "2_-1_1"]
    shares = [s for s in file.cumulative() if s is not None]
    assert max(shares) == pytest.approx(0.8)
    back = to_graph(file)
    assert back.header.n_layers == 3
    assert back.n_features == 2
    write_graph_file(file, tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text())["qParams"]["pinnedIds"] == ["0_2_1"]


def test_old_ids_without_a_collision_are_unchanged(tmp_path: Path):
    record = old_file()
    record["nodes"][2]["node_id"] = "0_2_0"
    record["nodes"][2]["ctx_idx"] = 0
    record["links"].pop()
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert [n.node_id for n in read_graph_file(tmp_path / "old.json").nodes][2] == "0_2_0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("nodes"), "nodes: Field required"),
        (lambda d: d["links"].append({"source": "x", "target": "1_7_1", "weight": 1}), "names the node 'x'"),
        (lambda d: d["links"][0].update(weight="heavy"), r"links\.0\.weight"),
        (lambda d: d["nodes"][1].update(node_id="E_9_1"), "have the id 'E_9_1'"),
        (lambda d: d["metadata"].pop("slug"), r"metadata\.slug"),
    ],
)
def test_files_that_are_not_graphs(tmp_path: Path, change: Any, words: str):
    record = old_file()
    change(record)
    (tmp_path / "bad.json").write_text(json.dumps(record))
    with pytest.raises(FormatError, match=words):
        read_graph_file(tmp_path / "bad.json")


def test_truncated_graph_file(tmp_path: Path):
    text = json.dumps(old_file())
    for n in (0, 10, len(text) // 2, len(text) - 1):
        (tmp_path / "cut.json").write_text(text[:n])
        with pytest.raises(FormatError, match="is not valid JSON"):
            read_graph_file(tmp_path / "cut.json")


def test_folder_of_graphs_has_a_list(graph: xl.Graph, tmp_path: Path):
    for slug in ("a", "b", "a"):
        add_to_folder(to_file(graph, slug), tmp_path / "graphs")
    listed = json.loads((tmp_path / "graphs" / "graph-metadata.json").read_text())["graphs"]
    assert sorted(g["slug"] for g in listed) == ["a", "b"]
    assert isinstance(open_graph(tmp_path / "graphs" / "a.json"), xl.Graph)
    with pytest.raises(ConfigError, match="slug 'a b' may hold letters"):
        to_file(graph, "a b")
    assert slug_of("x/a b.json") == "a-b"


def test_imported_file_is_complete(graph: xl.Graph):
    """Nodes without edges are imported too; pruning would drop them."""
    file = to_file(graph, "one", 0.9, 0.9)
    file.links = file.links[::3]
    again = to_graph(file).prune(1.0, 1.0)
    assert int(again.node_N.sum()) == len(file.nodes)
    assert len(again.weight_E) == len(file.links)
