"""The models' options and their list. Plain dataclasses without torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attn_shared.app import ModelCard


@dataclass(kw_only=True)
class BPRMFConfig:
    """BPR-MF.

    Attributes:
        embed_dim: numbers of a user's and an item's vector.
        l2: weight of half the squared length of the vectors of a batch.
    """

    embed_dim: int = 64
    l2: float = 1e-2


@dataclass(kw_only=True)
class LightGCNConfig:
    """LightGCN.

    Attributes:
        embed_dim: numbers of a user's and an item's vector.
        layers: times that vectors are smoothed over the graph.
        init: standard deviation of the first vectors.
        l2: weight of half the squared length of the vectors of a batch, as they are before smoothing.
    """

    embed_dim: int = 64
    layers: int = 3
    init: float = 0.1
    l2: float = 1e-4


@dataclass(kw_only=True)
class KGATConfig:
    """KGAT (S32). Option names are those of the common PyTorch port; the defaults are the paper's.

    Attributes:
        embed_dim: numbers of the vector of a user, item or entity.
        relation_dim: numbers of a relation's vector, the space in which TransR compares.
        aggregation_type: how a node's own vector and what it reads are joined.
        conv_dim_list: widths of the layers that propagate; a node sees as many edges far.
        mess_dropout: probability in each layer that a number of a node's new vector is dropped.
        node_dropout: probability that a node sends nothing in a layer.
        cf_l2loss_lambda: weight of half the squared length of the vectors that a batch ranks.
        kg_l2loss_lambda: weight of that of the projected vectors of a batch of triples.
        kg_batch_size: triples a step; 0 = as many as interactions.
        training: "together" = every step follows the sum of both losses, eq. (14); "alternate" = one step the ranking
            loss, the next one TransR's; "ranking" = no TransR.
        start: "bprmf" = BPR-MF is trained first and its vectors are where users and items start; the folder of a run of
            bprmf on the same interactions = its vectors; "none" = random ones.
        start_epochs: passes over the interactions of that training.
        start_lr: its learning rate.
        start_batch_size: its batch.
        start_l2: its `l2`.
    """

    embed_dim: int = 64
    relation_dim: int = 64
    aggregation_type: Literal["bi-interaction", "gcn", "graphsage"] = "bi-interaction"
    conv_dim_list: tuple[int, ...] = (64, 32, 16)
    mess_dropout: tuple[float, ...] = (0.1, 0.1, 0.1)
    node_dropout: float = 0.0
    cf_l2loss_lambda: float = 1e-5
    kg_l2loss_lambda: float = 1e-5
    kg_batch_size: int = 0
    training: Literal["together", "alternate", "ranking"] = "together"
    start: str = "none"
    start_epochs: int = 100
    start_lr: float = 1e-3
    start_batch_size: int = 1024
    start_l2: float = 1e-2


@dataclass(kw_only=True)
class DINConfig:
    """DIN.

    Attributes:
        embed_dim: numbers of a name's vector.
        attention_hidden: widths of the unit that weighs an earlier item.
        attention_softmax: weights of earlier items sum to one, as in the authors' code; the paper leaves them as they
            are.
        hidden: widths of the tower over everything.
        activation: of the unit and the tower; dice is the paper's.
        dropout: in the tower.
    """

    embed_dim: int = 16
    attention_hidden: tuple[int, ...] = (64, 16)
    attention_softmax: bool = False
    hidden: tuple[int, ...] = (200, 80)
    activation: Literal["dice", "prelu", "relu"] = "dice"
    dropout: float = 0.0


@dataclass(kw_only=True)
class MoEConfig:
    """A plain mixture of experts over what AW-MoE reads.

    Attributes:
        embed_dim: numbers of a name's vector.
        input_hidden: width of the layer over the item, over earlier items and over the rest.
        attention_hidden: widths of the unit that weighs an earlier item.
        attention_softmax: weights of earlier items sum to one.
        experts: number of experts.
        hidden: widths of an expert's layers.
        gate_hidden: widths of the gate's layers; of AW-MoE's gate unit and activation unit.
        dropout: in the experts.
    """

    embed_dim: int = 16
    input_hidden: int = 64
    attention_hidden: tuple[int, ...] = (32,)
    attention_softmax: bool = False
    experts: int = 4
    hidden: tuple[int, ...] = (64, 32)
    gate_hidden: tuple[int, ...] = (32,)
    dropout: float = 0.0


@dataclass(kw_only=True)
class AWMoEConfig(MoEConfig):
    """AW-MoE (S10).

    Attributes:
        contrast: weight of InfoNCE between the gates of the whole and of the masked behaviour; 0 = without.
        mask: probability that an earlier item is hidden for it.
        temperature: of InfoNCE.
        negatives: rows of the batch that each row is told from.
    """

    contrast: float = 0.05
    mask: float = 0.3
    temperature: float = 0.2
    negatives: int = 128


@dataclass(kw_only=True)
class LogisticConfig:
    """Logistic regression.

    Attributes:
        l2: weight of half the squared weights.
    """

    l2: float = 1e-5


@dataclass(kw_only=True)
class FMConfig:
    """FM.

    Attributes:
        embed_dim: numbers of a name's vector.
    """

    embed_dim: int = 16


@dataclass(kw_only=True)
class DCNv2Config:
    """DCN-v2, cross layers and a tower side by side.

    Attributes:
        embed_dim: numbers of a name's vector.
        layers: cross layers.
        rank: of a cross layer's matrix; 0 = full.
        hidden: widths of the tower; empty = none.
        dropout: in the tower.
    """

    embed_dim: int = 16
    layers: int = 2
    rank: int = 0
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.2


@dataclass(kw_only=True)
class AutoIntConfig:
    """AutoInt, the control of Hiformer.

    Attributes:
        embed_dim: numbers of a field's vector, which heads divide.
        heads: of attention.
        layers: of attention.
        scale: divide scores by the root of a head's width; the paper does not.
        hidden: widths of a tower beside it, whose log odds are added (AutoInt+); empty = none.
        dropout: of fields' vectors and in the tower.
    """

    embed_dim: int = 16
    heads: int = 2
    layers: int = 3
    scale: bool = False
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0


@dataclass(kw_only=True)
class HiformerConfig:
    """Hiformer (S9).

    Attributes:
        embed_dim: numbers of a field's vector, which heads divide.
        heads: of attention.
        layers: of attention.
        projection: how queries, keys and values are made: "composite" = each from all fields together, Hiformer;
            "heterogeneous" = each from its own field by a matrix of that field; "shared" = one matrix, a Transformer.
        rank: of the composite matrices; 0 = full.
        pruned: compute in the last layer only what the task token reads; the result is the same.
        numeric_tokens: vectors that all numbers together are turned into; 0 = one of each number's own.
        ffn_factor: width of a feed-forward layer over that of a vector.
        dropout: of what attention and feed-forward layers add.
    """

    embed_dim: int = 16
    heads: int = 2
    layers: int = 1
    projection: Literal["composite", "heterogeneous", "shared"] = "composite"
    rank: int = 32
    pruned: bool = True
    numeric_tokens: int = 0
    ffn_factor: int = 4
    dropout: float = 0.1


MODELS: dict[str, ModelCard] = {
    card.name: card
    for card in (
        ModelCard(
            name="kgat",
            title="KGAT: Knowledge Graph Attention Network for Recommendation",
            source="S32",
            year=2019,
            target="attn_recsys.models.kgat:KGAT",
            config=KGATConfig,
            kinds=("items",),
            note="attention over the edges of one graph of users, items and entities; gives paths as reasons",
        ),
        ModelCard(
            name="lightgcn",
            title="LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation",
            source="He et al. 2020",
            year=2020,
            target="attn_recsys.models.lightgcn:LightGCN",
            config=LightGCNConfig,
            kinds=("items",),
            note="smooths over interactions; no knowledge graph",
        ),
        ModelCard(
            name="bprmf",
            title="BPR: Bayesian Personalized Ranking from Implicit Feedback",
            source="Rendle et al. 2009",
            year=2009,
            target="attn_recsys.models.bprmf:BPRMF",
            config=BPRMFConfig,
            kinds=("items",),
            note="a vector a user and an item; no graph",
        ),
        ModelCard(
            name="hiformer",
            title="Hiformer: Heterogeneous Feature Interactions Learning with Transformers for Recommender Systems",
            source="S9",
            year=2023,
            target="attn_recsys.models.hiformer:Hiformer",
            config=HiformerConfig,
            mixer="softmax",
            mixer_patterns=("noncausal_self",),
            kinds=("clicks",),
            note="fields attend to fields, queries, keys and values of each made from all",
        ),
        ModelCard(
            name="autoint",
            title="AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks",
            source="Song et al. 2019",
            year=2019,
            target="attn_recsys.models.autoint:AutoInt",
            config=AutoIntConfig,
            mixer="softmax",
            mixer_patterns=("noncausal_self",),
            kinds=("clicks",),
            note="fields attend to fields by the same matrices; the control of Hiformer",
        ),
        ModelCard(
            name="dcnv2",
            title="DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems",
            source="Wang et al. 2021",
            year=2021,
            target="attn_recsys.models.dcn:DCNv2",
            config=DCNv2Config,
            kinds=("clicks",),
            note="layers that multiply; no attention",
        ),
        ModelCard(
            name="fm",
            title="Factorization Machines",
            source="Rendle 2010",
            year=2010,
            target="attn_recsys.models.fm:FM",
            config=FMConfig,
            kinds=("clicks",),
            note="names in pairs; no attention",
        ),
        ModelCard(
            name="logistic",
            title="Logistic regression",
            source="",
            year=0,
            target="attn_recsys.models.logistic:LogisticRegression",
            config=LogisticConfig,
            kinds=("clicks",),
            note="a weight a name; no pairs",
        ),
        ModelCard(
            name="awmoe",
            title="Attention Weighted Mixture of Experts with Contrastive Learning for Personalized Ranking in "
            "E-commerce",
            source="S10",
            year=2023,
            target="attn_recsys.models.awmoe:AWMoE",
            config=AWMoEConfig,
            kinds=("clicks",),
            note="each earlier item of the user votes for experts; needs behaviour",
        ),
        ModelCard(
            name="din",
            title="Deep Interest Network for Click-Through Rate Prediction",
            source="Zhou et al. 2018",
            year=2018,
            target="attn_recsys.models.din:DIN",
            config=DINConfig,
            kinds=("clicks",),
            note="earlier items weighed by what is scored; needs behaviour",
        ),
        ModelCard(
            name="moe",
            title="Adaptive Mixtures of Local Experts",
            source="Jacobs et al. 1991",
            year=1991,
            target="attn_recsys.models.moe:MoE",
            config=MoEConfig,
            kinds=("clicks",),
            note="AW-MoE with a plain gate; needs behaviour",
        ),
    )
}
