"""Long recordings through a trained separator: chunks against the whole file, seams, memory.

    python benchmarks/separation.py RUN [--minutes 10] [--whole 60] [--pairs 3] [--chunk 32] [--overlap 0.25]

The recording: two unseen readers of LibriSpeech mini at a time, each one's utterances one behind the other until the
time is full. quality: SI-SDR improvement of the first --whole seconds separated at once and in chunks, and of all in
chunks, one permutation each; changes = seams at which the order of voices differs from the order that is right there.
seams: the largest step between two samples of the second difference within 5 ms of a seam, against the largest
elsewhere in the same output. memory: peak resident memory of `speech predict`, a process for each length, and its
real-time factor. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from attn_shared import trainer
from attn_shared.profiling import machine
from attn_speech import audio, metrics
from attn_speech.cli import APP
from attn_speech.data.cards import DATASETS
from attn_speech.data.corpus import Utterance
from attn_speech.data.librispeech_mini import load
from attn_speech.data.mixing import mix
from attn_speech.data.options import SpeechDataConfig
from attn_speech.separate import separate
from attn_speech.task import SpeechTask

_CHILD = """
import re, sys
from attn_speech.cli import main
status = main(sys.argv[1:])
# Not ru_maxrss, which a process inherits from the one that started it.
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print("peak", int(peak) / 1024, file=sys.stderr)
sys.exit(status)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--whole", type=float, default=60.0, help="seconds that fit in memory at once")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--chunk", type=float, default=32.0)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--lengths", type=float, nargs="*", default=[1.0, 10.0, 60.0], help="minutes, for memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task, config = trainer.load_task(APP, args.run)
    assert isinstance(task, SpeechTask)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"\n{config.model}, chunks of {args.chunk:g} s sharing {args.overlap:g}\n")
    print("| voices | seconds | SI-SDRi at once | in chunks | all in chunks | changes | step at seams / elsewhere |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    utterances = load(DATASETS["librispeech_mini"], SpeechDataConfig(rate=task.rate)).utterances["test"]
    speakers = sorted({one.speaker for one in utterances})
    for pair in range(args.pairs):
        chosen = (speakers[pair], speakers[-1 - pair])
        mixture, sources = recording(utterances, chosen, round(60 * args.minutes * task.rate), task.rate)
        quality(task, chosen, mixture, sources, args)
    print("\n| minutes | peak memory, MiB | real-time factor |\n|---:|---:|---:|")
    for minutes in args.lengths:
        memory(args, task.rate, recording(utterances, chosen, round(60 * minutes * task.rate), task.rate)[0], minutes)


def recording(
    utterances: list[Utterance], speakers: tuple[str, str], samples: int, rate: int
) -> tuple[np.ndarray, np.ndarray]:
    """(T,) mixture and (2, T) voices."""
    rows = []
    for speaker in speakers:
        own = np.concatenate([audio.resample(*audio.read(u.path), rate) for u in utterances if u.speaker == speaker])
        rows.append(np.resize(own, samples))
    return mix(np.stack(rows), np.zeros(2), rate)


def quality(
    task: SpeechTask, speakers: tuple[str, str], mixture: np.ndarray, sources: np.ndarray, args: argparse.Namespace
) -> None:
    chunk, overlap = round(args.chunk * task.rate), round(args.overlap * args.chunk * task.rate)
    part = min(len(mixture), round(args.whole * task.rate))

    def gain(voices: np.ndarray, size: int) -> float:
        own, true, mixed = tensors(voices[:, :size], sources[:, :size], mixture[:size])
        values = metrics.score(own, true, mixed, None, task.rate, measures="si_sdr")
        return float((values[0, :, 0] - values[0, :, 1]).mean())

    whole = np.concatenate([v for _, v in separate(task.network, [mixture[:part]], chunk=0, overlap=0)], axis=1)
    found = np.concatenate([v for _, v in separate(task.network, [mixture], chunk=chunk, overlap=overlap)], axis=1)
    assert found.shape == sources.shape
    hop = chunk - overlap
    seams = [start + overlap // 2 for start in range(hop, len(mixture) - chunk, hop)]
    orders = []
    for start in range(0, len(mixture) - hop + 1, hop):
        stretch = tensors(found[:, start : start + hop], sources[:, start : start + hop], mixture[:1])
        orders.append(metrics.best_permutation(metrics.pairwise_si_sdr(stretch[0], stretch[1]))[0].tolist())
    changes = sum(a != b for a, b in itertools.pairwise(orders))
    print(
        f"| {'+'.join(speakers)} | {len(mixture) / task.rate:g} | {gain(whole, part):.2f} | {gain(found, part):.2f} | "
        f"{gain(found, len(mixture)):.2f} | {changes} of {len(orders) - 1} | {steps(found, seams, task.rate)} |"
    )


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(x))[None] for x in arrays]


def steps(voices: np.ndarray, seams: list[int], rate: int) -> str:
    bend = np.abs(np.diff(voices, n=2, axis=1)).max(axis=0)
    near = np.zeros(len(bend), bool)
    for seam in seams:
        near[max(0, seam - rate // 200) : seam + rate // 200] = True
    return f"{bend[near].max():.3g} / {bend[~near].max():.3g}" if near.any() else "-"


def memory(args: argparse.Namespace, rate: int, mixture: np.ndarray, minutes: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "long.wav"
        audio.write(file, mixture, rate)
        words = ["predict", str(args.run), str(file), "--output", folder, f"--chunk={args.chunk}"]
        words += [f"--overlap={args.overlap}", "--trainer.threads=1", "--trainer.accelerator=cpu"]
        done = subprocess.run([sys.executable, "-c", _CHILD, *words], capture_output=True, encoding="utf-8", check=True)
        said = done.stderr.splitlines()
        factor = next(line for line in said if "real-time" in line).rpartition(" ")[2].rstrip(")")
        peak = next(line for line in said if line.startswith("peak")).split()[1]
        print(f"| {minutes:g} | {float(peak):.0f} | {factor} |")


if __name__ == "__main__":
    main()
