"""Time and memory of opening and using a full-size transcoder.

    python benchmarks/make_reference.py --out DIR
    python benchmarks/bench_load.py DIR [--quick] [--json FILE]

Each value is measured in its own process, including its start; first with the files dropped from the page cache (cold),
then from the page cache (warm). Memory is resident memory. Except for `inspect`, it is counted above that of the host
after one forward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil

FEATURES = """
import json, sys, time, psutil, torch
import crosslayer as xl
me = psutil.Process()
since, rss = (lambda: time.time() - me.create_time()), (lambda: me.memory_info().rss / 2**30)
host = xl.load_host(sys.argv[1] + "/host", dtype=torch.bfloat16)
tokens_BT = host.encode("The capital of France is a city!"[:31])
assert tokens_BT.shape[1] == 32
x_BLD = host.tap(tokens_BT).x_BTLD[0, 1:]
host_s, host_gib = since(), rss()
clt = xl.load_clt(sys.argv[1] + "/clt").clt
opened_s = since()
active = clt.encode_sparse(x_BLD.float())
features_s, features_gib = since(), rss()
rows = [clt.decoder_rows(i, a.feature_K.unique()) for i, a in enumerate(active)]
rows_s, rows_gib = since(), rss()
print(json.dumps({
    "open_s": opened_s - host_s, "open_and_features_s": features_s - host_s, "with_start_and_host_s": features_s,
    "decoder_rows_s": rows_s - features_s, "features_gib": features_gib - host_gib, "rows_gib": rows_gib - host_gib,
    "rows": sum(map(len, rows)), "l0": sum(len(a.value_K) for a in active) / len(x_BLD),
}))
"""


def drop_from_cache(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path) -> None:
    """Read the files once."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 26):
                pass


def watched(command: list[str]) -> tuple[str, float, float]:
    """Return output, seconds and peak resident GiB of a command."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watcher = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, watcher.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.01)
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:3])} ended with {process.returncode}")
    return output, time.perf_counter() - began, peak / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="warm only")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    for state in ["warm"] if args.quick else ["cold", "warm"]:
        prepare = warm if state == "warm" else drop_from_cache
        prepare(args.folder)
        _, inspect_s, inspect_gib = watched(
            [sys.executable, "-m", "crosslayer", "inspect", "--json", str(args.folder / "clt")]
        )
        prepare(args.folder)
        output, _, _ = watched([sys.executable, "-c", FEATURES, str(args.folder)])
        rows[state] = {"inspect_s": inspect_s, "inspect_gib": inspect_gib, **json.loads(output.splitlines()[-1])}
    print(f"{'':24}" + "".join(f"{state:>10}" for state in rows))
    for name in next(iter(rows.values())):
        print(f"{name:24}" + "".join(f"{row[name]:10.2f}" for row in rows.values()))
    if args.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
