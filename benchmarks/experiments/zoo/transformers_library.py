"""Networks of the transformers library."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.experiments.zoo.entry import Entry, entry_of, noise_at
from benchmarks.experiments.zoo.inputs import (
    IMAGE,
    VOCABULARY,
    Inputs,
    floats,
    tokens,
)


def _library_model(class_name: str, config_name: str, **config: Any) -> nn.Module:
    """A model of the transformers library."""
    import transformers

    # Larger than the library's default, because in narrow layers that leaves next to nothing.
    defaults = {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    settings = getattr(transformers, config_name)(**(defaults | config))
    model: nn.Module = getattr(transformers, class_name)(settings)
    return model


def _library(
    name: str,
    model: tuple[str, str],
    config: dict[str, Any],
    inputs: Inputs,
    *noise: str | dict[str, Any],
    heads: Sequence[tuple[str, int]] = (),
) -> Entry:
    build = functools.partial(_library_model, *model, **config)
    return entry_of(name, build, inputs, *noise, heads=heads, needs_transformers=True)


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = _SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
_DECODER = _TEXT | {"use_cache": False}
_GROUPED = _DECODER | {"num_key_value_heads": 2}
_PATCHES = _SIZES | {"image_size": 32, "patch_size": 8}
_EAGER = {"attn_implementation": "eager"}


def pixel_values(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of an image, as a keyword argument."""
    return (), {"pixel_values": IMAGE(dtype)[0][0]}


def library_encoders() -> Iterable[Entry]:
    """Return networks that classify or embed."""
    bert = ("BertForSequenceClassification", "BertConfig")
    bert_places = ("*.intermediate.dense", "bert.pooler.dense")
    bert_heads = [("*.attention.output.dense", 4)]
    out_proj = [("*.self_attn.out_proj", 4)]
    swin = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "mlp_ratio": 2.0,
    }
    distilbert = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    whisper = {
        "num_mel_bins": 16,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "max_source_positions": 8,
        "classifier_proj_size": 24,
    }
    return (
        _library(
            "vit",
            ("ViTForImageClassification", "ViTConfig"),
            _PATCHES,
            pixel_values,
            "*.mlp.fc1",
            heads=[("*.attention.o_proj", 4)],
        ),
        _library(
            "swin",
            ("SwinForImageClassification", "SwinConfig"),
            swin,
            pixel_values,
            "*.mlp.fc1",
            heads=[("*.layers.0.*.attention.o_proj", 2), ("*.layers.1.*.attention.o_proj", 4)],
        ),
        _library("bert", bert, _TEXT, tokens(), *bert_places, heads=bert_heads),
        _library("bert_eager", bert, _TEXT | _EAGER, tokens(padding=4), *bert_places, heads=bert_heads),
        _library(
            "distilbert",
            ("DistilBertForSequenceClassification", "DistilBertConfig"),
            distilbert | {"max_position_embeddings": 32},
            tokens(padding=3),
            "*.ffn.lin1",
            "pre_classifier",
            heads=[("*.attention.out_lin", 4)],
        ),
        _library(
            "clip_text", ("CLIPTextModel", "CLIPTextConfig"), _TEXT, tokens(), "*.mlp.fc1", heads=out_proj
        ),
        _library(
            "clip_vision",
            ("CLIPVisionModel", "CLIPVisionConfig"),
            _PATCHES,
            pixel_values,
            "*.mlp.fc1",
            heads=out_proj,
        ),
        _library(
            "whisper_encoder",
            ("WhisperForAudioClassification", "WhisperConfig"),
            whisper,
            floats((2, 16, 16)),
            "encoder.layers.?.fc1",
            "encoder.conv1",
            "projector",
            heads=out_proj,
        ),
    )


def library_decoders() -> Iterable[Entry]:
    """Return networks that predict tokens."""
    llama = ("LlamaForCausalLM", "LlamaConfig")
    up, o_proj = "*.mlp.up_proj", [("*.self_attn.o_proj", 4)]
    gpt2 = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "use_cache": False,
    }
    t5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    t5_heads = [("*.SelfAttention.o", 4), ("*.EncDecAttention.o", 4)]
    return (
        _library(
            "gpt2",
            ("GPT2LMHeadModel", "GPT2Config"),
            gpt2,
            tokens(),
            noise_at("*.mlp.c_fc", 48, -1),
            heads=[("*.attn.c_proj", 4)],
        ),
        _library("llama", llama, _DECODER, tokens(), up, heads=o_proj),
        _library("llama_eager", llama, _GROUPED | _EAGER, tokens(), up, heads=o_proj),
        _library("qwen2", ("Qwen2ForCausalLM", "Qwen2Config"), _GROUPED, tokens(), up, heads=o_proj),
        _library(
            "qwen3",
            ("Qwen3ForCausalLM", "Qwen3Config"),
            _GROUPED | {"head_dim": 8},
            tokens(),
            up,
            heads=o_proj,
        ),
        _library(
            "mistral",
            ("MistralForCausalLM", "MistralConfig"),
            _GROUPED | {"sliding_window": 6},
            tokens(),
            up,
            heads=o_proj,
        ),
        _library(
            "gemma",
            ("GemmaForCausalLM", "GemmaConfig"),
            _DECODER | {"num_key_value_heads": 1, "head_dim": 16},
            tokens(3, 8),
            up,
            heads=o_proj,
        ),
        _library(
            "mixtral",
            ("MixtralForCausalLM", "MixtralConfig"),
            _GROUPED | {"num_local_experts": 4, "experts_implementation": "batched_mm"},
            tokens(),
            # The experts are parameters of one module, whose activation they share.
            noise_at("*.experts.act_fn", 48, -1),
            heads=o_proj,
        ),
        _library(
            "t5",
            ("T5ForConditionalGeneration", "T5Config"),
            t5 | {"use_cache": False, "decoder_start_token_id": 0},
            tokens(decoder_input_ids=7),
            "*.DenseReluDense.wi",
            heads=t5_heads,
        ),
        _library(
            "t5_gated",
            ("T5ForConditionalGeneration", "T5Config"),
            t5 | {"use_cache": False, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
            tokens(padding=4, decoder_input_ids=7),
            "*.DenseReluDense.wi_1",
            heads=t5_heads,
        ),
    )
