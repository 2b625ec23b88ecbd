"""Tiny random instances of the real model classes, and text, for tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

EOT = "<|endoftext|>"
WINDOW = 4
"""Sliding window of the families that have one; prompts of the tests are longer."""
N_LAYERS, D_MODEL, N_VOCAB, CONTEXT = 3, 16, 320, 64
_SHAPE = {
    "vocab_size": N_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 32,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": N_VOCAB - 1,
    "pad_token_id": None,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 1, "head_dim": 8}

CONFIGS: dict[str, Any] = {
    "qwen3": Qwen3Config(**_GROUPED),
    "qwen2": Qwen2Config(**_SHAPE, num_key_value_heads=1),
    "llama": LlamaConfig(**_GROUPED),
    "mistral": MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "phi3": Phi3Config(**_SHAPE, num_key_value_heads=1),
    "olmo2": Olmo2Config(**_SHAPE, num_key_value_heads=1),
    "gemma2": Gemma2Config(**_GROUPED, sliding_window=WINDOW),
    "gemma3_text": Gemma3TextConfig(**_GROUPED, sliding_window=WINDOW),
    "gpt2": GPT2Config(
        vocab_size=N_VOCAB,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=2,
        n_positions=CONTEXT,
        bos_token_id=N_VOCAB - 1,
        eos_token_id=N_VOCAB - 1,
        activation_function="relu",
    ),
    "gpt_neox": GPTNeoXConfig(**_SHAPE, use_parallel_residual=True),
    "gpt_neox_sequential": GPTNeoXConfig(**_SHAPE, use_parallel_residual=False),
}

WORDS = [
    "def",
    "class",
    "self",
    "return",
    "import",
    "for",
    "in",
    "if",
    "else",
    "print",
    "value",
    "name",
    "list",
    "the",
    "a",
    "of",
    "and",
    "to",
    "(",
    ")",
    ":",
    "[",
    "]",
    "=",
    "+",
    "1",
    "2",
    "3",
]


def make_text(n_words: int, seed: int) -> str:
    """Words and punctuation, a line every dozen or so."""
    chance = random.Random(seed)
    words = [chance.choice(WORDS) + ("\n" if chance.random() < 0.08 else " ") for _ in range(n_words)]
    return "".join(words)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of N_VOCAB tokens; `<|endoftext|>` is the last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([make_text(5000, 0)], trainer)
    while tokenizer.get_vocab_size() < N_VOCAB - 1:
        tokenizer.add_tokens([f"<extra {tokenizer.get_vocab_size()}>"])
    tokenizer.add_special_tokens([EOT])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOT)


def make_model(family: str, seed: int = 0) -> torch.nn.Module:
    """A random model; weights are large enough that every layer matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3)
            if "norm" in name or "ln_" in name:
                p.add_(1.0)
    return model.eval().requires_grad_(False)


def write_host(folder: Path, family: str = "qwen3") -> Path:
    """A folder that `load_host` opens."""
    make_model(family).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_text_folder(folder: Path, n_files: int = 60, n_words: int = 400) -> Path:
    """A folder of text files, all different."""
    folder.mkdir()
    for i in range(n_files):
        (folder / f"{i:03d}.txt").write_text(make_text(n_words, seed=i + 1))
    return folder
