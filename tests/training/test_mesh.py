"""Every mesh of data x feature ranks computes, saves and loads the same as one rank."""

from __future__ import annotations

import json
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from clt.test_transcoder import KINDS, inputs, make
from crosslayer import parallel
from crosslayer.clt import precision
from crosslayer.clt.calibrate import to_jumprelu
from crosslayer.clt.config import Provenance
from crosslayer.clt.formats import published
from crosslayer.clt.init import initialise
from crosslayer.clt.open import load_clt
from crosslayer.clt.ranking import top_mask
from crosslayer.clt.shard import by_feature, join, share_of
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError, FormatError, ResourceError, RunError
from crosslayer.data.sources import open_sources
from crosslayer.eval.api import evaluate
from crosslayer.host.host import load_host
from crosslayer.parallel import ALONE, Mesh, group
from crosslayer.parallel.select import kth_largest
from crosslayer.schemas.evaluation import Evaluation
from crosslayer.training import checkpoint, publish
from crosslayer.training.config import TrainConfig
from crosslayer.training.gradients import Gradients
from crosslayer.training.plan import HostShape
from crosslayer.training.share import plan_of_one_rank
from crosslayer.training.trainer import Trainer, train
from ranks import run_on
from training.by_autograd import by_parts
from training.test_losses import config as losses_config

SHAPES = {2: [1, 2], 4: [1, 2, 4]}
"""Feature ranks by number of ranks."""


def share(whole: CLT, mesh: Mesh) -> CLT:
    """Return this rank's part of a whole transcoder."""
    clt = share_of(whole.config, mesh, dtype=whole.dtype, device="cpu")
    for (name, p), (_, q) in zip(clt.named_parameters(), whole.named_parameters(), strict=True):
        p.data.copy_(q.data.chunk(mesh.features.size)[mesh.features.rank] if by_feature(name) else q.data)
    return clt


def gathered(name: str, tensor: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    return mesh.features.cat(tensor) if by_feature(name) else tensor


def meshes() -> list[Mesh]:
    return [parallel.lay_out(n) for n in SHAPES[parallel.world_size()]]


@contextmanager
def sizes_reduced():
    """Record the sizes of tensors that are all-reduced in the block."""
    sizes, reduce = [], group.dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    with mock.patch.object(group.dist, "all_reduce", counting):
        yield sizes


def same_gradients_on(mesh: Mesh, kind: tuple[str, str], dtype: torch.dtype, sparse: bool) -> None:
    whole, x, y = make(*kind, dtype=dtype), inputs(40).to(dtype), inputs(80)[40:].to(dtype)
    dead_LF = torch.zeros(3, 24, dtype=torch.bool)
    dead_LF[1, :4] = dead_LF[2, 17] = True  # most ranks have no dead features in some layers
    settings = losses_config(activation=kind[0], scope=kind[1])
    of_all, mine = Gradients(), Gradients()
    expected, slopes = by_parts(whole, x, y, settings, dead_LF, sparse, into=of_all, l0=12.0)

    clt, tokens = (
        share(whole, mesh),
        slice(mesh.data.rank * 40 // mesh.data.size, (mesh.data.rank + 1) * 40 // mesh.data.size),
    )
    mine_LF = dead_LF.chunk(mesh.features.size, dim=1)[mesh.features.rank]
    with sizes_reduced() as sizes:
        found, _ = by_parts(clt, x[tokens], y[tokens], settings, mine_LF, sparse, into=mine, l0=12.0)
    if mesh.features.size > 1 and not whole.config.ranks:
        # One all-reduce of the reconstruction per step: not one per pair of layers, and none in the backward pass.
        assert [n for n in sizes if n > 1] == [x[tokens].numel()]
    mine.average(mesh.data)

    close = 1e-12 if dtype == torch.float64 else 1e-6
    for name, p in clt.named_parameters():
        grad, wanted = gathered(name, mine.of(p), mesh), slopes[name]
        scale = wanted.abs().max().item()
        torch.testing.assert_close(
            grad, wanted, rtol=close, atol=close * scale, msg=lambda m, n=name: f"{mesh.shape} {kind} {n}: {m}"
        )
    torch.testing.assert_close(mine.norm(clt), of_all.norm(whole), rtol=10 * close, atol=0.0)
    fired = mesh.features.cat(mesh.data.sum_(found.fired_LF), dim=1)
    assert torch.equal(fired, expected.fired_LF)


def ties_go_to_the_earlier_feature(mesh: Mesh) -> None:
    whole = torch.randint(-2, 4, (30, 3, 24), generator=torch.Generator().manual_seed(0)).float()
    order = whole.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :20]
    expected = torch.zeros(30, 72, dtype=torch.bool).scatter_(1, order, value=True).view_as(whole) & (whole > 0)
    assert torch.equal(top_mask(whole, 20), expected)
    mine = whole.chunk(mesh.features.size, dim=2)[mesh.features.rank]
    assert torch.equal(mesh.features.cat(top_mask(mine, 20, mesh.features), dim=2), expected)


def the_kth_largest_is_exact(mesh: Mesh) -> None:
    for dtype, k in ((torch.float32, 1), (torch.float32, 40), (torch.float64, 17), (torch.float64, 60)):
        x_XY = torch.randn(5, 80, generator=torch.Generator().manual_seed(k), dtype=dtype)
        x_XY[0] *= 1e-30
        mine = x_XY.tensor_split([1, 3, 50][: mesh.world.size - 1], dim=1)[mesh.world.rank]
        assert torch.equal(kth_largest(mine, k, mesh.world), kth_largest(x_XY, k, ALONE.world))


def beginning_and_conversion_are_one_ranks(mesh: Mesh) -> None:
    for kind in (("jumprelu", "all"), ("topk", "layer"), ("batchtopk", "all")):
        whole = make(*kind, dtype=torch.float32)
        clt = share(whole, mesh)
        for p in clt.parameters():
            p.data.zero_()
        initialise(whole, 5)
        initialise(clt, 5)
        for (name, p), (_, q) in zip(clt.named_parameters(), whole.named_parameters(), strict=True):
            assert torch.equal(gathered(name, p.data, mesh), q.data), (kind, name)
        one, other = (to_jumprelu(c, inputs(60).float().split(20), 9.0) for c in (clt, whole))
        assert one.l0_before == other.l0_before
        for mine, theirs in zip(one.clt.threshold, other.clt.threshold, strict=True):
            torch.testing.assert_close(gathered("threshold", mine.data, mesh), theirs.data, rtol=1e-5, atol=1e-7)


def arithmetic() -> None:
    for mesh in meshes():
        assert mesh.data.size * mesh.features.size == parallel.world_size()
        assert parallel.rank() == mesh.data.rank * mesh.features.size + mesh.features.rank
        ties_go_to_the_earlier_feature(mesh)
        the_kth_largest_is_exact(mesh)
        beginning_and_conversion_are_one_ranks(mesh)
        for kind in KINDS:
            same_gradients_on(mesh, kind, torch.float64, True)
        for kind in (("jumprelu", "all"), ("batchtopk", "all")):
            same_gradients_on(mesh, kind, torch.float32, True)
            same_gradients_on(mesh, kind, torch.float64, False)
    with pytest.raises(
        ConfigError, match=r"feature_ranks=3 does not divide the number of ranks, \d; give --feature-ranks one of 1, 2"
    ):
        parallel.lay_out(3)
    with (
        mock.patch.object(parallel, "version", return_value=f"1.{parallel.rank()}"),
        pytest.raises(RunError, match=r"rank 1 has crosslayer 1\.1 and rank 0 has 1\.0; install the same"),
    ):
        parallel.check_same_versions()


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_mesh_gives_one_ranks_gradients(ranks: int):
    run_on(ranks, arithmetic)


class Given:
    """A stream that serves this rank's part of batches that are the same on every mesh."""

    def __init__(self, trainer: Trainer) -> None:
        self.world, self.shape = trainer.mesh.world, (trainer.host.n_layers, trainer.host.d_model)
        self.served = 0

    def batch(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.served += 1
        generator = torch.Generator().manual_seed(self.served)
        x, y = torch.randn(2, n * self.world.size, *self.shape, generator=generator)
        return tuple(a.chunk(self.world.size)[self.world.rank] for a in (x, y + x.roll(1, dims=2)))


def fifty_steps(config: TrainConfig, mesh: Mesh, run: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    run.mkdir(exist_ok=True)
    trainer = Trainer(config, run, load_host(config.model), open_sources(config.text), "cpu", Console(quiet=True), mesh)
    trainer.prepare(resume=False, step=None)
    trainer.stream = Given(trainer)  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(50):
        metrics = trainer.one_step()
        trainer.state.step += 1
    weights = {name: gathered(name, p.data, mesh) for name, p in trainer.state.clt.named_parameters()}
    return weights | {"inactive": mesh.features.cat(trainer.state.inactive_LF, dim=1)}, metrics


def same_run(folder: Path, one: Path) -> None:
    # Weights in float64, so that rounding does not change which features are chosen.
    with mock.patch.dict(precision.DTYPES, fp32=torch.float64):
        for config, expected, metrics in torch.load(one, weights_only=False):
            for mesh in meshes():
                if parallel.world_size() == 4 and config.activation == "batchtopk":
                    continue
                mine, run = replace(config, feature_ranks=mesh.features.size), folder / "-".join(map(str, mesh.shape))
                weights, found = fifty_steps(mine, mesh, run)
                for name, w in expected.items():
                    torch.testing.assert_close(weights[name], w, rtol=1e-6, atol=1e-6)
                for name, metric in metrics.items():
                    assert found[name] == pytest.approx(metric, rel=1e-5), (mesh.shape, name)


def test_every_mesh_trains_to_one_ranks_weights(tiny_config: TrainConfig, tmp_path: Path):
    jumprelu = replace(tiny_config, batch=160, buffer_tokens=256, scale_tokens=500, dead_after=1600, clip=0.5)
    batchtopk = replace(jumprelu, activation="batchtopk", accumulate=2)
    with mock.patch.dict(precision.DTYPES, fp32=torch.float64):
        expected = [(c, *fifty_steps(c, ALONE, tmp_path / c.activation)) for c in (jumprelu, batchtopk)]
    torch.save(expected, tmp_path / "one.pt")
    for ranks in SHAPES:
        run_on(ranks, same_run, tmp_path, tmp_path / "one.pt")


class Killed(Exception):
    """Stands for SIGKILL."""


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return weights, moments and counters since last activation, gathered over ranks."""
    mesh, state = trainer.mesh, {"inactive": trainer.mesh.features.cat(trainer.state.inactive_LF, dim=1)}
    for name, p in trainer.state.clt.named_parameters():
        state[name] = gathered(name, p.data, mesh)
        for key, moment in trainer.state.optimiser.state.get(p, {}).items():
            state[f"{name}.{key}"] = gathered(name, moment, mesh) if moment.dim() else moment
    return {name: tensor.clone() for name, tensor in state.items()}


def killed_at(step: int):
    one_step = Trainer.one_step

    def until(self: Trainer) -> dict[str, float]:
        if self.state.step == step:
            raise Killed
        return one_step(self)

    return mock.patch.object(Trainer, "one_step", until)


def runs_of_four(config: TrainConfig, folder: Path) -> None:
    """On 2 x 2 ranks: an uninterrupted run, one killed and resumed, and one with a full disk."""
    config = replace(config, feature_ranks=2)
    published_from = {}

    def write_clt(clt: CLT, provenance: Provenance, run: Path, mesh: Mesh, write=publish.write_clt) -> None:
        published_from.update({name: gathered(name, p.data, mesh) for name, p in clt.named_parameters()})
        write(clt, provenance, run, mesh)

    with mock.patch.object(publish, "write_clt", write_clt):
        train(config, folder / "whole")
    with killed_at(17), pytest.raises(Killed):
        train(config, folder / "cut")
    if parallel.is_first():
        torch.save(published_from, folder / "published.pt")
        shutil.copytree(folder / "cut", folder / "at-2")
        shutil.copytree(folder / "cut", folder / "at-1")
    loaded_state = []

    def load(self: Trainer, found: Path, read=Trainer.restore):
        loaded = read(self, found)
        loaded_state.append(state_of(self))
        return loaded

    with mock.patch.object(Trainer, "restore", load):
        train(config, folder / "cut", resume=True)
    if parallel.is_first():
        torch.save(loaded_state[0], folder / "state.pt")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    one_step = Trainer.one_step

    def filling(self: Trainer) -> dict[str, float]:
        if self.state.step == 15 and parallel.rank() == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        return one_step(self)

    with (
        mock.patch.object(Trainer, "one_step", filling),
        pytest.raises(
            ResourceError,
            match=(
                r"rank 3 could not write the checkpoint of step 20 \(File too large\); the checkpoint of step 10 is"
                r" intact: free disk space and resume with --resume"
            ),
        ),
    ):
        train(config, folder / "full")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    parallel.barrier()
    assert [p.name for p in (folder / "full" / "checkpoints").iterdir()] == ["step-00000010"]


def resumed_elsewhere(config: TrainConfig, run: Path, state: Path) -> None:
    """On other meshes the loaded state equals the saved state, and the run finishes."""
    expected = torch.load(state)
    for mesh in meshes():
        mine = replace(config, feature_ranks=mesh.features.size)
        trainer = Trainer(mine, run, load_host(mine.model), open_sources(mine.text), "cpu", Console(quiet=True), mesh)
        found = checkpoint.find(run, 10, mesh)
        assert found is not None
        trainer.restore(found)
        loaded = state_of(trainer)
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor), (mesh.shape, name)
    train(replace(config, feature_ranks=2), run, resume=True)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {k: v for p in sorted((run / "clt").glob("*.safetensors")) for k, v in load_file(p).items()}


def test_sharded_runs_save_resume_on_any_mesh_and_merge(tiny_config: TrainConfig, tmp_path: Path):
    config = replace(
        tiny_config,
        tokens=6000,
        buffer_tokens=512,
        checkpoint_every=10,
        scale_tokens=500,
        calibration_tokens=2000,
        eval_tokens=500,
        eval_every=15,
    )
    run_on(4, runs_of_four, config, tmp_path)
    whole, gathered_ = weights(tmp_path / "whole"), torch.load(tmp_path / "published.pt")
    assert whole.keys() == {name.replace(".", "_") for name in gathered_}
    for name, tensor in gathered_.items():
        assert torch.equal(whole[name.replace(".", "_")], tensor), name
    assert not list((tmp_path / "whole").glob(".clt*"))
    cut = weights(tmp_path / "cut")
    assert all(torch.equal(w, cut[name]) for name, w in whole.items())
    saved = Evaluation.model_validate_json((tmp_path / "whole" / "eval.json").read_text())
    again = evaluate(tmp_path / "whole", text=config.text, tokens=config.eval_tokens, context=config.context)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [r["eval"]["n_tokens"] for r in log if "eval" in r] == [saved.n_tokens]
    assert saved.affine_fvu is not None
    assert again.training == saved.training
    of_the_run = {"sources", "density_histogram_L", "replacement", "wall_s", "training", "affine_fvu", "affine_fvu_L"}
    for one, other in ((saved, again), (saved.replacement, again.replacement)):
        for name, value in one.model_dump(exclude=of_the_run).items():
            assert value == pytest.approx(getattr(other, name), rel=1e-4), name

    run_on(2, resumed_elsewhere, config, tmp_path / "at-2", tmp_path / "state.pt")
    printed = Console(record=True, stderr=True, width=300)
    train(config, tmp_path / "at-1", resume=True, console=printed)
    assert (
        "on 2 x 2 ranks (data x features) and resumes on 1 x 1: weights and optimiser are unchanged, remaining text is"
        " redistributed" in printed.export_text()
    )
    for run in ("at-2", "at-1"):
        log = [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        assert [r["step"] for r in log if "loss" in r] == list(range(5, 31, 5))
        assert json.loads((tmp_path / run / "run.json").read_text())["state"] == "finished"
        fvu = json.loads((tmp_path / run / "eval.json").read_text())["fvu"]
        assert fvu == pytest.approx(saved.fvu, rel=0.1)


def test_parts_of_different_transcoders_are_not_joined(tmp_path: Path):
    one, other = make(), make()
    other.b_dec[1].data += 1
    provenance = Provenance(model_name="m", scan="s")
    for name, clt in (("a", one), ("b", other), ("c", one)):
        published.save(clt, provenance, tmp_path / name)
    a, b, c = (load_clt(tmp_path / name) for name in "abc")
    with pytest.raises(FormatError, match="parts of s are not of one transcoder"):
        join([a, b])
    twice = join([a, c]).clt
    rows = torch.tensor([47, 3, 24, 23])
    assert torch.equal(twice.W_dec.rows(1, rows), one.W_dec[1][rows % 24])


def test_settings_that_ranks_cannot_share_are_refused(tiny_config: TrainConfig):
    with pytest.raises(
        ConfigError,
        match="n_features=64 cannot be divided evenly over feature_ranks=3; make --n-features a multiple",
    ):
        replace(tiny_config, feature_ranks=3)
    shape = HostShape(name="h", n_layers=3, d_model=16, n_parameters=1000, n_matrix_parameters=900)
    alone, one_of_four = (plan_of_one_rank(replace(tiny_config, feature_ranks=n), shape) for n in (1, 4))
    for part in ("transcoder weights", "gradients", "Adam moments", "transcoder as saved"):
        assert one_of_four.memory_bytes[part] == pytest.approx(alone.memory_bytes[part] / 4, rel=0.05)
    assert (one_of_four.n_parameters, one_of_four.disk_bytes) == (alone.n_parameters, alone.disk_bytes)
    with pytest.raises(
        ConfigError,
        match=(
            "batch=200 in accumulate=2 micro-batches cannot be divided evenly over 8 ranks; make --batch a multiple"
            " of 16"
        ),
    ):
        replace(tiny_config, feature_ranks=2, accumulate=2).share(data_ranks=4)
