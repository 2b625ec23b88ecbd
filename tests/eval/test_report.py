"""Warnings name the number and the remedy, on the terminal and in the model card."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.eval.report import model_card, print_table, warnings_of
from crosslayer.schemas.evaluation import Evaluation, Replacement, TrainingEnd


def evaluation(training: dict | None = None, **changes: object) -> Evaluation:
    end = {"trained_as": "jumprelu", "l0_asked": 16.0, "l0_training": 16.5, "l0_uncalibrated": 15.5}
    values: dict = {
        "n_tokens": 1000,
        "sources": ["words"],
        "fvu": 0.2,
        "fvu_L": [0.1, 0.3],
        "fvu_all": 0.25,
        "affine_fvu": 0.4,
        "affine_fvu_L": [0.4, 0.4],
        "l0": 16.2,
        "l0_per_layer": 8.1,
        "l0_L": [8.0, 8.2],
        "l0_all": 17.0,
        "massive_share": 0.002,
        "dead_tokens": 998,
        "dead_share": 0.03,
        "dead_L": [0.02, 0.04],
        "density_log10_edges": [-1.0, 0.0],
        "density_histogram_L": [[1], [1]],
        "replacement": Replacement(
            n_tokens=900, ce_host=2.0, ce_replaced=2.5, ce_zero=8.0, kl=0.5, top1_agreement=0.8, loss_recovered=0.9
        ),
        "training": TrainingEnd(**(end | (training or {}))),
        "wall_s": 1.0,
    }
    return Evaluation(**(values | changes))


def printed(e: Evaluation, *, colour: bool = False) -> str:
    out = io.StringIO()
    print_table(Console(file=out, width=200, force_terminal=colour, color_system="standard" if colour else None), e)
    return out.getvalue()


def card_of(e: Evaluation) -> str:
    config = CLTConfig(n_layers=2, d_model=4, n_features=8)
    return model_card(config, Provenance(model_name="m", scan="s"), e, {})


def test_a_good_run_has_no_warnings_and_says_where_it_ended():
    e = evaluation()
    assert warnings_of(e) == []
    text = printed(e)
    assert "WARNING" not in text
    for figure in (
        "16.0 (8.00 per layer)",
        "16.5 (+3.1%)",
        "15.5 (-3.1%)",
        "16.2 (+1.2%)",
        "0.4000",
        "0.20% of tokens",
    ):
        assert figure in text
        assert figure in model_card(
            CLTConfig(n_layers=2, d_model=4, n_features=8), Provenance(model_name="m", scan="s"), e, {}
        )


@pytest.mark.parametrize(
    ("e", "warning"),
    [
        (evaluation(fvu=0.5), r"FVU 0.5000 is not below 0.4000.*--tokens.*--lr"),
        (evaluation(fvu=float("nan")), r"FVU nan is not below 0.4000"),
        (
            evaluation({"l0_training": 770.0}),
            r"L0 770.0 at the end of training is 48.12 times.*--l0-ramp",
        ),
        (evaluation({"l0_training": 14.0}), r"L0 14.0 at the end of training is 0.88 times"),
        (evaluation({"l0_uncalibrated": 20.0}), r"calibration moved the L0 from 20.0, 1.25 times the 16.0 asked"),
        (evaluation(l0=12.0), r"L0 12.0 on held-out text is 0.75 times the 16.0 asked.*--calibration-tokens"),
    ],
)
def test_what_is_off_is_a_warning(e: Evaluation, warning: str):
    (found,) = warnings_of(e)
    assert re.search(warning, found)
    assert f"WARNING {found}" in printed(e)
    coloured = printed(e, colour=True).rstrip()
    assert coloured.splitlines()[-1].startswith("\x1b[1;31mWARNING\x1b[0m \x1b[33m")
    assert f"> **Warning:** {found}." in card_of(e)


def test_a_ranking_is_said_to_be_converted_and_is_not_measured_before():
    e = evaluation({"trained_as": "batchtopk", "l0_uncalibrated": None})
    assert warnings_of(e) == []
    assert "converted from batchtopk to JumpReLU" in printed(e)


def test_without_a_run_only_what_was_measured_is_shown():
    e = evaluation(training=None, affine_fvu=None, massive_share=None).model_copy(update={"training": None})
    assert warnings_of(e) == []
    text = printed(e)
    assert "not measured" in text
    assert "asked" not in text
    assert "massive" not in text
