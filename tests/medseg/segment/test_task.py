"""Training, evaluation, prediction and scoring of files through the command line, on volumes that the test writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from attn_medseg.cli import APP, main
from attn_medseg.segment import baselines, data, metrics
from attn_medseg.segment.corpus import Case, Corpus, Image
from attn_medseg.segment.options import SegmentDataConfig, SegmentTaskConfig
from attn_medseg.segment.task import SegmentTask, score_case
from attn_shared import trainer

SMALL = (
    "--model_args.channels",
    "4,8",
    "--preset",
    "none",
    "--trainer.accelerator",
    "cpu",
    "--trainer.progress",
    "false",
)
AFFINE = np.array([[-1.1, 0, 0, 3.0], [0, 0, 2.0, 4.0], [0, 1.1, 0, 5.0], [0, 0, 0, 1.0]])  # left, head, front


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two bright boxes in noise, in about the same place everywhere; one case in four lacks the second."""
    rng = np.random.default_rng(seed)
    label = np.zeros((18 + seed % 3, 16, 10 + seed % 2), np.uint8)
    x, y, z = (int(one) for one in rng.integers(2, 4, 3))
    label[x : x + 8, y : y + 7, z : z + 5] = 1
    if seed % 4:
        label[x + 9 : x + 14, y + 3 : y + 10, z : z + 5] = 2
    image = 200 * (label == 1) + 400 * (label == 2) + 60 * rng.random(label.shape)
    return image.astype(np.int16), label


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("boxes")
    for part, first, count in (("train", 0, 8), ("val", 20, 3), ("test", 40, 5)):
        for kind in ("images", "masks"):
            (made / part / kind).mkdir(parents=True)
        for number in range(first, first + count):
            image, label = drawn(number)
            nibabel.save(nibabel.Nifti1Image(image, AFFINE), made / part / "images" / f"p{number}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(label, AFFINE), made / part / "masks" / f"p{number}.nii.gz")
    return made


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    limits = ("--trainer.max_epochs", "14", "--optim.lr", "0.02", "--data_args.augment", "none")
    few = ("--task_args.bootstrap", "50")
    assert main(["train", "--data", str(folder), "--runs", str(runs), *SMALL, *limits, *few]) == 0
    (file,) = runs.glob("**/metrics.json")
    return file.parent


@pytest.fixture(scope="module")
def predicted(run: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("predicted")
    assert main(["predict", str(run), str(folder / "test" / "images"), "--output", str(output)]) == 0
    return output


def test_train_and_report(run: Path) -> None:
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    test = found["splits"]["test"]
    assert test["dice"] > 0.5
    assert test["cases"] == 5
    assert test["dice, 95% from"] <= test["dice"] <= test["dice, 95% to"]
    rows = {row["model"]: row for row in found["baselines"]}
    assert set(rows) == {"nothing", "mean shape"}
    assert rows["nothing"]["dice"] == 0
    assert rows["nothing"]["missed"] == sum(1 + bool(number % 4) for number in range(40, 45))
    assert 0.2 < rows["mean shape"]["dice"] < 1
    for text in ("HD95 pooled", "missed and invented structures have no distance"):
        assert text in found["protocol"]
    for name in ("scores", "worst_1", "best_2"):
        assert (run / "plots" / f"{name}.png").stat().st_size > 5000


def test_batches_change_no_figure(run: Path) -> None:
    kept = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["splits"]["test"]
    again = trainer.evaluate(APP, run, overrides={"trainer.eval_batch_size": 3})["metrics"]
    assert again == pytest.approx(kept, abs=1e-5, nan_ok=True)


def test_files_are_scored_as_the_model_is(
    run: Path, folder: Path, predicted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["splits"]["test"]
    options = ["--task_args.bootstrap", "50", "--output", str(tmp_path / "own.json")]
    cases = ["--cases", str(tmp_path / "cases.csv")]
    assert main(["eval", "--predictions", str(predicted), "--data", str(folder), *options, *cases]) == 0
    own = json.loads((tmp_path / "own.json").read_text(encoding="utf-8"))
    assert "p40" not in own["definition"]
    assert {name: own["metrics"][name] for name in kept} == pytest.approx(kept, abs=1e-6)
    lines = list(csv.DictReader((tmp_path / "cases.csv").open()))
    assert len(lines) == 10
    dice = [float(line["dice"]) for line in lines if line["structure"] == "1" or line["structure"].endswith("1")]
    assert float(np.mean(dice)) == pytest.approx(
        kept[next(n for n in kept if n.startswith("dice ") and n.endswith("1"))], abs=1e-4
    )
    # The masks alone, and the run itself, give the same.
    truth = str(folder / "test" / "masks")
    assert main(["eval", "--predictions", str(predicted), "--truth", truth, *options]) == 0
    assert json.loads((tmp_path / "own.json").read_text(encoding="utf-8"))["metrics"]["dice"] == pytest.approx(
        kept["dice"], abs=1e-6
    )
    for name, score in (("nnunet", "foreground_mean Dice"), ("synapse", "dice")):
        given = [f"--protocol={name}", "--output", str(tmp_path / f"{name}.json")]
        assert main(["eval", str(run), *given]) == 0
        one = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert main(["eval", "--predictions", str(predicted), "--data", str(folder), *given]) == 0
        other = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert one["metrics"] == pytest.approx(other["metrics"], abs=1e-9)
        if name == "nnunet":
            assert one["metrics"][score] == pytest.approx(kept["dice"], abs=1e-6)
            assert set(one["metric_per_case"][0]["metrics"]) == {"1", "2"}
            assert one["foreground_mean"]["Dice"] == one["metrics"][score]
    assert "in voxels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predictions", "{out}", "--data", "{data}", "--protocol", "isic"], "ISIC scores one structure"),
        (["--predictions", "{out}", "--data", "{data}", "--protocol", "acdc"], "the phase is not known"),
        (["--predictions", "{out}", "--data", "{data}", "--protocol", "synaps"], "did you mean"),
        (["--predictions", "{out}", "--data", "{data}", "--split", "all"], "lacks the masks of 11 of 16 cases"),
        (["--predictions", "{out}"], "needs their true masks"),
        (["--predictions", "nowhere", "--data", "{data}"], "there is no folder nowhere"),
        (["--predictions", "{out}", "--truth", "{data}/train/masks"], "lacks the masks of 8 of 8 cases"),
        (["nowhere", "--protocol", "acdc"], "there is no run"),
        (["--protocol", "acdc"], "eval needs one run"),
        (["--predictions", "{out}", "--data", "{data}", "--polcy", "x"], "unknown option --polcy"),
    ],
)
def test_what_cannot_be_scored(
    words: list[str], message: str, folder: Path, predicted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *(word.format(out=predicted, data=folder) for word in words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_predictions_that_do_not_fit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = folder / "test" / "masks"
    for path in truth.iterdir():
        loaded = nibabel.load(path)
        moved = np.diag([1.0, 1.0, 1.0, 1.0])
        nibabel.save(nibabel.Nifti1Image(np.asanyarray(loaded.dataobj), moved), tmp_path / path.name)
    assert main(["eval", "--predictions", str(tmp_path), "--truth", str(truth), "--task_args.bootstrap", "0"]) == 0
    told = capsys.readouterr().out
    assert "5 predictions lie elsewhere in space" in told
    assert "dice" in told
    odd = nibabel.Nifti1Image(np.full((18, 16, 10), 7, np.uint8), AFFINE)
    nibabel.save(odd, tmp_path / "p40.nii.gz")
    assert main(["eval", "--predictions", str(tmp_path), "--truth", str(truth)]) == 2
    assert "p40.nii.gz holds the value 7, which is no label from 0 to 2" in capsys.readouterr().err
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), AFFINE), tmp_path / "p40.nii.gz")
    assert main(["eval", "--predictions", str(tmp_path), "--truth", str(truth)]) == 2
    assert "p40.nii.gz is of 4 x 4 x 4 voxels" in capsys.readouterr().err


def test_pictures_of_any_tool(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("images", "masks", "volumes"):
        (tmp_path / kind).mkdir()
    for number in range(4):
        label = np.zeros((20, 20), np.uint8)
        label[2 : 8 + number, 5:18] = 255
        for kind, values in (("images", rng.integers(0, 255, (20, 20)).astype(np.uint8)), ("masks", label)):
            sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / kind / f"s{number}.png"))
        # As tools write arrays: width comes first in the file.
        made = sitk.GetImageFromArray((label > 0).astype(np.float32))
        sitk.WriteImage(made, str(tmp_path / "volumes" / f"s{number}_pred.nii.gz"))
    for folder in ("masks", "volumes"):
        for truth in (["--data", str(tmp_path), "--split", "all"], ["--truth", str(tmp_path / "masks")]):
            out = tmp_path / "out.json"
            words = ["--predictions", str(tmp_path / folder), *truth, "--protocol", "isic", "--output", str(out)]
            assert main(["eval", *words]) == 0
            found = json.loads(out.read_text(encoding="utf-8"))["metrics"]
            assert (found["threshold_jaccard"], found["images"]) == (1, 4)


def test_threshold_finds_what_is_dark() -> None:
    def picture(seed: int) -> tuple[Image, Image]:
        rng = np.random.default_rng(seed)
        label = np.zeros((20, 24), np.uint8)
        label[4:12, 6 + seed : 14 + seed] = 1
        return Image(values=(200 - 100.0 * label + 20 * rng.random(label.shape))[None].astype(np.float32)), Image(
            values=label
        )

    cases = tuple(
        Case(name=f"c{i}", patient=f"p{i}", image=lambda i=i: picture(i)[0], label=lambda i=i: picture(i)[1])  # type: ignore[misc]
        for i in range(8)
    )
    corpus = Corpus(cases=cases, structures=("spot",), ndim=2, channels=1, unit="px")
    bundle = data.build(corpus, SegmentDataConfig(), "spots")
    rows = {row["model"]: row for row in baselines.rows(bundle, SegmentTaskConfig(bootstrap=0))}
    assert rows["threshold"]["dice"] > 0.99
    assert rows["threshold"]["note"].startswith("below")
    assert 0 < rows["mean shape"]["dice"] < rows["threshold"]["dice"]


def test_slices_are_scored_one_by_one(folder: Path) -> None:
    bundle = data.load_bundle(str(folder), SegmentDataConfig(slices=2))
    test = bundle.test
    assert isinstance(test, data.CaseSet)
    whole = test.whole(0)
    truth = whole.label
    half = truth.copy()
    half[:, :, : truth.shape[2] // 2] = 0
    (volume,) = score_case(half, truth, whole.prepared, bundle.state, SegmentTaskConfig())
    parts = score_case(half, truth, whole.prepared, bundle.state, SegmentTaskConfig(case="slice"))
    axis = whole.prepared.undo.order[2]
    assert len(parts) == truth.shape[axis]
    assert np.stack(parts)[:, :, :3].sum(0) == pytest.approx(volume[:, :3])
    rows = metrics.unpack(metrics.pack(0, 0, parts))
    assert rows is not None
    assert rows.key("part").max() == truth.shape[axis] - 1
    assert metrics.figures(rows, bundle.state["structures"], metrics.Policy())["cases"] == truth.shape[axis]


def test_scribbles_are_scored_on_full_masks() -> None:
    label = np.zeros((16, 16), np.uint8)
    label[4:12, 4:12] = 1
    drawn_only = np.full((16, 16), 4, np.uint8)
    drawn_only[6, 5:10], drawn_only[1, :] = 1, 0
    cases = tuple(
        Case(
            name=f"c{i}",
            patient=f"p{i}",
            image=lambda: Image(values=label[None].astype(np.float32)),
            label=lambda: Image(values=label),
            scribble=lambda: Image(values=drawn_only),
        )
        for i in range(4)
    )
    corpus = Corpus(cases=cases, structures=("s",), ndim=2, channels=1, unit="px", unlabelled=4)
    bundle = data.build(corpus, SegmentDataConfig(supervision="scribble", augment="none"), "lines")
    batch = bundle.train.__getitems__([0])  # type: ignore[union-attr]
    assert set(batch["label"].unique().tolist()) == {0, 1, 255}
    test = bundle.test
    assert isinstance(test, data.CaseSet)
    assert np.array_equal(test.whole(0).label, label)
    (row,) = (one for one in baselines.rows(bundle, SegmentTaskConfig(bootstrap=0)) if one["model"] == "mean shape")
    assert row["dice"] == 1


def test_the_network_is_the_models(run: Path) -> None:
    task, config = trainer.load_task(APP, run)
    assert isinstance(task, SegmentTask)
    batch = {"image": torch.randn(2, 1, *task.window)}
    assert torch.equal(task.forward_batch(batch), task.network(batch["image"]))
    assert config.kind in (None, "segment")
