"""The command line: answers without torch, names the nearest, and puts the layers of options in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from attn_shared import options
from attn_shared.errors import UserError

QUIET = """
import sys
sys.path.insert(0, {toy!r})
from toyapp.app import main
code = main({argv!r})
heavy = sorted({{"torch", "lightning", "numpy", "pandas", "matplotlib"}} & set(sys.modules))
print("CODE", code, "HEAVY", heavy)
"""


def test_answers_without_torch(toy):
    from_here = Path(__file__).parent / "toy"
    calls = [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--model", "mixing", "--help"], 0),
        (["eval", "--help"], 0),
        (["predict", "--help"], 0),
        (["compare", "--help"], 0),
        (["data", "--help"], 0),
        (["data", "list"], 0),
        (["models"], 0),
        (["models", "mixing"], 0),
        (["train", "--print_config", "--data", "other"], 0),
        (["train", "--trainer.max_epoch", "3"], 2),
        (["train", "--resume", "nowhere"], 2),
        (["eval", "nowhere"], 2),
        (["trian"], 2),
    ]
    code = "".join(QUIET.format(toy=str(from_here), argv=argv) for argv, _ in calls)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=toy.folder)
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith("CODE")]
    assert answers == [f"CODE {code} HEAVY []" for _, code in calls]
    assert "share of hidden units left out in training" in done.stdout  # docstrings are the help


def test_a_terminal_without_a_character_shows_the_rest(toy):
    code = QUIET.format(toy=str(Path(__file__).parent / "toy"), argv=["--help"])
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="ascii", cwd=toy.folder, env=env)
    assert done.returncode == 0, done.stderr
    assert "CODE 0" in done.stdout
    assert "/?/<time>" in done.stdout


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["train", "--model", "mpl"], "unknown model 'mpl'; did you mean 'mlp'?"),
        (["train", "--data", "pints"], "unknown data set 'pints'; did you mean 'points'?"),
        (["train", "--data", "none.csv"], "there is no file none.csv"),
        (["train", "--trainer.max_epoch", "3"], "did you mean --trainer.max_epochs"),
        (["train", "--lr", "3"], "unknown option --lr; did you mean --optim.lr?"),
        (["train", "--model_args.widht=3"], "did you mean --model_args.width?"),
        (["train", "--trainer.max_epochs", "many"], "--trainer.max_epochs takes int, got many"),
        (["train", "--trainer.patience", "many"], "--trainer.patience takes int or null, got many"),
        (["predict", ".", "points", "--output", "x"], "`toyapp eval . --data points` scores it"),
        (["data", "check", "points", "--data_args.x", "1"], "unknown option --data_args.x"),
        (["train", "--trainer.precision", "12"], "--trainer.precision takes one of 32-true"),
        (["train", "--seed"], "--seed needs a value"),
        (["train", "points"], "train takes options only"),
        (["train", "--config", "no.yaml"], "there is no configuration file no.yaml"),
        (["train", "--preset", "nne"], "--preset takes auto or none"),
        (["models", "mlpp"], "did you mean 'mlp'?"),
        (["data", "lst"], "unknown data command 'lst'; did you mean 'list'?"),
        (["data", "fetch", "pointz"], "did you mean 'points'?"),
        (["eval"], "eval needs a run or checkpoint folder"),
        (["eval", ".", "--splt", "val"], "did you mean --split?"),
        (["predict", "."], "predict needs --output"),
        (["compare", "--seeds", "x"], "--seeds takes a whole number"),
        (["train", "--resume", ".", "--optim.lr", "1"], "--optim.lr cannot change when a run is resumed"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(toy, capsys, argv, said):
    assert toy.main(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert not list(toy.folder.iterdir())


def test_lists_may_be_written_with_commas():
    known = [options.Option("a.words", list[str] | None, None), options.Option("a.numbers", list[float], [1.0])]
    for text, expected in (
        ("x", ["x"]),
        ("x, y", ["x", "y"]),
        ("[x, y]", ["x", "y"]),
        ("2019,2020", ["2019", "2020"]),
        ("[yes, 1.0]", ["yes", "1.0"]),
        ("null", None),
        ("[]", []),
    ):
        assert options.typed(known, {}, [f"--a.words={text}"])["a.words"] == expected, text
    for text in ("0.1,0.9", "[0.1, 0.9]"):
        assert options.typed(known, {}, [f"--a.numbers={text}"])["a.numbers"] == [0.1, 0.9]
    for line, said in (
        ("--a.numbers=0.1,x", "--a.numbers takes float, got x"),
        ("--a.words=[x", "--a.words takes list"),
    ):
        with pytest.raises(UserError, match=said):
            options.typed(known, {}, [line])


def test_tuples_may_be_written_with_commas():
    known = [
        options.Option("a.sizes", tuple[int, ...], ()),
        options.Option("a.pair", tuple[float, float], (0.9, 0.999)),
    ]
    for text in ("4,8", "4, 8", "[4, 8]"):
        assert list(options.typed(known, {}, [f"--a.sizes={text}"])["a.sizes"]) == [4, 8]
    assert list(options.typed(known, {}, ["--a.sizes=32"])["a.sizes"]) == [32]
    assert list(options.typed(known, {}, ["--a.pair=[0.8, 0.9]"])["a.pair"]) == [0.8, 0.9]
    with pytest.raises(UserError, match="takes int, got x"):
        options.typed(known, {}, ["--a.sizes=x"])


def test_a_key_of_a_configuration_file_is_checked(toy, capsys):
    Path("c.yaml").write_text("trainer:\n  max_epoch: 3\n", encoding="utf-8")
    assert toy.main("train", "--config", "c.yaml") == 2
    assert "c.yaml: unknown key trainer.max_epoch; did you mean trainer.max_epochs" in capsys.readouterr().err
    Path("c.yaml").write_text("app: other\n", encoding="utf-8")
    assert toy.main("train", "--config", "c.yaml") == 2
    assert "a configuration of other, not of toyapp" in capsys.readouterr().err


def test_later_layers_win(toy):
    assert toy.config().trainer.max_epochs == 3  # the app's default over the dataclass's 10
    preset = toy.config("--data", "other")
    assert (preset.trainer.max_epochs, preset.model_args.width) == (4, 24)
    assert toy.config("--data", "other", "--preset", "none").model_args.width == 16
    Path("c.yaml").write_text(
        "data: other\nmodel_args:\n  width: 32\nmixer_args: {a: 1, b: 2}\noptim: {betas: [0.5, 0.6]}\n",
        encoding="utf-8",
    )
    file = toy.config("--config", "c.yaml")
    assert (file.data, file.trainer.max_epochs, file.model_args.width) == ("other", 4, 32)
    assert file.optim.betas == (0.5, 0.6)
    line = toy.config("--model_args.width", "48", "--config", "c.yaml", "--mixer_args.b", "[3]", "--mixer_args.c=x")
    assert (line.model_args.width, line.mixer_args) == (48, {"a": 1, "b": [3], "c": "x"})


def test_options_of_one_mechanism_do_not_reach_another(toy):
    Path("c.yaml").write_text("model: mixing\nmixer: softmax\nmixer_args: {window: 3}\n", encoding="utf-8")
    assert toy.config("--config", "c.yaml").mixer_args == {"window": 3}
    assert toy.config("--config", "c.yaml", "--mixer", "flow").mixer_args == {}


def test_print_config_round_trip(toy, capsys):
    from attn_shared.config import config_to_dict

    argv = ["--data", "other", "--model_args.sizes", "[5]", "--optim.lr", "1e-05", "--mixer_args.x", "2", "--seed", "7"]
    assert toy.main("train", *argv, "--print_config") == 0
    text = capsys.readouterr().out
    Path("again.yaml").write_text(text, encoding="utf-8")
    assert toy.main("train", "--config", "again.yaml", "--print_config") == 0
    assert capsys.readouterr().out == text
    printed = yaml.safe_load(text)
    assert printed["optim"]["lr"] == 1e-5
    assert printed["model_args"] == {"width": 24, "dropout": 0.2, "sizes": [5]}
    assert printed | {"runs": "x"} == config_to_dict(toy.config(*argv)) | {"runs": "x"}


def test_eval_and_predict_from_a_checkpoint_alone(toy, toy_run, capsys):
    import shutil

    shutil.copytree(toy_run / "checkpoints" / "best", "alone")
    (toy.folder / "alone" / "trainer.pt").unlink()  # only resuming needs it
    assert toy.main("eval", "alone", "--output", "out/eval.json", "--trainer.eval_batch_size", "7") == 0
    assert "mlp on points, test split" in capsys.readouterr().out
    found = json.loads(Path("out/eval.json").read_text(encoding="utf-8"))
    told = json.loads((toy_run / "metrics.json").read_text(encoding="utf-8"))["splits"]["test"]
    assert found["metrics"] == pytest.approx(told, rel=1e-6)
    assert found["metrics"]["samples"] == 53

    Path("in.csv").write_text("0,0,0,0\n1,1,1,1\n", encoding="utf-8")
    assert toy.main("predict", "alone", "in.csv", "--output", "pred", "--digits", "3") == 0
    low, high = map(float, Path("pred/in.txt").read_text(encoding="utf-8").split())
    assert low < high
    Path("bad.csv").write_text("a,b\n", encoding="utf-8")
    assert toy.main("predict", "alone", "bad.csv", "--output", "pred") == 2
    assert toy.main("predict", "alone", "absent.csv", "--output", "pred") == 2
    assert toy.main("predict", "alone", "in.csv", "--output", "pred", "--digit", "3") == 2
    assert "did you mean --digits?" in capsys.readouterr().err


def test_eval_on_a_file_of_the_users_own(toy, toy_run, capsys):
    Path("mine.csv").write_text("0,0,0,0,5\n1,1,1,1,6\n0,1,0,1,7\n", encoding="utf-8")
    assert toy.main("eval", toy_run, "--data", "mine.csv", "--output", "e.json") == 0
    found = json.loads(Path("e.json").read_text(encoding="utf-8"))
    assert (found["metrics"]["samples"], found["data"]) == (3, "mine.csv")
    assert toy.main("eval", toy_run, "--data", "mine.csvv") == 2


def test_mixers(toy, capsys):
    assert toy.main("train", "--model", "mlp", "--mixer", "softmax") == 2
    assert "mlp mixes no tokens" in capsys.readouterr().err
    assert toy.main("train", "--model", "mixing", "--mixer", "sofmax") == 2
    assert "did you mean 'softmax'?" in capsys.readouterr().err
    assert toy.main("train", "--model", "mixing", "--mixer_args.windoow", "3") == 2
    assert "window" in capsys.readouterr().err
    assert not Path("runs").exists()
