"""Data that we make ourselves, the same everywhere, and call synthetic."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

DEMAND_ROLES: dict[str, Any] = {
    "columns": ["sales"],
    "id_columns": ["region", "shop"],
    "known_covariates": ["price", "promotion"],
    "known_categories": ["holiday"],
    "past_covariates": ["visitors"],
    "static_covariates": ["area"],
    "static_categories": ["region", "format"],
}
_REGIONS = ("north", "south", "west")
_FORMATS = ("corner", "market")
_DAYS = 600


def demand(seed: int = 0) -> pd.DataFrame:
    """Daily sales of twelve shops in three regions, which a plan known ahead decides: price, promotion, holidays.

    log sales = level + 0.3 log(area) + weekday - 1.5 log(price) + 0.5 promotion + holiday + 0.15 a + noise of 0.05,
    a an autoregression (0.97 a day) that the visitors of the day before show with little noise; the holiday's effect
    depends on the shop's format. A shop's first day and number of days differ.
    """
    rng = np.random.default_rng(seed)
    first = pd.Timestamp("2022-01-03")
    weekday = np.array([0.0, -0.05, 0.0, 0.05, 0.2, 0.35, -0.4])
    parts = []
    for number in range(12):
        days = _DAYS - 20 * (number % 4)
        times = pd.date_range(first + pd.Timedelta(days=10 * (number % 3)), periods=days, freq="D")
        kind = _FORMATS[number % 2]
        area = float(rng.integers(80, 900))
        # Prices hold for one to four weeks, a promotion for three days; holidays are the same for all shops.
        price = np.repeat(rng.uniform(0.7, 1.4, size=days), rng.integers(7, 29, size=days))[:days].round(2)
        promotion = np.convolve(rng.random(days) < 0.04, np.ones(3))[:days].clip(0, 1)
        year = times.day_of_year
        holiday = np.where(year % 61 == 17, "feast", np.where(year % 83 == 40, "fair", ""))
        effect = {"feast": {"corner": 0.7, "market": -1.0}[kind], "fair": 0.5, "": 0.0}
        state = np.zeros(days)
        noise = rng.normal(size=days)
        for t in range(1, days):
            state[t] = 0.97 * state[t - 1] + 0.24 * noise[t]
        log = (
            1.5
            + 0.3 * np.log(area)
            + weekday[times.day_of_week]
            - 1.5 * np.log(price)
            + 0.5 * promotion
            + np.array([effect[name] for name in holiday])
            + 0.15 * state
            + 0.05 * rng.normal(size=days)
        )
        parts.append(
            pd.DataFrame(
                {
                    "date": times.strftime("%Y-%m-%d"),
                    "region": _REGIONS[number % 3],
                    "shop": f"{number // 3 + 1:02d}",
                    "sales": np.exp(log).round(2),
                    "price": price,
                    "promotion": promotion.astype(int),
                    "holiday": holiday,
                    "visitors": (100 * np.exp(0.3 * state + 0.03 * rng.normal(size=days))).round(1),
                    "format": kind,
                    "area": area,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


@functools.cache
def demand_file() -> Path:
    """`demand` as a CSV file, which lasts as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="attn-timeseries-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "demand.csv"
    demand().to_csv(path, index=False, lineterminator="\n")
    return path
