"""Training, evaluation, prediction and export of click models through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from attn_recsys.cli import APP, kind_of_file, main
from attn_recsys.clicks.baselines import fitted
from attn_recsys.clicks.data import load_table, prepare
from attn_recsys.clicks.options import ClicksDataConfig
from attn_recsys.clicks.predict import log_odds
from attn_recsys.clicks.synthetic import synthetic_clicks
from attn_recsys.clicks.task import ClicksTask
from attn_shared import trainer
from attn_shared.errors import UserError
from attn_shared.task import DataBundle


def results(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


def test_train_and_report(own: Path) -> None:
    found = results(own)
    test = found["splits"]["test"]
    rows = {row["model"]: row for row in found["baselines"]}
    assert set(rows) == {"share of clicks", "item's share", "logistic regression", "gradient boosting"}
    assert rows["share of clicks"]["auc"] == pytest.approx(0.5)
    for row in rows.values():
        assert set(row) - {"model", "note"} == set(test)
    assert {"auc", "gauc", "logloss", "ece", "auc, 95% from"} <= set(test)
    assert "By time" in found["protocol"]
    for name in ("calibration", "activity"):
        assert (own / "plots" / f"{name}.png").stat().st_size > 5000


def test_evaluation_does_not_depend_on_batches(own: Path) -> None:
    expected = results(own)["splits"]["test"]
    for size in (1, 37, 1000):
        found = trainer.evaluate(APP, own, overrides={"trainer.eval_batch_size": size})["metrics"]
        assert found == pytest.approx(expected, abs=1e-6)


def test_simple_models_learn_what_is_planted(train_clicks: Callable[..., Path]) -> None:
    """Pairs of fields matter: what multiplies them finds more than what adds."""
    run = train_clicks("--data", "synthetic_clicks", "--model", "fm", "--optim.lr", "0.01")
    found = results(run)
    rows = {row["model"]: row for row in found["baselines"]}
    assert rows["logistic regression"]["auc"] > 0.65
    assert rows["gradient boosting"]["auc"] > rows["logistic regression"]["auc"]
    assert found["splits"]["test"]["auc"] > rows["logistic regression"]["auc"] + 0.02


# -- files of one's own -----------------------------------------------------------------------------------------------


def args(**options: object) -> ClicksDataConfig:
    return ClicksDataConfig(**options)  # type: ignore[arg-type]


def test_columns_are_found(table: Path) -> None:
    found = load_table(str(table), args(multi=["tags"], sequence="history"))
    assert list(found.single) == ["user_id", "item_id", "brand", "code"]
    assert list(found.numeric) == ["price"]
    assert (found.user, found.item) == ("user_id", "item_id")
    assert found.item_columns == ("brand", "tags")
    assert set(found.single["code"].names) == {"007", "7", "08"}  # as written
    assert found.past is not None
    assert found.past.start[-1] == len(found.past.code)
    encoder = prepare(found, args(multi=["tags"], sequence="history")).encoder
    assert encoder.shape.behaviour == ("item_id", "brand", "tags")


def test_parquet_gives_the_same(table: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(table, dtype={"item_id": str, "code": str, "history": str, "tags": str})
    frame.to_parquet(tmp_path / "shop.parquet")
    options = args(multi=["tags"], sequence="history")
    a, b = (prepare(load_table(str(path), options), options) for path in (table, tmp_path / "shop.parquet"))
    assert a.state == b.state
    np.testing.assert_array_equal(a.train.names, b.train.names)
    np.testing.assert_array_equal(a.train.numbers, b.train.numbers)
    assert kind_of_file(str(table)) == kind_of_file(str(tmp_path / "shop.parquet")) == "clicks"


BAD = {
    "label 2": (
        lambda f: f.assign(clicked=[2, *f["clicked"][1:]]),
        {},
        r"bad.csv:2: '2' in column 'clicked' is no label",
    ),
    "one label": (lambda f: f.assign(clicked=1), {}, r"is 1 in every row"),
    "no label": (lambda f: f.drop(columns="clicked"), {}, r"no column that is known to hold the labels"),
    "labels and negatives": (lambda f: f, {"negatives": 2}, r"has labels \(clicked\)"),
    "no such column": (lambda f: f, {"multi": ["tag"]}, r"no column 'tag', which --data_args.multi names"),
    "no items": (lambda f: f.drop(columns="item_id"), {"sequence": "history"}, r"the column of items must be known"),
    "word among numbers": (
        lambda f: f.assign(price=["dear", *f["price"][1:].astype(str)]),
        {"numeric": ["price"]},
        r"bad.csv:2: 'dear' in column 'price' is no number",
    ),
    "infinite": (lambda f: f.assign(price=[np.inf, *f["price"][1:]]), {}, r"bad.csv:2: an infinite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_a_sentence(case: str, table: Path, tmp_path: Path) -> None:
    change, options, message = BAD[case]
    change(pd.read_csv(table, dtype={"code": str})).to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(UserError, match=message) as caught:
        load_table(str(tmp_path / "bad.csv"), args(**options))
    assert "\n" not in str(caught.value)


def test_clicks_alone(table: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(table, dtype={"code": str})
    frame[frame["clicked"] == 1].drop(columns="clicked").to_csv(tmp_path / "clicks.csv", index=False)
    options = args(negatives=2)
    made = prepare(load_table(str(tmp_path / "clicks.csv"), options), options)
    assert made.train.label.mean() == pytest.approx(1 / 3)
    assert "SAMPLED" in made.protocol


# -- prediction and export --------------------------------------------------------------------------------------------


def test_predictions_are_the_models(own: Path, table: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(table, dtype=str, keep_default_na=False)
    cut = frame.drop(columns=["clicked", "time"]).tail(60)
    cut.iloc[0, 0] = "somebody new"
    cut.to_csv(tmp_path / "new.csv", index=False)
    assert main(["predict", str(own), str(tmp_path / "new.csv"), "--output", str(tmp_path / "out")]) == 0
    found = pd.read_csv(tmp_path / "out" / "new_clicks.csv", dtype={"user_id": str})
    assert list(found.columns) == [*cut.columns, "p_click"]
    task, config = trainer.load_task(APP, own)
    assert isinstance(task, ClicksTask)
    bundle = trainer.load_data(APP, config, task.data_state)
    expected = 1 / (1 + np.exp(-log_odds(task, bundle.test)))  # the last rows of the table are for test
    np.testing.assert_allclose(found["p_click"][1:], expected[-59:], rtol=2e-5)
    cut.drop(columns="brand").to_csv(tmp_path / "less.csv", index=False)
    with pytest.raises(UserError, match=r"less.csv lacks what the model was trained with: brand"):
        trainer.predict(APP, own, [tmp_path / "less.csv"], tmp_path / "out")
    assert not (tmp_path / "out" / "less_clicks.csv").exists()


def test_export_serves_what_the_model_predicts(own: Path, table: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    target = tmp_path / "model.onnx"
    assert main(["export", str(own), "--output", str(target), "--calls", "5", "--candidates", "50"]) == 0
    frame = pd.read_csv(table, dtype=str, keep_default_na=False).tail(40)
    user = frame.iloc[0]
    rows = [
        {
            "item_id": row["item_id"],
            "brand": row["brand"],
            "tags": row["tags"].split(),
            "price": float(row["price"]) if row["price"] else None,
            "code": row["code"],
        }
        for _, row in frame.iterrows()
    ]
    request = {"user_id": user["user_id"], "past": user["history"].split()}
    frame.assign(user_id=user["user_id"], history=user["history"]).to_csv(tmp_path / "same.csv", index=False)
    (written,) = trainer.predict(APP, own, [tmp_path / "same.csv"], tmp_path / "out")
    script = (
        "import json, sys; from pathlib import Path; from attn_recsys.clicks.serving import Ranker;"
        "request, rows = json.load(sys.stdin);"
        f"print(json.dumps(Ranker(Path({str(target)!r})).rank(request, rows).tolist()));"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([request, rows]),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    np.testing.assert_allclose(json.loads(done.stdout), pd.read_csv(written)["p_click"], atol=2e-6)
    facts = json.loads(__import__("onnx").load(target).metadata_props[-1].value)
    assert {"fields", "numeric", "behaviour"} <= set(facts)
    assert str(tmp_path).encode() not in target.read_bytes()


def test_export_is_refused_in_a_sentence(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        ([str(own)], "name the file to write"),
        ([str(own), "--output", "x.pt"], "ends in .onnx"),
        ([str(own), "--output", str(tmp_path / "m.onnx"), "--calls", "no"], "--calls takes a whole number"),
        (
            [str(own), "--output", str(tmp_path / "m.onnx"), "--tolerance", "1e-30", "--calls", "0"],
            "differs from PyTorch",
        ),
    ):
        assert main(["export", *argv]) != 0
        assert message in capsys.readouterr().err
    assert not (tmp_path / "m.onnx").exists()


def test_help_and_lists_import_nothing_heavy(table: Path) -> None:
    script = (
        "import sys; from attn_recsys.cli import main;"
        "codes = [main(argv) for argv in (['export', '--help'], ['models'], ['data', 'list'])];"
        "heavy = {'torch', 'numpy', 'pandas'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.data
def test_frappe() -> None:
    """Counts of the real set, and that a drawn app has its own cost."""
    try:
        table = load_table("frappe", ClicksDataConfig())
    except UserError as error:
        pytest.skip(str(error))
    made = prepare(table, ClicksDataConfig())
    assert table.rows == 17_421
    assert made.table.rows == 3 * 17_421
    cost: dict[int, set] = {}
    for item, value in zip(made.table.single["item"].code, made.table.single["cost"].code):
        cost.setdefault(int(item), set()).add(int(value))
    assert {len(values) for values in cost.values()} == {1}
    assert made.train.label.mean() == pytest.approx(1 / 3)
    assert torch.is_tensor(made.train.__getitems__([0])["names"])


def test_simple_models_are_fitted_once_for_equal_data() -> None:
    def bundle(shuffle: int) -> DataBundle:
        args = ClicksDataConfig(shuffle=shuffle)
        made = prepare(synthetic_clicks(400), args)
        return DataBundle(train=made.train, val=made.val, test=made.test, state=made.state)

    first = fitted(bundle(0))
    assert fitted(bundle(0)) is first
    other = fitted(bundle(1))
    assert [one.name for one in other] == [one.name for one in first]
    assert any((a.odds != b.odds).any() for a, b in zip(first, other))
