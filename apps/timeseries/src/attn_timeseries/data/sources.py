"""From `--data NAME_OR_PATH` to a table of series."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from attn_shared.errors import UserError
from attn_timeseries.data.cards import DATASETS, FILE_SUFFIXES, ForecastDataConfig
from attn_timeseries.data.table import SeriesTable, read_table
from core_attn.naming import UnknownNameError, unknown


def source_path(data: str) -> Path:
    """The file behind a data set's name, or the path itself.

    Raises:
        UserError: no data set of that name, its file is not there (the message says where to get it), or no such file.
    """
    card = DATASETS.get(data)
    if card is None:
        path = Path(data).expanduser()
        if path.exists() or path.suffix.lower() in FILE_SUFFIXES or len(path.parts) > 1:
            return path
        try:
            raise unknown("data set", data, DATASETS)
        except UnknownNameError as error:
            raise UserError(f"{error} (or name a CSV or Parquet file)") from None
    if card.synthetic:
        from attn_timeseries.data.synthetic import demand_file

        return demand_file()
    if card.embedded:
        # The file is found without importing statsmodels, which takes seconds.
        spec = importlib.util.find_spec("statsmodels")
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"data set {data!r} comes with statsmodels, which is not installed")
        return Path(spec.submodule_search_locations[0]) / "datasets" / data / f"{data}.csv"
    from attn_shared.datasets import locate

    return locate(card) / card.files[0].path


def read_source(data: str, config: ForecastDataConfig) -> SeriesTable:
    """Read a data set by name, or a file of one's own."""
    return read_table(source_path(data), with_roles(data, config))


def with_roles(data: str, config: ForecastDataConfig) -> ForecastDataConfig:
    """The options, with the columns and covariates of a data set whose roles are known where the options name none."""
    card = DATASETS.get(data)
    if card is None or not card.synthetic:
        return config
    from attn_timeseries.data.synthetic import DEMAND_ROLES

    return dataclasses.replace(
        config, **{name: value for name, value in DEMAND_ROLES.items() if getattr(config, name) is None}
    )
