"""Models of survival: MOTCat, a network on genes alone, gated attention on slides alone.

"Multimodal Optimal Transport-based Co-Attention Transformer with Global Structure Consistency for Survival Prediction"
(S8); "Multimodal Co-Attention Transformer for Survival Prediction in Gigapixel Whole Slide Images" (2021) for the
network on genes and the loss. Shapes: B patients, G groups of genes, N patches, C features of a patch, K intervals of
time, D channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attn_medseg.config import ABMILConfig, MOTCatConfig, SNNConfig
from attn_medseg.models.mil import BagClassifier, BagShape
from core_attn.mechanisms.pooling.gated import GatedAttentionPooling
from core_attn.ops import sinkhorn

_EPS = 1e-7


@dataclass(frozen=True)
class SurvivalShape:
    """A problem of survival.

    Attributes:
        groups: genes of each group.
        patches: C; 0 = there are no slides.
        intervals: K.
    """

    groups: tuple[int, ...]
    patches: int
    intervals: int


@dataclass(frozen=True)
class SurvivalOutput:
    """What a model says of patients.

    Attributes:
        logits: (B, K) of the hazards: the chance of the event in an interval if it did not come before.
        attention: (B, G, N) share of each patch in what each group of genes reads, or (B, 1, N) of a model without
            genes; None without slides.
    """

    logits: Tensor
    attention: Tensor | None = None

    @property
    def hazards(self) -> Tensor:
        """(B, K)."""
        return torch.sigmoid(self.logits)

    @property
    def survival(self) -> Tensor:
        """(B, K) chance of no event to the end of each interval."""
        return torch.cumprod(1 - self.hazards, dim=1)

    @property
    def risk(self) -> Tensor:
        """(B,) less the expected number of intervals survived: the higher, the earlier."""
        return -self.survival.sum(dim=1)


class SurvivalModel(nn.Module):
    """Genes and slides of patients -> hazards.

    Attributes:
        needs: of "genes" and "slides", what the model reads.
    """

    needs: ClassVar[tuple[str, ...]] = ("genes", "slides")

    def __init__(self, config: Any, shape: SurvivalShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape

    def forward(self, genes: Tensor, x: Tensor, mask: Tensor) -> SurvivalOutput:
        """Read patients.

        Args:
            genes: (B, sum of the groups' sizes), group after group.
            x: (B, N, C) patches.
            mask: (B, N) bool, True = a patch.
        """
        raise NotImplementedError


def nll(output: SurvivalOutput, interval: Tensor, event: Tensor, *, alpha: float = 0.0) -> Tensor:
    """(B,) negative log-likelihood of times in intervals.

    Of a patient with the event in interval y: -log S(y - 1) - log h(y); of a censored one -log S(y), times 1 - alpha.
    Probabilities below 1e-7 count as 1e-7, as in the official code.

    Args:
        interval: (B,) y of the event or of the last contact.
        event: (B,) bool; False = censored.
        alpha: how much less censored patients weigh.
    """
    survival = torch.cat([torch.ones_like(output.logits[:, :1]), output.survival], dim=1)
    place = interval[:, None]
    before, after = (survival.gather(1, place + i).clamp(min=_EPS).log() for i in (0, 1))
    hazard = output.hazards.gather(1, place).clamp(min=_EPS).log()
    return torch.where(event, -(before + hazard)[:, 0], -(1 - alpha) * after[:, 0])


class MOTCat(SurvivalModel):
    """Optimal transport from patches to groups of genes decides which patches a group reads (section 3.3).

    Each group of genes and each patch is encoded; the plan of unbalanced transport between them, which no gradient
    enters, gives for each group a sum of patches; a transformer over the groups' tokens and gated pooling follow on
    both sides, both vectors are joined and give the hazards.
    """

    def __init__(
        self,
        config: MOTCatConfig,
        shape: SurvivalShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        width, dropout = config.width, config.dropout
        if width < 1 or width % config.heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {config.heads}")
        _check_dropout(dropout)
        self.patches = nn.Sequential(nn.Linear(shape.patches, width), nn.ReLU(), nn.Dropout(dropout))
        self.genes = nn.ModuleList(_self_normalising((size, width, width), dropout) for size in shape.groups)
        self.path_transformer, self.omic_transformer = (_transformer(config) for _ in range(2))
        self.path_pooling, self.omic_pooling = (
            GatedAttentionPooling(width, hidden=width, dropout=dropout) for _ in range(2)
        )
        self.path_rho, self.omic_rho = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)) for _ in range(2)
        )
        self.join = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.classifier = nn.Linear(width, shape.intervals)

    def forward(self, genes: Tensor, x: Tensor, mask: Tensor) -> SurvivalOutput:
        patches = self.patches(x.masked_fill(~mask[..., None], 0.0))
        parts = genes.split(self.shape.groups, dim=1)
        omics = torch.stack([network(part) for network, part in zip(self.genes, parts)], dim=1)
        plan = self.plan(patches, omics, mask).to(patches.dtype)  # (B, N, G)
        read = plan.mT @ patches
        path = self.path_rho(self.path_pooling(self.path_transformer(read)).features[:, 0])
        omic = self.omic_rho(self.omic_pooling(self.omic_transformer(omics)).features[:, 0])
        return SurvivalOutput(self.classifier(self.join(torch.cat([path, omic], dim=1))), plan.mT)

    @torch.no_grad()
    def plan(self, patches: Tensor, omics: Tensor, mask: Tensor) -> Tensor:
        """(B, N, G) plan in float64; what is transported costs the squared distance of features from which each row's
        least was taken, divided by the bag's largest."""
        source, target = (one.double() - one.double().amin(dim=-1, keepdim=True) for one in (patches, omics))
        cost = torch.cdist(source, target).square().masked_fill(~mask[..., None], 0.0)
        cost = cost / cost.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(cost.dtype).tiny)
        mass = mask.double() / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return sinkhorn(cost, mass, reg=self.config.reg, tau=self.config.tau)


class SNN(SurvivalModel):
    """A self-normalising network on all genes: the control without slides."""

    needs = ("genes",)

    def __init__(
        self,
        config: SNNConfig,
        shape: SurvivalShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        _check_dropout(config.dropout)
        if not config.channels or min(config.channels) < 1:
            raise ValueError(f"channels must be 1 or more, got {list(config.channels)}")
        self.network = _self_normalising((sum(shape.groups), *config.channels), config.dropout)
        self.classifier = nn.Linear(config.channels[-1], shape.intervals)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
                nn.init.zeros_(module.bias)

    def forward(self, genes: Tensor, x: Tensor, mask: Tensor) -> SurvivalOutput:
        return SurvivalOutput(self.classifier(self.network(genes)))


class SlideSurvival(SurvivalModel):
    """Gated attention pooling of patches: the control without genes."""

    needs = ("slides",)

    def __init__(
        self,
        config: ABMILConfig,
        shape: SurvivalShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape)
        self.network = BagClassifier(config, BagShape(shape.patches, shape.intervals))

    def forward(self, genes: Tensor, x: Tensor, mask: Tensor) -> SurvivalOutput:
        output = self.network(x, mask)
        return SurvivalOutput(output.logits, output.attention[:, None])


def _self_normalising(widths: tuple[int, ...], dropout: float) -> nn.Sequential:
    blocks = [
        nn.Sequential(nn.Linear(ins, outs), nn.ELU(), nn.AlphaDropout(dropout))
        for ins, outs in itertools.pairwise(widths)
    ]
    return nn.Sequential(*blocks)


def _transformer(config: MOTCatConfig) -> nn.TransformerEncoder:
    # torch.relu, not "relu": the fused layer that PyTorch then takes in evaluation knows no autocast.
    layer = nn.TransformerEncoderLayer(
        config.width, config.heads, 2 * config.width, config.dropout, activation=torch.relu, batch_first=True
    )
    return nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be 0 or more and below 1, got {dropout:g}")


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official MOTCAT_Surv's parameters (fusion by concatenation) under our names."""
    names = {
        "wsi_net.": "patches.",
        "sig_networks.": "genes.",
        "path_attention_head.attention_a.0.": "path_pooling.value.",
        "path_attention_head.attention_b.0.": "path_pooling.gate.",
        "path_attention_head.attention_c.": "path_pooling.score.",
        "omic_attention_head.attention_a.0.": "omic_pooling.value.",
        "omic_attention_head.attention_b.0.": "omic_pooling.gate.",
        "omic_attention_head.attention_c.": "omic_pooling.score.",
        "mm.": "join.",
    }
    found = {}
    for name, value in weights.items():
        start = next((one for one in names if name.startswith(one)), "")
        found[names.get(start, "") + name.removeprefix(start)] = value
    return found
