"""The commands on any folder of a model and of text; bad input ends in one sentence."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from safetensors.torch import load_file, save_file

import tiny
from crosslayer.cli.main import VERBS, main

QUICK = [
    *("--tokens", "3000", "--batch", "200", "--buffer-tokens", "512", "--context", "33", "--rows-per-forward", "8"),
    *(
        "--scale-tokens",
        "500",
        "--calibration-tokens",
        "2000",
        "--n-features",
        "64",
        "--eval-tokens",
        "1000",
        "--l0-per-layer",
        "4",
    ),
]


def crosslayer(*args: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "160"} | (env or {})
    command = [sys.executable, "-m", "crosslayer", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_llama_and_a_folder_of_text_give_a_transcoder(tmp_path: Path, text_folder: Path):
    model = tiny.write_host(tmp_path / "llama", "llama")
    done = crosslayer("train", "--model", model, "--text", text_folder, *QUICK, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "FVU" in done.stdout
    assert "loss recovered" in done.stdout
    looked = crosslayer("inspect", tmp_path / "run")
    assert looked.returncode == 0
    for words in ("3 × 64 × 16", "jumprelu", "mlp.hook_in, mlp.hook_out", str(model)):
        assert words in looked.stdout
    out = tmp_path / "again.json"
    measured = crosslayer("eval", tmp_path / "run", "--tokens", "1000", "--context", "33", "-o", out)
    assert measured.returncode == 0, measured.stderr
    saved = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert json.loads(out.read_text())["fvu"] == pytest.approx(saved["fvu"], rel=1e-4)
    tensors = load_file(tmp_path / "run" / "clt" / "W_dec_1.safetensors")
    save_file({"W_dec_1": tensors["W_dec_1"][:-1].contiguous()}, tmp_path / "run" / "clt" / "W_dec_1.safetensors")
    broken = crosslayer("inspect", tmp_path / "run")
    assert broken.returncode == 2
    assert "W_dec_1 has shape (63, 2, 16), expected (64, 2, 16)" in broken.stderr


def test_the_column_of_the_text_is_remembered_by_the_run(host_folder: Path, tmp_path: Path, here):
    text, run = tmp_path / "a.csv", tmp_path / "run"
    with text.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "body"], *([i, tiny.make_text(300, i)] for i in range(40))])
    train = ("train", "--model", host_folder, "--text", text, *QUICK, "-o", run)
    assert "found id, body; give the column of the text with --column" in " ".join(here(*train).stderr.split())
    assert here(*train, "--column", "body").returncode == 0
    measure = ("eval", run, "--tokens", "300", "--context", "33")
    assert here(*measure).returncode == 0
    assert here(*measure, "--text", text).returncode == 2
    assert here(*measure, "--text", text, "--column", "body").returncode == 0
    build = ("features", "build", "--clt", run, "--tokens", "300", "--context", "33")
    assert here(*build).returncode == 0


def test_plan_needs_no_weights(host_folder: Path, tmp_path: Path, here):
    (tmp_path / "config.json").write_text((host_folder / "config.json").read_text())
    done = crosslayer(
        "plan", "--model", tmp_path, "--text", "x", "--n-features", "1000", "--l0", "10", "--flops", "1e11"
    )
    assert done.returncode == 0, done.stderr
    parameters = 3 * 1000 * 16 + 6 * 1000 * 16 + 3 * (1000 + 1000 + 16)
    assert f"{parameters:,}" in done.stdout
    assert "1,000,000 tokens at 100 GFLOP/s" in done.stdout


def test_help_explains_every_flag(here):
    for verb in VERBS:
        done = here(verb, "--help")
        assert done.returncode == 0
        options = [
            p
            for p in import_module(f"crosslayer.cli.{verb.replace('-', '_')}").command.params
            if isinstance(p, click.Option)
        ]
        assert [o.name for o in options if not o.help] == []
        assert all(o.opts[0] in done.stdout for o in options)
    text = " ".join(here("train", "--help").stdout.split())
    for words in (
        "target L0: active features per token",
        "Adam's beta1",
        "steps between checkpoints",
        "--no-cross-layer",
    ):
        assert words in text


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Runs a command in this process, which saves importing torch."""

    def run(*args: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["crosslayer", *map(str, args)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Ended(code, *capsys.readouterr())

    return run


BAD = {
    "no such model": (["--model", "no/such-model"], "no model 'no/such-model'"),
    "no such text": (["--text", "/no/such/text"], "no text at /no/such/text"),
    "empty source": (["--text", "{empty}"], "holds no text"),
    "unreadable source": (["--text", "{broken}"], "line 1, is not JSON"),
    "no family": (["--model", "{bloom}"], "is a 'bloom' model, a family"),
    "target too high": (["--l0-per-layer", "65"], "a target L0 of 195 exceeds the 192 features"),
    "two targets": (["--l0", "5"], "give the target L0 once"),
    "memory": (["--n-features", "3000000000"], "lower --batch"),
    "a word for a number": (["--tokens", "many"], "'many' is not a valid integer"),
    "no such flag": (["--tokns", "5"], "No such option"),
    "no such choice": (["--activation", "gelu"], "'gelu' is not one of"),
    "out in use": (["--out", "{filled}"], "is not empty; give another --out"),
    "out is a file": (["--out", "{empty}"], "is a file; give a folder"),
    "context": (["--context", "9999"], "context=9999 exceeds the context of"),
    "device": (["--device", "tpu"], "device=tpu"),
    "out below a file": (["--out", "{empty}/run"], "cannot be created"),
    "not a number": (["--l0-per-layer", "nan"], "l0_per_layer=nan must be at least 0"),
    "infinite": (["--lr", "inf"], "lr=inf must be finite"),
    "seed": (["--seed", "99999999999999999999999"], "must be below 2**63"),
    "no name": (["--model", ""], "model is empty"),
    "no tokenizer": (["--model", "{bare}"], "has no tokenizer that can be read"),
    "beta": (["--beta1", "1"], "beta1=1.0 must be at least 0 and below 1"),
    "penalty": (["--sparsity", "-1"], "sparsity=-1.0 must be at least 0"),
    "one token": (["--batch", "200", "--accumulate", "200"], "leaves one token per micro-batch"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(
    name: str, host_folder: Path, text_folder: Path, tmp_path: Path, here
):
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "mine.txt").write_text("mine")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "bloom").mkdir()
    (tmp_path / "bloom" / "config.json").write_text('{"model_type": "bloom", "architectures": ["BloomForCausalLM"]}')
    places = {
        "filled": tmp_path / "filled",
        "empty": tmp_path / "empty.txt",
        "broken": tmp_path / "broken.jsonl",
        "bloom": tmp_path / "bloom",
        "bare": tmp_path / "bare",
    }
    tiny.make_model("llama").save_pretrained(tmp_path / "bare")
    before = sorted(tmp_path.rglob("*"))
    changed, words = BAD[name]
    given = {"--model": str(host_folder), "--text": str(text_folder), "--out": str(tmp_path / "run")}
    given |= dict(zip(QUICK[::2], QUICK[1::2], strict=True))
    given |= {flag: value.format(**places) for flag, value in zip(changed[::2], changed[1::2], strict=True)}
    done = here("train", *[part for pair in given.items() for part in pair])
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("crosslayer: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_other_verbs_name_what_is_wrong(tmp_path: Path, here):
    for args, words in (
        (["eval", tmp_path, "--text", "stdlib"], "no config.yaml"),
        (["eval", tmp_path / "no"], "no folder"),
        (["eval", tmp_path], "no text was given"),
        (["eval", tmp_path, "--text", "stdlib", "-o", tmp_path], "it is a folder"),
        (["plan", "--text", "x", "--l0", "5", "--flops", "-1"], "is not in the range"),
        (["inspect", tmp_path / "no"], "no folder"),
        (["eval", tmp_path, "--text", "stdlib", "-o", f"{__file__}/x.json"], "is a file, not a folder"),
        (["convert", tmp_path, tmp_path / "out"], "no config.yaml"),
        (["push", tmp_path, "nobody"], "is not a Hub repository"),
        (["train", "--resume", tmp_path], "no run.json"),
        (["train", "--text", "stdlib", "--l0", "5"], "give --out"),
        (["plan", "--model", tmp_path, "--text", "x", "--l0", "5"], "cannot be read as a Hugging Face"),
        (["nonsense"], "No such command 'nonsense'"),
    ):
        done = here(*args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (args, done.stderr)
        assert words in done.stderr, done.stderr


def test_ctrl_c_saves_and_the_run_resumes(host_folder: Path, text_folder: Path, tmp_path: Path):
    args = [
        "train",
        "--model",
        host_folder,
        "--text",
        text_folder,
        *QUICK,
        "--tokens",
        "200000",
        "--out",
        tmp_path / "run",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "crosslayer", *map(str, args)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "resume with --resume" in err.splitlines()[-1]
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    refused = crosslayer("train", "--resume", tmp_path / "run", "--lr", "0.5")
    assert refused.returncode == 2
    assert "started with lr=" in refused.stderr


def test_waiting_threads_give_way_unless_the_environment_decides():
    """A busy machine slows PyTorch tenfold if its threads spin while they wait."""
    code = "import os, crosslayer.cli.main; print(os.environ.get('GOMP_SPINCOUNT'))"
    for given, spins in (({}, "20000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        cleared = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=cleared | given, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == spins
