"""Write `torchscale.safetensors`: a small random torchscale BEiT3, its inputs, outputs and gradients.

Run once, by hand, where torchscale is importable (its own pins are too old to resolve, hence `--no-deps`):

    pip install --no-deps torchscale==0.3.0 fairscale==0.4.13
    python tests/parity/make_torchscale_tensors.py

Every parameter is random, LayerNorms and tokens included, so that none is trivially zero or one. Weights are rounded
to half precision, which halves the file; torchscale computes in fp32 with the rounded values.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = Path(__file__).with_name("torchscale.safetensors")
NUM_HEADS, NUM_LAYERS, WIDTH, FFN_WIDTH = 2, 2, 128, 96
PATCH, SIDE, VOCAB, POSITIONS = 4, 12, 50, 16


def build() -> nn.Module:
    """Build the torchscale model with all parameters perturbed and rounded to half precision."""
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    torch.manual_seed(7)
    config = EncoderConfig(
        img_size=SIDE,
        patch_size=PATCH,
        vocab_size=VOCAB,
        multiway=True,
        layernorm_embedding=False,
        normalize_output=True,
        no_output_layer=True,
        encoder_embed_dim=WIDTH,
        encoder_attention_heads=NUM_HEADS,
        encoder_ffn_embed_dim=FFN_WIDTH,
        encoder_layers=NUM_LAYERS,
        max_source_positions=POSITIONS,
    )
    model: nn.Module = BEiT3(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.copy_(parameter.half())
    return model.eval()


def inputs() -> dict[str, Tensor]:
    """Draw images, texts with padding, and masked patches."""
    generator = torch.Generator().manual_seed(8)
    lengths = torch.tensor([3, 7, 5])
    return {
        "images": torch.randn(3, 3, SIDE, SIDE, generator=generator),
        "text_ids": torch.randint(3, VOCAB, (3, 7), generator=generator),
        "text_mask": torch.arange(7) < lengths[:, None],
        "image_mask": torch.rand(3, (SIDE // PATCH) ** 2, generator=generator) < 0.4,
    }


def outputs(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Final states for an image, a text, a pair, and masked patches (alone and in a pair).

    Rows of padding hold whatever torchscale computes there; comparisons leave them out.
    """
    images, ids, masked = given["images"], given["text_ids"], given["image_mask"]
    padding = ~given["text_mask"]
    return {
        "image": model(visual_tokens=images)["encoder_out"],
        "text": model(textual_tokens=ids, text_padding_position=padding)["encoder_out"],
        "pair": model(visual_tokens=images, textual_tokens=ids, text_padding_position=padding)["encoder_out"],
        "masked_image": model(visual_tokens=images, vision_masked_position=masked)["encoder_out"],
        "masked_pair": model(
            visual_tokens=images, textual_tokens=ids, text_padding_position=padding, vision_masked_position=masked
        )["encoder_out"],
    }


def loss_weights(shape: torch.Size) -> Tensor:
    """Weights of the linear loss whose gradients are compared: fixed, irregular, no random numbers."""
    return torch.arange(shape.numel(), dtype=torch.float32).mul(0.37).sin().view(shape)


def project(gradient: Tensor) -> Tensor:
    """Shrink a matrix's gradient to one number a row, so that the file stays small; vectors stay whole."""
    if gradient.ndim < 2 or gradient.shape[0] == 1:
        return gradient.flatten()
    rows = gradient.flatten(1)
    return rows @ torch.arange(rows.shape[1], dtype=torch.float32).mul(0.61).cos()


def gradients(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the sum of the masked pair's real states, each times its fixed weight."""
    model.zero_grad()
    states = outputs(model, given)["masked_pair"]
    num_vision = states.shape[1] - given["text_ids"].shape[1]
    real = torch.cat([torch.ones(len(states), num_vision, dtype=torch.bool), given["text_mask"]], dim=1)
    torch.autograd.backward((states * loss_weights(states.shape) * real[..., None]).sum())
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def main() -> None:
    """Write the file and say how large it is."""
    model, given = build(), inputs()
    tensors = {f"weights/beit3.{name}": value.half() for name, value in model.state_dict().items()}
    tensors |= {f"inputs/{name}": value for name, value in given.items()}
    with torch.no_grad():
        tensors |= {f"outputs/{name}": value for name, value in outputs(model, given).items()}
    tensors |= {f"gradients/{name}": project(value) for name, value in gradients(model, given).items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, FILE)
    print(f"{FILE.name}: {len(tensors)} tensors, {FILE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
