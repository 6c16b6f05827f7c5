"""What passes inside a model while it runs: residual streams at every site, maps, activations.

Hooks stand on the pre-norms, so what is read is what the blocks are given, before gamma. A caller
runs the model itself inside ``reading``, with or without its head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from core.architectures.shape import ModelShape
from core.transport.fold_plans import SLICED
from core.transport.sites import layer_of, sites

SeeStream = Callable[[str, Tensor, float], None]
"""Site, stream [B, T, d] as the model computes it, before the norm, and the norm's eps."""
SeeLayer = Callable[[int, Tensor], None]
"""Layer, and its attention maps [B, H, T, T] or its MLP activations [B, T, neurons]."""


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Return the shape that the model's configuration tells; with skip adapters, of what it was.

    Raises:
        DataInvalid: of no known family.
    """
    config = model.config.to_dict()
    return ModelShape.of({**config, "model_type": config["model_type"].removeprefix(SLICED)})


def lengths(stream: Tensor) -> Tensor:
    """Return how long each row is, [...] in float32 or wider: sqrt(sum x^2)."""
    found: Tensor = torch.linalg.vector_norm(stream, dim=-1, dtype=_wide(stream))
    return found


def normalised(stream: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps), the pre-norm without its gamma.

    Args:
        stream: [..., d], any float dtype.
        eps: of the norm.

    Returns:
        [..., d] in float32, of a float64 stream in float64.
    """
    rows = stream.to(_wide(stream))
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)


@contextmanager
def reading(
    model: PreTrainedModel,
    *,
    stream: SeeStream | None = None,
    only: Collection[str] | None = None,
    maps: SeeLayer | None = None,
    activations: SeeLayer | None = None,
    layers: Collection[int] = (),
) -> Iterator[None]:
    """Show what passes while the model runs inside this context, in the order it is computed.

    Within a layer: ``attention.l``, its maps, ``mlp.l``, its activations. What a callback raises
    ends the forward pass. Tensors are the model's own: they are not to be changed in place.

    Args:
        model: of a known family; for ``maps`` loaded with eager attention, which alone has them.
        stream: sees the residual stream at each site.
        only: the sites it sees; None: all.
        maps: sees the softmax of the attention scores in ``layers``.
        activations: sees what down_proj is given, silu(gate) * up, in ``layers``.
        layers: of ``maps`` and ``activations``.

    Raises:
        ValueError: maps are wanted of a model whose attention keeps none.
    """
    if maps is not None and layers and model.config._attn_implementation != "eager":
        raise ValueError(
            f"attention maps: loaded with {model.config._attn_implementation!r}; needed 'eager'"
        )
    shape = shape_of(model)
    wanted = sites(shape) if only is None else [site for site in sites(shape) if site in only]
    with ExitStack() as stack:
        if stream is not None:
            for site in wanted:
                norm = _norm(model, shape, site)
                stack.callback(norm.register_forward_pre_hook(_shown(stream, site, norm)).remove)
        for layer in layers:
            if maps is not None:
                block = _module(model, shape, layer, "self_attn")
                stack.callback(block.register_forward_hook(_mapped(maps, layer)).remove)
            if activations is not None:
                down = _module(model, shape, layer, "mlp.down_proj")
                hook = _given(activations, layer)
                stack.callback(down.register_forward_pre_hook(hook).remove)
        yield


@torch.no_grad()
def run_backbone(model: PreTrainedModel, ids: Tensor) -> None:
    """Run all layers and the final norm, without the head, for what ``reading`` shows.

    Texts of several lengths are padded at their end with any id: attention looks backwards only,
    so no real token sees the padding and no mask is needed.

    Args:
        model: in evaluation mode.
        ids: [B, T] int64, on the model's first device.
    """
    model.base_model(input_ids=ids, use_cache=False)


def states(
    model: PreTrainedModel, ids: Tensor, *, only: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return the normalised stream at every site, [B, T, d] as ``normalised`` gives it.

    Args:
        model: in evaluation mode.
        ids: [B, T] int64, padded at the end.
        only: the sites wanted; None: all, which takes ``sites * B * T * d`` numbers.
    """
    found: dict[str, Tensor] = {}

    def keep(site: str, stream: Tensor, eps: float) -> None:
        found[site] = normalised(stream, eps)

    with reading(model, stream=keep, only=only):
        run_backbone(model, ids)
    return found


def first_device(model: PreTrainedModel) -> torch.device:
    """Return where ids go: the device on which the embedding is computed.

    Of a model that accelerate spreads, weights that rest in memory or on disk have no device of
    their own; its map of devices says where they are brought to.
    """
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    where = getattr(hook, "execution_device", None)
    return model.device if where is None else torch.device(where)


def _wide(stream: Tensor) -> torch.dtype:
    return torch.promote_types(stream.dtype, torch.float32)


def _norm(model: PreTrainedModel, shape: ModelShape, site: str) -> nn.Module:
    layer = layer_of(site)
    if layer is None:
        return model.get_submodule(shape.table.final_norm.removesuffix(".weight"))
    norm = shape.table.points[site.partition(".")[0]].removesuffix(".weight")
    return _module(model, shape, layer, norm)


def _module(model: PreTrainedModel, shape: ModelShape, layer: int, name: str) -> nn.Module:
    return model.get_submodule(shape.table.layer_prefix.format(layer=layer) + name)


def _shown(see: SeeStream, site: str, norm: nn.Module) -> Callable[[nn.Module, Any], None]:
    eps = float(norm.variance_epsilon)  # type: ignore[arg-type]  # a module's attributes have no types

    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        see(site, given[0], eps)

    return hook


def _given(see: SeeLayer, layer: int) -> Callable[[nn.Module, Any], None]:
    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        see(layer, given[0])

    return hook


def _mapped(see: SeeLayer, layer: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, gave: tuple[Tensor, Tensor]) -> None:
        see(layer, gave[1])

    return hook
