"""Each family's entry against the real class: taps read MLP inputs and outputs, and patching works."""

from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import tiny
from crosslayer.core.errors import ConfigError, HostError
from crosslayer.host.anatomy import Anatomy
from crosslayer.host.families import FAMILIES
from crosslayer.host.host import Host

TOKENS_BT = torch.tensor([[tiny.N_VOCAB - 1, 5, 9, 17, 30], [tiny.N_VOCAB - 1, 8, 100, 3, 3]])


def host_of(family: str, **kwargs: str) -> Host:
    if family == "gemma3":
        torch.manual_seed(0)
        text = tiny.CONFIGS["gemma3_text"].to_dict()
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
        }
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).eval()
        return Host(model, None, family, **kwargs)
    return Host(tiny.make_model(family), None, family, **kwargs)


EVERY = [*tiny.CONFIGS, "gemma3"]


def test_every_entry_is_tested():
    assert {f.removesuffix("_sequential") for f in EVERY} == set(FAMILIES)


@pytest.mark.parametrize("family", EVERY)
def test_tap_gives_what_the_mlp_reads_and_writes(family: str):
    host = host_of(family)
    x_BTLD, y_BTLD = host.tap(TOKENS_BT)
    assert x_BTLD.shape == (2, 5, host.n_layers, host.d_model)
    for i, block in enumerate(host.layers):
        mlp = block.get_submodule(host.family.mlp)
        with torch.no_grad():
            torch.testing.assert_close(mlp(x_BTLD[:, :, i]), y_BTLD[:, :, i])


@pytest.mark.parametrize("family", EVERY)
def test_unembedded_hidden_states_are_the_logits(family: str):
    host = host_of(family)
    if family in ("gemma2", "gemma3_text"):
        host.model.config.final_logit_softcapping = 0.7
    with torch.no_grad():
        for visit in (None, lambda layer, x, y: torch.zeros_like(y)):
            hidden_BTD = host.hidden(TOKENS_BT, visit)
            assert hidden_BTD.shape == (2, 5, host.d_model)
            torch.testing.assert_close(host.unembed(hidden_BTD), host.run(TOKENS_BT, visit), rtol=1e-6, atol=1e-6)
    with pytest.raises(HostError, match="exceed the context"):
        host.hidden(torch.zeros(1, host.max_positions + 1, dtype=torch.long))


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("output_hook", ["mlp.hook_out", "blocks.{i}.hook_mlp_out"])
def test_patching_in_the_same_output_changes_nothing_and_zero_changes_all(family: str, output_hook: str):
    host = host_of(family, output_hook=output_hook)
    own = host.run(TOKENS_BT)
    torch.testing.assert_close(host.run(TOKENS_BT, lambda layer, x, y: y.clone()), own)
    for layer_cut in range(host.n_layers):
        cut = host.run(TOKENS_BT, lambda layer, x, y, at=layer_cut: torch.zeros_like(y) if layer == at else None)
        assert not torch.allclose(cut, own)


@pytest.mark.parametrize("family", EVERY)
def test_hook_resid_mid_is_what_the_norm_reads(family: str):
    if family == "gpt_neox":
        with pytest.raises(ConfigError, match="parallel"):
            host_of(family, input_hook="hook_resid_mid")
        return
    before = host_of(family, input_hook="hook_resid_mid").tap(TOKENS_BT).x_BTLD
    host = host_of(family)
    if host.family.mlp_norm is None:
        torch.testing.assert_close(before, host.tap(TOKENS_BT).x_BTLD)
        return
    for i, block in enumerate(host.layers):
        with torch.no_grad():
            normed = block.get_submodule(host.family.mlp_norm)(before[:, :, i])
        torch.testing.assert_close(normed, host.tap(TOKENS_BT).x_BTLD[:, :, i])


@pytest.mark.parametrize("family", EVERY)
def test_hook_normalized_is_the_norm_before_its_gain_and_bias(family: str):
    if family == "olmo2":
        with pytest.raises(ConfigError, match="without a norm before the MLP"):
            host_of(family, input_hook="ln2.hook_normalized")
        return
    plain = host_of(family, input_hook="blocks.{i}.ln2.hook_normalized").tap(TOKENS_BT).x_BTLD
    host = host_of(family)
    gained = host.tap(TOKENS_BT).x_BTLD
    for i, block in enumerate(Anatomy(host).blocks):
        bias_D = 0.0 if block.mlp_norm.bias_D is None else block.mlp_norm.bias_D
        torch.testing.assert_close(plain[:, :, i] * block.mlp_norm.gain_D + bias_D, gained[:, :, i])
    some = any(bool((block.mlp_norm.gain_D != 1).any()) for block in Anatomy(host).blocks)
    assert torch.allclose(plain, gained) != some


def test_hook_mlp_out_differs_where_a_norm_follows_the_mlp():
    for family, same in (("gemma2", False), ("gemma3_text", False), ("qwen3", True), ("gpt2", True)):
        inner = host_of(family).tap(TOKENS_BT).y_BTLD
        outer = host_of(family, output_hook="hook_mlp_out").tap(TOKENS_BT).y_BTLD
        assert torch.equal(inner, outer) == same


def test_hooks_are_gone_after_a_run_and_after_an_error():
    host = host_of("qwen3")
    own = host.run(TOKENS_BT)

    def fail(layer, x, y):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        host.run(TOKENS_BT, fail)
    torch.testing.assert_close(host.run(TOKENS_BT), own)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())


def test_unknown_family_lists_the_known():
    model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(HostError, match=r"'bloom'.*gemma2.*qwen3"):
        Host(model, None, "some-bloom")


def test_unknown_hooks_list_the_known():
    with pytest.raises(ConfigError, match=r"mlp\.hook_in, ln2\.hook_normalized, hook_resid_mid"):
        host_of("qwen3", input_hook="hook_nonsense")
    with pytest.raises(ConfigError, match=r"mlp\.hook_out, hook_mlp_out"):
        host_of("qwen3", output_hook="hook_nonsense")


def test_too_long_a_row_is_refused():
    with pytest.raises(HostError, match="65 tokens exceed the context of qwen3, 64"):
        host_of("qwen3").run(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("family", [f for f in tiny.CONFIGS if not f.startswith("gpt")])
def test_norms_of_a_bfloat16_host_keep_their_gains(family: str):
    """Gemma adds 1 to its gains in float32; in bfloat16 edges would be off by up to 2.7 % of a row's largest."""
    host = Host(tiny.make_model(family).bfloat16(), tiny.make_tokenizer(), family)
    x_TD = torch.randn(5, tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    for block in Anatomy(host).blocks:
        for norm in (block.attention_norm, block.mlp_norm, block.after_mlp_norm):
            if norm is not None and norm.module is not None:
                torch.testing.assert_close(norm.apply(x_TD, norm.scale(x_TD)), norm.module(x_TD).float())
