"""Generation, mutagenesis and variants by models as they are saved, and `pretrain`."""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attn_genomics.cli import APP, main
from attn_genomics.commands import mutations, sampling
from attn_genomics.commands.heatmap import heights, picture
from attn_genomics.commands.scoring import LikelihoodScorer, load_scorer
from attn_genomics.data.fasta import records
from attn_genomics.tokens import BASES, N, decode, encode
from attn_shared import checkpoint, options, trainer
from attn_shared.config import config_to_dict
from attn_shared.errors import UserError

CHAIN = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.1, 0.2], [0.25, 0.25, 0.3, 0.2], [0.05, 0.15, 0.2, 0.6]])
SMALL = {
    "bigla": ["--model_args.dim", "16", "--model_args.layers", "1", "--model_args.heads", "2"],
    "hyenadna": ["--model_args.d_model", "16", "--model_args.n_layer", "1", "--model_args.filter_order", "8"],
    "hybridna": [
        "--model_args.dim",
        "16",
        "--model_args.layers",
        "2",
        "--model_args.every",
        "2",
        "--model_args.heads",
        "2",
    ],
    "cnn": ["--model_args.channels", "8"],
}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Checkpoint of an untrained model, as training writes it."""

    def save(kind: str, model: str, *more: str, length: int = 64, **state: Any) -> Path:
        words = ["--kind", kind, "--model", model, "--preset", "none", *SMALL[model], *more]
        config = options.resolve(APP, options.split(words))
        if kind == "sequences":
            state = {"classes": ["no", "yes"], **state}
        task = trainer.build_task(APP, config, {"length": length, **state})
        with torch.no_grad():  # far from even, so that differences show
            for weight in task.parameters():
                weight.mul_(1.5)
        folder = tmp_path / f"{kind}-{model}"
        checkpoint.save(
            checkpoint.Checkpoint(
                app="genomics",
                config=config_to_dict(config),
                data_state={"length": length, **state},
                weights=task.state_dict(),
                trainer={},
                step=1,
                epoch=1,
                metrics={},
                versions={},
            ),
            folder,
        )
        return folder

    return save


class Chain(nn.Module):
    """A language model as the commands see it: the next base follows from the one before."""

    objective, rc = "next", "none"

    def __init__(self, *, carries: bool, longest: int | None = None) -> None:
        super().__init__()
        self.table = nn.Parameter(CHAIN.log())
        self.carries, self.longest, self.read = carries, longest, 0

    backbone = property(lambda self: self)
    decodes = property(lambda self: self.carries)

    def scores(self, tokens: Tensor) -> Tensor:
        self.read += tokens.numel()
        return self.table[tokens.clamp(max=3)]

    def init_state(self, batch: int) -> int:
        return 0

    def step(self, tokens: Tensor, state: int) -> tuple[Tensor, int]:
        return self.scores(tokens), state + tokens.shape[1]

    def bits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        found = -CHAIN[tokens[:, :-1].clamp(max=3), tokens[:, 1:].clamp(max=3)].log2()
        bits = torch.cat([torch.full((len(tokens), 1), 2.0), found], dim=1)
        return torch.where((torch.arange(tokens.shape[1]) < lengths[:, None]) & (tokens < N), bits, 0.0)


# -- generate ---------------------------------------------------------------------------------------------------------


def test_bases_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]])).expand(10_000, 4)
    even = (torch.arange(10_000) + 0.5) / 10_000

    def shares(temperature: float, top_k: int) -> list[float]:
        drawn = sampling.choose(logits, even.double(), temperature, top_k)
        return (torch.bincount(drawn, minlength=4) / 10_000).tolist()

    assert shares(1.0, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=2e-4)
    assert shares(1.0, 2) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=2e-4)
    squares = np.array([1, 4, 9, 16]) / 30
    assert shares(0.5, 4) == pytest.approx(squares.tolist(), abs=2e-4)
    assert shares(0.0, 4) == shares(1e-300, 4) == shares(1.0, 1) == [0, 0, 0, 1]
    ends = sampling.choose(
        torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4), torch.tensor([0.0, 1.0]).double(), 1.0, 4
    )
    assert ends.tolist() == [1, 2]


@pytest.mark.parametrize("carries", [True, False])
def test_a_chain_is_drawn_as_it_is(carries: bool) -> None:
    uniform = torch.from_numpy(np.stack([sampling.uniforms(0, row, 1000) for row in range(60)]))
    drawn = sampling.draw(Chain(carries=carries), torch.empty(60, 0, dtype=torch.int64), uniform, reads=1)
    steps = torch.bincount((drawn[:, :-1] * 4 + drawn[:, 1:]).flatten(), minlength=16).view(4, 4).double()
    found = steps / steps.sum(dim=1, keepdim=True)
    # Five standard deviations of a share counted so often.
    assert ((found - CHAIN).abs() < 5 * (CHAIN * (1 - CHAIN) / steps.sum(dim=1, keepdim=True)).sqrt()).all()
    first = torch.bincount(drawn[:, 0], minlength=4)
    assert first.min() >= 5  # even


def test_a_base_costs_the_same_however_long_the_sequence() -> None:
    for length in (50, 400):
        model = Chain(carries=True)
        uniform = torch.rand(2, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        sampling.draw(model, torch.zeros(2, 7, dtype=torch.int64), uniform)
        assert model.read == 2 * (7 + length - 1)
    past = Chain(carries=True, longest=20)  # longer than its state can be: the last bases are read again
    sampling.draw(past, torch.zeros(1, 7, dtype=torch.int64), torch.rand(1, 30, dtype=torch.float64))
    assert past.read == sum(min(20, 7 + place) for place in range(30))


@pytest.mark.parametrize(
    ("model", "more"), [("bigla", ["--model_args.causal", "true"]), ("hyenadna", []), ("hybridna", [])]
)
def test_what_is_drawn_step_by_step_is_what_the_whole_sequence_says(
    saved: Callable[..., Path], model: str, more: list[str]
) -> None:
    task, _ = trainer.load_task(APP, saved("genome", model, *more))
    prompt = torch.from_numpy(encode("ACGTTGCA").astype(np.int64)).repeat(3, 1)
    uniform = torch.rand(3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = sampling.draw(task.model, prompt, uniform, temperature=0.8, top_k=3)
    whole = torch.cat((prompt, drawn), dim=1)
    with torch.no_grad():
        scores = task.model.scores(whole)[:, 7:-1]
    again = sampling.choose(scores.reshape(-1, 4), uniform.reshape(-1), 0.8, 3).view(3, 40)
    assert (again == drawn).float().mean() > 0.99  # a draw may fall between two roundings
    assert len(set(map(tuple, drawn.tolist()))) == 3
    greedy = sampling.draw(task.model, prompt[:1], uniform[:1], temperature=0.0)
    with torch.no_grad():
        assert torch.equal(task.model.scores(torch.cat((prompt[:1], greedy), dim=1))[:, 7:-1].argmax(2), greedy)


def test_generate_writes_fasta(saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(saved("genome", "hybridna"))
    one, two, packed = tmp_path / "one.fa", tmp_path / "two.fa", tmp_path / "deep" / "two.fa.gz"
    words = ["generate", run, "--length", "30", "--count", "3", "--seed", "5"]
    assert main([*words, "--output", str(one)]) == 0
    assert capsys.readouterr().out.strip() == str(one)
    found = dict(records(one))
    assert list(found) == ["generated_1", "generated_2", "generated_3"]
    assert all(len(codes) == 30 and codes.max() < 4 for codes in found.values())
    assert one.read_text(encoding="utf-8").splitlines()[0] == ">generated_1 bases=30 temperature=1 top_k=4 seed=5"
    assert main(["generate", run, "--length", "30", "--count", "2", "--seed", "5", "--output", str(two)]) == 0
    assert dict(records(two))["generated_2"].tolist() == found["generated_2"].tolist()  # whatever is drawn beside it
    prompt = tmp_path / "prompt.fa"
    prompt.write_text(">a\nACGTN\n>b\nGGG\n")
    assert main([*words, "--prompt", str(prompt), "--output", str(packed)]) == 0
    begun = [decode(codes) for _, codes in records(packed)]
    assert [letters[:5] for letters in begun[:3]] == ["ACGTN"] * 3
    assert [len(letters) for letters in begun] == [35] * 3 + [33] * 3
    assert "prompt=b" in gzip.decompress(packed.read_bytes()).decode()


def test_generate_tells_what_is_wrong(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    causal, masked, classes = saved("genome", "hybridna"), saved("genome", "bigla"), saved("sequences", "cnn")
    output = str(tmp_path / "out.fa")
    for words, said in (
        ([str(causal)], "needs --output"),
        (["--output", output], "takes one run"),
        ([str(masked), "--output", output], "was trained on hidden bases"),
        ([str(classes), "--output", output], "classifies sequences"),
        ([str(causal), "--output", output, "--top_k", "5"], "--top_k takes 1 to 4"),
        ([str(causal), "--output", output, "--temperature", "-1"], "--temperature takes a number from 0 on"),
        ([str(causal), "--output", output, "--temperature", "nan"], "--temperature takes a number from 0 on"),
        ([str(causal), "--output", output, "--length", "0"], "--length takes a whole number from 1 on"),
        ([str(causal), "--output", output, "--prompt", "none.fa"], "no file none.fa"),
        (["none", "--output", output], "there is no run or checkpoint at none"),
    ):
        assert main(["generate", *words]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert len(told.splitlines()) == 1
        assert not Path(output).exists()


# -- scores of saved models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "model", "more"),
    [
        ("genome", "bigla", []),
        ("genome", "bigla", ["--task_args.rc", "equivariant"]),
        ("genome", "hybridna", []),
        ("genome", "hybridna", ["--task_args.rc", "average"]),
        ("sequences", "cnn", []),
        ("sequences", "bigla", ["--task_args.rc", "average"]),
        ("sequences", "hyenadna", ["--task_args.rc", "equivariant"]),
    ],
)
def test_scores_do_not_depend_on_what_is_scored_beside_and_are_the_models_own(
    saved: Callable[..., Path], kind: str, model: str, more: list[str]
) -> None:
    folder = saved(kind, model, *more)
    scorer = load_scorer(folder, context=None, strand=None, of_class=None)
    assert scorer.context == 64
    draw = torch.Generator().manual_seed(0)
    tokens, lengths = torch.randint(0, 4, (4, 50), generator=draw), torch.tensor([50, 50, 31, 7])
    tokens = torch.where(torch.arange(50) < lengths[:, None], tokens, N)
    with torch.no_grad():
        together = scorer.score(tokens, lengths)
        alone = torch.cat([scorer.score(row[None, :n], n[None]) for row, n in zip(tokens, lengths)])
    assert torch.allclose(together, alone, atol=1e-4)
    task, _ = trainer.load_task(APP, folder)
    with torch.no_grad():
        if kind == "sequences":
            shares = task.model.probabilities(tokens, lengths).double()
            assert torch.allclose(together, torch.logit(shares[:, 1]), atol=1e-4)
        elif more or model == "bigla":
            turned = tokens[:2].flip(1)
            assert torch.allclose(scorer.score(3 - turned, lengths[:2]), together[:2], atol=1e-4)


def test_score_variants_by_saved_models(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = decode(np.random.default_rng(0).integers(0, 4, 300).astype(np.uint8))
    fasta, vcf, output = tmp_path / "g.fa", tmp_path / "in.vcf", tmp_path / "out.tsv"
    fasta.write_text(f">1\n{letters}\n")
    others = {base: BASES.replace(base, "") for base in BASES}
    lines = [f"1\t{place}\t.\t{letters[place - 1]}\t{others[letters[place - 1]][0]}" for place in (1, 100, 150, 300)]
    lines += [f"1\t120\t.\t{letters[119:122]}\t{letters[119]}", "1\t301\t.\tA\tC"]
    vcf.write_text("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n" + "".join(f"{line}\t.\t.\t.\n" for line in lines))
    runs = {"genome": saved("genome", "hybridna"), "sequences": saved("sequences", "bigla")}
    for kind, run in runs.items():
        words = ["score-variants", str(run), "--vcf", str(vcf), "--fasta", str(fasta), "--output", str(output)]
        assert main(words) == 0
        shown = capsys.readouterr()
        assert "scored 5 alternates of 5 records, 1 record skipped" in shown.out
        assert "line 7: position 301 is past the end" in shown.err
        rows = [line.split("\t") for line in output.read_text(encoding="utf-8").splitlines()[1:]]
        scorer = load_scorer(run, context=None, strand=None, of_class=None)
        here, changed = letters[99 - 31 : 99 + 33], list(letters)
        changed[99] = others[letters[99]][0]
        there = "".join(changed)[99 - 31 : 99 + 33]
        both = torch.from_numpy(np.stack([encode(here), encode(there)]).astype(np.int64))
        with torch.no_grad():
            reference, alternate = scorer.score(both, torch.tensor([64, 64])).tolist()
        assert float(rows[1][5]) == pytest.approx(alternate - reference, abs=1e-4), kind
        assert float(rows[1][5]) != 0
        output.unlink()
        assert main([*words, "--of_class", "maybe"]) == 2
        told = capsys.readouterr().err
        assert "no classes" in told if kind == "genome" else "its classes are: no, yes" in told
        assert not output.exists()


def test_a_window_that_a_model_cannot_read_is_told(saved: Callable[..., Path], tmp_path: Path) -> None:
    run = saved("genome", "hyenadna", "--model_args.l_max", "64")
    scorer = load_scorer(run, context=100, strand=None, of_class=None)
    with pytest.raises(UserError, match=r"cannot read a window of 100 bases.*--context"):
        mutations.effects(scorer, mutations.Target(name="a", codes=encode("ACGT" * 50), start=50, end=52), 100)


# -- mutagenesis ------------------------------------------------------------------------------------------------------


def test_effects_are_differences_of_likelihoods() -> None:
    letters, size = "ACGTTGCANACGGTCATTGCA", 100
    scorer = LikelihoodScorer(Chain(carries=True), size, "forward")
    target = mutations.Target(name="a", codes=encode(letters), start=2, end=20)
    found = mutations.effects(scorer, target, size)
    assert found.shape == (18, 4)
    assert np.isnan(found[6]).all()
    assert not np.isnan(np.delete(found, 6, axis=0)).any()

    def likelihood(text: str) -> float:
        tokens = torch.from_numpy(encode(text).astype(np.int64))[None]
        return -Chain(carries=True).bits(tokens, torch.tensor([len(text)])).double().sum().item()

    for place in (0, 5, 17):
        at = place + 2
        for base in range(4):
            changed = letters[:at] + BASES[base] + letters[at + 1 :]
            assert found[place, base] == pytest.approx(likelihood(changed) - likelihood(letters), abs=1e-5)
        assert found[place, BASES.index(letters[at])] == 0
    assert heights(found)[5] == pytest.approx(-found[5].sum() / 3)
    assert heights(found)[6] == 0


def test_bed_places_are_read_on_their_strand(tmp_path: Path) -> None:
    letters = decode(np.random.default_rng(1).integers(0, 4, 400).astype(np.uint8))
    fasta, bed = tmp_path / "g.fa", tmp_path / "p.bed"
    fasta.write_text(f">1\n{letters}\n")
    bed.write_text("chr1\t100\t110\tup\t0\t+\nchr1\t100\t110\tdown\t0\t-\nchr1\t390\t400\tend\t0\t.\n")
    up, down, end = mutations.of_bed(bed, fasta)
    turned = letters[100:110][::-1].translate(str.maketrans("ACGT", "TGCA"))
    assert (up.letters, down.letters, end.letters) == (letters[100:110], turned, letters[390:])
    assert [up.position(0), up.position(9), down.position(0), down.position(9)] == [101, 110, 110, 101]
    bed.write_text("2\t1\t5\n")
    with pytest.raises(UserError, match="the genome has no 2"):
        list(mutations.of_bed(bed, fasta))
    bed.write_text("1\t390\t401\n")
    with pytest.raises(UserError, match="ends at 400, before 401"):
        list(mutations.of_bed(bed, fasta))


def test_mutagenesis_writes_a_table_and_a_picture_a_sequence(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = str(saved("sequences", "cnn")), tmp_path / "out"
    fasta = tmp_path / "a.fa"
    fasta.write_text(">one/x\nACGTACGTNACGGT\n>two\n" + "ACGT" * 20 + "\n")
    assert main(["mutagenesis", run, str(fasta), "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["mutagenesis.tsv", "one_x.png", "two.png"]
    rows = [line.split("\t") for line in (output / "mutagenesis.tsv").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ["sequence", "position", "chrom", "strand", "ref", "alt", "score"]
    assert len(rows) == 1 + 3 * 13 + 3 * 80
    assert (output / "two.png").read_bytes()[:4] == b"\x89PNG"
    for words, said in (
        ([run, "ACGT"], "needs --output"),
        ([run, "--output", str(output)], "takes a run and a sequence"),
        ([run, "none.fa", "--output", str(output)], "there is no file none.fa"),
        ([run, str(fasta), "--name", "three", "--output", str(output)], "there are: one/x, two"),
        ([run, str(fasta), "--limit", "20", "--output", str(output)], "two has 80 bases, so 240 changes"),
        ([run, "--bed", str(fasta), "--output", str(output)], "go together"),
    ):
        assert main(["mutagenesis", *words]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert len(told.splitlines()) == 1


@pytest.mark.parametrize("length", [1, 80, 81, 1500])
def test_pictures_of_any_length(length: int) -> None:
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 5, length).astype(np.uint8)
    effects = draw.normal(size=(length, 4))
    effects[codes == 4] = np.nan
    known = codes < 4
    effects[np.flatnonzero(known), codes[known]] = 0
    made = picture("a", decode(codes), effects, list(range(1, length + 1)), "score")
    logos = [ax for ax in made.axes if ax.patches]
    assert sum(len(ax.patches) for ax in logos) == (known.sum() if length <= 1200 else 0)
    images = [ax.images[0].get_array() for ax in made.axes if ax.images]
    assert sum(image.shape[1] for image in images) == (length if length <= 1200 else 600)


# -- pretrain ---------------------------------------------------------------------------------------------------------


def test_pretrain_is_train_of_the_kind_genome(saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--print_config", "--model", "hyenadna"]) == 0
    shown = capsys.readouterr().out
    assert "kind: genome" in shown
    assert "data: synthetic_genome" in shown
    assert main(["train", "--print_config", "--model", "hyenadna", "--kind", "genome"]) == 0
    assert capsys.readouterr().out == shown
    assert main(["pretrain", "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: genomics pretrain [options]")
    assert "--task_args.objective" in told
    for words, said in (
        (["--kind", "sequences"], "use `genomics train`"),
        (["--data", "synthetic"], "synthetic is data to classify sequences"),
        (["--model", "cnn"], "cnn is no model to model the language of genomes"),
        (["--resume", str(saved("sequences", "cnn"))], "classifies sequences; go on with it by `genomics train"),
    ):
        assert main(["pretrain", *words]) == 2
        assert said in capsys.readouterr().err
    assert dataclasses.is_dataclass(APP.kind("synthetic_genome").task_config)
