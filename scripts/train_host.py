"""Train the host model that ships with the package, on the sources of the Python standard library only.

    python scripts/train_host.py --out DIR --minutes 65        # train, or resume a killed run
    python scripts/train_host.py --out DIR --minutes 65 --finish   # write the host folder from the last checkpoint

The result is an ordinary Hugging Face folder: a Qwen3-architecture model in bfloat16, its own byte-level BPE tokenizer
with Qwen's splitting rule, and a model card with metrics measured by this script. Documents are those of
`crosslayer.data.sources.stdlib`, split by module path exactly as for transcoders, so text held out from a transcoder
was held out from its host as well.

The budget is wall-clock time: the learning rate is constant, then falls linearly to zero over the last `--cooldown` of
it. Matrices are trained with Muon, everything else with AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from crosslayer.data.documents import split_of
from crosslayer.data.sources.stdlib import stdlib_documents

EOT = "<|endoftext|>"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose only special token comes last, so that it is not id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([EOT])
    return tokenizer


class Tokens(NamedTuple):
    """The host is evaluated on the library; the library's tests are additional training text."""

    library: np.ndarray
    tests: np.ndarray
    held_out: np.ndarray


def load_tokens(out: Path, vocab_size: int) -> tuple[Tokenizer, Tokens]:
    """Return the tokenizer, and the text as streams of tokens; the held-out stream is from the library."""
    library = {d.id: d.text for d in stdlib_documents()}
    everything = {d.id: d.text for d in stdlib_documents(tests=True)}
    train = {i: t for i, t in everything.items() if split_of(i) == "train"}
    held_out = {i: t for i, t in library.items() if split_of(i) == "held_out"}
    path = out / "tokenizer.json"
    if path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = train_tokenizer([t for i, t in train.items() if i in library], vocab_size)
        tokenizer.save(str(path))
    eot = tokenizer.token_to_id(EOT)

    def stream(texts: dict[str, str]) -> np.ndarray:
        rows = tokenizer.encode_batch(list(texts.values()))
        return np.concatenate([np.array([eot, *row.ids], dtype=np.int32) for row in rows])

    in_library = stream({i: t for i, t in train.items() if i in library})
    in_tests = stream({i: t for i, t in train.items() if i not in library})
    return tokenizer, Tokens(in_library, in_tests, stream(held_out))


def held_out_loss(model: Qwen3ForCausalLM, tokens: np.ndarray, eot: int, context: int) -> float:
    """Compute nats per token over the whole held-out stream, in rows that start with `<|endoftext|>`."""
    n_rows = len(tokens) // (context - 1)
    rows = torch.from_numpy(tokens[: n_rows * (context - 1)].reshape(n_rows, context - 1).astype(np.int64))
    rows = F.pad(rows, (1, 0), value=eot)
    total = 0.0
    model.eval()
    with torch.no_grad():
        for batch in rows.split(16):
            logits = model(batch, use_cache=False).logits
            total += F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
            ).item()
    model.train()
    return total / (n_rows * (context - 1))


def rate(progress: float, cooldown: float) -> float:
    """Return the learning rate multiplier: a short warm-up, constant, linear to zero."""
    return min(1.0, progress / 0.01 + 0.02) * min(1.0, (1.0 - progress) / cooldown)


def save_atomically(state: object, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def model_card(config: Qwen3Config, facts: dict) -> str:
    """Write the host's model card from `facts`."""
    return f"""---
library_name: transformers
license: psf-2.0
tags: [qwen3, code, tiny]
---

# stdlib-qwen3

A small language model that ships with crosslayer, for use without network or GPU. Qwen3 \
architecture,
{config.num_hidden_layers} layers of width {config.hidden_size}, MLPs of {config.intermediate_size}, \
{config.num_attention_heads} heads
({config.num_key_value_heads} for keys and values), context {config.max_position_embeddings}; {facts["parameters"]:,} \
parameters in bfloat16; a
byte-level BPE tokenizer of its own with {config.vocab_size:,} tokens; the last, `{EOT}`, starts every text.

| | |
|---|---|
| held-out loss | {facts["held_out_nats_per_token"]} nats per token (perplexity {facts["perplexity"]}) over \
{facts["held_out_tokens"]:,} tokens |
| trained on | {facts["training_tokens_seen"]:,} tokens, {facts["training_tokens_distinct"]:,} of them distinct |
| steps, time | {facts["steps"]:,} steps, {facts["minutes"]} minutes on {facts["machine"]} |
| data | the sources of the standard library of Python {facts["python"]}, and its tests |
| held out | a tenth of the library's modules, by hash of their path |

```sh
python scripts/train_host.py --out DIR {facts["command"]}
```

It models Python's syntax: it closes brackets, continues indentation, writes `self` as a method's first argument, \
and copies names from its context.
It was trained on code only and is meant for experiments.
"""


def export(model: Qwen3ForCausalLM, tokenizer_file: Path, folder: Path, facts: dict) -> None:
    """Write the host folder: weights in bfloat16, tokenizer, model card."""
    model.to(dtype=torch.bfloat16).save_pretrained(folder)  # pyright: ignore
    model.generation_config.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), eos_token=EOT, pad_token=EOT, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)
    # transformers 5 writes a class that 4 does not know; this one both know.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {k: v for k, v in settings.items() if k != "backend"} | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(model.config, facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="working folder: tokenizer, checkpoint, log, and host/ at the end"
    )
    parser.add_argument("--minutes", type=float, default=65, help="wall-clock budget for training")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--mlp", type=int, default=576)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="rows of --context tokens per step")
    parser.add_argument(
        "--library-share",
        type=float,
        default=0.65,
        help="share of rows from the library; the others are from its tests",
    )
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of Muon; AdamW uses a tenth")
    parser.add_argument("--cooldown", type=float, default=0.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--finish", action="store_true", help="only write host/ from the last checkpoint")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    tokenizer, tokens = load_tokens(args.out, args.vocab)
    eot = tokenizer.token_to_id(EOT)
    assert eot is not None
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.width,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.width // args.heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=eot,
        pad_token_id=eot,
    )
    model = Qwen3ForCausalLM(config).to(args.device)
    n_parameters = sum(p.numel() for p in model.parameters())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers = [
        torch.optim.Muon(matrices, lr=args.lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.lr / 10, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base = [args.lr, args.lr / 10]
    n_training = len(tokens.library) + len(tokens.tests)
    print(f"{n_parameters / 1e6:.2f}M parameters, {n_training / 1e6:.2f}M training tokens", flush=True)

    step, spent_s, generator = 0, 0.0, torch.Generator().manual_seed(1)
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step, spent_s = state["step"], state["spent_s"]
        generator.set_state(state["generator"])
        print(f"resuming at step {step}, {spent_s / 60:.1f} minutes spent", flush=True)

    def save() -> None:
        save_atomically(
            {
                "model": model.state_dict(),
                "optimisers": [o.state_dict() for o in optimisers],
                "step": step,
                "spent_s": spent_s,
                "generator": generator.get_state(),
            },
            checkpoint,
        )

    library, tests = (torch.from_numpy(t.astype(np.int64)) for t in (tokens.library, tokens.tests))
    n_library = round(args.rows * args.library_share)
    body = args.context - 1
    compiled = torch.compile(model) if args.device == "cpu" else model
    recent: list[float] = []
    while not args.finish and spent_s < args.minutes * 60:
        began = time.perf_counter()
        for optimiser, lr in zip(optimisers, base, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = lr * rate(spent_s / (args.minutes * 60), args.cooldown)
        pieces = []
        for data, n in ((library, n_library), (tests, args.rows - n_library)):
            starts = torch.randint(len(data) - body, (n,), generator=generator)
            pieces.extend(data[s : s + body] for s in starts)
        rows = F.pad(torch.stack(pieces), (1, 0), value=eot).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            logits = compiled(rows, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        recent.append(loss.item())
        step += 1
        # The first step compiles: do not count its time.
        spent_s += time.perf_counter() - began if len(recent) > 1 else 0.0
        if step % 50 == 0:
            record = {
                "step": step,
                "minutes": round(spent_s / 60, 2),
                "loss": round(float(np.mean(recent[-50:])), 4),
                "tokens": step * args.rows * body,
            }
            if step % 500 == 0:
                record["held_out"] = round(held_out_loss(model, tokens.held_out[:100_000], eot, args.context), 4)
                save()
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            print(record, flush=True)
    save()

    loss = held_out_loss(model.float(), tokens.held_out, eot, args.context)
    facts = {
        "held_out_nats_per_token": round(loss, 4),
        "held_out_tokens": len(tokens.held_out),
        "training_tokens_seen": step * args.rows * body,
        "training_tokens_distinct": n_training,
        "parameters": n_parameters,
        "minutes": round(spent_s / 60, 1),
        "steps": step,
        "perplexity": round(math.exp(loss), 3),
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} CPU cores" if args.device == "cpu" else torch.cuda.get_device_name(),
        "command": " ".join(
            f"--{k.replace('_', '-')} {v}" for k, v in vars(args).items() if k not in ("out", "finish")
        ),
    }
    export(model, args.out / "tokenizer.json", args.out / "host", facts)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
