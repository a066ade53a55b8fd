"""STTN against its formulas, written out here once more, and its parts against their definitions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attn_timeseries.config import STTNConfig
from attn_timeseries.models.base import SeriesShape
from attn_timeseries.models.layers import fitting_mixers
from attn_timeseries.models.sttn import STTN, chebyshev, scaled_laplacian
from attn_timeseries.traffic.cards import PEMSD7_SIGMA, PEMSD7_THRESHOLD, TrafficDataConfig
from attn_timeseries.traffic.graph import to_weights

STEPS, SENSORS, AHEAD, MARKS = 4, 5, 3, 2
SMALL: dict[str, Any] = {"d_model": 8, "d_ff": 10, "d_head": 12, "n_heads": 2, "layers": 2}


def draw_graph(count: int = SENSORS, seed: int = 0, directed: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, count, generator=generator, dtype=torch.float64)
    weights = torch.where(weights > 0.4, weights, 0.0)
    weights = weights if directed else torch.maximum(weights, weights.T)
    return weights - weights.diagonal().diag()


def build(graph: Tensor | None = None, *, mixer: str | None = None, dtype: torch.dtype = torch.float64, **options: Any):
    shape = SeriesShape(seq_len=STEPS, label_len=2, pred_len=AHEAD, channels=SENSORS, marks=MARKS,
                        graph=draw_graph() if graph is None else graph)  # fmt: skip
    torch.manual_seed(0)
    model = STTN(STTNConfig(**(SMALL | options)), shape, mixer=mixer).to(dtype)
    for parameter in model.parameters():  # every term must count, biases too
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs(dtype: torch.dtype = torch.float64, size: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, STEPS, SENSORS, generator=generator, dtype=torch.float64)
    marks = torch.rand(size, STEPS, MARKS, generator=generator, dtype=torch.float64) - 0.5
    return x.to(dtype), marks.to(dtype), torch.zeros(size, 2 + AHEAD, MARKS, dtype=dtype)


# --- an independent implementation: one sensor, one step, one head at a time, from the equations ---


def by_the_formulas(model: STTN, graph: Tensor, x: Tensor, marks: Tensor) -> Tensor:
    c = model.config
    p = dict(model.named_parameters())
    # Chebyshev polynomials of the Laplacian from its eigenvalues: T_k(cos a) = cos(k a).
    weights = graph.to(x.dtype)
    degree = weights.sum(0)
    laplacian = torch.diag(degree) - weights
    for i in range(SENSORS):
        for j in range(SENSORS):
            laplacian[i, j] = laplacian[i, j] / math.sqrt(degree[i] * degree[j])
    values, vectors = torch.linalg.eigh(laplacian)
    angles = torch.arccos((2 * values / values.max() - 1).clamp(-1, 1))
    polynomials = [vectors @ torch.diag(torch.cos(k * angles)) @ vectors.T for k in range(c.order)]

    def linear(name: str, v: Tensor) -> Tensor:
        bias = p.get(f"{name}.bias")
        return p[f"{name}.weight"] @ v + (0 if bias is None else bias)

    def norm(name: str, v: Tensor) -> Tensor:
        if not c.norm:
            return v
        centred = v - v.mean()
        return centred / torch.sqrt(centred.square().mean() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def attend(name: str, tokens: list[Tensor]) -> list[Tensor]:
        width = c.d_model // c.n_heads
        heads: list[list[Tensor]] = [[] for _ in tokens]
        for h in range(c.n_heads):
            part = slice(h * width, (h + 1) * width)
            q, k, v = ([linear(f"{name}.attention.{kind}_proj", t)[part] for t in tokens] for kind in "qkv")
            for i in range(len(tokens)):
                scores = torch.stack([(q[i] @ k[j]) / math.sqrt(width) for j in range(len(tokens))])
                share = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
                heads[i].append(sum(share[j] * v[j] for j in range(len(tokens))))
        result = []
        for i, t in enumerate(tokens):
            u = norm(f"{name}.norm1", t + linear(f"{name}.attention.out_proj", torch.cat(heads[i])))
            inner = torch.relu(linear(f"{name}.feed_forward.0", u))
            inner = torch.relu(linear(f"{name}.feed_forward.2", inner))
            result.append(norm(f"{name}.norm2", u + linear(f"{name}.feed_forward.4", inner)))
        return result

    def one(window: Tensor, mark: Tensor) -> Tensor:
        h = [[linear("input", torch.cat([window[m, n : n + 1], mark[m]]) if c.calendar else window[m, n : n + 1])
              for n in range(SENSORS)] for m in range(STEPS)]  # fmt: skip
        for layer in range(c.layers):
            s, t = f"spatial.{layer}", f"temporal.{layer}"
            embed = torch.cat([p[f"{s}.{name}.weight"] for name in ("embed", "embed_sensor", "embed_step")], dim=1)
            for m in range(STEPS):
                x_ = [
                    embed @ torch.cat([h[m][n], p[f"{s}.sensors"][n], p[f"{s}.steps"][m]]) + p[f"{s}.embed.bias"]
                    for n in range(SENSORS)
                ]
                dynamic = attend(f"{s}.dynamic", x_)
                for n in range(SENSORS):
                    theta = p[f"{s}.fixed.weight"].view(c.d_model, c.order, c.d_model)
                    fixed = p[f"{s}.fixed.bias"] + sum(
                        theta[:, k] @ sum(polynomials[k][n, j] * x_[j] for j in range(SENSORS)) for k in range(c.order)
                    )
                    if c.fusion == "gate":
                        g = 1 / (
                            1 + torch.exp(-linear(f"{s}.gate_dynamic", dynamic[n]) - linear(f"{s}.gate_fixed", fixed))
                        )
                        spatial = g * dynamic[n] + (1 - g) * fixed
                    else:
                        spatial = torch.relu(dynamic[n] + x_[n] + 0.1 * fixed)
                    h[m][n] = h[m][n] + spatial
            embed = torch.cat([p[f"{t}.embed.weight"], p[f"{t}.embed_step.weight"]], dim=1)
            for n in range(SENSORS):
                tokens = [embed @ torch.cat([h[m][n], p[f"{t}.steps"][m]]) + p[f"{t}.embed.bias"] for m in range(STEPS)]
                for m, token in enumerate(attend(f"{t}.dynamic", tokens)):
                    h[m][n] = h[m][n] + token
        columns = []
        for n in range(SENSORS):
            last = h[-1][n] if c.head == "last" else torch.cat([h[m][n] for m in range(STEPS)])
            columns.append(linear("output", torch.relu(linear("features", last))))
        return torch.stack(columns, dim=1)

    return torch.stack([one(window, mark) for window, mark in zip(x, marks)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fusion": "sum", "head": "window", "n_heads": 1},
        {"norm": False, "calendar": True, "order": 1},
        {"order": 4, "layers": 1, "head": "window"},
    ],
    ids=["paper", "sum, window", "no norm, calendar", "four polynomials"],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_the_formulas(options: dict[str, Any], dtype: torch.dtype, bound: float) -> None:
    graph = draw_graph()
    ours = build(graph, dtype=dtype, **options)
    exact = build(graph, **options)
    exact.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    x, marks, future = inputs(dtype)
    probe = torch.randn(2, AHEAD, SENSORS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    x.requires_grad_()
    out = ours(x, marks, future)
    (out * probe.to(dtype)).mean().backward()
    x64 = x.detach().double().requires_grad_()
    expected = by_the_formulas(exact, graph, x64, marks.double())
    (expected * probe).mean().backward()

    expected = expected.detach()
    assert (out.detach() - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))
    assert (x.grad - x64.grad).abs().max() <= bound
    theirs = dict(exact.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        scale = max(1.0, float(theirs[name].grad.abs().max()))
        assert (parameter.grad - theirs[name].grad).abs().max() <= bound * scale, name
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name


# --- the graph convolution ---


@pytest.mark.parametrize("directed", [False, True])
def test_chebyshev_polynomials(directed: bool) -> None:
    graph = draw_graph(7, seed=3, directed=directed)
    laplacian = scaled_laplacian(graph)
    values, vectors = torch.linalg.eigh(laplacian)
    assert values.min() >= -1 - 1e-12
    assert values.max() == pytest.approx(1, abs=1e-12)
    for k, term in enumerate(chebyshev(graph, 5)):
        expected = vectors @ torch.diag(torch.cos(k * torch.arccos(values.clamp(-1, 1)))) @ vectors.T
        torch.testing.assert_close(term, expected, rtol=0, atol=1e-10)


def test_chebyshev_of_a_path_by_hand() -> None:
    """Three sensors in a row: L = I - D^-1/2 W D^-1/2 has eigenvalues 0, 1, 2."""
    graph = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.float64)
    r = 1 / math.sqrt(2)
    expected = torch.tensor([[0.0, -r, 0], [-r, 0, -r], [0, -r, 0]], dtype=torch.float64)
    torch.testing.assert_close(scaled_laplacian(graph), expected, rtol=0, atol=1e-12)


def test_the_graph_of_the_official_code() -> None:
    """Weights from distances and Chebyshev polynomials, three sensors of nine without an edge."""
    golden = load_file(Path(__file__).parents[1] / "golden" / "timeseries_sttn_graph.safetensors")
    config = TrafficDataConfig(graph_sigma=PEMSD7_SIGMA, graph_threshold=PEMSD7_THRESHOLD)
    weights = to_weights(golden["distances"].numpy(), config, "distances", kind="distances")
    torch.testing.assert_close(torch.from_numpy(weights), golden["weights"], rtol=0, atol=1e-14)
    assert (golden["weights"].sum(dim=0) == 0).sum() == 3
    torch.testing.assert_close(chebyshev(golden["weights"], 4), golden["kernels"], rtol=0, atol=1e-13)


def test_the_fixed_convolution_against_another_library() -> None:
    geometric = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed")
    graph = draw_graph(7, seed=5)
    block = build(graph[:SENSORS, :SENSORS], layers=1, order=4).spatial[0]
    graph = graph[:SENSORS, :SENSORS]
    other = geometric.ChebConv(SMALL["d_model"], SMALL["d_model"], K=4, normalization="sym").double()
    for k, linear in enumerate(other.lins):
        linear.weight.data = block.fixed.weight.data.view(SMALL["d_model"], 4, SMALL["d_model"])[:, k]
    other.bias.data = block.fixed.bias.data
    edges = graph.nonzero().T
    degree = graph.sum(dim=0)
    laplacian = torch.eye(SENSORS) - graph / (degree[:, None] * degree).sqrt()
    x = torch.randn(SENSORS, SMALL["d_model"], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = other(x, edges, graph[edges[0], edges[1]], lambda_max=torch.linalg.eigvalsh(laplacian)[-1])
    ours = block.fixed(torch.cat([kernel @ x for kernel in chebyshev(graph, 4)], dim=-1))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_a_sensor_without_an_edge_and_a_graph_without_edges() -> None:
    graph = draw_graph(4, seed=1)
    graph[2], graph[:, 2] = 0, 0
    terms = chebyshev(graph, 3)
    assert terms.isfinite().all()
    assert not terms[:, 2, [0, 1, 3]].any()
    assert chebyshev(torch.zeros(3, 3, dtype=torch.float64), 3).isfinite().all()


def test_the_diagonal_of_a_graph_does_not_matter() -> None:
    graph = draw_graph()
    torch.testing.assert_close(scaled_laplacian(graph + torch.eye(SENSORS)), scaled_laplacian(graph))


# --- what is where ---


def test_without_attention_a_sensor_reads_only_along_the_graph() -> None:
    """With the dynamic part's values at zero, what reaches a sensor comes over at most order - 1 edges."""
    graph = torch.zeros(SENSORS, SENSORS, dtype=torch.float64)
    for i in range(SENSORS - 1):
        graph[i, i + 1] = graph[i + 1, i] = 1.0
    model = build(graph, layers=1)
    for name, parameter in model.named_parameters():
        if "attention.v_proj" in name or "attention.out_proj" in name:
            parameter.data.zero_()
    x, marks, future = inputs()
    x.requires_grad_()
    model(x, marks, future)[:, :, 0].sum().backward()
    reached = x.grad.abs().sum(dim=(0, 1)) > 1e-12
    assert reached.tolist() == [True, True, True, False, False]


def test_order_of_sensors_only_moves_with_the_graph() -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    graph = draw_graph()
    model, moved = build(graph), build(graph[order][:, order])
    state = model.state_dict()
    for layer in range(SMALL["layers"]):
        name = f"spatial.{layer}."
        state[f"{name}sensors"] = state[f"{name}sensors"][order]
    moved.load_state_dict(state)
    x, marks, future = inputs()
    torch.testing.assert_close(moved(x[:, :, order], marks, future), model(x, marks, future)[:, :, order])


def test_embeddings_start_as_the_graph_and_as_one_hot_steps() -> None:
    shape = SeriesShape(seq_len=STEPS, label_len=0, pred_len=1, channels=SENSORS, marks=0, graph=draw_graph())
    model = STTN(STTNConfig(**SMALL), shape)
    torch.testing.assert_close(model.spatial[0].sensors.double(), draw_graph(), rtol=1e-6, atol=1e-6)
    assert torch.equal(model.spatial[0].steps, torch.eye(STEPS))
    assert torch.equal(model.temporal[0].steps, torch.eye(STEPS))


@pytest.mark.parametrize("where", ["spatial", "temporal", "both"])
def test_the_mixer_is_where_it_is_asked_for(where: str) -> None:
    model = build(mixer="flow", mixer_in=where)
    for name in ("spatial", "temporal"):
        kinds = {type(block.dynamic.attention).__name__ for block in getattr(model, name)}
        assert kinds == ({"FlowAttention"} if where in (name, "both") else {"SoftmaxAttention"})


@pytest.mark.parametrize("mixer", fitting_mixers())
def test_every_fitting_mixer_runs(mixer: str) -> None:
    model = build(mixer=mixer, dtype=torch.float32, layers=1)
    x, marks, future = inputs(torch.float32)
    out = model(x, marks, future)
    assert out.shape == (2, AHEAD, SENSORS)
    assert out.isfinite().all()
    out.sum().backward()
    assert model.input.weight.grad.abs().sum() > 0


def test_no_graph_is_refused() -> None:
    shape = SeriesShape(seq_len=STEPS, label_len=0, pred_len=1, channels=SENSORS, marks=0)
    with pytest.raises(ValueError, match=r"needs a graph.*--data_args.graph"):
        STTN(STTNConfig(**SMALL), shape)
    with pytest.raises(ValueError, match="5 x 5"):
        SeriesShape(seq_len=1, label_len=0, pred_len=1, channels=5, marks=0, graph=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="at least 1"):
        build(layers=0)
