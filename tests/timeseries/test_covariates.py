"""Covariates: tables with them, what is learnt from training rows only, windows without a look ahead, and their use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle
from attn_timeseries.baselines import fit_effect
from attn_timeseries.config import MODELS
from attn_timeseries.data.cards import ForecastDataConfig, name_list
from attn_timeseries.data.covariates import OPTIONS, CovariateCoder, longest_run
from attn_timeseries.data.table import SeriesTable, read_table
from attn_timeseries.data.windows import COVARIATES
from attn_timeseries.models.covariates import CovariateModel, CovariateShape
from attn_timeseries.task import ForecastTask

ARGS: dict[str, Any] = {"seq_len": 14, "label_len": 7, "pred_len": 7}
ROLES: dict[str, Any] = {
    "columns": ["y"],
    "id_columns": ["region", "shop"],
    "known_covariates": ["price"],
    "known_categories": ["day"],
    "past_covariates": ["rain"],
    "past_categories": ["sky"],
    "static_covariates": ["area"],
    "static_categories": ["region", "kind"],
}
SMALL = {"d_model": 8, "d_ff": 8, "n_heads": 2, "e_layers": 1, "patch_len": 4, "stride": 2}
FORECASTERS = [n for n, card in MODELS.items() if card.trainable and "forecast" in (card.kinds or ("forecast",))]


def panel(days: int = 120, shops: int = 4, seed: int = 0) -> pd.DataFrame:
    """Shops one below the other; y is noise but for the price of the same day."""
    rng = np.random.default_rng(seed)
    parts = []
    for i in range(shops):
        price = rng.normal(size=days).round(3)
        parts.append(
            pd.DataFrame(
                {
                    "date": pd.date_range("2024-01-01", periods=days, freq="D").strftime("%Y-%m-%d"),
                    "region": "ab"[i % 2],
                    "shop": f"{i // 2:03d}",
                    "y": (3 * price + rng.normal(size=days)).round(4),
                    "price": price,
                    "day": rng.choice(["work", "rest", "feast"], size=days),
                    "rain": rng.normal(size=days).round(3),
                    "sky": rng.choice(["1", "2"], size=days),
                    "area": 10.0 * (i + 1),
                    "kind": ["big", "small"][i // 2 % 2],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def text(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False)


def cell(row: int, column: str, value: Any) -> str:
    frame = panel(40).astype({column: object})
    frame.loc[row, column] = value
    return text(frame)


def run_config(path: str | Path, model: str = "dlinear", **args: Any) -> RunConfig:
    kind = MODELS[model].config
    sizes = {name: value for name, value in SMALL.items() if name in kind.__dataclass_fields__}
    return RunConfig(
        app="timeseries",
        model=model,
        model_args=kind(**sizes),
        data=str(path),
        data_args=ForecastDataConfig(**{**ARGS, **ROLES, **args}),
    )


def build(run: RunConfig) -> tuple[ForecastTask, DataBundle]:
    bundle = ForecastTask.load_data(run)
    torch.manual_seed(0)
    return ForecastTask(run, bundle.state).eval(), bundle


# -- tables as they come ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A table and what must come of it: parts of the sentence that refuses it, or a look at what was read."""

    name: str
    content: str
    refused: tuple[str, ...] = ()
    check: Callable[[SeriesTable], bool] | None = None
    note: str = ""
    config: dict[str, Any] = field(default_factory=dict)


def codes(table: SeriesTable, role: str, series: int = 0) -> np.ndarray:
    part = table.series[series].covariates
    assert part is not None
    return part.values[role] if role in part.values else part.codes[role]


def without(*rows: int) -> str:
    return text(panel(40).drop(index=list(rows)))


def long_gap() -> str:
    frame = panel(40)
    frame.loc[5:34, "price"] = np.nan
    return text(frame)


def with_rows_ahead(count: int = 7) -> pd.DataFrame:
    frame = panel(40)
    frame.loc[frame.groupby(["region", "shop"]).cumcount() >= 40 - count, ["y", "rain", "sky"]] = np.nan
    return frame


def one_series(**columns: Any) -> str:
    return text(panel(40, shops=1).assign(**columns))


CASES = [
    Case("plain", text(panel(40)), check=lambda t: [s.name for s in t.series] == ["a/000", "b/000", "a/001", "b/001"]),
    Case(
        "unknown covariate",
        text(panel(40)),
        ("unknown covariate 'prize'", "price"),
        config={"known_covariates": "prize"},
    ),
    Case(
        "two roles",
        text(panel(40)),
        ("'price'", "past_covariates", "known_covariates", "one role"),
        config={"past_covariates": "price"},
    ),
    Case("named twice", text(panel(40)), ("'rain' stands twice",), config={"past_covariates": "rain,rain"}),
    Case("target as covariate", text(panel(40)), ("'y'", "data_args.columns"), config={"past_covariates": ["y"]}),
    Case("time as covariate", text(panel(40)), ("'date' holds the times",), config={"known_categories": ["date"]}),
    Case(
        "id as number",
        text(panel(40)),
        ("'shop' names the series", "static_categories"),
        config={"static_covariates": ["shop"]},
    ),
    Case("id as target", text(panel(40)), ("'shop' names the series",), config={"columns": ["shop"]}),
    Case("text among numbers", cell(7, "price", "cheap"), ("t.csv:9: 'cheap' in column 'price' is not a number",)),
    Case("thousands separator", cell(7, "area", "1,000"), ("t.csv:9: '1,000' in column 'area'",)),
    Case("infinite", cell(7, "rain", "inf"), ("t.csv:9: the value in column 'rain' is infinite",)),
    Case("empty numbers", text(panel(40).assign(price=np.nan)), ("'price' holds no number", "known_covariates")),
    Case("empty categories", text(panel(40).assign(day="")), ("'day' holds no category", "known_categories")),
    Case("numbers as categories", one_series(day=np.arange(80)[:40] + 0.5, price=0.0) + "", check=lambda t: True),
    Case(
        "too many categories",
        text(panel(200).assign(day=[f"n{i}" for i in range(800)])),
        ("'day' has 800 different values in 800 rows", "known_covariates"),
    ),
    Case(
        "static number changes",
        cell(7, "area", 99),
        ("t.csv:9: column 'area' changes within the rows of series 'a/000'", "known_covariates or past_covariates"),
    ),
    Case(
        "static category changes",
        cell(50, "kind", "huge"),
        ("t.csv:52: column 'kind' changes", "'b/000'", "known_categories"),
    ),
    Case("static with holes", cell(7, "area", ""), check=lambda t: codes(t, "static").tolist() == [10.0]),
    Case(
        "static empty in a series",
        text(panel(40).assign(area=[np.nan] * 40 + [5.0] * 120)),
        note="'area' is empty in a series",
        check=lambda t: bool(np.isnan(codes(t, "static")).all()),
    ),
    Case(
        "codes with leading zeros",
        text(panel(40).assign(kind="007")),
        check=lambda t: t.series[0].covariates.levels["static_cat"][1] == ["007"],
    ),
    Case("categories with holes", cell(7, "day", ""), check=lambda t: codes(t, "known_cat")[7, 0] == -1),
    Case(
        "numbers with holes",
        cell(7, "price", ""),
        check=lambda t: bool(np.isnan(codes(t, "known")[7, 0])),
        note="1 values of covariates missing, longest run 1",
    ),
    Case(
        "numbers with holes where none may be",
        cell(7, "price", ""),
        ("covariate 'price' has no value at 2024-01-08",),
        config={"missing": "error"},
    ),
    Case("a long hole", long_gap(), ("covariate 'price' has no value for 30 steps", "max_gap is 24")),
    Case(
        "covariate that begins late",
        text(panel(40).assign(rain=[np.nan] * 5 + [1.0] * 155)),
        note="covariate 'rain' begins 5 steps after the targets in series 'a/000'",
        check=lambda t: True,
    ),
    Case(
        "a row missing", without(7), check=lambda t: codes(t, "known_cat")[7, 0] == -1 and len(t.series[0].times) == 40
    ),
    Case(
        "yes and no as numbers",
        text(panel(40).assign(price=["True", "False"] * 80)),
        check=lambda t: codes(t, "known")[0, 0] == 1,
    ),
    Case("words for numbers", text(panel(40).assign(price=["yes", "no"] * 80)), ("t.csv:2: 'yes' in column 'price'",)),
    Case("constant covariate", text(panel(40).assign(price=1.5)), check=lambda t: codes(t, "known")[0, 0] == 1.5),
    Case(
        "rows again with other covariates",
        text(pd.concat([panel(40), panel(40).head(1).assign(price=9.0)])),
        ("t.csv:162: the time 2024-01-01 00:00:00 stands there again with other values", "t.csv:2"),
    ),
    Case(
        "rows repeated",
        text(pd.concat([panel(40), panel(40).head(3)])),
        note="3 rows repeated exactly",
        check=lambda t: len(t.series[0].times) == 40,
    ),
    Case(
        "rows ahead",
        text(with_rows_ahead()),
        note="7 steps ahead hold known covariates only",
        check=lambda t: len(t.series[0].times) == 33 and len(codes(t, "known")) == 40 and len(codes(t, "past")) == 33,
    ),
    Case(
        "a series with rows ahead only",
        text(panel(40).assign(y=[np.nan] * 40 + [1.0, 2.0] * 60)),
        note="left out",
        check=lambda t: [s.name for s in t.series] == ["b/000", "a/001", "b/001"],
    ),
    Case("no target at all", text(panel(40).assign(y=np.nan)), ("'y' holds no number",)),
    Case("unknown id level", text(panel(40)), ("unknown id column 'land'",), config={"id_columns": "land,shop"}),
    Case("id level missing", cell(50, "region", ""), ("t.csv:52: the name of the series is missing ('region')",)),
    Case("id level twice", text(panel(40)), ("names a column twice",), config={"id_columns": "shop,shop"}),
    Case("both kinds of id option", text(panel(40)), ("not both",), config={"id_column": "shop"}),
    Case(
        "ids that join to one name",
        text(panel(40).assign(region=["a/b"] * 40 + ["a"] * 120, shop=np.repeat(["c", "b/c", "d", "e"], 40))),
        ("a/b, c and a, b/c", "'a/b/c'"),
        config={"static_categories": ["kind"]},
    ),
    Case(
        "too few levels of id",
        text(panel(40)),
        ("stands there again with other values",),
        config={"id_columns": "region"},
    ),
    Case(
        "static category that names the series",
        text(panel(40, shops=2).drop(columns="shop")),
        check=lambda t: t.id_columns == ["region"],
        config={"id_columns": None},
        note="series named by column 'region'",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_case(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(case.content)
    config = ForecastDataConfig(**{**ROLES, **case.config})
    if case.refused:
        with pytest.raises(UserError) as caught:
            read_table(path, config)
        message = str(caught.value)
        assert "\n" not in message
        for part in case.refused:
            assert part in message, message
        return
    table = read_table(path, config)
    assert case.check is not None
    assert case.check(table), table
    assert case.note in " | ".join([*table.form, *table.notes]), (table.form, table.notes)


def test_there_are_enough_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert len([case for case in CASES if case.refused or case.note]) >= 20


def test_names_in_options() -> None:
    assert name_list("region, shop") == name_list(["region", "shop"]) == ["region", "shop"]
    assert name_list(None) == name_list([]) == []


def test_the_longest_run() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        holes = rng.random((int(rng.integers(1, 30)), int(rng.integers(1, 4)))) < rng.random()
        best = (0, 0, 0)
        length = np.zeros(holes.shape[1], dtype=int)
        for row in range(len(holes)):
            length = (length + 1) * holes[row]
            if length.max() > best[0]:
                best = (int(length.max()), row - int(length.max()) + 1, int(length.argmax()))
        assert longest_run(holes) == best


# -- what is learnt, and windows --------------------------------------------------------------------------------------


def test_what_lies_after_the_border_changes_nothing_learnt(tmp_path: Path) -> None:
    """Other numbers and new categories in the test rows: the same statistics, the same training batches."""
    frame = panel()
    late = frame.groupby(["region", "shop"]).cumcount() >= 84
    other = frame.copy()
    other.loc[late, ["price", "rain"]] *= 100
    other.loc[late, "day"] = "new"
    other.loc[late, "sky"] = "9"
    bundles = []
    for name, one in (("ours", frame), ("other", other)):
        one.to_csv(tmp_path / f"{name}.csv", index=False)
        bundles.append(build(run_config(tmp_path / f"{name}.csv"))[1])
    assert bundles[0].state == bundles[1].state
    batches = [bundle.train.__getitems__(range(len(bundle.train))) for bundle in bundles]
    for name in batches[0]:
        assert torch.equal(batches[0][name], batches[1][name]), name
    assert bundles[1].test[3]["known_cat"][-7:].tolist() == [[0]] * 7
    assert not torch.equal(bundles[0].test[0]["known"], bundles[1].test[0]["known"])


def test_batches_hold_what_the_table_says(tmp_path: Path) -> None:
    frame = panel()
    frame.to_csv(tmp_path / "t.csv", index=False)
    _, bundle = build(run_config(tmp_path / "t.csv"))
    coder = CovariateCoder.from_state(bundle.state["covariates"])
    batch = bundle.test.__getitems__(range(len(bundle.test)))
    assert {name: tuple(batch[name].shape[1:]) for name in COVARIATES} == {
        "past": (14, 1),
        "past_cat": (14, 1),
        "known": (21, 1),
        "known_cat": (21, 1),
        "static": (1,),
        "static_cat": (2,),
    }
    for index in (0, 17, len(bundle.test) - 1):
        name, times = bundle.test.window_times(index)
        region, shop = name.split("/")
        rows = frame[(frame["region"] == region) & (frame["shop"] == shop)].set_index("date")
        rows = rows.loc[[str(day)[:10] for day in times]]
        known = batch["known"][index, :, 0].numpy() * coder.std["known"] + coder.mean["known"]
        np.testing.assert_allclose(known, rows["price"], atol=1e-5)
        past = batch["past"][index, :, 0].numpy() * coder.std["past"] + coder.mean["past"]
        np.testing.assert_allclose(past, rows["rain"].iloc[:14], atol=1e-5)
        days = ["?", *coder.vocabulary["known_cat"][0]]
        assert [days[i] for i in batch["known_cat"][index, :, 0]] == rows["day"].tolist()
        static = [["?", *levels][i] for levels, i in zip(coder.vocabulary["static_cat"], batch["static_cat"][index])]
        assert static == [region, rows["kind"].iloc[0]]
    assert coder.vocabulary["known_cat"] == [["feast", "rest", "work"]]


def test_a_gap_carries_the_past_on(tmp_path: Path) -> None:
    frame = panel(shops=1)
    frame.loc[100:103, "rain"] = np.nan
    frame.to_csv(tmp_path / "t.csv", index=False)
    _, bundle = build(run_config(tmp_path / "t.csv"))
    rows = torch.cat([bundle.test[i]["past"][-1] for i in range(len(bundle.test))])
    first = next(i for i in range(len(bundle.test)) if str(bundle.test.window_times(i)[1][13])[:10] == "2024-04-09")
    assert torch.equal(rows[first : first + 5], rows[first].expand(5))  # from day 99 on, which is the last seen


@pytest.mark.parametrize("model", FORECASTERS)
def test_the_future_of_what_is_only_known_up_to_now_changes_no_forecast(tmp_path: Path, model: str) -> None:
    frame = panel(80)
    frame.to_csv(tmp_path / "ours.csv", index=False)
    ours = run_config(tmp_path / "ours.csv", model)
    task, bundle = build(ours)
    with torch.no_grad():
        for weight in task.network.correction[-1].parameters():  # type: ignore[union-attr]
            weight.normal_()
    last = len(frame) - 7
    theirs = frame.copy()
    theirs.loc[last:, "y"] = 1e3
    theirs.loc[last:, "rain"] = -1e3
    theirs.loc[last:, "sky"] = "2"
    theirs.to_csv(tmp_path / "theirs.csv", index=False)
    other = ForecastTask.load_data(replace(ours, data=str(tmp_path / "theirs.csv")), state=bundle.state)

    def forecast(one: DataBundle) -> torch.Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return task.forward_batch(one.test.__getitems__([len(one.test) - 1]))

    assert torch.equal(forecast(bundle), forecast(other))
    theirs.loc[last:, "price"] += 1.0  # what is known ahead does change it
    theirs.to_csv(tmp_path / "theirs.csv", index=False)
    other = ForecastTask.load_data(replace(ours, data=str(tmp_path / "theirs.csv")), state=bundle.state)
    assert not torch.allclose(forecast(bundle), forecast(other))


# -- the models -------------------------------------------------------------------------------------------------------


def test_without_covariates_the_model_is_the_bare_one(tmp_path: Path) -> None:
    frame = panel()[["date", "region", "y"]].head(120)
    frame.to_csv(tmp_path / "t.csv", index=False)
    none = {**dict.fromkeys(OPTIONS.values()), "id_columns": None}
    task, bundle = build(run_config(tmp_path / "t.csv", **none))
    assert not isinstance(task.network, CovariateModel)
    assert "covariates" not in bundle.state
    assert not set(COVARIATES) & set(bundle.test[0])


@pytest.mark.parametrize("model", FORECASTERS)
def test_at_the_start_it_is_the_base_model(tmp_path: Path, model: str) -> None:
    panel(80).to_csv(tmp_path / "t.csv", index=False)
    task, bundle = build(run_config(tmp_path / "t.csv", model))
    batch = bundle.test.__getitems__(range(4))
    assert isinstance(task.network, CovariateModel)
    torch.manual_seed(1)
    ours = task.forward_batch(batch)
    torch.manual_seed(1)
    assert torch.equal(ours, task.network.base(batch["x"], batch["x_mark"], batch["y_mark"]))


@pytest.mark.parametrize("model", FORECASTERS)
def test_every_model_gains_from_a_covariate_that_decides(tmp_path: Path, model: str) -> None:
    """y = 3 price + noise: without the price of the day nothing beats the variance, 1; with it 0.1 is left."""
    panel(200, shops=2).to_csv(tmp_path / "t.csv", index=False)
    errors = []
    for roles in ({}, dict.fromkeys(OPTIONS.values())):
        task, bundle = build(run_config(tmp_path / "t.csv", model, **roles))
        optimizer = torch.optim.Adam(task.parameters(), 1e-2)
        order = torch.Generator().manual_seed(0)
        task.train()
        for _ in range(80):
            chosen = torch.randint(len(bundle.train), (32,), generator=order).tolist()
            optimizer.zero_grad()
            task.training_loss(bundle.train.__getitems__(chosen)).backward()
            optimizer.step()
        task.eval()
        batch = bundle.test.__getitems__(range(len(bundle.test)))
        with torch.no_grad():
            errors.append((task.forward_batch(batch) - task.target(batch)).square().mean().item())
    assert errors[0] < 0.45 < 0.8 < errors[1]


@pytest.mark.parametrize(
    "shape",
    [
        CovariateShape(past=2),
        CovariateShape(known=1),
        CovariateShape(static=3),
        CovariateShape(past_cat=(4,), known_cat=(3, 2)),
        CovariateShape(static_cat=(5,)),
    ],
    ids=str,
)
def test_each_role_alone(shape: CovariateShape) -> None:
    from attn_timeseries.models.base import SeriesShape
    from attn_timeseries.models.dlinear import DLinear

    base = DLinear(MODELS["dlinear"].config(), SeriesShape(seq_len=10, label_len=2, pred_len=4, channels=2, marks=1))
    net = CovariateModel(base, shape)
    rows = {"p": (3, 10), "k": (3, 14), "s": (3,)}
    given: dict[str, torch.Tensor] = {}
    for role, size in vars(shape).items():
        if isinstance(size, tuple) and size:
            given[role] = torch.stack([torch.randint(n, rows[role[0]]) for n in size], dim=-1)
        elif size:
            given[role] = torch.randn(*rows[role[0]], size)
    x, x_mark, y_mark = torch.randn(3, 10, 2), torch.randn(3, 10, 1), torch.randn(3, 6, 1)
    out = net(x, x_mark, y_mark, **given)
    assert out.shape == (3, 4, 2)
    for _ in range(2):  # the last layers begin at zero, so the first step moves only them
        net(x, x_mark, y_mark, **given).square().sum().backward()
        with torch.no_grad():
            for p in net.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    with pytest.raises(ValueError, match="got none"):
        net(x, x_mark, y_mark)
    with pytest.raises(ValueError, match="no kind of covariate"):
        net(x, x_mark, y_mark, **given, weather=x)
    name, value = next(iter(given.items()))
    with pytest.raises(ValueError, match=f"built for {name} of shape"):
        net(x, x_mark, y_mark, **{**given, name: value[:, :-1]})


def test_a_regression_on_the_covariates_stands_beside(tmp_path: Path) -> None:
    """On y = 3 price + noise it leaves the noise, a tenth; nothing after the training border moves it."""
    frame = panel(200, shops=2)
    frame.loc[20:24, "y"] = np.nan
    frame.to_csv(tmp_path / "ours.csv", index=False)
    run = run_config(tmp_path / "ours.csv", train_fraction=0.6)
    bundle = ForecastTask.load_data(run)
    rows = {row["model"]: row["mse"] for row in ForecastTask.baselines(run, bundle)}
    assert rows["regression (closed form)"] < 0.15 < 0.8 < rows["dlinear (closed form)"]
    frame.loc[frame.groupby("region").cumcount() >= 120, ["y", "price"]] = 1e3
    frame.to_csv(tmp_path / "other.csv", index=False)
    other = ForecastTask.load_data(replace(run, data=str(tmp_path / "other.csv")), state=bundle.state)
    batch = bundle.test.__getitems__([0])
    effects = [fit_effect(one.train) for one in (bundle, other)]
    assert effects[0] is not None
    assert effects[1] is not None
    assert torch.equal(effects[0](batch), effects[1](batch))


def test_rules_without_weights_take_no_covariates(tmp_path: Path) -> None:
    panel(80).to_csv(tmp_path / "t.csv", index=False)
    task, bundle = build(run_config(tmp_path / "t.csv", "naive"))
    batch = bundle.test.__getitems__([0])
    assert torch.equal(task.forward_batch(batch), batch["x"][:, -1:].expand(-1, 7, -1))


# -- several series ---------------------------------------------------------------------------------------------------


def test_short_series_are_used_where_possible_and_told(tmp_path: Path) -> None:
    frame = pd.concat(
        [panel(120, shops=2), panel(25, shops=3).tail(25).assign(shop="new"), panel(8, shops=1).assign(shop="tiny")]
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    _, bundle = build(run_config(tmp_path / "t.csv"))
    assert bundle.train.series == ["a/000", "b/000"]
    assert bundle.facts["too short for a window"] == "train 2 series, val 2 series, test 2 series"
    frame = pd.concat([panel(120, shops=2), panel(40, shops=1).assign(shop="new")])
    frame.to_csv(tmp_path / "t.csv", index=False)
    _, bundle = build(run_config(tmp_path / "t.csv"))
    assert bundle.train.series == ["a/000", "b/000", "a/new"]
    assert bundle.facts["too short for a window"] == "val 1 series"


def test_ids_in_the_test_part_only(tmp_path: Path) -> None:
    """A shop of a new region opens after the last training day: forecast all the same, its level unknown."""
    old = panel(120, shops=2)
    new = panel(120, shops=1, seed=5).tail(30).assign(region="z", shop="9", kind="other")
    frame = pd.concat([old, new])
    frame.to_csv(tmp_path / "t.csv", index=False)
    task, bundle = build(run_config(tmp_path / "t.csv", split="time"))
    assert bundle.train.series == ["a/000", "b/000"]
    assert bundle.state["covariates"]["vocabulary"]["static_cat"] == [["a", "b"], ["big"]]
    windows = [i for i in range(len(bundle.test)) if bundle.test.window_times(i)[0] == "z/9"]
    assert len(windows) > 3
    batch = bundle.test.__getitems__(windows)
    assert (batch["static_cat"] == 0).all()
    assert task.forward_batch(batch).isfinite().all()
    # No target of training lies after a target of test in any series.
    train = max(bundle.train.window_times(i)[1][-1] for i in range(len(bundle.train)))
    test = min(bundle.test.window_times(i)[1][14] for i in range(len(bundle.test)))
    assert train < test
    with pytest.raises(UserError, match=r"series 'z/9' was not in training and the scaler is one a series"):
        build(run_config(tmp_path / "t.csv", split="time", scaler="series"))


@pytest.mark.parametrize("scaler", ["global", "series"])
def test_one_constant_series_among_a_hundred(tmp_path: Path, scaler: str) -> None:
    from attn_shared.trainer import evaluate_split

    rng = np.random.default_rng(0)
    dates = pd.date_range("2024-01-01", periods=80, freq="D")
    frames = [
        pd.DataFrame({"date": dates, "id": f"s{i}", "y": 7.0 if i == 40 else rng.normal(size=80)}) for i in range(100)
    ]
    pd.concat(frames).to_csv(tmp_path / "t.csv", index=False)
    none = dict.fromkeys(OPTIONS.values())
    run = run_config(tmp_path / "t.csv", **none, id_columns="id", scaler=scaler)
    task, bundle = build(run)
    assert "column 'y' is constant in series 's40'" in bundle.facts["found"]
    figures = evaluate_split(task, bundle, "test", run)
    assert all(np.isfinite(value) for value in figures.values())
    for row in ForecastTask.baselines(run, bundle):
        assert all(np.isfinite(value) for name, value in row.items() if isinstance(value, float)), row


# -- forecasts of files -----------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> ForecastTask:
    """A model that has learnt nothing but to read prices: forecast = 3 price."""
    panel().to_csv(tmp_path / "train.csv", index=False)
    task, _ = build(run_config(tmp_path / "train.csv"))
    return task


def predict(task: ForecastTask, frame: pd.DataFrame, folder: Path, **options: Any) -> pd.DataFrame:
    frame.to_csv(folder / "new.csv", index=False)
    return pd.read_csv(task.predict_files([folder / "new.csv"], folder / "out", options)[0], dtype={"shop": str})


def test_rows_ahead_and_a_file_of_the_future_say_the_same(trained: ForecastTask, tmp_path: Path) -> None:
    with torch.no_grad():
        for weight in trained.network.effect.parameters():  # type: ignore[union-attr]
            weight.normal_()
    ahead = with_rows_ahead()
    ahead.loc[35, "day"] = "never seen"
    ours = predict(trained, ahead, tmp_path)
    assert list(ours.columns) == ["date", "region", "shop", "y"]
    assert len(ours) == 28
    assert ours["shop"].unique().tolist() == ["000", "001"]
    assert ours["date"][0] == "2024-02-03"
    future = ahead[ahead["y"].isna()][["shop", "region", "date", "price", "day"]]
    future.iloc[::-1].to_csv(tmp_path / "future.csv", index=False)
    theirs = predict(trained, ahead[ahead["y"].notna()], tmp_path, future=str(tmp_path / "future.csv"))
    pd.testing.assert_frame_equal(ours, theirs)
    ahead.loc[36, "price"] += 1
    changed = predict(trained, ahead, tmp_path)
    assert (ours["y"] != changed["y"]).tolist() == [i == 3 for i in range(28)]


def test_the_forecast_of_a_file_is_that_of_the_window(trained: ForecastTask, tmp_path: Path) -> None:
    with torch.no_grad():
        for weight in trained.network.parameters():
            weight.copy_(torch.randn_like(weight) / 5)
    frame = panel()
    frame.to_csv(tmp_path / "train.csv", index=False)
    bundle = ForecastTask.load_data(trained.config)
    index = max(i for i in range(len(bundle.test)) if bundle.test.window_times(i)[0] == "a/000")
    with torch.no_grad():
        scaled = trained.forward_batch(bundle.test.__getitems__([index]))[0].double().numpy()
    frame.loc[frame.groupby(["region", "shop"]).cumcount() >= 113, "y"] = np.nan
    out = predict(trained, frame, tmp_path)
    np.testing.assert_allclose(
        out["y"][:7], scaled[:, 0] * trained.scaler.std[0, 0] + trained.scaler.mean[0, 0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f[f["y"].notna()], r"'a/000' needs 'price', 'day' for 7 steps ahead and they end before 2024-02-03"),
        (lambda f: f.drop(index=39), r"'a/000' needs .* they end before 2024-02-09"),
        (
            lambda f: f.assign(price=f["price"].where(f.index != 36)),
            r"'price' of series 'a/000' has no value at 2024-02-06",
        ),
        (lambda f: f.drop(columns="rain"), r"unknown covariate 'rain'"),
        (lambda f: f.drop(columns="shop"), r"unknown id column 'shop'"),
        (lambda f: f[f.index % 40 > 35], r"'y' holds no number|has no value"),
        (lambda f: f[f.index % 40 > 25], r"the history of series 'a/000' has 7 steps and the model looks back 14"),
    ],
)
def test_what_a_forecast_needs(trained: ForecastTask, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        predict(trained, change(with_rows_ahead()), tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(index=36), r"'a/000' needs .* they end before 2024-02-09|has no value at 2024-02-06"),
        (lambda f: f[f.index % 40 < 36], r"'a/000' needs .* they end before 2024-02-06"),
        (lambda f: f.drop(columns="price"), r"future\.csv: unknown covariate 'price'"),
        (lambda f: f.assign(price="dear"), r"future\.csv:2: 'dear' in column 'price' is not a number"),
        (lambda f: f[f["region"] == "a"], r"future\.csv has no rows of series 'b/000', which new\.csv has"),
        (lambda f: f.drop(columns="region"), r"future\.csv: unknown id column 'region'"),
        (lambda f: f.assign(date=f["date"] + " 05:30"), r"they end before 2024-02-03"),
        (lambda f: f.assign(date=f["date"] + "T00:00:00+02:00"), r"must both have a UTC offset or none"),
        (lambda f: f.iloc[:0], r"future\.csv holds a header but no rows"),
    ],
)
def test_a_future_that_does_not_fit(trained: ForecastTask, tmp_path: Path, change: Any, message: str) -> None:
    ahead = with_rows_ahead()
    change(ahead[ahead["y"].isna()][["region", "shop", "date", "price", "day"]]).to_csv(
        tmp_path / "future.csv", index=False
    )
    with pytest.raises(UserError, match=message):
        predict(trained, ahead[ahead["y"].notna()], tmp_path, future=str(tmp_path / "future.csv"))


def test_a_future_needs_one_input_and_a_model_that_reads_it(trained: ForecastTask, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="belongs to one input, and there are 2"):
        trained.predict_files([tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "out", {"future": "f.csv"})
    with pytest.raises(UserError, match=r"f\.csv does not exist"):
        predict(trained, with_rows_ahead(), tmp_path, future=str(tmp_path / "f.csv"))
    none = dict.fromkeys(OPTIONS.values())
    task, _ = build(run_config(tmp_path / "train.csv", **none))
    with pytest.raises(UserError, match="trained without known covariates"):
        predict(task, with_rows_ahead(), tmp_path, future="f.csv")


def test_short_series_of_a_file_are_left_out(
    trained: ForecastTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ahead = with_rows_ahead()
    short = ahead[(ahead.index >= 40) | (ahead.index > 25)].assign()
    out = predict(trained, short, tmp_path)
    assert len(out) == 21
    assert "1 of 4 series are shorter than the 14 steps that the model looks back, and are left out: 'a/000'" in (
        capsys.readouterr().err
    )


def test_new_shops_and_regions(trained: ForecastTask, tmp_path: Path) -> None:
    out = predict(trained, with_rows_ahead().assign(region="far", kind="new", shop=lambda f: f.index // 40), tmp_path)
    assert len(out) == 28
    assert np.isfinite(out["y"]).all()


# -- the synthetic set ------------------------------------------------------------------------------------------------


def test_the_synthetic_set_is_the_same_every_time_and_its_covariates_decide() -> None:
    from attn_timeseries.data.synthetic import demand

    assert demand().equals(demand())
    run = replace(run_config("demand"), data_args=ForecastDataConfig(seq_len=28, label_len=14, pred_len=14))
    task, bundle = build(run)
    assert isinstance(task.network, CovariateModel)
    assert bundle.facts["static categories"] == "region, format"
    assert bundle.protocol.count("with known and past and static covariates") == 1
    none = replace(run, data_args=replace(run.data_args, **{name: [] for name in OPTIONS.values()}))
    assert "covariates" not in ForecastTask.load_data(none).state


def test_a_table_of_a_thousand_series(tmp_path: Path) -> None:
    """Read whole, with gaps, two covariates and a level of the id."""
    days = pd.date_range("2021-01-01", periods=100, freq="D").strftime("%Y-%m-%d")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "date": np.tile(days, 1000),
            "region": np.repeat([f"r{i % 10}" for i in range(1000)], 100),
            "shop": np.repeat([f"{i:04d}" for i in range(1000)], 100),
            "y": rng.normal(size=10**5).round(3),
            "price": rng.normal(size=10**5).round(2),
        }
    )
    frame.drop(index=rng.choice(10**5, size=500, replace=False)).to_csv(tmp_path / "t.csv", index=False)
    config = ForecastDataConfig(
        id_columns=["region", "shop"], columns=["y"], known_covariates="price", static_categories="region"
    )
    table = read_table(tmp_path / "t.csv", config)
    assert len(table.series) == 1000
    assert sum(len(one.times) for one in table.series) > 99_900
