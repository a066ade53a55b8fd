"""HybriDNA against another hybrid of Mamba-2 and grouped-query attention, where the two definitions meet.

The paper's authors published no code of the model. Bamba (transformers) has the same blocks: RMSNorm, Mamba-2 or
attention with rotary positions, RMSNorm, a gated feed-forward layer. It turns half of a head's channels, and computes
norms and decays in float32 whatever its weights are, so the comparison is in float32.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attn_genomics.config import HybriDNAConfig
from attn_genomics.models.base import Shape
from attn_genomics.models.hybridna import HybriDNA, RotaryAttention
from attn_genomics.tokens import N

NAMES = {
    "input_layernorm": "norm1",
    "pre_ff_layernorm": "norm2",
    "mamba.in_proj": "mixer.in_proj",
    "mamba.conv1d": "mixer.conv1d",
    "mamba.out_proj": "mixer.out_proj",
    "mamba.norm.weight": "mixer.norm_weight",
    "mamba.A_log": "mixer.A_log",
    "mamba.D": "mixer.D",
    "mamba.dt_bias": "mixer.dt_bias",
    "self_attn.q_proj": "mixer.q_proj",
    "self_attn.k_proj": "mixer.k_proj",
    "self_attn.v_proj": "mixer.v_proj",
    "self_attn.o_proj": "mixer.out_proj",
    "feed_forward.down_proj": "ffn.down",
}


def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights, or gradients, under our names."""
    found: dict[str, Tensor] = {}
    for key, value in theirs.items():
        name = (
            key.replace("embed_tokens", "embeddings").replace("final_layernorm", "norm").replace("layers.", "blocks.")
        )
        for one, other in NAMES.items():
            name = name.replace(f".{one}", f".{other}")
        found[name] = value
    for index in {key.split(".")[1] for key in found if key.startswith("blocks.")}:
        start = f"blocks.{index}."
        both = [found.pop(f"{start}feed_forward.{part}_proj.weight") for part in ("gate", "up")]
        found[f"{start}ffn.up.weight"] = torch.cat(both)
    return found


def test_agrees_with_bamba() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.BambaConfig(
        vocab_size=6,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[2],
        mamba_n_heads=8,
        mamba_d_state=16,
        mamba_chunk_size=16,
        pad_token_id=None,
    )
    reference = transformers.BambaModel(settings).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
            elif "A_log" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    config = HybriDNAConfig(dim=32, layers=4, every=4, attention_at=2, head_dim=8, state=16)
    model = HybriDNA(config, Shape(length=64)).eval()
    model.load_state_dict(ours(dict(reference.state_dict())))
    for module in model.modules():
        if isinstance(module, RotaryAttention):
            module.turned = module.head_dim // 2
    tokens = torch.randint(0, 5, (2, 45))
    got, expected = model(tokens), reference(tokens).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for output in (got, expected):
        (output * torch.cos(torch.arange(output.numel())).view_as(output)).sum().backward()
    gradients = ours({name: p.grad for name, p in reference.named_parameters() if p.grad is not None})
    parameters = dict(model.named_parameters())
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        size = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=0, atol=1e-5 * size, msg=name)


def test_echo_is_the_second_reading() -> None:
    torch.manual_seed(0)
    sizes = {"dim": 16, "layers": 2, "every": 2, "head_dim": 8, "state": 8}
    once, echo = (HybriDNA(HybriDNAConfig(**sizes, echo=way), Shape(length=20)).eval() for way in (False, True))
    echo.load_state_dict(once.state_dict())
    tokens, lengths = torch.randint(0, 4, (2, 20)), torch.tensor([20, 13])
    mask = torch.arange(20) < lengths[:, None]
    tokens = torch.where(mask, tokens, N)
    with torch.no_grad():
        found = echo(tokens, mask)
        for row, n in enumerate(lengths.tolist()):
            twice = once(tokens[row : row + 1, :n].repeat(1, 2))[0, n:]
            torch.testing.assert_close(found[row, :n], twice, rtol=0, atol=1e-5)
        first = echo(tokens[:1])[0, 0]
        tokens[0, 19] = (tokens[0, 19] + 1) % 4
        assert (echo(tokens[:1])[0, 0] - first).abs().max() > 1e-4  # the first base has seen the last one


def test_refuses_a_place_of_attention_outside_its_group() -> None:
    with pytest.raises(ValueError, match="attention_at is the place"):
        HybriDNA(HybriDNAConfig(every=2, attention_at=2), Shape(length=9))
