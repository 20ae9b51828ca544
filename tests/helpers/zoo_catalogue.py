"""Whole networks with random weights, and episodes for them, for the sweep over networks.

They are those of torchvision, timm and transformers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models import swin_transformer
from torchvision.ops import StochasticDepth

from lightning_maml import Episodes

WAYS, SHOTS = 2, 2
SIZE = 64
"""Of images: at half of it batch norm has so few numbers in deep layers that it blows up rounding
errors."""

WORDS, LENGTH = 30, 8
LARGE, HUGE = 20e6, 60e6
"""Networks with more parameters than this have one task, and train every seventh tensor only; what
they cost is time and memory."""


class Entry(NamedTuple):
    """A network and its episodes.

    Attributes:
        make: Makes the network.
        inputs: Makes the inputs of so many examples.
        seed: Of the weights.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Any]
    seed: int = 0


def size_of(network: nn.Module) -> int:
    """Return the number of a network's parameters."""
    return sum(p.numel() for p in network.parameters())


def network_of(entry: Entry) -> nn.Module:
    """Return an entry's network in float64, in training mode and without dropout.

    It has no stochastic depth either.

    Its parameters are moved a little: zeros and tiny scales, from which many networks start, would
    hide what is behind them.
    """
    torch.manual_seed(entry.seed)
    network = entry.make().double().train()
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | StochasticDepth):
            module.p = 0.0
        elif isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    huge = size_of(network) > HUGE
    with torch.no_grad():
        for number, p in enumerate(network.parameters()):
            p.requires_grad_(not huge or number % 7 == 0)
            p.add_(torch.randn_like(p), alpha=0.02)
    return network


def episodes_of(entry: Entry, network: nn.Module) -> Episodes:
    """Return two tasks for an entry's network, or one if it is large."""
    generator = torch.Generator().manual_seed(1)
    tasks, examples = 1 if size_of(network) > LARGE else 2, WAYS * SHOTS

    def inputs() -> Any:
        return tree_map(
            lambda x: x.unflatten(0, (tasks, examples)), entry.inputs(tasks * examples, generator)
        )

    labels = torch.arange(WAYS).repeat(tasks, SHOTS)
    return Episodes(inputs(), labels, inputs(), labels)


def _images(size: int, channels: int = 3) -> Callable[[int, torch.Generator], Tensor]:
    """Return noise over a coarse pattern.

    By noise alone all images look alike to deep layers, and batch norm blows up rounding errors.
    """

    def images(n: int, generator: torch.Generator) -> Tensor:
        pattern, noise = (
            torch.randn(n, channels, side, side, generator=generator, dtype=torch.float64)
            for side in (3, size)
        )
        return F.interpolate(pattern, size=size) + 0.5 * noise

    return images


def _words(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return sentences of different lengths, from a vocabulary whose word 0 is the padding."""
    words = torch.randint(3, WORDS, (n, LENGTH), generator=generator)
    there = torch.arange(LENGTH) < torch.randint(
        LENGTH // 2, LENGTH + 1, (n, 1), generator=generator
    )
    return {"input_ids": words * there, "attention_mask": there.long()}


def _named(
    name: str, make: Callable[[int, torch.Generator], Tensor]
) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    return lambda n, generator: {name: make(n, generator)}


def _sound(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 400, generator=generator, dtype=torch.float64)


def _spectrum(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 24, 16, generator=generator, dtype=torch.float64)


# torchvision: all


INSIST = {"alexnet": 64, "inception_v3": 75, "vit_b_32": 64, "vit_l_32": 64, "vit_h_14": 28}
"""Sizes of images that large networks insist on; of others images are three quarters as wide as
usual."""


def _of_torchvision(name: str) -> Entry:
    large = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"] > LARGE
    size = INSIST.get(name, 3 * SIZE // 4) if large else SIZE
    settings: dict[str, Any] = {"num_classes": WAYS}
    if name.startswith("vit"):
        settings["image_size"] = size
    if name == "inception_v3":
        # these need images of nearly 299 pixels; googlenet has such outputs too
        settings["aux_logits"] = False
    if name in ("googlenet", "inception_v3"):
        settings["init_weights"] = False  # what it draws by scipy takes long
    if name == "maxvit_t":  # its sizes are multiples of 32 times the size of its windows
        settings |= {
            "input_size": (SIZE, SIZE),
            "stem_channels": 64,
            "partition_size": 2,
            "block_channels": [64, 128, 256, 512],
        }
        settings |= {"block_layers": [2, 2, 5, 2], "head_dim": 32, "stochastic_depth_prob": 0.0}
        return Entry(partial(torchvision.models.MaxVit, **settings), _images(SIZE))
    if name.startswith("swin_v2"):
        # windows that are filled up have vectors of zeros, whose norms torch differentiates twice
        # to NaN
        layers, width = (6 if name.endswith("t") else 18), (128 if name.endswith("b") else 96)
        settings |= {
            "window_size": [2, 2],
            "patch_size": [4, 4],
            "embed_dim": width,
            "depths": [2, 2, layers, 2],
            "stochastic_depth_prob": 0.0,
        }
        settings |= {"num_heads": [width // 32 * 2**stage for stage in range(4)]}
        settings |= {
            "block": swin_transformer.SwinTransformerBlockV2,
            "downsample_layer": swin_transformer.PatchMergingV2,
        }
        return Entry(partial(torchvision.models.SwinTransformer, **settings), _images(SIZE))
    return Entry(
        partial(torchvision.models.get_model, name, weights=None, **settings), _images(size)
    )


TORCHVISION = {
    f"torchvision {name}": _of_torchvision(name)
    for name in torchvision.models.list_models(module=torchvision.models)
}

# timm: the smallest of each family, or one made smaller

OF_ANY_SIZE = (
    "convnext_atto", "efficientnet_lite0", "mobilenetv3_small_050", "mobilenetv4_conv_small_050",
    "regnetx_002", "resnest14d", "poolformer_s12", "dla46_c", "hrnet_w18_small", "ghostnet_050",
    "edgenext_xx_small", "pvt_v2_b0", "fastvit_t8", "inception_next_atto", "nf_regnet_b0",
    "lcnet_035", "tinynet_e", "focalnet_tiny_srf", "mambaout_femto", "caformer_s18", "starnet_s1",
    "skresnet18", "ese_vovnet19b_slim_dw", "selecsls42", "cspresnet50", "efficientvit_b0",
    "tiny_vit_5m_224", "resnet10t", "davit_tiny",
)  # fmt: skip
OF_A_SIZE = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "mixer_s32_224",
    "coatnet_nano_rw_224", "maxvit_rmlp_pico_rw_256", "repvgg_a0", "volo_d1_224",
    "xcit_nano_12_p16_224", "mobilevit_xxs", "mobilevitv2_050", "levit_128s", "twins_svt_small",
    "convit_tiny", "pit_ti_224", "sequencer2d_s", "gmlp_s16_224", "resmlp_12_224",
    "eva02_tiny_patch14_224", "hiera_tiny_224", "repvit_m0_9", "efficientvit_m0",
    "lambda_resnet26t", "visformer_tiny", "cait_xxs24_224",
)  # fmt: skip
MADE_SMALLER: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {"img_size": SIZE, "window_size": 2},
    "beit_base_patch16_224": {"img_size": SIZE, "embed_dim": 96, "depth": 3, "num_heads": 3},
}


def _of_timm(name: str, **settings: Any) -> Entry:
    size = settings.get("img_size", SIZE)
    return Entry(partial(timm.create_model, name, num_classes=WAYS, **settings), _images(size))


TIMM = (
    {f"timm {name}": _of_timm(name) for name in OF_ANY_SIZE}
    | {f"timm {name}": _of_timm(name, img_size=SIZE) for name in OF_A_SIZE}
    | {
        "timm convmixer": Entry(
            partial(
                timm.models.convmixer.ConvMixer,
                64,
                4,
                kernel_size=7,
                patch_size=7,
                num_classes=WAYS,
            ),
            _images(SIZE),
        )
    }
    | {f"timm {name}": _of_timm(name, **settings) for name, settings in MADE_SMALLER.items()}
)

# transformers: from a config

_PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": WAYS}
_ENCODER = _PLAIN | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_OF_WORDS = _ENCODER | {"vocab_size": WORDS, "max_position_embeddings": 16, "pad_token_id": 0}
_OF_SOUND = _ENCODER | {
    "conv_dim": (8, 8),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
_DISTIL = {
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 2,
    "n_heads": 2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}
_GPT2 = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "attention_dropout": 0.0,
}
_SHORT = {
    "vocab_size": WORDS,
    "pad_token_id": 0,
    "num_labels": WAYS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SWIN = {
    "image_size": 32,
    "embed_dim": 12,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
_CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": WAYS}
_SPECTRUM = _ENCODER | {
    "patch_size": 8,
    "max_length": 24,
    "num_mel_bins": 16,
    "time_stride": 8,
    "frequency_stride": 8,
}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": WAYS}
_SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0,
}
_OF_IMAGES = _ENCODER | {"image_size": 32, "patch_size": 8}


def _of_transformers(
    name: str, config: str, inputs: Callable[[int, torch.Generator], Any], settings: dict[str, Any]
) -> Entry:
    def make() -> nn.Module:
        made = getattr(transformers, config)(**settings)
        network: nn.Module = getattr(transformers, name)(made)
        return network

    return Entry(make, inputs)


_IMAGE, _SPEECH, _AUDIO = (
    _named("pixel_values", _images(32)),
    _named("input_values", _sound),
    _named("input_values", _spectrum),
)
_FROM_CONFIG = (
    ("BertForSequenceClassification", "BertConfig", _words, _OF_WORDS),
    ("RobertaForSequenceClassification", "RobertaConfig", _words, _OF_WORDS),
    (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _words,
        _DISTIL | _SHORT | {"max_position_embeddings": 16},
    ),
    (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        _words,
        _OF_WORDS | {"embedding_size": 8, "classifier_dropout_prob": 0.0},
    ),
    (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        _words,
        _OF_WORDS | {"embedding_size": 8},
    ),
    ("DebertaV2ForSequenceClassification", "DebertaV2Config", _words, _OF_WORDS),
    ("GPT2ForSequenceClassification", "GPT2Config", _words, _GPT2 | _SHORT),
    ("LlamaForSequenceClassification", "LlamaConfig", _words, _LLAMA | _SHORT),
    ("ViTForImageClassification", "ViTConfig", _IMAGE, _OF_IMAGES),
    ("DeiTForImageClassification", "DeiTConfig", _IMAGE, _OF_IMAGES),
    ("BeitForImageClassification", "BeitConfig", _IMAGE, _OF_IMAGES | {"drop_path_rate": 0.0}),
    ("SwinForImageClassification", "SwinConfig", _IMAGE, _PLAIN | _SWIN),
    ("ResNetForImageClassification", "ResNetConfig", _IMAGE, _RESNET),
    ("ConvNextForImageClassification", "ConvNextConfig", _IMAGE, _CONVNEXT),
    ("SegformerForImageClassification", "SegformerConfig", _IMAGE, _PLAIN | _SEGFORMER),
    ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _SPEECH, _OF_SOUND),
    ("HubertForSequenceClassification", "HubertConfig", _SPEECH, _OF_SOUND),
    ("ASTForAudioClassification", "ASTConfig", _AUDIO, _SPECTRUM),
)
TRANSFORMERS = {
    f"transformers {network}": _of_transformers(network, *rest) for network, *rest in _FROM_CONFIG
}

NETWORKS = TORCHVISION | TIMM | TRANSFORMERS
