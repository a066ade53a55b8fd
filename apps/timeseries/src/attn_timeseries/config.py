"""The models' options and their list. Plain dataclasses without torch, so that `--help` answers at once.

Defaults are the sizes of each paper's published ETTh1 experiments. Option names are those of the official code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from attn_shared.app import ModelCard

Activation = Literal["gelu", "relu"]


@dataclass(kw_only=True)
class ForecastTaskConfig:
    """What a forecast is trained for, and the intervals around it.

    Attributes:
        loss: "mse" squared, "mae" absolute, "huber" (squared below 1, absolute above), all on scaled values;
            "quantile" = pinball loss of the quantiles below, for which the model gets a head around its own forecast.
        quantiles: levels in (0, 1), as many above 0.5 as below and equally far from it. 0.5, which is the forecast
            itself, and the two ends of `coverage` are added where they are missing.
        calibrate: "none"; "conformal" = intervals grow or shrink to the share of the validation windows that they
            promise; "adaptive" = and go on doing so along the test windows, from targets already past.
        coverage: share of the truth that the interval is to hold.
    """

    loss: Literal["mse", "mae", "huber", "quantile"] = "mse"
    quantiles: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
    calibrate: Literal["none", "conformal", "adaptive"] = "none"
    coverage: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage is {self.coverage}; it must lie between 0 and 1, such as 0.9")
        for level in self.quantiles:
            if not 0 < level < 1:
                raise ValueError(f"quantile {level} does not lie between 0 and 1")
            if not any(abs(1 - level - other) < 1e-6 for other in self.quantiles):
                raise ValueError(f"quantile {level} needs {1 - level:g} beside it: quantiles come in pairs about 0.5")

    @property
    def intervals(self) -> bool:
        """Whether forecasts have intervals."""
        return self.loss == "quantile" or self.calibrate != "none"

    @property
    def levels(self) -> tuple[float, ...]:
        """All quantile levels, increasing."""
        end = (1 - self.coverage) / 2
        return tuple(sorted({round(level, 9) for level in (*self.quantiles, 0.5, end, 1 - end)}))

    @property
    def pair(self) -> int:
        """Number of the interval of `coverage` among the pairs of levels, the widest being 0."""
        return self.levels.index(round((1 - self.coverage) / 2, 9))


@dataclass(kw_only=True)
class AutoformerConfig:
    """Autoformer (S73), Appendix C and the published scripts.

    Attributes:
        d_model: channels of a token.
        n_heads: attention heads; divides d_model.
        e_layers: encoder layers.
        d_layers: decoder layers.
        d_ff: width of the feed-forward layers.
        moving_avg: kernel of the decomposition's moving average, in steps; odd.
        factor: c in "the top floor(c ln L) delays" of Auto-Correlation.
        dropout: probability.
        activation: of the feed-forward layers.
    """

    d_model: int = 512
    n_heads: int = 8
    e_layers: int = 2
    d_layers: int = 1
    d_ff: int = 2048
    moving_avg: int = 25
    factor: int = 3
    dropout: float = 0.05
    activation: Activation = "gelu"


@dataclass(kw_only=True)
class InformerConfig:
    """Informer (S83), Section 5 and the published scripts.

    Attributes:
        d_model: channels of a token.
        n_heads: attention heads; divides d_model.
        e_layers: encoder layers; with `distil`, the sequence halves after each but the last.
        d_layers: decoder layers.
        d_ff: width of the feed-forward layers.
        factor: c in "c ln L sampled keys" and "c ln L active queries" of ProbSparse attention.
        distil: self-attention distilling between encoder layers (Equation 5).
        mix: order in which the decoder's ProbSparse self-attention hands its heads to the output projection. True, as
            published results were made: the (head, time) axes are read as if they were (time, head), which mixes heads
            with time. False: each token keeps its own heads.
        dropout: probability.
        activation: of the feed-forward layers.
    """

    d_model: int = 512
    n_heads: int = 8
    e_layers: int = 2
    d_layers: int = 1
    d_ff: int = 2048
    factor: int = 5
    distil: bool = True
    mix: bool = True
    dropout: float = 0.05
    activation: Activation = "gelu"


@dataclass(kw_only=True)
class TransformerConfig:
    """The encoder-decoder Transformer as the forecasting papers run it beside their own models.

    Attributes:
        d_model: channels of a token.
        n_heads: attention heads; divides d_model.
        e_layers: encoder layers.
        d_layers: decoder layers; a classifier has none.
        d_ff: width of the feed-forward layers.
        dropout: probability, of attention weights too.
        activation: of the feed-forward layers.
    """

    d_model: int = 512
    n_heads: int = 8
    e_layers: int = 2
    d_layers: int = 1
    d_ff: int = 2048
    dropout: float = 0.1
    activation: Activation = "gelu"


@dataclass(kw_only=True)
class FlowformerConfig(TransformerConfig):
    """Flowformer (S217) in the encoder-decoder of its authors' forecasting code; see `TransformerConfig`."""


@dataclass(kw_only=True)
class ITransformerConfig:
    """iTransformer, sizes of the published ETTh1 96-step script.

    Attributes:
        d_model: channels of a variate's token.
        n_heads: attention heads; divides d_model.
        e_layers: encoder layers.
        d_ff: width of the feed-forward layers.
        use_norm: standardise each window by its own mean and deviation, and undo it in the forecast.
        dropout: probability, of attention weights too.
        activation: of the feed-forward layers.
    """

    d_model: int = 256
    n_heads: int = 8
    e_layers: int = 2
    d_ff: int = 256
    use_norm: bool = True
    dropout: float = 0.1
    activation: Activation = "gelu"


@dataclass(kw_only=True)
class PatchTSTConfig:
    """PatchTST, sizes of the published ETTh1 script (look-back 336).

    Attributes:
        d_model: channels of a patch's token.
        n_heads: attention heads; divides d_model.
        e_layers: encoder layers.
        d_ff: width of the feed-forward layers.
        patch_len: steps of a patch; the look-back must hold at least one.
        stride: steps between starts of patches; the series' end is extended by this many copies of its last value.
        res_attention: add each layer's attention scores to the next layer's (RealFormer); only the softmax mechanism
            has scores, so with another mixer it falls away.
        revin: standardise each window by its own mean and deviation, and undo it in the forecast.
        affine: learn a scale and a shift a channel in that normalisation.
        subtract_last: subtract the window's last value instead of its mean.
        individual: one output layer a channel instead of one shared.
        dropout: probability in the encoder.
        head_dropout: probability after the output layer.
    """

    d_model: int = 16
    n_heads: int = 4
    e_layers: int = 3
    d_ff: int = 128
    patch_len: int = 16
    stride: int = 8
    res_attention: bool = True
    revin: bool = True
    affine: bool = False
    subtract_last: bool = False
    individual: bool = False
    dropout: float = 0.3
    head_dropout: float = 0.0


@dataclass(kw_only=True)
class CloudFormerConfig:
    """CloudFormer (S11) as a forecaster; sizes are ours, the paper's code and data are not public.

    Attributes:
        d_model: channels of a step's and of a metric's token.
        n_heads: attention heads; divides d_model.
        e_layers: encoder layers of each branch.
        d_ff: width of the feed-forward layers and of the joint one.
        use_norm: standardise each window by its own mean and deviation, and undo it in the forecast.
        dropout: probability, of attention weights too.
        activation: of the feed-forward layers.
    """

    d_model: int = 64
    n_heads: int = 4
    e_layers: int = 2
    d_ff: int = 128
    use_norm: bool = True
    dropout: float = 0.1
    activation: Activation = "gelu"


@dataclass(kw_only=True)
class DLinearConfig:
    """DLinear.

    Attributes:
        moving_avg: kernel of the decomposition's moving average, in steps; odd.
        individual: one pair of linear maps a channel instead of one shared.
    """

    moving_avg: int = 25
    individual: bool = False


@dataclass(kw_only=True)
class STTNConfig:
    """STTN (S100), Sections 3 and 4; sizes of the official code.

    Attributes:
        d_model: channels of a sensor at a step.
        n_heads: attention heads, between sensors and over time; divides d_model.
        layers: blocks of a spatial and a temporal transformer.
        d_ff: width of the three-layer feed-forward networks.
        order: Chebyshev polynomials of the fixed graph convolution.
        fusion: how the fixed and the dynamic spatial features join. "gate": weighed by a sigmoid of both, a number a
            sensor and step (the paper); "sum": ReLU of the dynamic features, the input and a tenth of the fixed (as
            the official code).
        norm: a layer norm after each residual sum of the attention and feed-forward layers, as in the official code.
        head: what the prediction layer reads: "last", the last step's features (the paper); "window", those of all
            steps (as the official code).
        d_head: width between the prediction layer's two convolutions.
        calendar: the calendar features of each step enter beside the value; not in the paper.
        mixer_in: which attention `--mixer` replaces: "spatial" (between sensors), "temporal" or "both".
        dropout: probability, of attention weights too.
    """

    d_model: int = 64
    n_heads: int = 1
    layers: int = 1
    d_ff: int = 128
    order: int = 3
    fusion: Literal["gate", "sum"] = "gate"
    norm: bool = True
    head: Literal["last", "window"] = "last"
    d_head: int = 512
    calendar: bool = False
    mixer_in: Literal["both", "spatial", "temporal"] = "both"
    dropout: float = 0.0


@dataclass(kw_only=True)
class UTDEConfig:
    """UTDE and interleaved fusion (S198), Section 3; the published run has d_model 128 and 8 heads.

    Attributes:
        d_model: channels of a step.
        n_heads: attention heads; divides d_model.
        layers: layers of self-attention, cross-attention and feed-forward.
        embed_time: width of an embedded time.
        time_heads: heads of learned time attention; divides embed_time.
        kernel_size: steps that the convolution over the imputed grid reads; odd.
        gate: the gate weighs time attention against imputation once a "stay", a "step", or for each "channel" of
            a step.
        series: embedding of the series: "utde" = both, mixed by the gate; "imputation" or "mtand" = that one alone.
        hide_missingness: a control: both embeddings get the imputed grid, as if everything had been observed.
        dropout: probability, of attention weights too.
    """

    d_model: int = 64
    n_heads: int = 4
    layers: int = 2
    embed_time: int = 64
    time_heads: int = 8
    kernel_size: int = 1
    gate: Literal["stay", "step", "channel"] = "channel"
    series: Literal["utde", "imputation", "mtand"] = "utde"
    hide_missingness: bool = False
    dropout: float = 0.1


@dataclass(kw_only=True)
class BlindUTDEConfig(UTDEConfig):
    """The same network as UTDE with the same weights, which sees imputed values only; see `UTDEConfig`."""

    hide_missingness: bool = True


@dataclass(kw_only=True)
class ImputationConfig(UTDEConfig):
    """The imputed grid alone, without what tells where a value was observed; see `UTDEConfig`."""

    series: Literal["utde", "imputation", "mtand"] = "imputation"
    hide_missingness: bool = True


@dataclass(kw_only=True)
class MTANDConfig(UTDEConfig):
    """Learned time attention alone; see `UTDEConfig`."""

    series: Literal["utde", "imputation", "mtand"] = "mtand"


@dataclass(kw_only=True)
class TFTConfig:
    """Temporal Fusion Transformer of pytorch-forecasting; names and defaults are that library's.

    Attributes:
        hidden_size: channels of a token.
        lstm_layers: layers of its two LSTMs.
        attention_head_size: attention heads; divides hidden_size.
        hidden_continuous_size: channels of a number before variables are selected.
        dropout: probability.
    """

    hidden_size: int = 16
    lstm_layers: int = 1
    attention_head_size: int = 4
    hidden_continuous_size: int = 8
    dropout: float = 0.1


@dataclass(kw_only=True)
class NHiTSConfig:
    """N-HiTS of pytorch-forecasting; names and defaults are that library's, but `stacks` and `blocks` (its n_blocks).

    Attributes:
        hidden_size: units of a block's layers.
        stacks: stacks, each at its own resolution.
        blocks: blocks a stack.
        n_layers: layers a block.
        dropout: probability.
        pooling_mode: how the look-back is made coarser.
        interpolation_mode: how a coarse forecast becomes fine.
        batch_normalization: between layers.
        shared_weights: one set of weights a stack for all its blocks.
        naive_level: begin from the last value.
        activation: of the layers.
    """

    hidden_size: int = 512
    stacks: int = 3
    blocks: int = 1
    n_layers: int = 2
    dropout: float = 0.0
    pooling_mode: Literal["max", "average"] = "max"
    interpolation_mode: Literal["linear", "nearest"] = "linear"
    batch_normalization: bool = False
    shared_weights: bool = True
    naive_level: bool = True
    activation: Literal["ReLU", "Softplus", "Tanh", "SELU", "LeakyReLU", "PReLU", "Sigmoid"] = "ReLU"


@dataclass(kw_only=True)
class NaiveConfig:
    """Repeat the last value: nothing to choose."""


@dataclass(kw_only=True)
class SeasonalNaiveConfig:
    """Repeat the last season.

    Attributes:
        season: steps of a season; 0 = what the data's frequency suggests (24 for hours).
    """

    season: int = 0


_SELF = ("noncausal_self",)
_IN_TIME = (("causal_self",),)  # tokens in order of time: a mechanism without a noncausal form will do

MODELS: dict[str, ModelCard] = {
    card.name: card
    for card in (
        ModelCard(
            name="autoformer",
            title="Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term Series Forecasting",
            source="S73",
            year=2021,
            target="attn_timeseries.models.autoformer:Autoformer",
            config=AutoformerConfig,
            mixer="auto_correlation",
            mixer_patterns=_SELF,
            kinds=("forecast", "traffic"),
            note="seasonal and trend parts, split in every layer; the mixer is in encoder and decoder",
        ),
        ModelCard(
            name="informer",
            title="Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
            source="S83",
            year=2021,
            target="attn_timeseries.models.informer:Informer",
            config=InformerConfig,
            mixer="prob_sparse",
            mixer_patterns=_SELF,
            kinds=("forecast", "traffic"),
            note="distilling encoder, one-pass decoder; the mixer is the self-attention of both",
        ),
        ModelCard(
            name="flowformer",
            title="Flowformer: Linearizing Transformers with Conservation Flows",
            source="S217",
            year=2022,
            target="attn_timeseries.models.flowformer:Flowformer",
            config=FlowformerConfig,
            mixer="flow",
            mixer_patterns=_SELF,
            mixer_alternatives=_IN_TIME,
            note="Transformer with linear attention; the mixer is in the encoder",
            kinds=("forecast", "traffic", "classify"),
            targets={"classify": "attn_timeseries.models.classifier:FlowformerClassifier"},
        ),
        ModelCard(
            name="transformer",
            title="Attention Is All You Need",
            source="Vaswani et al. 2017",
            year=2017,
            target="attn_timeseries.models.transformer:Transformer",
            config=TransformerConfig,
            mixer="softmax",
            mixer_patterns=_SELF,
            mixer_alternatives=_IN_TIME,
            note="encoder-decoder over time steps; the mixer is in encoder and decoder",
            kinds=("forecast", "traffic", "classify"),
            targets={"classify": "attn_timeseries.models.classifier:TransformerClassifier"},
        ),
        ModelCard(
            name="itransformer",
            title="iTransformer: Inverted Transformers Are Effective for Time Series Forecasting",
            source="Liu et al. 2024",
            year=2024,
            target="attn_timeseries.models.itransformer:ITransformer",
            config=ITransformerConfig,
            mixer="softmax",
            mixer_patterns=_SELF,
            kinds=("forecast", "traffic"),
            note="a variate is a token",
        ),
        ModelCard(
            name="patchtst",
            title="A Time Series is Worth 64 Words: Long-term Forecasting with Transformers",
            source="Nie et al. 2023",
            year=2023,
            target="attn_timeseries.models.patchtst:PatchTST",
            config=PatchTSTConfig,
            mixer="softmax",
            mixer_patterns=_SELF,
            mixer_alternatives=_IN_TIME,
            kinds=("forecast", "traffic"),
            note="a patch is a token, each channel by itself",
        ),
        ModelCard(
            name="sttn",
            title="Spatial-Temporal Transformer Networks for Traffic Flow Forecasting",
            source="S100",
            year=2020,
            target="attn_timeseries.models.sttn:STTN",
            config=STTNConfig,
            mixer="softmax",
            mixer_patterns=_SELF,
            kinds=("traffic",),
            note="sensors read each other by graph convolution and attention, fused by a gate; the mixer is between "
            "sensors and over time",
        ),
        ModelCard(
            name="utde",
            title="Improving Medical Predictions by Irregular Multimodal Electronic Health Records Modeling",
            source="S198",
            year=2023,
            target="attn_timeseries.models.utde:UTDE",
            config=UTDEConfig,
            mixer="softmax",
            mixer_patterns=_SELF,
            kinds=("records",),
            note="irregular series and notes: a gate mixes imputation and time attention; the mixer is in self-, "
            "and where it can in cross-attention",
        ),
        ModelCard(
            name="utde_blind",
            title="Control of UTDE that ignores missingness",
            source="control of S198",
            year=2023,
            target="attn_timeseries.models.utde:UTDE",
            config=BlindUTDEConfig,
            mixer="softmax",
            mixer_patterns=_SELF,
            kinds=("records",),
            note="the same network and number of weights; sees imputed values, and not where they were observed",
        ),
        ModelCard(
            name="imputation",
            title="Control of UTDE: imputation alone",
            source="control of S198",
            year=2023,
            target="attn_timeseries.models.utde:UTDE",
            config=ImputationConfig,
            mixer="softmax",
            mixer_patterns=_SELF,
            kinds=("records",),
            note="the imputed grid alone; ignores missingness",
        ),
        ModelCard(
            name="mtand",
            title="Multi-Time Attention Networks for Irregularly Sampled Time Series",
            source="Shukla and Marlin 2021",
            year=2021,
            target="attn_timeseries.models.utde:UTDE",
            config=MTANDConfig,
            mixer="softmax",
            mixer_patterns=_SELF,
            kinds=("records",),
            note="its learned time attention alone in the network of S198",
        ),
        ModelCard(
            name="cloudformer",
            title="CloudFormer: An Attention-based Performance Prediction for Public Clouds with Unknown Workload",
            source="S11",
            year=2025,
            target="attn_timeseries.models.cloudformer:CloudFormer",
            config=CloudFormerConfig,
            mixer="softmax",
            mixer_patterns=_SELF,
            kinds=("forecast", "traffic"),
            note="one branch attends over time, one over metrics; the forecasting head is ours",
        ),
        ModelCard(
            name="dlinear",
            title="Are Transformers Effective for Time Series Forecasting?",
            source="Zeng et al. 2023",
            year=2023,
            target="attn_timeseries.models.dlinear:DLinear",
            config=DLinearConfig,
            kinds=("forecast", "traffic"),
            note="two linear maps from look-back to horizon: the baseline to beat",
        ),
        ModelCard(
            name="tft",
            title="Temporal Fusion Transformers for Interpretable Multi-horizon Time Series Forecasting",
            source="Lim et al. 2021",
            year=2021,
            target="attn_timeseries.integrations.baselines:TFT",
            config=TFTConfig,
            note="from pytorch-forecasting, an extra; each column is a series of its own",
        ),
        ModelCard(
            name="nhits",
            title="N-HiTS: Neural Hierarchical Interpolation for Time Series Forecasting",
            source="Challu et al. 2023",
            year=2023,
            target="attn_timeseries.integrations.baselines:NHiTS",
            config=NHiTSConfig,
            note="from pytorch-forecasting, an extra; each column is a series of its own",
        ),
        ModelCard(
            name="naive",
            title="Repeat the last value",
            source="baseline",
            year=0,
            target="attn_timeseries.models.naive:Naive",
            config=NaiveConfig,
            trainable=False,
            kinds=("forecast", "traffic"),
            note="no parameters",
        ),
        ModelCard(
            name="seasonal_naive",
            title="Repeat the last season",
            source="baseline",
            year=0,
            target="attn_timeseries.models.naive:SeasonalNaive",
            config=SeasonalNaiveConfig,
            trainable=False,
            kinds=("forecast", "traffic"),
            note="no parameters; the last value where the look-back is shorter than a season",
        ),
    )
}
