"""Checkpoints: what is refused, in one sentence and with nothing executed; what survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def reseal(folder: Path) -> None:
    """Make sizes and checksums right again, as someone who means harm would."""
    card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in card["files"]:
        data = (folder / name).read_bytes()
        card["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "config.json").write_text(json.dumps(card))


def edit(folder: Path, **changes) -> None:
    card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**card, **changes}))


@pytest.fixture
def alone(toy, toy_run) -> Path:
    shutil.copytree(toy_run / "checkpoints" / "last", "alone")
    return Path("alone")


def pickle_trainer(folder):
    torch.save({"progress": Evil()}, folder / "trainer.pt")
    reseal(folder)


def pickle_plain(folder):
    (folder / "trainer.pt").write_bytes(pickle.dumps(Evil()))
    reseal(folder)


def pickle_weights(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    reseal(folder)


def truncate(name):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


def flip(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))


def reshape(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors")
    reseal(folder)


def rename(folder):
    weights = load_file(folder / "model.safetensors")
    weights["stranger"] = weights.pop(next(iter(weights)))
    save_file(weights, folder / "model.safetensors")
    reseal(folder)


def config(**changes):
    def change(folder):
        card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        edit(folder, config={**card["config"], **changes})

    return change


REFUSALS = {
    "pickle in trainer.pt": (pickle_trainer, "something other than tensors and plain values"),
    "pickle for trainer.pt": (pickle_plain, "trainer.pt"),
    "pickle for weights": (pickle_weights, "is no safetensors file"),
    "truncated weights": (truncate("model.safetensors"), "is damaged: it has"),
    "truncated trainer": (truncate("trainer.pt"), "is damaged: it has"),
    "truncated config": (truncate("config.json"), "is damaged"),
    "one bit": (flip, "checksum differs"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "another app": (lambda f: edit(f, app="medseg"), "is a checkpoint of medseg, not of toyapp"),
    "newer schema": (lambda f: edit(f, schema=2), "was written by a newer version"),
    "no schema": (lambda f: edit(f, schema="x"), "names no schema"),
    "field gone": (lambda f: edit(f, data_state=None), "'data_state' is missing or wrong"),
    "shape": (reshape, "has shape (3,)"),
    "name": (rename, "lacks"),
    "unknown model": (config(model="gone"), "unknown model 'gone'"),
    "unknown option": (config(model_args={"depth": 3}), "unknown key model_args.depth"),
    "wrong type": (config(model_args={"width": "wide"}), "--model_args.width takes int"),
    "impossible": (config(model_args={"width": 0}), "width must be positive"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refused(toy, alone, capsys, what):
    change, said = REFUSALS[what]
    change(alone)
    for argv in (["eval", alone], ["train", "--resume", alone]):
        if argv[0] == "eval" and "trainer" in what:
            continue  # evaluation does not read it
        assert toy.main(*argv) == 2
        out, err = capsys.readouterr()
        assert said in err
        assert err.count("\n") == 1
        assert out == ""
    assert not Path("executed").exists()
    assert not Path("runs").exists()


def test_what_is_no_checkpoint(toy, alone, capsys):
    Path("empty").mkdir()
    for path, said in (
        ("empty", "is not a run folder"),
        (alone / "config.json", "is a file"),
        ("no", "there is no run"),
    ):
        assert toy.main("eval", path) == 2
        assert said in capsys.readouterr().err


def test_it_describes_itself(alone):
    card = json.loads((alone / "config.json").read_text(encoding="utf-8"))
    assert (card["schema"], card["app"], card["step"], card["epoch"]) == (1, "toyapp", 27, 3)
    assert card["config"]["model_args"]["width"] == 16
    assert set(card["data_state"]) == {"mean", "scale"}
    assert card["versions"]["torch"] == torch.__version__ or card["versions"]["torch"] in torch.__version__


def some(step: int):
    from attn_shared.checkpoint import Checkpoint

    tied = torch.full((3,), float(step))
    return Checkpoint(
        app="toyapp",
        config={},
        data_state={},
        weights={"a": tied, "b": tied, "c": torch.arange(6.0).reshape(2, 3).T},
        trainer={"x": torch.ones(2)},
        step=step,
        epoch=0,
        metrics={},
        versions={},
    )


class Killed(BaseException):
    pass


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Every call that touches the disk is in turn the last one: the old checkpoint or the new one is found, whole."""
    from attn_shared import checkpoint

    steps = found_new = 0
    while True:
        folder = tmp_path / str(steps) / "last"
        folder.parent.mkdir()
        checkpoint.save(some(1), folder)
        left = steps

        def counted(real):
            def call(*args, **kwargs):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "fsync"):
                patch.setattr(checkpoint.os, name, counted(getattr(os, name)))
            patch.setattr(checkpoint.shutil, "rmtree", counted(shutil.rmtree))
            try:
                checkpoint.save(some(2), folder)
                finished = True
            except Killed:
                finished = False
        state = checkpoint.load(checkpoint.resolve(folder), trainer=True)
        assert torch.equal(state.weights["b"], torch.full((3,), float(state.step)))
        assert state.step in (1, 2)
        found_new += state.step == 2
        # The next one is written over whatever was left.
        checkpoint.save(some(3), folder)
        assert checkpoint.load(folder).step == 3
        assert [p.name for p in folder.parent.iterdir()] == ["last"]
        steps += 1
        if finished:
            break
    assert steps > 8
    assert found_new >= 2


def test_round_trip_of_tied_and_strided_weights(tmp_path):
    from attn_shared import checkpoint

    checkpoint.save(some(4), tmp_path / "c")
    back = checkpoint.load(tmp_path / "c").weights
    assert torch.equal(back["a"], back["b"])
    assert torch.equal(back["c"], torch.arange(6.0).reshape(2, 3).T)
