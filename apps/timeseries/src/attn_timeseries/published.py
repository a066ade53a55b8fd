"""Published figures, MSE and MAE on scaled values, under the protocol this application follows.

Sources: A. Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023, Table 2 (Informer,
Autoformer, DLinear, repeat-last; it takes the first two from FEDformer's paper); Y. Nie et al., "A Time Series is
Worth 64 Words", ICLR 2023, Table 3 (PatchTST/42).
Look-back 96 (ILI 36) for Informer and Autoformer, 336 (ILI 104) for DLinear and PatchTST.
"""

from __future__ import annotations

from typing import Any

_ZENG = "Zeng et al. 2023, table 2"
_NIE = "Nie et al. 2023, table 3"
# Model, source, look-back, look-back on ILI.
_COLUMNS = (
    ("informer", _ZENG, 96, 36),
    ("autoformer", _ZENG, 96, 36),
    ("dlinear", _ZENG, 336, 104),
    ("naive", _ZENG, 1, 1),
    ("patchtst", _NIE, 336, 104),
)

# data -> horizon -> (MSE, MAE) of Informer, Autoformer, DLinear, repeat-last, PatchTST; None = not in the table.
_FIGURES: dict[str, dict[int, tuple[tuple[float, float] | None, ...]]] = {
    "etth1": {
        96: ((0.865, 0.713), (0.449, 0.459), (0.375, 0.399), (1.295, 0.713), (0.375, 0.399)),
        192: ((1.008, 0.792), (0.500, 0.482), (0.405, 0.416), (1.325, 0.733), (0.414, 0.421)),
        336: ((1.107, 0.809), (0.521, 0.496), (0.439, 0.443), (1.323, 0.744), (0.431, 0.436)),
        720: ((1.181, 0.865), (0.514, 0.512), (0.472, 0.490), (1.339, 0.756), (0.449, 0.466)),
    },
    "etth2": {
        96: ((3.755, 1.525), (0.358, 0.397), (0.289, 0.353), (0.432, 0.422), (0.274, 0.336)),
        192: ((5.602, 1.931), (0.456, 0.452), (0.383, 0.418), (0.534, 0.473), (0.339, 0.379)),
        336: ((4.721, 1.835), (0.482, 0.486), (0.448, 0.465), (0.591, 0.508), (0.331, 0.380)),
        720: ((3.647, 1.625), (0.515, 0.511), (0.605, 0.551), (0.588, 0.517), (0.379, 0.422)),
    },
    "exchange": {
        96: ((0.847, 0.752), (0.197, 0.323), (0.081, 0.203), (0.081, 0.196), None),
        192: ((1.204, 0.895), (0.300, 0.369), (0.157, 0.293), (0.167, 0.289), None),
        336: ((1.672, 1.036), (0.509, 0.524), (0.305, 0.414), (0.305, 0.396), None),
        720: ((2.478, 1.310), (1.447, 0.941), (0.643, 0.601), (0.823, 0.681), None),
    },
    "ili": {
        24: ((5.764, 1.677), (3.483, 1.287), (2.215, 1.081), (6.587, 1.701), (1.522, 0.814)),
        36: ((4.755, 1.467), (3.103, 1.148), (1.963, 0.963), (7.130, 1.884), (1.430, 0.834)),
        48: ((4.763, 1.469), (2.669, 1.085), (2.130, 1.024), (6.575, 1.798), (1.673, 0.854)),
        60: ((5.264, 1.564), (2.770, 1.125), (2.368, 1.096), (5.893, 1.677), (1.529, 0.862)),
    },
}  # fmt: skip


def published(data: str, pred_len: int) -> list[dict[str, Any]]:
    """Rows for the table beside a model: `model`, `source`, `mse`, `mae`."""
    rows: list[dict[str, Any]] = []
    for (model, source, look_back, ili), figures in zip(_COLUMNS, _FIGURES.get(data, {}).get(pred_len, ())):
        if figures is not None:
            mse, mae = figures
            steps = ili if data == "ili" else look_back
            rows.append({"model": model, "source": f"{source}, look-back {steps}", "mse": mse, "mae": mae})
    return rows
