"""Train a tiny language model of another family than the shipped host, to try settings on.

    python scripts/train_tiny_host.py --family llama --text FILE [FILE ...] --out DIR [--minutes 4]

The result is an ordinary Hugging Face folder in float32: a byte-level BPE tokenizer of 2,048 tokens, trained on the
same text, and a Llama (5 layers x 64), a GPT-2 (4 layers x 128) or a GPT-NeoX (3 layers x 96). AdamW, cosine schedule
over wall-clock time.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from train_host import EOT, train_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

VOCABULARY, CONTEXT, BATCH = 2048, 256, 16


def config_of(family: str) -> PretrainedConfig:
    """Return the config of the host of a family."""
    shared = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": VOCABULARY - 1,
    }
    if family == "llama":
        return LlamaConfig(
            **shared,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
    if family == "gpt2":
        return GPT2Config(**shared, n_embd=128, n_layer=4, n_head=4, n_positions=512)
    return GPTNeoXConfig(**shared, hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("llama", "gpt2", "neox"), required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in args.text)
    tokenizer = train_tokenizer([text], VOCABULARY)
    ids = torch.tensor(tokenizer.encode(text).ids, device=args.device)
    model = AutoModelForCausalLM.from_config(config_of(args.family)).to(args.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    began, step, loss = time.monotonic(), 0, torch.zeros(())
    while (progress := (time.monotonic() - began) / (60 * args.minutes)) < 1:
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        starts = torch.randint(0, len(ids) - CONTEXT, (BATCH,)).tolist()
        rows_BT = torch.stack([ids[a : a + CONTEXT] for a in starts])
        loss = model(rows_BT, labels=rows_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
    model.save_pretrained(args.out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOT, pad_token=EOT).save_pretrained(args.out)
    print(f"{args.out}: {step} steps, loss {loss.item():.3f} nats per token")


if __name__ == "__main__":
    main()
