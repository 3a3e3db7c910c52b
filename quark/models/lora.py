"""Low-rank adapters, which are trained while the weights themselves stay fixed.

The adapters come from peft and are put into the model in place. Beside them the reward tokens' input
vectors are trained, in a small matrix of their own, so that neither gradients nor moments of the whole
embedding are ever made. With the adapters off, the model is the original one: the reference needs no
second copy of the weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quark.errors import ModelError
from quark.installing import install_command
from quark.models.config import LoraConfig
from quark.models.reward_tokens import RewardTokens

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

_NAME = "default"
"""peft's name for a model's only adapter."""


class RewardTokenEmbedding(nn.Module):
    """An embedding whose rows for the reward tokens are parameters of their own, the others frozen.

    Args:
        base: the model's embedding; its own rows for the reward tokens are no longer used.
        ids: [K] consecutive ids.
    """

    def __init__(self, base: nn.Embedding, ids: Sequence[int]) -> None:
        super().__init__()
        self.base = base
        self.ids = range(ids[0], ids[-1] + 1)
        # float32 whatever the weights are in: small steps would be lost in half precision.
        self.rows = nn.Parameter(self._own_rows().float().clone())

    @property
    def weight(self) -> Tensor:
        """The whole matrix, as the model's head shares it."""
        return self.base.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Vectors [..., D] of ids [...]."""
        looked_up: Tensor = self.base(input_ids)
        place = input_ids - self.ids.start
        is_reward_token = (place >= 0) & (place < len(self.ids))
        rows = self.rows.to(looked_up.dtype)
        # Some models (Gemma) scale what they look up.
        scale = getattr(self.base, "embed_scale", None)
        if scale is not None:
            rows = rows * scale
        own = nn.functional.embedding(place.clamp(0, len(self.ids) - 1), rows)
        return torch.where(is_reward_token.unsqueeze(-1), own, looked_up)

    @contextmanager
    def merged(self) -> Iterator[nn.Embedding]:
        """Within: the whole embedding, with the trained rows in it."""
        before = self._own_rows().clone()
        self._own_rows().copy_(self.rows)
        try:
            yield self.base
        finally:
            self._own_rows().copy_(before)

    def _own_rows(self) -> Tensor:
        return self.base.weight.detach()[self.ids.start : self.ids.stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The adapters in a model; made by ``add_adapter``."""

    model: PreTrainedModel
    embedding: RewardTokenEmbedding | None
    """None if the model has no reward tokens."""
    layers: tuple[tuple[str, LoraLayer], ...]
    """By their names in the model."""

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within: the model is the original one, for inputs without a reward token."""
        self._enable(False)
        try:
            yield
        finally:
            self._enable(True)

    @contextmanager
    def dropping(self, seed: int) -> Iterator[None]:
        """Within: inputs of the adapters are dropped, chosen by ``seed``."""
        dropouts = [d for _, layer in self.layers for d in layer.lora_dropout.values()]
        if not any(isinstance(dropout, nn.Dropout) for dropout in dropouts):
            yield
            return
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed % (1 << 63))
            for dropout in dropouts:
                dropout.train()
            try:
                yield
            finally:
                for dropout in dropouts:
                    dropout.eval()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within: an ordinary model whose weights have the adapters in them, on the CPU, to be saved.

        The original weights are stored and restored, because adding and subtracting a value does
        not restore a float exactly.
        """
        originals = []
        # In full precision also where sampling, which has servers given the weights, is not.
        exactly = torch.autocast(self.model.device.type, enabled=False)
        own = nullcontext() if self.embedding is None else self.embedding.merged()
        with torch.no_grad(), exactly, own as embedding:
            try:
                if embedding is not None:
                    self.model.set_input_embeddings(embedding)
                for name, layer in self.layers:
                    base = layer.get_base_layer()
                    originals.append((name, layer, base.weight))
                    weight = base.weight
                    sum_ = weight.float() + layer.get_delta_weight(_NAME).float()
                    base.weight = nn.Parameter(sum_.to(weight.dtype).cpu(), requires_grad=False)
                    self.model.set_submodule(name, base)
                yield
            finally:
                for name, layer, weight in originals:
                    layer.get_base_layer().weight = weight
                    self.model.set_submodule(name, layer)
                if self.embedding is not None:
                    self.model.set_input_embeddings(self.embedding)

    def _enable(self, enabled: bool) -> None:
        for _, layer in self.layers:
            layer.enable_adapters(enabled)


_LINEAR = (nn.Linear, Conv1D)


def _is_a_product(module: nn.Module) -> bool:
    """Whether a module multiplies by its matrix and does nothing else: routers of a mixture are linear layers too."""
    if type(module) in _LINEAR:
        return True
    if not isinstance(module, nn.Linear):
        return False
    with torch.no_grad():
        out = module(module.weight.new_zeros(1, module.in_features))
    return isinstance(out, Tensor) and out.shape == (1, module.out_features)


def _linear_layers(whole: nn.Module) -> list[str]:
    """The names of all linear layers in a model's container that an adapter can be added to.

    Experts and routers of a mixture are no such layers: they hold their matrices themselves, or return more than a
    product. The last projection of a state-space layer is left out too, because its kernel reads the weight directly.
    """
    heads = [m.get_output_embeddings() for m in whole.children() if isinstance(m, PreTrainedModel)]
    names = []
    for name, module in whole.named_modules():
        parent = whole.get_submodule(name.rpartition(".")[0])
        is_read_directly = hasattr(parent, "A_log") and name.endswith(".out_proj")
        if _is_a_product(module) and module not in heads and not is_read_directly:
            names.append(name)
    return names


def frozen_digest(model: nn.Module) -> str:
    """Hex SHA-256 of the parameters that are not trained."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()


def add_adapter(
    model: PreTrainedModel, reward_tokens: RewardTokens, config: LoraConfig, *, seed: int
) -> Adapter:
    """Freeze ``model`` and put adapters into it, in place; its output is unchanged until they are trained.

    Args:
        model: with rows for the reward tokens.
        reward_tokens: their ids.
        config: with a rank above 0.
        seed: for the initial values of the adapters.

    Raises:
        ModelError: peft is missing, or the model cannot take such adapters.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            "model.lora.rank is set, and peft is not installed: " + install_command("peft")
        )
    import peft
    from peft.tuners.lora import LoraLayer

    model.requires_grad_(False)
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ModelError(f"{type(model).__name__} has no embedding that adapters can be added to")
    # Inside a plain module, peft takes names as they are. For a mixture it would replace some by those of experts.
    within = model if config.target_modules else nn.ModuleDict({"model": model})
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules) or _linear_layers(within),
    )
    # Its own drawing is drawn over below; it says which way round a layer's matrix is, and turns it itself.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        try:
            peft.inject_adapter_in_model(settings, within, _NAME)
        except ValueError as err:
            raise ModelError(
                f"{model.name_or_path or type(model).__name__} cannot take the adapters of model.lora: {err}"
            ) from err
    layers = tuple((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    for name, layer in layers:
        base = layer.get_base_layer()
        # A head with an adapter would be applied after the reference's rows were made with adapters off.
        if base is head or base is embedding:
            raise ModelError(
                f"model.lora.target_modules: {name} is the model's embedding or vocabulary head, which stay as "
                "they are: leave it out"
            )
        if _NAME not in layer.lora_A or not isinstance(base, _LINEAR):
            raise ModelError(
                f"model.lora.target_modules: {name} ({type(base).__name__}) is not a linear layer"
            )
        down, up = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        # float32 whatever the weights are in, and drawn on the CPU, so that every device begins alike.
        first = torch.empty(down.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
        down.data = first.to(down.device)
        up.data = torch.zeros_like(up, dtype=torch.float32)
    wrapped = None
    if reward_tokens.are_placed:
        wrapped = RewardTokenEmbedding(embedding, reward_tokens.ids)
        model.set_input_embeddings(wrapped)
    return Adapter(model=model, embedding=wrapped, layers=layers)
