"""Make a randomly initialised host and transcoder of the reference's shapes, to test full size without the hub.

    python benchmarks/make_reference.py --out DIR [--layers 28 --features 20480 ...]

Writes `DIR/host` (Qwen3-0.6B's shape) and `DIR/clt` (28 x 20,480 x 1,024, bfloat16, 18 GB), reproducible by seed.
Thresholds are set on a page of the standard library so that `--l0` features fire per token, summed over layers. Files
are written in parts, in less than 2 GB of memory. If it is killed, the same command resumes.
"""

from __future__ import annotations

import argparse
import os
import resource
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

import crosslayer as xl
from crosslayer.clt.formats.published import KIND
from crosslayer.clt.formats.writing import PART_BYTES, Chunks, FilePlan, whole, write_folder
from crosslayer.core.progress import track

EOT = "<|endoftext|>"
CALIBRATION = (4, 128)
"""Rows and tokens of text on which thresholds are set."""


def write_host(folder: Path, args: argparse.Namespace) -> None:
    """Write a random Qwen3 with a byte-level tokenizer."""
    torch.manual_seed(args.seed)
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=max(1, args.heads // 2),
        head_dim=128,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab=dict(zip(alphabet, range(256), strict=True)), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([EOT])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOT).save_pretrained(folder)


def random_matrix(shape: tuple[int, ...], std: float, seed: int) -> Chunks:
    """Return chunks of normal numbers in bfloat16; each part has its own seed, so that any part can be made again."""
    rows_at_once = max(1, PART_BYTES // (4 * prod(shape[1:])))

    def read() -> Iterator[Tensor]:
        for number, rows in enumerate(torch.arange(shape[0]).split(rows_at_once)):
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            yield torch.randn(len(rows), *shape[1:], generator=generator).mul_(std).to(torch.bfloat16)

    return Chunks(shape, torch.bfloat16, read)


@torch.no_grad()
def thresholds(host: xl.Host, encoders: list[Chunks], l0: float) -> list[Tensor]:
    """Compute per layer the threshold that its share of `l0` pre-activations per token exceed."""
    rows, tokens = CALIBRATION
    ids = host.encode(Path(os.__file__).read_text(encoding="utf-8"))[0, 1:]
    tokens_BT = torch.cat([torch.full((rows, 1), host.first_token), ids[: rows * (tokens - 1)].view(rows, -1)], dim=1)
    x_LBD = host.tap(tokens_BT).x_BTLD[:, 1:].flatten(0, 1).transpose(0, 1).float()
    out = []
    for x_BD, encoder in zip(x_LBD, encoders, strict=True):
        wanted = round(l0 / len(encoders) * len(x_BD))
        largest = torch.cat([(x_BD @ part.float().T).flatten().topk(wanted).values for part in encoder.read()])
        theta = largest.topk(wanted).values[-1].clamp(min=0)
        out.append(torch.full((encoder.shape[0],), theta.item(), dtype=torch.bfloat16))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--features", type=int, default=20_480)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=151_936)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--l0", type=float, default=115.0, help="active features per token, summed over layers")
    target.add_argument("--l0-per-layer", type=float)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    l0 = args.l0_per_layer * args.layers if args.l0_per_layer else args.l0
    if not (args.out / "host" / "config.json").exists():
        write_host(args.out / "host", args)
    host = xl.load_host(args.out / "host", dtype=torch.bfloat16)
    n, f, d = args.layers, args.features, args.width
    encoders = [random_matrix((f, d), d**-0.5, seed=2 * i) for i in range(n)]
    theta = thresholds(host, encoders, l0)
    del host
    hooks = "feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
    config = f"model_kind: {KIND}\nmodel_name: {args.out.resolve() / 'host'}\n{hooks}scan: reference-shape\n"
    files = [FilePlan("config.yaml", text=config)]
    for i in range(n):
        vectors = {f"b_enc_{i}": torch.zeros(f), f"b_dec_{i}": torch.zeros(d), f"threshold_{i}": theta[i]}
        tensors = {name: whole(t, torch.bfloat16) for name, t in vectors.items()} | {f"W_enc_{i}": encoders[i]}
        files.append(FilePlan(f"W_enc_{i}.safetensors", tensors))
        decoder = random_matrix((f, n - i, d), 0.02, seed=2 * i + 1)
        files.append(FilePlan(f"W_dec_{i}.safetensors", {f"W_dec_{i}": decoder}))
    total = sum(file.n_bytes for file in files)
    with track(Console(stderr=True), "write", total) as update:
        write_folder(args.out / "clt", files, update)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.out}: {total / 2**30:.2f} GiB; peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
