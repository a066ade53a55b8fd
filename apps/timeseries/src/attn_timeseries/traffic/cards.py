"""The data sets of traffic and the options all of them share. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attn_shared.app import DataCard, DataFile, Kind
from attn_shared.config import OptimConfig, TrainerConfig
from attn_timeseries.config import ForecastTaskConfig
from attn_timeseries.data.cards import ForecastDataConfig

NAME = "traffic"
GRAPH_SUFFIX = ".graph.csv"

# STGCN (Yu et al. 2018), Equation 10: distances in units of 10 km, sigma^2 = 0.1, weights below 0.5 dropped.
PEMSD7_SIGMA = 10_000 * 0.1**0.5
PEMSD7_THRESHOLD = 0.5
PEMSD7_DAYS = (34, 5, 5)
_OF_OTHER_KINDS = (
    *("id_column", "id_columns", "known_covariates", "known_categories", "past_covariates", "past_categories"),
    *("static_covariates", "static_categories"),
)


@dataclass(kw_only=True)
class TrafficDataConfig(ForecastDataConfig):
    """How a table of sensors and their graph are read, split and cut into windows.

    Attributes:
        graph: CSV of the graph: a square matrix (in the order of the sensors, or with their names in the header), or a
            list of edges under the header from,to,weight or from,to,distance. None = NAME.graph.csv beside NAME.csv,
            where there is one.
        graph_values: what the graph's numbers are; "auto" = as its header says, else weights where none is above 1.
        graph_sigma: a distance d becomes the weight exp(-(d / sigma)^2); None = the deviation of all distances given
            (PeMSD7: 3162 m).
        graph_threshold: weights below it count as no edge; None = 0.1 for distances (PeMSD7: 0.5), 0 for weights.
        days: whole days for training, validation and test in order of time, such as "[34, 5, 5]"; None = by the
            fractions (PeMSD7: 34, 5, 5).
        cut: where windows may not run over. "gap": rows missing for longer than `max_gap`; "day": midnight, too;
            "auto": day for PeMSD7, as in its papers, else gap.
        max_gap: longest run of steps without a row that is bridged; a longer one cuts the table. A sensor that reports
            nothing while others do is no cut, however long: its values are filled and never scored.
        zero_missing: a value of exactly 0 means that the sensor reported nothing.
        shared_scale: one mean and deviation for all sensors, as the official code; false = one a sensor.
    """

    seq_len: int = 12
    label_len: int = 6
    pred_len: int = 9
    max_gap: int = 3
    graph: str | None = None
    graph_values: Literal["auto", "weights", "distances"] = "auto"
    graph_sigma: float | None = None
    graph_threshold: float | None = None
    days: list[int] | None = None
    cut: Literal["auto", "day", "gap"] = "auto"
    zero_missing: bool = False
    shared_scale: bool = True

    def __post_init__(self) -> None:
        if self.days is not None and (len(self.days) != 3 or min(self.days) < 0 or not (self.days[0] and self.days[2])):
            raise ValueError(f"days takes training, validation and test days, such as [34, 5, 5], got {self.days}")
        if self.graph_sigma is not None and not self.graph_sigma > 0:
            raise ValueError(f"graph_sigma must be above 0, got {self.graph_sigma:g}")
        if self.graph_threshold is not None and self.graph_threshold < 0:
            raise ValueError(f"graph_threshold must be at least 0, got {self.graph_threshold:g}")
        if self.max_gap < 0:
            raise ValueError(f"max_gap must be at least 0, got {self.max_gap}")
        for name in _OF_OTHER_KINDS:
            if getattr(self, name, None):
                raise ValueError(f"a table of sensors has nothing but sensors beside its times, so it takes no {name}")


@dataclass(kw_only=True)
class TrafficTaskConfig(ForecastTaskConfig):
    """What a forecast is trained for, by default the mean absolute error of the papers; and the intervals around it."""

    loss: Literal["mse", "mae", "huber", "quantile"] = "mae"


def is_traffic(path: str) -> bool:
    """Whether a graph lies beside a table: `roads.graph.csv` beside `roads.csv`."""
    return graph_beside(path) is not None


def graph_beside(path: str) -> Path | None:
    """The graph that lies beside a table, None where there is none."""
    table = Path(path).expanduser()
    beside = table.with_name(table.stem + GRAPH_SUFFIX)
    return beside if beside != table and beside.is_file() else None


DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        DataCard(
            name="pemsd7",
            kind=NAME,
            title="Speed at 25 of the 228 stations of PeMSD7(M), California District 7",
            task="forecasting on a graph, 25 sensors",
            licence="none stated",
            source="Caltrans PeMS; github.com/Lin956/STTNS (folder PEMSD7)",
            size="12,672 steps x 25, 1.5 MB",
            split="whole days: 34 training, 5 validation, 5 test; no window runs over midnight",
            citation="B. Yu, H. Yin and Z. Zhu, Spatio-Temporal Graph Convolutional Networks, IJCAI 2018",
            subdir="timeseries/pemsd7_25",
            files=(
                DataFile(
                    path="V_25.csv",
                    sha256="05f722e674411d898f66b9ce09299c3db10f11a2a54871da165e92483fadac19",
                    bytes=1518723,
                ),
                DataFile(
                    path="W_25.csv",
                    sha256="38784165e062b7f62d351a755c70b10bb754416abda255bd2fcb19f11792c045",
                    bytes=3298,
                ),
            ),
            manual="download V_25.csv and W_25.csv from github.com/Lin956/STTNS (folder PEMSD7)",
            facts={
                "step": "5 minutes",
                "span": "the 44 weekdays of May and June 2012",
                "missing": "none",
                "unit": "miles an hour",
                "graph": "road distances in metres, as weights exp(-d^2 / sigma^2) of at least 0.5, sigma 3162 m",
                "dates": "not in the file; counted on from the first weekday (Memorial Day then falls on the day "
                "without a rush hour)",
            },
        ),
        DataCard(
            name="metr_la_week",
            kind=NAME,
            title="Speed at 207 loop detectors in Los Angeles, one week (Los-loop)",
            task="forecasting on a graph, 207 sensors",
            licence="none stated",
            source="LA Metro; github.com/lehaifeng/T-GCN (folder data)",
            size="2,016 steps x 207, 2.3 MB",
            split="first 70 % training, last 20 % test, validation between",
            citation="Y. Li et al., Diffusion Convolutional Recurrent Neural Network, ICLR 2018; this week: L. Zhao et "
            "al., T-GCN, 2019",
            subdir="timeseries/metr_la_week",
            files=(
                DataFile(path="los_speed.csv.gz"),  # gzip writes other bytes on every machine
                DataFile(
                    path="los_adj.csv",
                    sha256="7a6eb41e10677992b5af50f5ab187c6c05c5c3a92cb973950cfddbf857361e76",
                    bytes=111686,
                ),
            ),
            manual="download los_speed.csv and los_adj.csv from github.com/lehaifeng/T-GCN (folder data) and compress "
            "the first with gzip",
            facts={
                "step": "5 minutes",
                "span": "2012-03-01 to 2012-03-07",
                "missing": "none (the T-GCN authors filled what was missing)",
                "unit": "miles an hour",
                "graph": "weights as given",
            },
        ),
    )
}

KIND = Kind(
    name=NAME,
    title="forecast traffic on a graph of sensors",
    task="attn_timeseries.traffic.task:TrafficTask",
    data_config=TrafficDataConfig,
    task_config=TrafficTaskConfig,
    default_model="sttn",
    default_data="pemsd7",
    trainer_defaults=TrainerConfig,
    optim_defaults=OptimConfig,
)
FILE_FORMATS = (
    "Traffic: a CSV with one column of times and one column a sensor, and the graph of the sensors as a CSV beside it "
    "(roads.graph.csv beside roads.csv) or named by --data_args.graph with --kind traffic: a square matrix of weights "
    "or distances, or edges under from,to,weight or from,to,distance."
)
