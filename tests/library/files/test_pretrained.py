"""Folders of transformers: what is loaded computes what was saved, and whatever is wrong with a folder is told."""

import copy
import json
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from packaging.version import Version
from torch import nn

import bmrs
from benchmarks.experiments.zoo import ENTRIES
from bmrs.noise.lookup import noise_layers

transformers = pytest.importorskip("transformers", minversion="5.0")

pytestmark = pytest.mark.filterwarnings("ignore")

# Whether the class can say in its config what is left, where all layers are alike.
CASES = {
    ("llama", "noise", "alike"): True,
    ("qwen2", "heads", "alike"): True,
    ("mixtral", "heads", "unlike"): False,
    ("bert", "noise", "alike"): False,  # no field of its config says the width of the pooler
    ("gpt2", "heads", "alike"): False,  # nor the width of a head here
    ("vit", "heads", "unlike"): False,
    ("t5", "noise", "alike"): True,
}
IN_ANOTHER_PROCESS = """
import json, sys, torch, transformers, bmrs
for folder in sys.argv[1:]:
    inputs = torch.load(folder + "/inputs.pt")
    loaders = {"bmrs": bmrs.load_pretrained}
    if json.load(open(folder + "/alone.json")):
        name = json.load(open(folder + "/config.json"))["architectures"][0]
        loaders["transformers"] = getattr(transformers, name).from_pretrained
    for who, load in loaders.items():
        model = load(folder)
        assert not model.training
        with torch.no_grad():
            torch.save((type(model).__name__, model(**inputs).logits), f"{folder}/{who}.pt")
"""


def masked(name, place, pattern):
    torch.manual_seed(0)
    entry = ENTRIES[name]
    model = entry.build()
    if place == "noise":
        for options in entry.noise:
            bmrs.add_noise(model, **options)
    else:
        for where, heads in entry.heads:
            bmrs.add_noise(model, where=where, structures="heads", num_heads=heads)
    for number, layer in enumerate(noise_layers(model).values()):
        nn.init.uniform_(layer.mu, -2.0, 0.0)
        half = layer.num_structures // 2
        layer.set_kept(
            torch.arange(layer.num_structures) >= (half if pattern == "alike" or number % 2 else 0)
        )
    args, kwargs = entry.inputs(torch.float32)
    names = ("pixel_values",) if name == "vit" else ("input_ids", "attention_mask")
    return model.eval(), {**dict(zip(names, args, strict=False)), **kwargs}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.slow
def test_another_process_loads_what_was_saved(tmp_path):
    expected = {}
    for number, (case, alone) in enumerate(CASES.items()):
        if case[0] == "vit" and Version(metadata.version("transformers")) < Version("5.24"):
            continue  # before that it names the layers otherwise
        model, inputs = masked(*case)
        compacted = bmrs.compact(model, inputs)
        assert bmrs.compact_report(compacted).removed > 0, case
        config = compacted.config.to_dict()
        folder = tmp_path / str(number)
        assert bmrs.save_pretrained(folder, compacted) is alone, case
        assert compacted.config.to_dict() == config
        torch.save(inputs, folder / "inputs.pt")
        (folder / "alone.json").write_text(json.dumps(alone))
        expected[folder] = (case, type(compacted).__name__, logits(compacted, inputs))
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, *map(str, expected)], check=True)
    for folder, (case, name, outputs) in expected.items():
        files = [folder / "bmrs.pt"] + ([folder / "transformers.pt"] if CASES[case] else [])
        for file in files:
            found_name, found = torch.load(file)
            assert found_name == name
            assert torch.equal(found, outputs), (case, file.name)
        if not CASES[case]:
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                getattr(transformers, name).from_pretrained(folder)


TOKENS = {"input_ids": torch.arange(8).view(2, 4)}


def small_gpt2(model_class=transformers.GPT2LMHeadModel):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_inner": 12, "n_layer": 2, "n_head": 2, "n_positions": 16}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.GPT2Config(**sizes, **tokens, vocab_size=20, initializer_range=0.3)
    return model_class(config).eval()


def narrower(model, kept, **options):
    """One layer is narrower than the other, which no config of the class can say."""
    width = model.transformer.h[1].mlp.c_fc.nf
    bmrs.add_noise(model, where="*.1.mlp.c_fc", num_structures=width, dim=-1)
    (layer,) = noise_layers(model).values()
    layer.set_kept(torch.arange(width) < kept)
    return bmrs.compact(model, TOKENS, **options)


@pytest.fixture(scope="module")
def narrow_gpt2():
    model = small_gpt2()
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    return narrower(model, 7)


@pytest.fixture
def folder(narrow_gpt2, tmp_path):
    assert bmrs.save_pretrained(tmp_path / "model", narrow_gpt2) is False
    return tmp_path / "model"


def test_folders_have_what_such_folders_have(narrow_gpt2, folder, tmp_path):
    """Shards, tied weights once, the generation config."""
    bmrs.save_pretrained(tmp_path / "shards", narrow_gpt2, max_shard_size=2000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for saved in (folder, tmp_path / "shards"):
        loaded = bmrs.load_pretrained(saved)
        assert loaded.generation_config.temperature == 0.7
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert torch.equal(logits(loaded, TOKENS), logits(narrow_gpt2, TOKENS))
        assert loaded.transformer.h[1].mlp.c_fc.nf == 7
        assert loaded.transformer.h[0].mlp.c_fc.nf == 12
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        generated = [m.generate(**TOKENS, max_new_tokens=3, do_sample=False) for m in (loaded, narrow_gpt2)]
        assert torch.equal(*generated)
    assert not list(folder.glob("*.bin"))
    half = bmrs.load_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.config._attn_implementation == "eager"


def test_what_is_loaded_is_trained_saved_and_pruned_again(narrow_gpt2, folder, tmp_path):
    """By the model's own `save_pretrained`, as transformers' Trainer calls it for its checkpoints."""
    loaded = bmrs.load_pretrained(folder).train()
    loss = loaded(**TOKENS, labels=TOKENS["input_ids"]).loss
    loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    loaded.save_pretrained(tmp_path / "trained")
    outputs = logits(loaded.eval(), TOKENS)
    assert torch.equal(logits(bmrs.load_pretrained(tmp_path / "trained"), TOKENS), outputs)
    assert not torch.allclose(outputs, logits(narrow_gpt2, TOKENS))

    smaller = narrower(loaded, 3)
    bmrs.save_pretrained(tmp_path / "smaller", smaller)
    again = bmrs.load_pretrained(tmp_path / "smaller")
    assert again.transformer.h[1].mlp.c_fc.nf == 3
    assert torch.equal(logits(again, TOKENS), logits(smaller, TOKENS))


def test_noise_that_was_kept_is_there_again(tmp_path):
    compacted = narrower(small_gpt2(), 7, keep_noise=True)
    (layer,) = noise_layers(compacted).values()
    nn.init.uniform_(layer.mu, -3.0, 0.0)
    assert bmrs.save_pretrained(tmp_path, compacted) is False
    loaded = bmrs.load_pretrained(tmp_path)
    (found,) = noise_layers(loaded).values()
    assert torch.equal(found.mu, layer.mu)
    assert found.kept.all()
    assert found.compacted
    assert torch.equal(logits(loaded, TOKENS), logits(compacted, TOKENS))
    outputs = [logits(m, TOKENS) for m in (loaded.train(), loaded)]
    assert not torch.equal(*outputs)


def test_models_that_were_never_compacted(tmp_path):
    model = small_gpt2()
    assert bmrs.save_pretrained(tmp_path, model) is True
    assert torch.equal(logits(bmrs.load_pretrained(tmp_path), TOKENS), logits(model, TOKENS))


class Inherited(transformers.GPT2LMHeadModel):
    pass


def test_a_config_may_lack_a_part_that_its_class_knows(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.EsmConfig(vocab_size=9, pad_token_id=1, mask_token_id=2, **sizes)
    model = bmrs.add_noise(transformers.EsmForMaskedLM(config), where="*.intermediate.dense").eval()
    for layer in noise_layers(model).values():
        layer.set_kept(torch.arange(12) < 8)
    assert config.esmfold_config is None
    assert bmrs.save_pretrained(tmp_path, bmrs.compact(model, {"input_ids": torch.arange(8)[None] + 1}))
    assert transformers.EsmForMaskedLM.from_pretrained(tmp_path).config.intermediate_size == 8


def test_own_classes_are_given(tmp_path):
    model = small_gpt2(Inherited)
    bmrs.save_pretrained(tmp_path, model)
    with pytest.raises(
        ValueError, match=r"'Inherited', which is none of transformers .*give it as model_class"
    ):
        bmrs.load_pretrained(tmp_path)
    loaded = bmrs.load_pretrained(tmp_path, model_class=Inherited)
    assert type(loaded) is Inherited
    assert torch.equal(logits(loaded, TOKENS), logits(model, TOKENS))


def edited(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


UP = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("bmrs"), r"is of shape \(.*config.json makes it .*; it has no 'bmrs'"),
        (lambda c: c["bmrs"].pop("shapes"), "has no shapes"),
        (lambda c: c["bmrs"].update(version=2), "has version 2, and this version of bmrs reads 1"),
        (lambda c: c.update(bmrs=3), "must be a mapping, got 3"),
        (lambda c: c["bmrs"]["shapes"].update({UP: "16x8"}), rf"'{UP}' is of shape \(16, 7\).* \(16, 8\)"),
        (lambda c: c["bmrs"]["shapes"].update({UP: "16x13"}), rf"'{UP}' of shape \(16, 13\) does not come"),
        (lambda c: c["bmrs"]["shapes"].update({UP: [16, 7]}), r"such as '24x32', got \[16, 7\]"),
        (lambda c: c["bmrs"]["shapes"].update({"x.weight": "1"}), "'x.weight' is not a part of model"),
        (
            lambda c: c["bmrs"].update(sizes={"transformer": {"a": 1}}),
            "its size 'a' of 'transformer' is not one of model",
        ),
        (lambda c: c["bmrs"].update(noise={"x.noise": 1}), "'x.noise'"),
        (lambda c: c.update(architectures=None), "names no class of model"),
        (lambda c: c.update(architectures=["Nobody"]), "'Nobody', which is none of transformers"),
        (lambda c: c.update(architectures=["GPT2Config"]), "'GPT2Config', which is none of transformers"),
        (lambda c: c.update(n_layer=3), "it has no 'transformer.h.2"),
        (lambda c: c.update(n_layer="two"), "does not hold a whole model: "),
    ],
)
def test_what_is_wrong_with_a_config_is_told(folder, change, message):
    edited(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        bmrs.load_pretrained(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (cut_off, ValueError, "does not hold a whole model: "),
        (lambda f: (f / "model.safetensors").unlink(), ValueError, "model.safetensors"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            ValueError,
            "model.safetensors",
        ),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "not a mapping in JSON"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json of a model in folder"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message) as found:
        bmrs.load_pretrained(folder)
    assert "\n" not in str(found.value)


def test_weights_that_are_missing_or_too_many_are_told(narrow_gpt2, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "other": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its config.json makes no 'other'"):
        bmrs.load_pretrained(folder)
    tensors.pop("transformer.ln_f.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it has no 'transformer\.ln_f\.weight'"):
        bmrs.load_pretrained(folder)


def test_other_classes_are_refused(folder):
    with pytest.raises(ValueError, match=r"model_class must be GPT2LMHeadModel, .* got GPT2Model"):
        bmrs.load_pretrained(folder, model_class=transformers.GPT2Model)
    with pytest.raises(TypeError, match="model_class must be a class of transformers' models"):
        bmrs.load_pretrained(folder, model_class=nn.Linear)


def test_what_cannot_be_saved_is_refused(narrow_gpt2, tmp_path):
    noisy = bmrs.add_noise(small_gpt2(), where="*.ln_1")
    with pytest.raises(ValueError, match=r"model without noise layers, and 'transformer.h.0.ln_1.noise'"):
        bmrs.save_pretrained(tmp_path / "a", noisy)
    with pytest.raises(TypeError, match=r"got Linear: save it with bmrs\.save"):
        bmrs.save_pretrained(tmp_path / "a", nn.Linear(2, 2))
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="became a graph of operators"):
        bmrs.save_pretrained(tmp_path / "a", graph)
    # transformers would load it and leave the noise out.
    whole = narrower(small_gpt2(), 12, keep_noise=True)
    with pytest.raises(ValueError, match="from_pretrained would leave that out without an error"):
        bmrs.save_pretrained(tmp_path / "a", whole)
    forgotten = copy.deepcopy(narrow_gpt2)
    del forgotten.__dict__["_bmrs_record"]
    with pytest.raises(
        ValueError, match=r"what bmrs\.compact or bmrs\.load_pretrained returned, and 'transformer\."
    ):
        bmrs.save_pretrained(tmp_path / "a", forgotten)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="folder must be a folder"):
        bmrs.save_pretrained(tmp_path / "file", narrow_gpt2)
