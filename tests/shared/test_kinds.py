"""An application with several kinds of task."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from attn_shared import compare, options, trainer
from attn_shared.app import App, Kind
from attn_shared.cli import run
from attn_shared.config import TrainerConfig
from attn_shared.errors import UserError


@dataclasses.dataclass(kw_only=True)
class OtherData:
    """Options of the second kind's data.

    Attributes:
        samples: training points.
        noise: standard deviation of the noise.
        shift: only this kind has it.
    """

    samples: int = 40
    noise: float = 0.0
    shift: float = 0.0


@dataclasses.dataclass(kw_only=True)
class OtherTask:
    """Options of the second kind's task.

    Attributes:
        loss: unused here.
    """

    loss: str = "squares"


def few() -> TrainerConfig:
    return TrainerConfig(max_epochs=1, batch_size=16, threads=1)


def _kind_of(path: str) -> str:
    return "second" if path.endswith(".second.csv") else "first"


@pytest.fixture
def app(toy: Any, monkeypatch: pytest.MonkeyPatch) -> App:
    from toyapp import app as toyapp

    monkeypatch.setitem(sys.modules, "toy_kinds", sys.modules[__name__])  # "module:function" needs a name
    kinds = (
        Kind(
            name="first",
            title="fit the first sort",
            task="toyapp.task:ToyTask",
            data_config=toyapp.ToyData,
            default_model="mlp",
            default_data="points",
            predict_options=toyapp.ToyPredict,
            trainer_defaults=few,
        ),
        Kind(
            name="second",
            title="fit the second sort",
            task="toyapp.task:ToyTask",
            data_config=OtherData,
            task_config=OtherTask,
            default_model="mixing",
            default_data="other",
            trainer_defaults=few,
        ),
    )
    models = {card.name: card for card in toyapp.MODELS}
    models["mixing"] = dataclasses.replace(models["mixing"], kinds=("second",))
    models["mlp"] = dataclasses.replace(models["mlp"], kinds=("first", "second"))
    return App(
        name="toyapp",
        package="toyapp",
        title="two sorts of points",
        models=models,
        datasets={"points": toyapp.card("points"), "other": dataclasses.replace(toyapp.card("other"), kind="second")},
        kinds=kinds,
        kind_of_file="toy_kinds:_kind_of",
        file_suffixes=(".csv",),
    )


def _resolve(app: App, *words: str) -> Any:
    return options.resolve(app, options.split(words))


def test_data_decides_the_kind_and_the_kind_the_rest(app: App) -> None:
    first, second = _resolve(app), _resolve(app, "--data", "other", "--data_args.shift", "2", "--task_args.loss", "x")
    assert (first.kind, first.model, first.task_args) == ("first", "mlp", None)
    assert (second.kind, second.model) == ("second", "mixing")
    assert second.data_args == OtherData(shift=2.0)
    assert second.task_args == OtherTask(loss="x")
    assert _resolve(app, "--model", "mixing").data == "other"
    assert _resolve(app, "--data", "other", "--model", "mlp").kind == "second"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--model", "mixing", "--data", "points"], "mixing is no model to fit the first sort, which points is for"),
        (["--model", "mean", "--data", "other"], "these are: mlp, mixing"),
        (["--data_args.shift", "1"], "unknown option --data_args.shift"),
        (["--data", "points", "--kind", "second"], "points is data to fit the first sort, not to fit the second sort"),
        (["--kind", "secnod"], "did you mean 'second'"),
    ],
)
def test_what_does_not_fit_is_refused(app: App, words: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        _resolve(app, *words)


def test_a_file_is_of_the_kind_its_name_says_or_the_user(app: App, tmp_path: Path) -> None:
    for name in ("a.csv", "a.second.csv"):
        (tmp_path / name).write_text("1,2,3,4,5\n")
    assert _resolve(app, "--data", str(tmp_path / "a.csv")).kind == "first"
    assert _resolve(app, "--data", str(tmp_path / "a.second.csv")).kind == "second"
    assert _resolve(app, "--data", str(tmp_path / "a.csv"), "--kind", "second").kind == "second"


def test_a_file_is_taken_for_what_the_model_does_where_that_kind_reads_it(app: App, tmp_path: Path) -> None:
    for name in ("a.csv", "a.second.csv", "a.xyz"):
        (tmp_path / name).write_text("1,2,3,4,5\n")
    assert _resolve(app, "--data", str(tmp_path / "a.csv"), "--model", "mixing").kind == "second"
    assert _resolve(app, "--data", str(tmp_path / "a.second.csv"), "--model", "mean").kind == "first"
    picky = tuple(dataclasses.replace(kind, file_suffixes=(".xyz",)) for kind in app.kinds)
    app = dataclasses.replace(app, kinds=picky, file_suffixes=(".csv", ".xyz"))
    assert _resolve(app, "--data", str(tmp_path / "a.xyz"), "--model", "mixing").kind == "second"
    with pytest.raises(UserError, match="mean is no model to fit the second sort"):
        _resolve(app, "--data", str(tmp_path / "a.second.csv"), "--model", "mean")


def test_saved_and_overridden(app: App, tmp_path: Path) -> None:
    from attn_shared.config import config_to_dict

    file = tmp_path / "a.csv"
    file.write_text("1,2,3,4,5\n")
    config = _resolve(app, "--data", str(file), "--kind", "second", "--task_args.loss", "x")
    saved = json.loads(json.dumps(config_to_dict(config)))
    file.unlink()
    assert options.config_from_dict(app, saved) == config
    assert options.override(app, config, {"trainer.batch_size": 3}).task_args == config.task_args
    file.write_text("1,2,3,4,5\n")
    assert options.override(app, config, {"data": str(file)}).kind == "second"
    with pytest.raises(UserError, match="points is data to fit the first sort"):
        options.override(app, config, {"data": "points"})


def test_train_eval_predict_compare(app: App, toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = _resolve(app, "--data", "other", "--runs", str(toy.folder / "runs"))
    folder = trainer.train(app, config)
    assert trainer.saved_kind(app, folder).name == "second"
    assert run(app, ["eval", str(folder), "--task_args.loss", "y"]) == 0
    assert "mse" in capsys.readouterr().out
    points = toy.folder / "p.csv"
    points.write_text("1,2,3,4\n")
    assert run(app, ["predict", str(folder), str(points), "--output", str(toy.folder), "--digits", "3"]) == 2
    assert "unknown option --digits" in capsys.readouterr().err
    words = ["--data", "other", "--model", "mlp,mixing", "--task_args.loss", "z", "--runs", str(toy.folder / "runs")]
    assert run(app, ["compare", *words]) == 0
    assert "mixing" in capsys.readouterr().out
    runs = [
        yaml.read_text(encoding="utf-8") for yaml in toy.folder.glob("runs/**/config.yaml") if "compare" in str(yaml)
    ]
    assert runs
    assert all("loss: z" in text for text in runs)


def test_lists_and_help_name_the_kinds(app: App, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["models"], ["data", "list"], ["train", "--help", "--data", "other"], ["models", "mlp"], ["--help"]):
        assert run(app, words) == 0
    text = capsys.readouterr().out
    assert "first, second" in text
    assert "KIND" in text
    assert "--task_args.loss" in text
    assert "fit the second sort" in text


def test_a_model_may_take_another_set_of_patterns_instead(toy: Any) -> None:
    """A causal mechanism is refused, unless the card says that it will do; then `fitting` lists it, too."""
    card = toy.app.models["mixing"]
    config = dataclasses.replace(toy.config("--model", "mixing"), mixer="retention")
    with pytest.raises(UserError, match=r"retention cannot replace .* no noncausal self attention; these can: "):
        trainer.check_mixer(toy.app, config)
    wider = dataclasses.replace(card, mixer_alternatives=(("causal_self",),))
    app = dataclasses.replace(toy.app, models={**toy.app.models, "mixing": wider})
    trainer.check_mixer(app, config)
    assert wider.mixer_wanted == "noncausal self or causal self"
    assert set(compare.fitting(wider)) - set(compare.fitting(card)) >= {"retention", "titans"}
    assert set(compare.fitting(wider)) > set(compare.fitting(card))
