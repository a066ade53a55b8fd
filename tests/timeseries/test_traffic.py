"""The traffic kind: segments, splits, graphs from files, scores, leaks, and users' own tables by command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.trainer import evaluate_split
from attn_timeseries.cli import APP, kind_of_file, main
from attn_timeseries.config import MODELS
from attn_timeseries.traffic import data, metrics
from attn_timeseries.traffic.cards import TrafficDataConfig, TrafficTaskConfig
from attn_timeseries.traffic.graph import read_graph
from attn_timeseries.traffic.task import TrafficTask, window_slots

needs_data = [
    pytest.mark.data,
    pytest.mark.skipif("ATTN_DATA" not in os.environ, reason="ATTN_DATA names no folder of data sets"),
]
SENSORS = ["a", "b", "c"]
DAYS, STEPS = 10, 48  # half an hour a step
SMALL: dict[str, Any] = {"d_model": 8, "d_ff": 8, "d_head": 8, "n_heads": 2}
SHORT: dict[str, Any] = {"seq_len": 6, "label_len": 3, "pred_len": 4}


def speeds(days: int = DAYS, seed: int = 0) -> pd.DataFrame:
    """A rush hour a day that reaches sensor a first and c last, and noise."""
    rng = np.random.default_rng(seed)
    hours = np.arange(days * STEPS) / 2 % 24
    frame = pd.DataFrame({"time": pd.date_range("2024-03-04", periods=days * STEPS, freq="30min")})
    for i, name in enumerate(SENSORS):
        frame[name] = (60 - 25 * np.exp(-np.square((hours - 8 - i) / 1.5)) + rng.normal(size=len(hours))).round(3)
    return frame


def write(folder: Path, frame: pd.DataFrame | None = None, *, graph: bool = True, name: str = "roads") -> Path:
    path = folder / f"{name}.csv"
    (speeds() if frame is None else frame).to_csv(path, index=False)
    if graph:
        (folder / f"{name}.graph.csv").write_text("from,to,distance\na,b,100\nb,a,100\nb,c,200\nc,b,200\na,c,900\n")
    return path


def config(path: Path | str, model: str = "naive", **args: Any) -> RunConfig:
    kind = MODELS[model].config
    sizes = {"d_model": 8, "d_ff": 8, "n_heads": 2, "d_head": 8, "patch_len": 4, "stride": 2, "moving_avg": 3}
    return RunConfig(
        app="timeseries",
        model=model,
        model_args=kind(**{name: value for name, value in sizes.items() if name in kind.__dataclass_fields__}),
        data=str(path),
        data_args=TrafficDataConfig(**{**SHORT, **args}),
        kind="traffic",
    )


def load(path: Path | str, **args: Any) -> Any:
    return TrafficTask.load_data(config(path, **args))


def whole(windows: Any) -> dict[str, torch.Tensor]:
    return windows.__getitems__(range(len(windows)))


# --- segments and splits ---


def test_rows_missing_for_long_cut_the_table(tmp_path: Path) -> None:
    frame = speeds().drop(index=[*range(100, 103), *range(200, 204)])
    bundle = load(write(tmp_path, frame))
    assert bundle.facts["segments"] == "2"
    assert "3 steps without a row bridged" in bundle.facts["found"]
    for split in ("train", "val", "test"):
        windows = bundle.split(split)
        for i in range(len(windows)):
            _, times = windows.window_times(i)
            assert len(times) == 10
            assert (np.diff(times) == pd.Timedelta("30min")).all()
            assert not ((times[0] < frame["time"][199]) & (times[-1] > frame["time"][199]))


def test_days_are_never_joined_where_midnight_cuts(tmp_path: Path) -> None:
    bundle = load(write(tmp_path), cut="day", days=[6, 2, 2])
    per_day = STEPS - 10 + 1
    assert [len(bundle.split(s)) for s in ("train", "val", "test")] == [6 * per_day, 2 * per_day, 2 * per_day]
    for split in ("train", "test"):
        windows = bundle.split(split)
        assert all(len(set(windows.window_times(i)[1].date)) == 1 for i in range(len(windows)))


@pytest.mark.parametrize(
    "args", [{}, {"days": [6, 2, 2]}, {"days": [7, 1, 1]}, {"cut": "day"}, {"days": [6, 2, 2], "cut": "day"}]
)
def test_splits_share_no_target_and_keep_the_order_of_time(tmp_path: Path, args: dict[str, Any]) -> None:
    bundle = load(write(tmp_path), **args)
    last: pd.Timestamp | None = None
    for split in ("train", "val", "test"):
        windows = bundle.split(split)
        targets = [windows.window_times(i)[1][SHORT["seq_len"] :] for i in range(len(windows))]
        assert last is None or min(t[0] for t in targets) > last
        last = max(t[-1] for t in targets)
        if "days" in args:
            assert len({day for t in targets for day in t.date}) == args["days"][("train", "val", "test").index(split)]


def test_targets_are_the_values_of_the_file(tmp_path: Path) -> None:
    frame = speeds()
    bundle = load(write(tmp_path, frame), days=[6, 2, 2])
    scaler = bundle.state["scaler"]
    train = frame[SENSORS].to_numpy()[: 6 * STEPS]
    assert np.allclose(scaler["mean"], train.mean())  # one scale for all sensors
    assert np.allclose(scaler["std"], train.std())
    indexed = frame.set_index("time")
    for i in (0, 17, len(bundle.test) - 1):
        _, times = bundle.test.window_times(i)
        item = bundle.test[i]
        values = torch.cat([item["x"], item["y"][-4:]]).double().numpy() * train.std() + train.mean()
        np.testing.assert_allclose(values, indexed.loc[times, SENSORS].to_numpy(), atol=1e-4)


def test_a_silent_sensor_is_filled_from_the_past_and_never_scored(tmp_path: Path) -> None:
    frame = speeds()
    frame.loc[5 * STEPS : 6 * STEPS + 20, "b"] = np.nan
    bundle = load(write(tmp_path, frame), cut="day", days=[4, 3, 3])
    windows = bundle.val
    on = [i for i in range(len(windows)) if windows.window_times(i)[1][0].date() == pd.Timestamp("2024-03-09").date()]
    before = (frame["b"][5 * STEPS - 1] - bundle.state["scaler"]["mean"][0][1]) / bundle.state["scaler"]["std"][0][1]
    batch = windows.__getitems__(on)
    assert not batch["observed"][:, :, 1].any()
    assert batch["observed"][:, :, [0, 2]].all()
    torch.testing.assert_close(batch["x"][:, :, 1], torch.full_like(batch["x"][:, :, 1], before))


def test_zeros_may_mean_missing(tmp_path: Path) -> None:
    frame = speeds()
    frame.loc[30:35, "a"] = 0.0
    zeros, holes = load(write(tmp_path, frame)), load(write(tmp_path, frame), zero_missing=True)
    assert "observed" not in zeros.train[0]
    observed = whole(holes.train)["observed"]
    assert not observed[30 - 6, :, 0].any()
    assert holes.state["scaler"]["mean"][0][0] > zeros.state["scaler"]["mean"][0][0]


@pytest.mark.parametrize("cut", ["gap", "day"])
def test_what_comes_after_the_border_changes_no_statistic_and_no_training_batch(tmp_path: Path, cut: str) -> None:
    frame = speeds()
    frame.loc[20:24, "c"] = np.nan
    other = frame.copy()
    border = 6 * STEPS
    other.loc[border:, SENSORS] = np.random.default_rng(1).normal(size=(len(frame) - border, 3)) * 1e3
    bundles = [
        load(write(tmp_path, one, name=name), cut=cut, days=[6, 2, 2]) for name, one in (("x", frame), ("y", other))
    ]
    assert bundles[0].state == bundles[1].state
    ours, theirs = (whole(bundle.train) for bundle in bundles)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    means = [data.time_of_day(bundle.train, STEPS) for bundle in bundles]
    np.testing.assert_array_equal(*means)
    assert not torch.equal(bundles[0].test[0]["y"], bundles[1].test[0]["y"])


def test_the_future_changes_no_forecast(tmp_path: Path) -> None:
    frame = speeds()
    run = config(write(tmp_path, frame), "sttn", days=[6, 2, 2])
    bundle = TrafficTask.load_data(run)
    torch.manual_seed(0)
    task = TrafficTask(run, bundle.state).eval()
    for index in (0, 30, 80):
        _, times = bundle.test.window_times(index)
        changed = frame.copy()
        rows = changed["time"] >= times[SHORT["seq_len"]]
        changed.loc[rows, SENSORS] = 1e3
        path = write(tmp_path, changed, name="changed")
        other = TrafficTask.load_data(config(path, "sttn", days=[6, 2, 2]), state=bundle.state)
        with torch.no_grad():
            forecasts = [task.forward_batch(one.test.__getitems__([index])) for one in (bundle, other)]
        assert torch.equal(*forecasts)
        assert not torch.equal(bundle.test[index]["y"], other.test[index]["y"])


def test_state_is_json_and_gives_the_graph_back(tmp_path: Path) -> None:
    bundle = load(write(tmp_path))
    state = json.loads(json.dumps(bundle.state, allow_nan=False))
    assert state == bundle.state
    sigma = np.std([100, 100, 200, 200, 900])
    weights = np.exp(-np.square(np.array([[np.inf, 100, 900], [100, np.inf, 200], [np.inf, 200, np.inf]]) / sigma))
    weights[weights < 0.1] = 0
    np.testing.assert_allclose(data.graph_matrix(state["graph"], 3), weights, rtol=1e-12)
    assert weights[0, 2] == 0  # 900 m is too far


# --- scores ---


def test_scores_by_hand(tmp_path: Path) -> None:
    """MAE, RMSE and masked MAPE of repeat-last, at each distance and over all, straight from the file."""
    frame = speeds()
    frame.loc[400, "b"] = 0.0
    run = config(write(tmp_path, frame), days=[6, 2, 2])
    bundle = TrafficTask.load_data(run)
    task = TrafficTask(run, bundle.state)
    figures = evaluate_split(task, bundle, "test", run)
    values = frame[SENSORS].to_numpy()
    starts = range(8 * STEPS, len(frame) - 3)
    error = np.stack([values[s : s + 4] - values[s - 1] for s in starts])
    truth = np.stack([values[s : s + 4] for s in starts])
    assert figures["windows"] == len(error)
    assert figures["mae_original"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert figures["rmse_original"] == pytest.approx(np.sqrt(np.square(error).mean()), rel=1e-5)
    there = truth != 0
    assert not there.all()
    assert figures["mape"] == pytest.approx(100 * (np.abs(error[there]) / truth[there]).mean(), rel=1e-5)
    # Half-hour steps divide no quarter: three steps are an hour and a half.
    assert figures["mae_90min"] == pytest.approx(np.abs(error[:, 2]).mean(), rel=1e-5)
    assert figures["rmse_90min"] == pytest.approx(np.sqrt(np.square(error[:, 2]).mean()), rel=1e-5)
    for size in (1, 7, 1000):
        run.trainer.eval_batch_size = size
        again = evaluate_split(task, bundle, "test", run)
        assert all(again[name] == pytest.approx(figures[name], rel=1e-9, nan_ok=True) for name in figures)


def test_marked_steps() -> None:
    assert metrics.marked_steps("5min", 9) == [3, 6, 9]
    assert metrics.marked_steps("5min", 12) == [3, 6, 9, 12]
    assert metrics.marked_steps("15min", 3) == [1, 2, 3]
    assert metrics.marked_steps("h", 7) == [3, 6]
    assert [metrics.ahead(f, 3) for f in ("5min", "h", "D", "20s")] == ["15min", "3h", "3D", "60s"]


def test_time_of_day_mean_by_hand(tmp_path: Path) -> None:
    frame = speeds()
    run = config(write(tmp_path, frame), days=[6, 2, 2])
    bundle = TrafficTask.load_data(run)
    rows = {row["model"]: row for row in TrafficTask.baselines(run, bundle)}
    assert list(rows) == ["naive", "dlinear (closed form)", "time_of_day"]
    values = frame[SENSORS].to_numpy().reshape(DAYS, STEPS, 3)
    means = values[:6].mean(axis=0)
    starts = range(8 * STEPS, len(frame) - 3)
    flat = values.reshape(-1, 3)
    error = [np.abs(flat[s : s + 4] - means[np.arange(s, s + 4) % STEPS]).mean() for s in starts]
    assert rows["time_of_day"]["mae_original"] == pytest.approx(np.mean(error), rel=1e-5)
    slots = window_slots(bundle.test, STEPS)
    assert slots[0].tolist() == [0, 1, 2, 3]
    # Here the day is nearly all there is to know.
    assert rows["time_of_day"]["mae_original"] < 0.5 * rows["naive"]["mae_original"]


# --- graphs ---

FORMS = {
    "matrix": "0,100,900\n100,0,200\n,200,0\n",
    "matrix with a header": "a,b,c\n0,100,900\n100,0,200\ninf,200,0\n",
    "matrix with names, in another order": ",c,a,b\nc,0,,200\na,900,0,100\nb,200,100,0\n",
    "edges": "from,to,distance\na,b,100\nb,a,100\nb,c,200\nc,b,200\na,c,900\n",
    "edges, another order of columns": "cost;to;from\n100;b;a\n100;a;b\n200;c;b\n200;b;c\n900;c;a\n",
    "edges, decimal commas": "from;to;distance\na;b;100,0\nb;a;100,0\nb;c;200,0\nc;b;2e2\na;c;900\n",
    "matrix, decimal commas": "0;100,0;900\n100,0;0;200,0\n900;200,0;0\n",
    "more sensors than the table": "from,to,distance\na,b,100\nb,a,100\nb,c,200\nc,b,200\na,c,900\nz,a,5\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_graph_gives_the_same_weights(tmp_path: Path, form: str) -> None:
    path = tmp_path / "graph.csv"
    path.write_text(FORMS[form])
    weights, _ = read_graph(path, SENSORS, TrafficDataConfig(graph_sigma=200.0))
    e = np.exp
    np.testing.assert_allclose(weights, [[0, e(-0.25), 0], [e(-0.25), 0, e(-1)], [0, e(-1), 0]], rtol=1e-12)


def test_weights_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "graph.csv"
    path.write_text("1,0.5,0.05\n0.5,1,0\n0.05,0,1\n")
    weights, _ = read_graph(path, SENSORS, TrafficDataConfig())
    np.testing.assert_array_equal(weights, [[0, 0.5, 0.05], [0.5, 0, 0], [0.05, 0, 0]])
    weights, _ = read_graph(path, SENSORS, TrafficDataConfig(graph_threshold=0.1))
    np.testing.assert_array_equal(weights, [[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]])
    path.write_text("from,to\na,b\nb,c\n")  # edges without a number weigh 1
    weights, _ = read_graph(path, SENSORS, TrafficDataConfig())
    np.testing.assert_array_equal(weights, [[0, 1, 0], [0, 0, 1], [0, 0, 0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("0,1\n1,0\n", "the matrix has 2 rows and there are 3 sensors"),
        ("0,1,2\n1,0,3\n", "the matrix has 2 rows"),
        ("0,1,2,3\n1,0,3,4\n2,3,0,5\n3,4,5,0\n", "has 4 rows and there are 3 sensors in the table; with a header of"),
        ("0,1,2\n1,0\n2,3,0\n", r"graph\.csv:2: the row has 2 numbers"),
        ("0,1,2\n1,0,x\n2,3,0\n", r"graph\.csv:2: 'x' is not a number"),
        ("0,1,2\n1,0,-3\n2,3,0\n", r"graph\.csv:2: the graph holds -3"),
        ("0,0,0\n0,0,0\n0,0,0\n", "no edge is left"),
        ("a,b,x\n0,1,2\n1,0,3\n2,3,0\n", "sensor 'c' of the table is not in the graph"),
        ("a,b,b\n0,1,2\n1,0,3\n2,3,0\n", "stands twice"),
        (",a,b,c\na,0,1,2\nb,1,0,3\nd,2,3,0\n", "the names of the rows are not those of the header"),
        ("from,to,weight\n", "a header but no edge"),
        ("from,to,weight\na,q,1\nr,b,1\n", r"graph\.csv:2: no edge joins two sensors of the table: unknown sensor 'q'"),
        ("from,to,weight\na,b,1\na,b,2\n", r"graph\.csv:3: the edge from a to b stands there again"),
        ("from,to,weight\na,b,much\n", r"graph\.csv:2: 'much' is not a number"),
        ("from,to,weight\na,b\n", r"graph\.csv:2: the row has 2 cells and the header 3"),
        ("from,to,lanes,colour\na,b,1,2\n", "which column holds the weights"),
        ("from,to,weight\na,a,1\n", "no edge is left"),
    ],
)
def test_malformed_graphs_are_refused_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "graph.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_graph(path, SENSORS, TrafficDataConfig())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"days": [6, 2, 3]}, "has 10 days and --data_args.days asks for 6 \\+ 2 \\+ 3 = 11"),
        ({"seq_len": 400, "label_len": 1}, "no window of seq_len 400"),
        ({"cut": "day", "seq_len": 46}, "in the training part: its longest stretch without a jump has 48 rows"),
        ({"label_len": 7}, "label_len is 7"),
        ({"split": "etth"}, "split by days or fractions"),
        ({"graph": "nowhere.csv"}, "there is no graph nowhere.csv"),
        ({"columns": ["a", "z"]}, "'z'"),
        ({"season": 0}, "season is 0"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_sentence(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(write(tmp_path), **args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args",
    [{"days": [1, 2]}, {"days": [0, 1, 1]}, {"graph_sigma": 0.0}, {"graph_threshold": -1.0}, {"max_gap": -1},
     {"known_covariates": ["x"]}, {"id_column": "x"}],
)  # fmt: skip
def test_options_that_mean_nothing(args: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(args))):
        TrafficDataConfig(**args)


def test_a_long_table_is_refused(tmp_path: Path) -> None:
    frame = speeds().melt("time", var_name="sensor", value_name="speed")
    with pytest.raises(UserError, match="one row a time and one column a sensor"):
        load(write(tmp_path, frame, graph=False))


# --- models ---


@pytest.mark.parametrize("model", [name for name, card in MODELS.items() if "traffic" in card.kinds])
def test_every_model_of_the_kind_trains_on_it(tmp_path: Path, model: str) -> None:
    run = config(write(tmp_path), model)
    bundle = TrafficTask.load_data(run)
    torch.manual_seed(0)
    task = TrafficTask(run, bundle.state)
    batch = bundle.train.__getitems__(range(8))
    loss = task.training_loss(batch)
    assert loss.isfinite()
    if MODELS[model].trainable:
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in task.parameters())
    assert task.forward_batch(batch).shape == (8, 4, 3)


def test_only_sttn_needs_the_graph(tmp_path: Path) -> None:
    path = write(tmp_path, graph=False)
    bundle = load(path)
    assert bundle.facts["graph"] == "none"
    TrafficTask(config(path, "itransformer"), bundle.state)
    with pytest.raises(UserError, match=r"needs a graph of the sensors; name its file with --data_args.graph"):
        TrafficTask(config(path, "sttn"), bundle.state)


def test_pictures(tmp_path: Path) -> None:
    run = config(write(tmp_path), "sttn")
    bundle = TrafficTask.load_data(run)
    task = TrafficTask(run, bundle.state)
    evaluate_split(task, bundle, "test", run)
    pictures = {picture.name: picture for picture in task.pictures(bundle)}
    assert {"forecasts", "worst", "ahead", "sensors"} <= set(pictures)
    assert len(pictures["ahead"].figure.axes[0].lines) == 4
    attention = task.sensor_attention(bundle.test)
    assert attention is not None
    np.testing.assert_allclose(attention.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(("model", "loss"), [("sttn", "quantile"), ("itransformer", "quantile"), ("naive", "mae")])
def test_intervals(tmp_path: Path, model: str, loss: str) -> None:
    run = config(write(tmp_path), model)
    run.task_args = TrafficTaskConfig(loss=loss, calibrate="conformal")
    bundle = TrafficTask.load_data(run)
    torch.manual_seed(0)
    task = TrafficTask(run, bundle.state)
    windows = bundle.val
    task.after_training(lambda split: [bundle.split(split).__getitems__(range(len(windows)))])
    figures = evaluate_split(task, bundle, "test", run)
    assert 0.7 < figures["coverage"] <= 1
    assert figures["mae_90min"] > 0
    rows = {row["model"]: row for row in TrafficTask.baselines(run, bundle)}
    assert 0.7 < rows["naive"]["coverage"] <= 1
    assert "intervals of 90%" in bundle.protocol


# --- from the command line ---


def test_a_graph_beside_a_table_makes_it_traffic(tmp_path: Path) -> None:
    assert kind_of_file(str(write(tmp_path, name="with"))) == "traffic"
    assert kind_of_file(str(write(tmp_path, graph=False, name="without"))) == "forecast"
    assert APP.datasets["pemsd7"].kind == "traffic"


def test_a_table_is_traffic_to_a_model_that_does_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, graph=False)
    assert APP.defaults("sttn", str(path))[2].name == "traffic"
    assert APP.defaults("dlinear", str(path))[2].name == "forecast"
    assert APP.defaults("dlinear", str(path), "traffic")[2].name == "traffic"
    with pytest.raises(UserError, match="sttn is no model to forecast tables of series, which etth1 is for"):
        APP.defaults("sttn", "etth1")


def test_data_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, speeds().drop(index=range(100, 110)))
    main(["data", "check", str(path)])
    assert "cut into 2 segments" in capsys.readouterr().out
    (tmp_path / "roads.graph.csv").write_text("from,to,weight\na,b,much\n")
    assert main(["data", "check", str(path)]) != 0
    assert "roads.graph.csv:2: 'much' is not a number" in capsys.readouterr().out
    # Options of the data; a graph of distances is nothing wrong.
    path = write(tmp_path, graph=False, name="plain")
    (tmp_path / "far.csv").write_text("from,to,distance\na,b,100\nb,c,200\na,c,900\n")
    assert main(["data", "check", str(path), "--kind", "traffic", "--data_args.graph", str(tmp_path / "far.csv")]) == 0
    capsys.readouterr()
    assert main(["data", "check", str(path), "--kind", "traffic", "--data_args.graph", str(tmp_path / "no.csv")]) == 2
    assert "there is no graph" in capsys.readouterr().out


def test_train_evaluate_and_predict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = write(tmp_path)
    sizes = [word for name, value in SMALL.items() for word in (f"--model_args.{name}", str(value))]
    lengths = [word for name, value in SHORT.items() for word in (f"--data_args.{name}", str(value))]
    assert main(["train", "--model", "sttn", "--data", str(table), "--trainer.max_epochs", "2",
                 "--trainer.threads", "1", "--optim.lr", "0.003", *sizes, *lengths]) == 0  # fmt: skip
    run = Path(capsys.readouterr().out.split()[-1])
    results = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert results["splits"]["test"]["mae_original"] < 20
    assert {row["model"] for row in results["baselines"]} >= {"naive", "time_of_day"}
    assert (run / "report.html").is_file()

    assert main(["eval", str(run)]) == 0
    # A later table, with a jump: the forecast goes on from what follows it.
    later = speeds(12, seed=3).drop(index=range(500, 550))
    later.to_csv(tmp_path / "later.csv", index=False)
    assert main(["predict", str(run), str(tmp_path / "later.csv"), "--output", str(tmp_path / "out")]) == 0
    forecast = pd.read_csv(tmp_path / "out" / "later_forecast.csv", parse_dates=["time"])
    assert list(forecast.columns)[:4] == ["time", *SENSORS]
    assert forecast["time"].tolist() == list(pd.date_range(later["time"].iloc[-1], periods=5, freq="30min")[1:])
    assert forecast[SENSORS].notna().all().all()

    later.iloc[:-40].to_csv(tmp_path / "short.csv", index=False)
    pd.concat([later.iloc[:300], later.iloc[-3:]]).to_csv(tmp_path / "short.csv", index=False)
    capsys.readouterr()
    assert main(["predict", str(run), str(tmp_path / "short.csv"), "--output", str(tmp_path / "out2")]) != 0
    assert "only 3 follow the last jump" in capsys.readouterr().err
    assert not (tmp_path / "out2").exists()

    # A sensor that is silent all along is carried by its training mean.
    speeds(3, seed=4).assign(b=np.nan).to_csv(tmp_path / "silent.csv", index=False)
    assert main(["predict", str(run), str(tmp_path / "silent.csv"), "--output", str(tmp_path / "out2")]) == 0
    assert pd.read_csv(tmp_path / "out2" / "silent_forecast.csv")[SENSORS].notna().all().all()
    with pytest.raises(UserError, match=r"column 'b' holds no number at all; leave it out with --data_args\.columns"):
        load(tmp_path / "silent.csv")


class TestRealData:
    pytestmark = needs_data

    def test_pemsd7(self) -> None:
        bundle = TrafficTask.load_data(config("pemsd7", seq_len=12, label_len=6, pred_len=9))
        assert [len(bundle.split(s)) for s in ("train", "val", "test")] == [34 * 268, 5 * 268, 5 * 268]
        for split in ("train", "val", "test"):
            windows = bundle.split(split)
            for i in range(0, len(windows), 97):
                assert len(set(windows.window_times(i)[1].date)) == 1
        weights = data.graph_matrix(bundle.state["graph"], 25)
        distance = np.loadtxt(Path(os.environ["ATTN_DATA"]) / "timeseries/pemsd7_25/W_25.csv", delimiter=",") / 1e4
        expected = np.exp(-np.square(distance) / 0.1)
        expected = expected * (expected >= 0.5) * (1 - np.eye(25))
        np.testing.assert_allclose(weights, expected, rtol=1e-9)

    def test_pemsd7_baselines(self) -> None:
        run = config("pemsd7", seq_len=12, label_len=6, pred_len=9)
        rows = {row["model"]: row for row in TrafficTask.baselines(run, TrafficTask.load_data(run))}
        for name, expected in (("naive", (3.24, 4.45, 5.33)), ("time_of_day", (4.86, 4.87, 4.88))):
            found = [rows[name][f"mae_{minutes}min"] for minutes in (15, 30, 45)]
            assert found == pytest.approx(expected, abs=0.01)

    def test_metr_la_week(self) -> None:
        bundle = TrafficTask.load_data(config("metr_la_week", seq_len=12, label_len=6, pred_len=12))
        assert len(bundle.state["columns"]) == 207
        assert bundle.facts["graph"].startswith("2,626 edges")  # 2,833 entries less the diagonal of 207
        assert len(bundle.test) == 403 - 11

    def test_some_sensors_only(self) -> None:
        run = config("pemsd7", columns=["7", "0", "1"])
        bundle = TrafficTask.load_data(run)
        assert bundle.state["columns"] == ["7", "0", "1"]
        full = TrafficTask.load_data(config("pemsd7"))
        weights = data.graph_matrix(full.state["graph"], 25)
        np.testing.assert_array_equal(
            data.graph_matrix(bundle.state["graph"], 3), weights[np.ix_([7, 0, 1], [7, 0, 1])]
        )
