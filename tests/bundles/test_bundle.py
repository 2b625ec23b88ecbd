"""Listing, search, labels and exchange of feature bundles."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslayer.bundles.annotations import PERSON, Label, UserStore
from crosslayer.bundles.bundle import FeatureBundle, load_features
from crosslayer.bundles.index import SORT_KEYS, words_of
from crosslayer.bundles.packed import import_packed, write_packed
from crosslayer.bundles.parquet import write_parquet
from crosslayer.core.errors import ConfigError, ConflictError, FormatError, RunError
from made_bundle import N_FEATURES, Made


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> FeatureBundle:
    shutil.copytree(made.bundle.path, tmp_path / "copy")
    return load_features(tmp_path / "copy")


def test_pages_by_every_key(made: Made):
    bundle = made.bundle
    n = bundle.n_layers * bundle.n_features
    for key in SORT_KEYS:
        for descending in (False, True):
            pages = [
                bundle.index.page(key, descending=descending, limit=7, offset=at, filters={}) for at in range(0, n, 7)
            ]
            ids = [f for page in pages for f in page]
            assert sorted(ids) == list(range(n)), key
            values = [v for f in ids if (v := {**bundle.index.metrics(f), "id": f}[key]) is not None]
            assert values == sorted(values, reverse=descending), key
    only = bundle.page("density", filters={"layer": (1, 1), "density": (0.01, None)}, limit=1000)
    assert only
    assert all(x.layer == 1 and x.density >= 0.01 for x in only)
    for bad in ({"sort": "colour"}, {"filters": {"1=1; --": (0, 1)}}):
        with pytest.raises(ConfigError, match="cannot be"):
            bundle.page(**bad)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=25))
def test_no_search_fails(made: Made, text: str):
    for found in made.bundle.search(text, 5):
        assert 0 <= found.layer < made.bundle.n_layers


@pytest.mark.parametrize(
    "text",
    ['"', "'", "a OR b", "NEAR(a b)", "label:", "fires:(", 'x" AND "y', "*", "-a", "^a", "{a b}", "a+b", "()", "\x00"],
)
def test_quotes_and_operators_are_taken_literally(made: Made, text: str):
    made.bundle.search(text)


def test_search_matches_brute_force(made: Made):
    bundle = made.bundle
    words = {}
    for n in range(bundle.n_layers * bundle.n_features):
        f = bundle.feature(*bundle.place(n))
        words[n] = {
            "label": set(words_of((f.label or "").replace("“", " ").replace("”", " "))),
            "fires": {w for t in f.at["peak"] for w in words_of(t.token)},
            "promotes": {w for x in f.promotes for w in words_of(x.token)},
        }
    for query in (
        "def",
        "self",
        "(",
        "return value",
        "fires:def",
        "promotes:list",
        "label:token",
        "im*",
        "nothing-like-this",
    ):
        wanted = set()
        for n, columns in words.items():
            every = True
            for part in query.split():
                column, _, word = part.rpartition(":")
                side = columns[column] if column else set().union(*columns.values())
                for w in words_of(word.rstrip("*")):
                    every &= any(x.startswith(w) for x in side) if word.endswith("*") else w in side
            if every:
                wanted.add(bundle.place(n))
        assert {(x.layer, x.index) for x in bundle.search(query, 1000)} == wanted, query


def test_person_label_takes_precedence_is_searchable_and_can_be_deleted(copy: FeatureBundle):
    by_rule = copy.feature(0, 3).label
    copy.user.set_label(
        Label(3, "some-model", "a label by a model", scores={"detection": 0.9}, provenance={"prompt": 1})
    )
    assert copy.feature(0, 3)[2:4] == ("a label by a model", "some-model")
    copy.set_label(0, 3, "Zebra crossings")
    assert copy.feature(0, 3)[2:4] == ("Zebra crossings", PERSON)
    assert [(x.layer, x.index) for x in copy.search("zebra")] == [(0, 3)]
    assert [(x.layer, x.index) for x in copy.search("cross*")] == [(0, 3)]
    again = load_features(copy.path)
    assert again.feature(0, 3).label == "Zebra crossings"
    assert again.user.labels([3])[3][1].scores == {"detection": 0.9}
    again.set_label(0, 3, "")
    assert again.feature(0, 3).label == "a label by a model"
    again.user.set_label(Label(3, "some-model", " "))
    assert again.feature(0, 3).label == by_rule
    assert again.search("zebra") == []


def test_pins_and_views_are_saved(tmp_path: Path):
    store = UserStore(tmp_path / "user.sqlite")
    assert (store.pins(), store.views("graph"), store.view("graph", "x")) == ([], [], (None, ""))
    assert not store.path.exists()
    store.pin(5)
    store.pin(2)
    store.pin(5, pinned=False)
    first = store.save_view("graph", "x", {"nodes": [1]}, over="")
    store.save_view("graph", "x", {"nodes": [2]}, over=first)
    for stale in (first, ""):
        with pytest.raises(ConflictError, match="changed elsewhere"):
            store.save_view("graph", "x", {"nodes": [3]}, over=stale)
    store.close()
    again = UserStore(tmp_path / "user.sqlite")
    assert (again.pins(), again.views("graph"), again.view("graph", "x")[0]) == ([2], ["x"], {"nodes": [2]})
    (tmp_path / "bad.sqlite").write_text("this is no database, however long it may be made to look" * 30)
    with pytest.raises(FormatError, match="move it away"):
        UserStore(tmp_path / "bad.sqlite").pins()


def test_unknown_features_and_kinds(made: Made):
    for place, words in (
        ((9, 0), "no layer 9"),
        ((-1, 0), "no layer -1"),
        ((0, N_FEATURES), f"no feature L0/{N_FEATURES}"),
    ):
        with pytest.raises(ConfigError, match=words):
            made.bundle.feature(*place)
    with pytest.raises(ConfigError, match="'smell'"):
        made.bundle.neighbours(0, 0, "smell")
    with pytest.raises(ConfigError, match="limit=0"):
        made.bundle.search("a", 0)


def read_packed_by_specification(folder: Path) -> dict[tuple[int, int], dict]:
    """Read packed files with code written from FORMATS.md alone."""
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    records = {}
    for layer, entry in index.items():
        data = (folder / entry["filename"]).read_bytes()
        for f, (begin, end) in enumerate(zip(entry["offsets"], entry["offsets"][1:], strict=False)):
            (length,) = struct.unpack("<I", data[begin : begin + 4])
            assert end - begin == 4 + length
            records[int(layer), f] = json.loads(zlib.decompress(data[begin + 4 : end]))
    return records


def test_packed_files_follow_the_format(made: Made, tmp_path: Path):
    bundle = made.bundle
    records = read_packed_by_specification(write_packed(bundle, tmp_path))
    assert len(records) == bundle.n_layers * bundle.n_features
    fields = {
        "transcoder_id",
        "index",
        "examples_quantiles",
        "top_logits",
        "bottom_logits",
        "act_min",
        "act_max",
        "quantile_values",
        "histogram",
        "activation_frequency",
    }
    for (layer, i), r in records.items():
        f = bundle.feature(layer, i)
        assert set(r) == fields
        assert (r["index"], r["activation_frequency"]) == (i, f.density)
        assert (r["top_logits"], r["bottom_logits"]) == ([x.token for x in f.promotes], [x.token for x in f.suppresses])
        assert sum(r["histogram"]) == f.count
        found = [e for q in r["examples_quantiles"] for e in q["examples"]]
        assert [e["tokens"] for e in found] == [e.tokens for e in f.examples]
        assert [e["train_token_ind"] for e in found] == [e.peak for e in f.examples]
        for one, other in zip(found, f.examples, strict=True):
            assert one["tokens_acts_list"] == pytest.approx(other.activations, abs=5e-5)
            assert set(one) == {"tokens", "tokens_acts_list", "train_token_ind", "is_repeated_datapoint"}
        if f.count:
            assert r["examples_quantiles"][0]["quantile_name"] == "Top activations"
            assert len(r["quantile_values"]) == 100
            assert r["quantile_values"] == sorted(r["quantile_values"])
            assert f.min <= r["quantile_values"][0] <= r["quantile_values"][-1] <= f.max + 1e-5
            assert r["act_min"] <= f.min <= f.max <= r["act_max"]
    with pytest.raises(RunError, match="already exists"):
        write_packed(bundle, tmp_path)


def test_packed_files_are_imported_as_a_bundle(made: Made, tmp_path: Path):
    folder = write_packed(made.bundle, tmp_path)
    back = import_packed("someone/their-clt", folder.joinpath, tmp_path / "bundle")
    assert back.manifest.imported == "someone/their-clt"
    for n in range(made.bundle.n_layers * made.bundle.n_features):
        one, other = made.bundle.feature(*made.bundle.place(n)), back.feature(*back.place(n))
        assert [e.tokens for e in one.examples] == [e.tokens for e in other.examples]
        assert [e.peak for e in one.examples] == [e.peak for e in other.examples]
        step = max(one.max, 1e-9) / 255
        for a, b in zip(one.examples, other.examples, strict=True):
            assert a.activations == pytest.approx(b.activations, abs=1.1 * step)
        assert [x.token for x in one.promotes] == [x.token for x in other.promotes]
        assert one.density == other.density
        assert one.count == other.count
        assert back.neighbours(*back.place(n), "encoder") == []
    word = next(w for x in back.feature(0, 0).promotes for w in words_of(x.token))
    assert (0, 0) in [(x.layer, x.index) for x in back.search(f"promotes:{word}", 1000)]
    back.set_label(0, 1, "ours")
    assert back.feature(0, 1).label == "ours"
    with pytest.raises(RunError, match="already exists"):
        import_packed("x", folder.joinpath, tmp_path / "bundle")


def damaged_records(folder: Path) -> list[tuple[str, str]]:
    return [
        ("layer_1.bin", "cut"),
        ("index.json.gz", "cut"),
        ("index.json.gz", "nonsense"),
        ("layer_0.bin", "nonsense"),
        ("index.json.gz", "uneven"),
    ]


@pytest.mark.parametrize(("name", "how"), damaged_records(Path()))
def test_damaged_packed_files_raise_format_error(made: Made, tmp_path: Path, name: str, how: str):
    folder = write_packed(made.bundle, tmp_path)
    raw = (folder / name).read_bytes()
    if how == "cut":
        (folder / name).write_bytes(raw[: len(raw) // 2])
    elif how == "nonsense":
        (folder / name).write_bytes(b"\x07" * len(raw))
    else:
        index = json.loads(gzip.decompress(raw))
        index["1"]["offsets"].pop()
        (folder / name).write_bytes(gzip.compress(json.dumps(index).encode()))
    with pytest.raises(FormatError, match=r"(again|expected)"):
        import_packed("x", folder.joinpath, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.glob(".bundle*"))


def test_record_variants_are_read(made: Made, tmp_path: Path):
    """Read `train_token_index`, a record without histogram, and tokens that are not text."""
    record = {
        "transcoder_id": "0",
        "index": 0,
        "top_logits": [" a"],
        "bottom_logits": [],
        "activation_frequency": 0.25,
        "examples_quantiles": [
            {
                "quantile_name": "Top activations",
                "examples": [
                    {
                        "tokens": [" a", "b"] * 200,
                        "tokens_acts_list": [0.0, 1.5] * 200,
                        "train_token_index": 399,
                        "is_repeated_datapoint": False,
                    }
                ],
            }
        ],
    }
    body = zlib.compress(json.dumps(record).encode())
    (tmp_path / "layer_0.bin").write_bytes(struct.pack("<I", len(body)) + body)
    index = {"0": {"filename": "layer_0.bin", "offsets": [0, 4 + len(body)]}}
    (tmp_path / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode()))
    feature = import_packed("x", tmp_path.joinpath, tmp_path / "bundle").feature(0, 0)
    (example,) = feature.examples
    assert len(example.tokens) == 255
    assert (example.tokens[example.peak], example.value, example.activations[example.peak]) == ("b", 1.5, 1.5)
    assert (feature.density, feature.at["peak"]) == (0.25, [("b", 1)])


def test_parquet_matches_the_bundle(made: Made, tmp_path: Path):
    import pyarrow.parquet as pq

    table = pq.read_table(write_parquet(made.bundle, tmp_path / "all.parquet")).to_pylist()
    assert len(table) == made.bundle.n_layers * made.bundle.n_features
    for row in table:
        f = made.bundle.feature(row["layer"], row["index"])
        assert (row["label"], row["count"]) == (f.label, f.count)
        assert [x["token"] for x in row["promotes"]] == [x.token for x in f.promotes]
        assert [e["tokens"] for e in row["examples"]] == [e.tokens for e in f.examples]
        near = made.bundle.neighbours(f.layer, f.index, "upstream")
        assert [(x["layer"], x["index"]) for x in row["upstream"]] == [(x.layer, x.index) for x in near]
    small = pq.read_table(write_parquet(made.bundle, tmp_path / "small.parquet", examples=False))
    assert "examples" not in small.column_names


def test_damage_of_the_same_size_is_reported(made: Made, tmp_path: Path):
    copy = Path(shutil.copytree(made.bundle.path, tmp_path / "copy"))
    shutil.copy(copy / "top_id.npy", copy / "top.npy")
    with pytest.raises(FormatError, match=r"top\.npy holds int32 .* expected float32"):
        load_features(copy).feature(2, 7)
    index = copy / "features.sqlite"
    whole = index.read_bytes()
    index.write_bytes(whole[:8192] + b"\xaa" * (len(whole) - 8192))
    with pytest.raises(FormatError, match=r"features\.sqlite"):
        load_features(copy).search("self")
    with pytest.raises(FormatError, match=r"features\.sqlite"):
        load_features(copy).page()


@pytest.mark.parametrize("label", ["   ", "x" * 501, "a\nb", "a\x1b[31mb", "a\u202eb", "\udcff"])
def test_labels_that_cannot_be_displayed_are_refused(made: Made, tmp_path: Path, label: str):
    copy = load_features(shutil.copytree(made.bundle.path, tmp_path / "copy"))
    with pytest.raises(ConfigError, match="label"):
        copy.set_label(2, 7, label)
    assert not copy.user.path.exists()


def test_added_labels_are_searched(made: Made, tmp_path: Path):
    copy = load_features(shutil.copytree(made.bundle.path, tmp_path / "copy"))
    copy.set_label(0, 3, "capital city")
    for text in ("capital", '"capital city"', "label:capital", "cap*", "label:cap*"):
        assert [(f.layer, f.index) for f in copy.search(text)][:1] == [(0, 3)], text
    with pytest.raises(ConfigError, match="600 words; give max 64"):
        copy.search("a " * 600)
