"""Our networks in the hands of other frameworks: MONAI's bundles; mmsegmentation where it is not installed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

SHAPE = {"_target_": "attn_medseg.models.base.ImageShape", "ndim": 3, "channels": 1, "classes": 3, "size": [8, 8, 8]}
SETTINGS = {"_target_": "attn_medseg.config.DAEFormerConfig", "channels": [8, 16], "blocks": 1, "expansion": 2}
BUNDLE = {
    "network": {"_target_": "attn_medseg.models.daeformer.DAEFormer", "config": SETTINGS, "shape": SHAPE},
    "x": "$__import__('torch').ones(1, 1, 9, 8, 11)",
    "initialize": [],
    "run": ["$@network(@x).shape"],
    "finalize": [],
}


def test_a_bundle_of_monai_names_our_networks(tmp_path: Path) -> None:
    from monai.bundle import ConfigWorkflow

    file = tmp_path / "train.json"
    file.write_text(json.dumps(BUNDLE), encoding="utf-8")
    workflow = ConfigWorkflow(str(file), workflow_type="train", logging_file=False)
    workflow.initialize()
    assert workflow.run() == [torch.Size([1, 3, 9, 8, 11])]


def test_without_mmsegmentation_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmengine", None)
    monkeypatch.delitem(sys.modules, "attn_medseg.mmseg", raising=False)
    with pytest.raises(
        ImportError, match=r"needs mmsegmentation \(.*\); install it with `MMCV_WITH_OPS=0 pip"
    ) as raised:
        importlib.import_module("attn_medseg.mmseg")
    assert "\n" not in str(raised.value)
