"""Time and memory of one DNA sequence by its length: each point in a process of its own.

    python benchmarks/dna_context.py [--models hyenadna hybridna ...] [--lengths 1000 10000 ... 1000000] [--block 8192]
        [--train] [--limit 600] [--output FILE.tsv]

Figures: wall and CPU seconds of one pass over one sequence on `--threads` threads, and the most memory that the pass
took above what the process held before it (peak resident memory, so a few MB are noise). Inference is in one piece for
`hyenadna` (l_max is the length) and `bigla`, and with the state carried from block to block for the others; of these
`hybridna_full` attends to all that was read, and `hybridna` to the last 1,024 bases. `--train` measures a forward and a
backward pass in one piece with activations computed again. The first call, which compiles and allocates, is one over 64
bases before. A point past `--limit` seconds is given up, and so are longer ones of that model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTHS = (1_000, 4_000, 16_000, 64_000, 250_000, 1_000_000)
MODELS = ("hyenadna", "bigla", "bigla_causal", "hybridna", "hybridna_full")
COLUMNS = ("model", "bases", "parameters", "wall_s", "cpu_s", "bases_per_s", "peak_mb")


def build(name: str, length: int) -> Any:
    """A small language model by its name here: about 100,000 to 200,000 parameters."""
    from attn_genomics.config import BiGLAConfig, HybriDNAConfig, HyenaDNAConfig
    from attn_genomics.models.base import Shape
    from attn_genomics.models.bigla import BiGLA
    from attn_genomics.models.hybridna import HybriDNA
    from attn_genomics.models.hyenadna import HyenaDNA
    from attn_genomics.models.network import LanguageModel

    shape = Shape(length=length)
    if name == "hyenadna":
        return LanguageModel(HyenaDNA(HyenaDNAConfig(d_model=64, checkpoint=True), shape))
    if name.startswith("bigla"):
        return LanguageModel(BiGLA(BiGLAConfig(causal=name == "bigla_causal", checkpoint=True), shape))
    window = 0 if name == "hybridna_full" else 1024
    sizes = {"dim": 64, "layers": 2, "every": 2, "head_dim": 32, "state": 32}
    return LanguageModel(HybriDNA(HybriDNAConfig(**sizes, window=window, checkpoint=True), shape))


def measure(name: str, length: int, *, block: int, train: bool, threads: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build(name, max(length, 1024))
    tokens = torch.randint(0, 4, (1, length))

    def once(tokens: torch.Tensor) -> None:
        if train:
            model.train()
            model.loss(tokens).backward()
            return
        model.eval()
        with torch.inference_mode():
            if not model.streams and name != "hybridna_full":
                model.scores(tokens)
                return
            state = model.init_state(1)
            for piece in tokens.split(block, dim=1):
                _, state = model.step(piece, state)

    once(tokens[:, :64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    once(tokens)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "model": name,
        "bases": length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "wall_s": round(wall, 3),
        "cpu_s": round(cpu, 3),
        "bases_per_s": round(length / wall),
        "peak_mb": round(peak / 1024, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--block", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--point", nargs=2, metavar=("MODEL", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    how = {"block": options.block, "train": options.train, "threads": options.threads}
    if options.point:
        print(json.dumps(measure(options.point[0], int(options.point[1]), **how)))
        return 0
    lines = ["\t".join(COLUMNS)]
    print(lines[0], flush=True)
    for name in options.models:
        for length in options.lengths:
            command = [sys.executable, __file__, "--point", name, str(length)]
            command += ["--block", str(options.block), "--threads", str(options.threads)]
            command += ["--train"] if options.train else []
            try:
                done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=options.limit)
            except subprocess.TimeoutExpired:
                print(f"# {name} at {length} bases: more than {options.limit:g} s", flush=True)
                break
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
                print(f"# {name} at {length} bases: {reason}", flush=True)
                break
            row = json.loads(done.stdout)
            lines.append("\t".join(str(row[column]) for column in COLUMNS))
            print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
