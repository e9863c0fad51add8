import pytest
import torch
from compaction_cases import assert_compacts, layer_report, num_values, randomise
from tiny_registry import images, tiny
from torch import nn

import bmrs
from bmrs.models import NETWORKS, build_network, place_noise
from bmrs.noise.lookup import noise_layers


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lenet5", 61_706),
        ("lenet5_caffe", 431_080),
        ("lenet_300_100", 266_610),
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("resnet20", 272_474),
        ("resnet56", 855_770),
        ("vgg16_bn", 138_365_992),
        ("vit_small", 22_050_664),
        ("vit_b16", 86_567_656),
    ],
)
def test_parameters_are_as_many_as_published(name, parameters):
    with torch.device("meta"):
        model = NETWORKS[name].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        (
            "resnet50",
            {
                "conv1.weight": (64, 3, 7, 7),
                "bn1.running_var": (64,),
                "layer1.0.downsample.0.weight": (256, 64, 1, 1),
                "layer1.0.downsample.1.num_batches_tracked": (),
                "layer3.5.conv2.weight": (256, 256, 3, 3),
                "layer4.2.bn3.bias": (2048,),
                "fc.weight": (1000, 2048),
            },
        ),
        (
            "resnet18",
            {
                "layer2.0.downsample.0.weight": (128, 64, 1, 1),
                "layer4.1.conv2.weight": (512, 512, 3, 3),
                "fc.bias": (1000,),
            },
        ),
        (
            "vgg16_bn",
            {
                "features.0.weight": (64, 3, 3, 3),
                "features.1.running_mean": (64,),
                "features.40.weight": (512, 512, 3, 3),
                "features.41.weight": (512,),
                "classifier.0.weight": (4096, 25088),
                "classifier.3.bias": (4096,),
                "classifier.6.weight": (1000, 4096),
            },
        ),
        (
            "vit_b16",
            {
                "class_token": (1, 1, 768),
                "conv_proj.weight": (768, 3, 16, 16),
                "encoder.pos_embedding": (1, 197, 768),
                "encoder.layers.encoder_layer_0.ln_1.weight": (768,),
                "encoder.layers.encoder_layer_0.self_attention.in_proj_weight": (2304, 768),
                "encoder.layers.encoder_layer_0.self_attention.in_proj_bias": (2304,),
                "encoder.layers.encoder_layer_11.self_attention.out_proj.bias": (768,),
                "encoder.layers.encoder_layer_11.ln_2.bias": (768,),
                "encoder.layers.encoder_layer_11.mlp.0.weight": (3072, 768),
                "encoder.layers.encoder_layer_11.mlp.3.weight": (768, 3072),
                "encoder.ln.weight": (768,),
                "heads.head.weight": (1000, 768),
            },
        ),
    ],
)
def test_weights_have_the_names_and_shapes_of_published_ones(name, shapes):
    with torch.device("meta"):
        state = NETWORKS[name].build().state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize(
    ("name", "entries"), [("resnet18", 122), ("resnet50", 320), ("vgg16_bn", 97), ("vit_b16", 152)]
)
def test_state_has_as_many_entries_as_published_ones(name, entries):
    with torch.device("meta"):
        assert len(NETWORKS[name].build().state_dict()) == entries


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    attention = tiny("vit_small").encoder.layers[0].self_attention
    nn.init.normal_(attention.in_proj_bias)
    theirs = nn.MultiheadAttention(8, 4, batch_first=True)
    theirs.load_state_dict(attention.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(attention(x), theirs(x, x, x)[0])


PLACES = [
    (name, placement)
    for name, network in NETWORKS.items()
    for placement in network.placements
    if placement == "inner" or network.placements[placement] != network.placements["inner"]
]


@pytest.mark.parametrize(("name", "placement"), PLACES, ids=["-".join(place) for place in PLACES])
def test_every_placement_compacts(name, placement):
    model = place_noise(tiny(name), NETWORKS[name].placements[placement], granularity="sample")
    x = images(name)
    before = num_values(randomise(model))
    compacted = assert_compacts(model, x)
    lost = [layer.pruned - layer.removed for layer in bmrs.compact_report(compacted).layers]
    if placement == "inner":
        assert lost == [0] * len(lost)
        assert num_values(compacted) < 0.8 * before


@pytest.mark.parametrize("name", NETWORKS)
def test_noise_trains_with_the_weights(name):
    model = tiny(name)
    place_noise(model, NETWORKS[name].placements["inner"], granularity="sample", backend="torch")
    model.train()(images(name)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(layer.mu.grad.abs().sum() > 0 for layer in noise_layers(model).values())


class TestPlacements:
    def test_paper_puts_noise_behind_each_batch_norm_and_the_output_layers_of_vit_blocks(self):
        for name in ("resnet18", "resnet50", "resnet20", "vgg16_bn"):
            model = place_noise(tiny(name), NETWORKS[name].placements["paper"])
            norms = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
            assert list(noise_layers(model)) == [f"{name}.noise" for name in norms]
        model = place_noise(tiny("vit_small"), NETWORKS["vit_small"].placements["paper"])
        assert list(noise_layers(model)) == ["encoder.layers.encoder_layer_0.mlp.3.noise"]

    def test_heads_are_read_from_the_attention(self, tmp_path):
        model = place_noise(tiny("vit_b16"), NETWORKS["vit_b16"].placements["inner"])
        heads = model.encoder.layers[0].self_attention.out_proj.noise
        assert (heads.num_structures, heads.structure_size) == (4, 2)
        with torch.no_grad():
            heads.set_kept(torch.tensor([True, False, False, True]))
        compacted = bmrs.compact(model, images("vit_b16"))
        assert compacted.encoder.layers[0].self_attention.num_heads == 2
        assert (
            layer_report(compacted, "encoder.layers.encoder_layer_0.self_attention.out_proj.noise").removed
            == 2
        )


class TestImagesOfOtherSizes:
    def test_resnet_halves_large_ones_five_times(self):
        with torch.device("meta"):
            *features, _average, _flatten, _classes = NETWORKS["resnet50"].build()
            assert nn.Sequential(*features)(torch.empty(1, 3, 224, 224)).shape == (1, 2048, 7, 7)

    @pytest.mark.parametrize(("image_size", "shape"), [(64, (64, 3, 3, 3)), (65, (64, 3, 7, 7))])
    def test_small_ones_get_the_small_stem(self, image_size, shape):
        with torch.device("meta"):
            model = build_network("resnet18", num_classes=2, in_channels=3, image_size=image_size)
        assert model.conv1.weight.shape == shape
        assert hasattr(model, "maxpool") == (shape[-1] == 7)

    @pytest.mark.parametrize(
        ("image_size", "patch_size"), [(224, 16), (112, 16), (96, 8), (64, 8), (32, 4), (28, 4), (8, 1)]
    )
    def test_small_ones_get_small_patches(self, image_size, patch_size):
        with torch.device("meta"):
            model = build_network("vit_small", num_classes=2, in_channels=1, image_size=image_size)
        assert model.conv_proj.kernel_size == (patch_size, patch_size)

    def test_vgg_reads_the_last_feature_map_as_it_is(self):
        with torch.device("meta"):
            model = build_network("vgg16_bn", num_classes=2, in_channels=1, image_size=64)
            assert model.classifier[0].in_features == 512 * 2 * 2
            assert model(torch.empty(1, 1, 64, 64)).shape == (1, 2)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("resnet5", {}, "network must be one of 'mlp', .*, got 'resnet5'"),
            ("vgg16_bn", {"image_size": 31}, "image_size must be at least 32, got 31"),
            ("lenet5", {"image_size": 28}, "image_size of lenet5 must be 32, got 28: pad"),
            ("vit_b16", {"patch_size": 5}, "patch_size must divide image_size=32, got 5"),
            ("vit_b16", {"num_heads": 5}, "num_heads must divide width=768, got 5"),
            ("resnet50", {"stem": "large"}, "stem must be one of '7x7', '3x3', None, got 'large'"),
            ("resnet20", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ],
    )
    def test_what_does_not_fit_is_said(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            build_network(name, **{"num_classes": 10, "in_channels": 3, "image_size": 32} | options)
