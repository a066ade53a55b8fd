"""The data sets of the application and the options all of them share. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attn_shared.app import DataCard, DataFile


@dataclass(kw_only=True)
class ForecastDataConfig:
    """How series are read, split and cut into windows.

    Attributes:
        seq_len: look-back: steps the model sees.
        label_len: last steps of the look-back repeated at the start of the decoder (Informer, Autoformer).
        pred_len: horizon: steps to forecast.
        columns: value columns, in order; None = every column of numbers.
        time_column: the column of times; None = found by its name and contents.
        id_column: the column that names the series of a long table; None = found where times repeat.
        id_columns: several columns that name a series together, from the widest group to the narrowest, such as
            region,store; each may also be one of `static_categories`.
        delimiter: "," ";" "tab" or "|"; None = found.
        frequency: step as a pandas alias such as "h", "15min", "D", "W-SUN", "MS"; None = inferred.
        calendar: frequency whose calendar features are used; None = the data's own. The Autoformer scripts use "h"
            for every data set.
        season: steps in a season, for the seasonal naive forecast and MASE; None = from the frequency (24 for hours).
        split: "etth" = rows 12*720, 16*720, 20*720; "ratio" = each series by the fractions below; "time" = all series
            at the same two times, so that a series may lie in the test part only; "auto" = etth for etth1 and etth2,
            else ratio.
        train_fraction: first part of each series, for training and for the scaler.
        test_fraction: last part of each series; what lies between is for validation.
        missing: "interpolate" = fill gaps over time (never from beyond the end of a look-back, never scored);
            "error" = refuse the first gap.
        max_gap: longest run of missing steps that is filled.
        scale: "standard" = subtract the mean of the training rows and divide by their deviation; "none".
        scaler: "global" = one mean and deviation a column; "series" = one a column and series.
        known_covariates: columns of numbers known also for the steps to forecast, such as a planned price.
        known_categories: columns of categories known so, such as a holiday's name.
        past_covariates: columns of numbers known up to now only, such as the weather.
        past_categories: columns of categories known so.
        static_covariates: columns with one number a series.
        static_categories: columns with one category a series; levels of the id are among them where named.
    """

    seq_len: int = 96
    label_len: int = 48
    pred_len: int = 96
    columns: list[str] | None = None
    time_column: str | None = None
    id_column: str | None = None
    id_columns: list[str] | str | None = None
    delimiter: str | None = None
    frequency: str | None = None
    calendar: str | None = None
    season: int | None = None
    split: Literal["auto", "etth", "ratio", "time"] = "auto"
    train_fraction: float = 0.7
    test_fraction: float = 0.2
    missing: Literal["interpolate", "error"] = "interpolate"
    max_gap: int = 24
    scale: Literal["standard", "none"] = "standard"
    scaler: Literal["global", "series"] = "global"
    known_covariates: list[str] | str | None = None
    known_categories: list[str] | str | None = None
    past_covariates: list[str] | str | None = None
    past_categories: list[str] | str | None = None
    static_covariates: list[str] | str | None = None
    static_categories: list[str] | str | None = None


def name_list(names: list[str] | str | None) -> list[str]:
    """Names of columns as options give them: a list, or text with commas between them."""
    if isinstance(names, str):
        names = names.split(",")
    return [name.strip() for name in names or () if name.strip()]


@dataclass(kw_only=True)
class ForecastPredictOptions:
    """Options of `predict`.

    Attributes:
        future: table of the known covariates of the steps to forecast (times, names of series, covariates), where the
            input has no rows for them.
    """

    future: str | None = None


FILE_FORMATS = (
    "CSV (comma, semicolon with decimal comma, tab or |) or Parquet with a header, one column of times and one or more "
    "columns of numbers: a row a step. Several series: one below the other, with a column that names the series. "
    "Frequency, gaps, duplicates and order are found and reported. Covariates are further columns, named in "
    "--data_args.known_covariates, .past_covariates, .static_covariates (numbers) and .known_categories, "
    ".past_categories, .static_categories; `predict` takes those of the future from rows with empty targets at the "
    "end, or from --future FILE."
)
FILE_SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".pq")

ETTH_SPLIT = "rows 0, 12*720, 16*720, 20*720 (12, 4 and 4 months of 30 days); the rest is unused"
RATIO_SPLIT = "first 70 % training, last 20 % test, validation between"

_ETT_CITATION = (
    "H. Zhou et al., Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting, AAAI 2021"
)
_AUTOFORMER_RELEASE = "CSV of the Autoformer release (THUML), github.com/thuml/Autoformer"


def _manual(file: str, where: str) -> str:
    return f"download {file} from {where} and put it at $ATTN_DATA/timeseries/{file}"


def _ett(number: int, sha256: str, size: int) -> DataCard:
    file = f"ETTh{number}.csv"
    return DataCard(
        name=f"etth{number}",
        title=f"Electricity transformer temperature, hourly, station {number}",
        task="forecasting, 7 variables",
        licence="CC BY-ND 4.0",
        source="github.com/zhouhaoyi/ETDataset, ETT-small",
        size="17,420 rows x 7, 2.5 MB",
        split=ETTH_SPLIT,
        citation=_ETT_CITATION,
        subdir="timeseries",
        files=(
            DataFile(
                path=file,
                sha256=sha256,
                bytes=size,
                url=f"https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{file}",
            ),
        ),
        manual=_manual(file, "github.com/zhouhaoyi/ETDataset (folder ETT-small)"),
        facts={"step": "1 hour", "span": "2016-07-01 to 2018-06-26", "missing": "none"},
    )


DATASETS: dict[str, DataCard] = {
    card.name: card
    for card in (
        DataCard(
            name="co2",
            title="Carbon dioxide over Mauna Loa, weekly",
            task="forecasting, 1 variable",
            licence="public domain",
            source="comes with statsmodels (statsmodels/datasets/co2)",
            size="2,284 weeks, 59 of them missing",
            split=RATIO_SPLIT,
            citation="C. D. Keeling and T. P. Whorf, Atmospheric CO2 records from sites in the SIO air sampling "
            "network, 2004",
            embedded=True,
            facts={"step": "1 week", "span": "1958-03-29 to 2001-12-29", "unit": "parts per million by volume"},
        ),
        _ett(1, "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066", 2589657),
        _ett(2, "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b", 2417960),
        DataCard(
            name="exchange",
            title="Daily exchange rates of eight currencies",
            task="forecasting, 8 variables",
            licence="none stated for the data",
            source=f"G. Lai et al. (LSTNet); {_AUTOFORMER_RELEASE}",
            size="7,588 rows x 8, 0.6 MB",
            split=RATIO_SPLIT,
            citation="G. Lai et al., Modeling Long- and Short-Term Temporal Patterns with Deep Neural Networks, "
            "SIGIR 2018",
            subdir="timeseries",
            files=(
                DataFile(
                    path="exchange_rate.csv",
                    sha256="d55e7aa2641009814a18ba3279431b13f6d413b0eab195b9ff21988d8cf94e97",
                    bytes=630212,
                ),
            ),
            manual=_manual("exchange_rate.csv", "the data folder linked in github.com/thuml/Autoformer"),
            facts={"step": "1 day (trading days, numbered through)", "span": "1990-01-01 to 2010-10-10"},
        ),
        DataCard(
            name="ili",
            title="Influenza-like illness in the United States, weekly",
            task="forecasting, 7 variables",
            licence="none stated for the data (US CDC, FluView ILINet)",
            source=_AUTOFORMER_RELEASE,
            size="966 rows x 7, 67 KB",
            split=RATIO_SPLIT,
            citation="US Centers for Disease Control and Prevention, FluView; H. Wu et al., Autoformer, NeurIPS 2021",
            subdir="timeseries",
            files=(
                DataFile(
                    path="national_illness.csv",
                    sha256="8594cecb98c6f2f9dc014eca11c4d5d1e38ad5ce6ed0592d4abe65b146fce395",
                    bytes=66653,
                ),
            ),
            manual=_manual("national_illness.csv", "the data folder linked in github.com/thuml/Autoformer"),
            facts={"step": "1 week", "span": "2002-01-01 to 2020-06-30", "missing": "none"},
        ),
        DataCard(
            name="demand",
            title="Daily sales of twelve shops, decided by plans known ahead (synthetic)",
            task="forecasting with covariates, 1 variable, 12 series in 3 regions",
            licence="Apache-2.0 (made by this package)",
            source="attn_timeseries.data.synthetic",
            size="12 series of 540 to 600 days, 0.4 MB",
            split=RATIO_SPLIT,
            citation="none: synthetic",
            synthetic=True,
            facts={
                "step": "1 day",
                "known ahead": "price, promotion, holiday",
                "known up to now": "visitors",
                "of each shop": "region, format, area",
            },
        ),
    )
}
