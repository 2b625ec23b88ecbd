"""Whole runs on a tiny host: files, the L0 reached, and resuming after a kill."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from crosslayer.clt.open import load_clt
from crosslayer.core.errors import ConfigError, FormatError, ResourceError, RunError
from crosslayer.core.files import locked
from crosslayer.data import massive
from crosslayer.data.rows import held_out_rows
from crosslayer.data.sources import open_sources
from crosslayer.eval.api import evaluate
from crosslayer.host.host import load_host
from crosslayer.parallel import ALONE
from crosslayer.schemas.evaluation import Evaluation
from crosslayer.schemas.policy import FirstPosition
from crosslayer.schemas.run import RunManifest, read_manifest
from crosslayer.training import checkpoint, plan, publish
from crosslayer.training.config import RENAMED, TrainConfig
from crosslayer.training.publish import last_l0
from crosslayer.training.trainer import Stopped, Trainer, train

RUN = (
    "import sys, json; from crosslayer.training.config import TrainConfig; from crosslayer.training.trainer import"
    " train; train(TrainConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2], resume=len(sys.argv) > 3)"
)


def start(config: TrainConfig, out: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", RUN, json.dumps(config.as_dict()), str(out), *more])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {k: v for p in sorted((run / "clt").glob("*.safetensors")) for k, v in load_file(p).items()}


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def finished(tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny_config, out)
    return out


def test_a_finished_run_writes_its_files(finished: Path, tiny_config: TrainConfig):
    manifest = RunManifest.model_validate_json((finished / "run.json").read_text())
    assert (manifest.state, manifest.step, manifest.tokens) == ("finished", 60, 12_000)
    assert TrainConfig.from_dict(manifest.config) == tiny_config
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == list(range(5, 61, 5))
    assert log[-1]["fvu"] < log[0]["fvu"]
    for line in log:
        # The pooled FVU lies between those of the layers; activation collection is part of training time.
        assert min(line["fvu_L"]) <= line["fvu"] <= max(line["fvu_L"])
        assert 0 < line["collect_s"] < line["train_s"]
        assert 0 <= line["massive_share"] < 0.05
    assert checkpoint.steps(finished) == [40, 60]
    e = Evaluation.model_validate_json((finished / "eval.json").read_text())
    card = (finished / "clt" / "README.md").read_text()
    for value in (f"{e.l0:.1f}", f"{e.fvu:.4f}", f"{e.replacement.kl:.4f}", f"{e.dead_share:.1%}"):
        assert value in card
    assert e.training is not None
    assert e.training.l0_asked == tiny_config.target_l0(3)
    assert e.training.l0_training == log[-1]["l0"]  # 5 % of twelve records is one
    assert e.training.l0_uncalibrated == pytest.approx(log[-1]["l0"], rel=0.2)
    assert e.affine_fvu is not None
    assert f"{e.affine_fvu:.4f}" in card


def test_the_last_l0_is_over_the_end_of_the_log(tmp_path: Path):
    assert last_l0(tmp_path) is None
    records = [{"step": i, "l0": float(i)} for i in range(60)] + [{"step": 60, "eval": {"l0": 1.0}}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert last_l0(tmp_path) == 58.0


def test_calibration_is_shown_at_the_end_and_baselines_too_large_are_left_out(
    tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(publish, "AFFINE_BYTES", 1 << 10)
    shown = io.StringIO()
    config = replace(tiny_config, tokens=2000, eval_every=4)
    done = train(config, tmp_path / "run", console=Console(file=shown, width=200))
    lines = shown.getvalue().splitlines()
    assert "no affine baseline: it needs" in shown.getvalue()
    assert sum(line.startswith("calibrate 100%") for line in lines) == 1
    assert done.evaluation.affine_fvu is None


def test_evaluating_the_saved_folder_again_gives_eval_json(finished: Path, tiny_config: TrainConfig):
    saved = Evaluation.model_validate_json((finished / "eval.json").read_text())
    again = evaluate(finished, text=tiny_config.text, tokens=tiny_config.eval_tokens, context=tiny_config.context)
    assert again.fvu == pytest.approx(saved.fvu, rel=1e-5)
    assert again.l0 == pytest.approx(saved.l0, rel=1e-5)
    assert again.replacement.ce_replaced == pytest.approx(saved.replacement.ce_replaced, rel=1e-5)
    assert again.training == saved.training


def test_damaged_metrics_of_a_run_are_refused(finished: Path, tiny_config: TrainConfig, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "eval.json").write_text("{")
    with pytest.raises(RunError, match=r"eval\.json is damaged; delete it"):
        evaluate(tmp_path / "run", text=tiny_config.text, tokens=500, context=33)


@pytest.mark.parametrize(
    "settings", [{}, {"activation": "batchtopk", "reuse": 2, "accumulate": 2}, {"precision": "bf16"}]
)
def test_killed_at_a_random_step_and_resumed_is_bitwise_identical(
    tiny_config, finished, tmp_path: Path, settings: dict
):
    config = replace(tiny_config, checkpoint_every=7, **settings)
    whole = finished if not settings else tmp_path / "whole"
    if settings:
        train(config, whole)
    killed = tmp_path / "killed"
    process = start(config, killed)
    wanted = random.randint(8, 45)
    log = killed / "log.jsonl"
    while process.poll() is None:
        steps = [json.loads(x)["step"] for x in log.read_text().splitlines() if x.endswith("}")] if log.exists() else []
        if steps and steps[-1] >= wanted:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait()
    assert not (killed / "clt").exists(), "the run ended before it could be killed"
    assert start(config, killed, "resume").wait() == 0
    assert same(whole, killed)
    steps = [json.loads(line)["step"] for line in (killed / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 60


def test_a_resumed_run_leaves_out_the_same_massive_activations(
    tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(massive, "MASSIVE", 1.5)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(tiny_config, whole)
    shutil.copytree(whole, resumed)
    train(tiny_config, resumed, resume=True, step=40)
    assert same(whole, resumed)
    shares = [
        [json.loads(line)["massive_share"] for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (whole, resumed)
    ]
    assert shares[0] == shares[1]
    assert 0.1 < shares[0][-1] < 0.9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(tiny_config, finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    step = Trainer.one_step

    def interrupted(self: Trainer) -> dict[str, float]:
        if self.state.step == 23:
            os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(Trainer, "one_step", interrupted)
    with pytest.raises(Stopped, match="stopped at step 24 of 60; resume with --resume"):
        train(tiny_config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "stopped"
    with pytest.raises(FormatError, match="has not finished"):
        load_clt(tmp_path / "run")
    monkeypatch.undo()
    train(tiny_config, tmp_path / "run", resume=True)
    assert same(finished, tmp_path / "run")


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk", "topk"])
@pytest.mark.parametrize("l0_per_layer", [2.0, 8.0])
def test_the_target_l0_is_reached_on_held_out_text(tiny_config, tmp_path: Path, activation: str, l0_per_layer: float):
    config = replace(tiny_config, activation=activation, l0_per_layer=l0_per_layer, eval_tokens=10_000)
    e = train(config, tmp_path / "run").evaluation
    assert e.l0_per_layer == pytest.approx(l0_per_layer, rel=0.05)
    assert e.l0 == pytest.approx(3 * e.l0_per_layer)


@pytest.mark.parametrize("settings", [{"cross_layer": False, "skip": True}, {"activation": "relu"}, {"sparsity": 0.5}])
def test_other_kinds_train_save_and_open(tiny_config, tmp_path: Path, settings: dict):
    done = train(replace(tiny_config, tokens=4000, eval_every=10, **settings), tmp_path / "run")
    assert done.evaluation.fvu < 1.0
    opened = load_clt(tmp_path / "run").clt
    assert opened.config == done.clt.config
    assert any("eval" in line for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines())


def test_gradient_accumulation_gives_the_whole_batchs_update(tiny_config, tmp_path: Path):
    settings = {"tokens": 600, "scale_tokens": 500}
    settings["log_every"] = 1
    one = train(replace(tiny_config, **settings), tmp_path / "one").clt
    four = train(replace(tiny_config, accumulate=4, **settings), tmp_path / "four").clt
    first = [json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[0]) for run in ("one", "four")]
    # Adam hides a wrong gradient scale; the norm shows it.
    assert first[0]["gradient_norm"] == pytest.approx(first[1]["gradient_norm"], rel=1e-4)
    for (name, a), (_, b) in zip(one.named_parameters(), four.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_diverging_run_raises_and_is_not_finished(tiny_config, tmp_path: Path):
    with pytest.raises(RunError, match="is not finite; lower --lr"):
        train(replace(tiny_config, lr=1e30, clip=0.0), tmp_path / "run")
    assert read_manifest(tmp_path / "run").state == "training"
    assert not (tmp_path / "run" / "eval.json").exists()


def test_other_text_is_refused_on_resume(tiny_config, text_folder: Path, tmp_path: Path):
    shutil.copytree(text_folder, tmp_path / "text")
    config = replace(tiny_config, text=(str(tmp_path / "text"),), tokens=2000)
    train(config, tmp_path / "run")
    (tmp_path / "text" / "001.txt").write_text("something else\n" * 50)
    with pytest.raises(RunError, match="has changed since the run started"):
        train(config, tmp_path / "run", resume=True)


def test_a_loaded_host_must_match_the_config(tiny_config, host_folder: Path, tmp_path: Path):
    other = load_host(host_folder, input_hook="hook_resid_mid")
    with pytest.raises(ConfigError, match=r"loaded with input_hook=hook_resid_mid, but mlp\.hook_in is needed"):
        train(tiny_config, tmp_path / "run", host=other)
    assert not (tmp_path / "run").exists()


def test_rows_follow_a_policy_without_a_prepended_token(tiny_config, host_folder: Path):
    policy = FirstPosition(prepend=False)
    host = load_host(host_folder, policy=policy)
    rows_BT = held_out_rows(host, open_sources(tiny_config.text), 33, 500)
    assert rows_BT.shape[1] == 33
    assert (rows_BT != host.first_token).all()


def test_a_sink_that_cannot_be_opened_writes_no_files(tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install"):
        train(replace(tiny_config, wandb=True), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_another_config_is_refused_on_resume(tiny_config, finished: Path):
    with pytest.raises(RunError, match=r"started with lr=0\.003, not 0\.1"):
        train(replace(tiny_config, lr=0.1), finished, resume=True)


def test_a_run_saved_with_old_setting_names_resumes(tiny_config, finished: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    manifest = json.loads((run / "run.json").read_text())
    for old, new in RENAMED.items():
        manifest["config"][old] = manifest["config"].pop(new)
    (run / "run.json").write_text(json.dumps(manifest))
    assert TrainConfig.from_dict(read_manifest(run).config) == tiny_config
    with pytest.raises(RunError, match="started with buffer_tokens=1024, not 2048"):
        train(replace(tiny_config, buffer_tokens=2048), run, resume=True)
    train(tiny_config, run, resume=True, step=40)
    assert same(finished, run)
    assert read_manifest(run).config["buffer_tokens"] == tiny_config.buffer_tokens
    assert "ring" not in read_manifest(run).config


def test_a_checkpoint_of_another_transcoder_is_refused(tiny_config, finished: Path, tmp_path: Path):
    other = replace(tiny_config, n_features=32, tokens=4000)
    train(other, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(finished / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(
        RunError, match="belongs to another transcoder, with n_features=64 and not 32; restore the run's own"
    ):
        train(other, tmp_path / "run", resume=True)


def test_a_checkpoint_that_would_run_code_is_not_read(tiny_config, finished: Path, tmp_path: Path):
    step = tmp_path / "step"
    shutil.copytree(finished / "checkpoints" / "step-00000060", step)
    (step / ".metadata").write_bytes(pickle.dumps(Path.unlink))
    with pytest.raises(RunError, match=r"its metadata names .*, which is not part of the format"):
        checkpoint.load(step, lambda name: False, ALONE)


def test_folders_in_use_finished_or_filled_are_refused(tiny_config, finished: Path, tmp_path: Path):
    with pytest.raises(RunError, match="already holds a run"):
        train(tiny_config, finished)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        train(tiny_config, tmp_path)
    with pytest.raises(RunError, match=r"no run\.json"):
        train(tiny_config, tmp_path, resume=True)
    with locked(tmp_path / "busy"), pytest.raises(RunError, match="in use by another process"):
        train(tiny_config, tmp_path / "busy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["busy", "notes.txt"]


def test_a_damaged_checkpoint_names_an_earlier_one(tiny_config, finished: Path, tmp_path: Path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "clt")
    state = run / "checkpoints" / "step-00000060" / "__0_0.distcp"
    raw = bytearray(state.read_bytes())
    raw[len(raw) // 2] ^= 1
    state.write_bytes(raw)
    with pytest.raises(RunError, match=r"damaged.*resume from an earlier one with --step 40"):
        train(tiny_config, run, resume=True)
    with pytest.raises(RunError, match="no checkpoint of step 41; its checkpoints are of steps 40, 60"):
        train(tiny_config, run, resume=True, step=41)
    train(tiny_config, run, resume=True, step=40)
    assert same(finished, run)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(tiny_config, tmp_path: Path, monkeypatch):
    with pytest.raises(ResourceError, match=r"GiB are free; most of it, .* GiB, is for .*: lower --"):
        train(replace(tiny_config, n_features=2_000_000_000), tmp_path / "run")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ResourceError, match=r"of disk but 0\.0 GiB are free"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
