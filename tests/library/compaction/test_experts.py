"""Hidden units of experts that have the matrices of all as one parameter, as those of transformers."""

import pytest
import torch
from torch import nn

import bmrs
from bmrs.noise.lookup import noise_layers

transformers = pytest.importorskip("transformers", minversion="5.0")

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = {"input_ids": torch.arange(12).view(2, 6)}
HIDDEN = 24


def mixtral(way):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(
        **sizes,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=20,
        initializer_range=0.3,
        experts_implementation=way,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    bmrs.add_noise(model, where="*.experts.act_fn", num_structures=HIDDEN, dim=-1)
    (layer,) = noise_layers(model).values()
    nn.init.uniform_(layer.mu, -3.0, 0.0)
    return model, layer


def logits(model):
    with torch.no_grad():
        return model(**TOKENS)["logits"]


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_hidden_units_leave_all_experts(way, tmp_path):
    model, layer = mixtral(way)
    kept = torch.arange(HIDDEN) % 3 != 1  # 16: grouped products want round numbers
    layer.set_kept(kept)
    compacted = bmrs.compact(model, TOKENS)
    (report,) = bmrs.compact_report(compacted).layers
    assert (report.removed, report.kept_because, report.folded) == (8, {}, True)
    experts = compacted.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (3, 32, 16)
    assert experts.down_proj.shape == (3, 16, 16)
    assert compacted.config._experts_implementation == way
    expected = logits(model)
    torch.testing.assert_close(
        logits(compacted), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )
    # The class says it by itself.
    assert bmrs.save_pretrained(tmp_path, compacted) is True
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation=way)
    assert loaded.config.intermediate_size == 16
    torch.testing.assert_close(logits(loaded), logits(compacted), rtol=1e-5, atol=1e-5)


def test_widths_that_grouped_products_refuse_are_told():
    """Where this machine and version have such a product, and take another way otherwise."""
    model, layer = mixtral("grouped_mm")
    layer.set_kept(torch.arange(HIDDEN) < 10)
    compacted = bmrs.compact(model, TOKENS)
    report = bmrs.compact_report(compacted)
    assert report.removed == 14
    assert report.form == "module" or "round_to=8 gives such widths" in report.form_because
    torch.testing.assert_close(logits(compacted), logits(model), rtol=1e-4, atol=1e-4)
    rounded = bmrs.compact(model, TOKENS, round_to=8)
    assert rounded.model.layers[0].mlp.experts.down_proj.shape[2] == 16


def test_experts_are_told_where_their_noise_goes():
    model, _ = mixtral("eager")
    message = (
        r"hidden units get noise .*where='model\.layers\.0\.mlp\.experts\.act_fn', num_structures=24, dim=-1"
    )
    with pytest.raises(ValueError, match=message):
        bmrs.add_noise(model, where="*.mlp.experts")
