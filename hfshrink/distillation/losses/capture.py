"""Recording what happens inside a model: the inputs and outputs of modules, and the states and scores of attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import eval_mode, random_inputs
from hfshrink.modules import layer_stack

FORBIDDEN = -1e4
"""Additive masks at or below this forbid a pair: every family writes such a number, the dtype's least, or −inf."""
PROBE_TOKENS = 4

_LISTENERS: WeakKeyDictionary[nn.Module, Callable[..., None]] = WeakKeyDictionary()
"""Attention module -> what to call with its states; only while a `Recorder` is open."""
_SWITCHED: dict[int, tuple[Any, int]] = {}
"""id of a config -> its own attention, and how many open `Recorder`s have switched it: models may share a config."""


@dataclass(frozen=True)
class Wanted:
    """What to record in each forward pass.

    Attributes:
        outputs: Dotted names of modules whose output is wanted.
        inputs: Dotted names of modules whose first input is wanted.
        attention: Numbers of the layers (see `layer_stack`) whose self-attention is wanted.
    """

    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    attention: tuple[int, ...] = ()


@dataclass(frozen=True)
class AttentionStates:
    """The insides of one layer's self-attention, after rotary embeddings where the family has them.

    Attributes:
        query: States of shape (batch, heads, sequence, head width).
        key: States of shape (batch, key heads, sequence, head width); grouped queries share key heads.
        value: States of shape (batch, key heads, sequence, head width).
        scaling: Factor of the scores, most often 1/√(head width).
        pairs: Booleans of shape (batch, 1, sequence, sequence): which query may look at which key (padding, the
            future of causal models, windows); None where all may. Rows of padding are not left out here.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    pairs: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """Q·Kᵀ · scaling in float32, of shape (batch, heads, sequence, sequence).

        Before mask, position bias, cap and softmax.
        """
        groups = self.query.shape[1] // self.key.shape[1]
        key = self.key.float().repeat_interleave(groups, dim=1)
        return self.query.float() @ key.transpose(-1, -2) * self.scaling


@dataclass(frozen=True)
class Features:
    """What one forward pass recorded.

    Attributes:
        outputs: Module name -> its output.
        inputs: Module name -> its first input.
        attention: Layer number -> the states of its self-attention.
        mask: Booleans of shape (batch, sequence), True where there is no padding; None where there is none at all.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionStates] = field(default_factory=dict)
    mask: Tensor | None = None


class Recorder:
    """Records what losses want from a model's forward passes, without changing what the model computes.

    Modules are read by hooks. Attention is read by a function that is registered with transformers'
    `AttentionInterface`, takes the states, and goes on with the model's own attention (sdpa where the model uses it,
    eager else). On exit, and on any exception, hooks are gone and the attention implementation is as it was. The
    tensors carry gradients. It works inside DDP, under autocast, and with gradient checkpointing that is not
    reentrant.

    Args:
        model: The model itself, not its DDP wrapper.
        wants: What to record, all together.

    Raises:
        SettingError: A module or layer that the model does not have.
        UnsupportedModelError: Attention is wanted, and the family's attention can't be read.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> model = BertModel(config)
        >>> with Recorder(model, [Wanted(outputs=("encoder.layer.0",), attention=(1,))]) as recorder:
        ...     output = model(torch.tensor([[1, 2, 3]]))
        ...     features = recorder.take()
        >>> features.outputs["encoder.layer.0"].shape, features.attention[1].scores.shape
        (torch.Size([1, 3, 8]), torch.Size([1, 2, 3, 3]))
    """

    def __init__(self, model: nn.Module, wants: Iterable[Wanted]) -> None:
        wants = list(wants)
        self._model = model
        self._outputs = {name: _find(model, name) for want in wants for name in want.outputs}
        self._inputs = {name: _find(model, name) for want in wants for name in want.inputs}
        self._layers = _find_layers(model, sorted({number for want in wants for number in want.attention}))
        self._seen: Features | None = None  # since the last take()
        self._running = False  # outside of a forward pass nothing counts, such as what checkpointing computes again
        self._needs_grad = False
        self._exit = ExitStack()

    def __enter__(self) -> Recorder:
        with ExitStack() as undo:
            self._add_hooks(undo)
            if self._layers:
                self._listen(undo)
                _switch_attention(self._model, undo)
            self._exit = undo.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._exit.close()
        self._seen = None

    def take(self, mask: Tensor | None = None) -> Features:
        """What the last forward pass recorded; it is given away once.

        Args:
            mask: Positions that are not padding, of shape (batch, sequence), as the tokenizer makes them; or None.

        Raises:
            SettingError: There was no forward pass since the last call.
            UnsupportedModelError: A wanted module or attention did not run in it.
        """
        seen, self._seen = self._seen, None
        family = _family(self._model)
        if seen is None:
            raise SettingError(
                f"Nothing was recorded of the {family} model: it ran no forward pass since the last take(). Call this "
                "very model, or a wrapper around it, while the recorder is open."
            )
        wanted = [*self._outputs, *self._inputs, *(f"the attention of layer {number}" for number in self._layers)]
        found = [*seen.outputs, *seen.inputs, *(f"the attention of layer {number}" for number in seen.attention)]
        missing = [name for name in wanted if name not in found]
        if missing:
            raise UnsupportedModelError(
                f"The family {family!r} ran past {', '.join(missing)}, where nothing could be read. Use a loss that "
                "does not look there."
            )
        return Features(seen.outputs, seen.inputs, seen.attention, None if mask is None else mask.bool())

    def _add_hooks(self, undo: ExitStack) -> None:
        handles = [self._model.register_forward_pre_hook(self._start)]
        for name, module in self._inputs.items():
            handles.append(module.register_forward_pre_hook(partial(self._see_input, name), with_kwargs=True))
        for name, module in self._outputs.items():
            handles.append(module.register_forward_hook(partial(self._see_output, name)))
        handles.append(self._model.register_forward_hook(self._stop, always_call=True))
        for handle in handles:
            undo.callback(handle.remove)

    def _listen(self, undo: ExitStack) -> None:
        for number, layer in self._layers.items():
            for module in layer.modules():
                if module in _LISTENERS:
                    raise SettingError(
                        f"Another Recorder reads the attention of this {_family(self._model)} model already. Give one "
                        "Recorder all that is wanted."
                    )
                _LISTENERS[module] = partial(self._see_attention, number)
                undo.callback(_LISTENERS.pop, module, None)

    def _start(self, module: nn.Module, _: Any) -> None:
        if getattr(module, "_is_replica", False):
            raise SettingError(
                "Features can't be recorded under nn.DataParallel, whose threads run copies of the model. Start one "
                "process per device: torchrun --nproc_per_node ..."
            )
        self._seen, self._running, self._needs_grad = Features(), True, torch.is_grad_enabled()

    def _stop(self, *_: Any) -> None:
        self._running = False

    def _see_input(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep("inputs", name, _first_tensor((*args, *kwargs.values())), f"the input of {name}")

    def _see_output(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        self._keep("outputs", name, _first_tensor(output), f"the output of {name}")

    def _see_attention(self, number: int, states: AttentionStates) -> None:
        self._keep("attention", number, states, f"the attention of layer {number}")

    def _keep(self, kind: str, key: Any, value: Any, what: str) -> None:
        if not self._running:
            return
        store = getattr(self._seen, kind)
        family = _family(self._model)
        if value is None:
            raise UnsupportedModelError(f"Expected a tensor as {what} of the {family} model, found none there.")
        if key in store:
            raise UnsupportedModelError(
                f"The {family} model computes {what} more than once in a forward pass (cross-attention or shared "
                "layers): it is unclear which is meant."
            )
        if self._needs_grad and not torch.is_grad_enabled():
            raise SettingError(
                f"{what[:1].upper()}{what[1:]} of the {family} model comes without gradients, as reentrant "
                'checkpointing does it. Set activation_checkpointing_kwargs={"use_reentrant": False}.'
            )
        store[key] = value


def probe(model: Any, wanted: Wanted, inputs: dict[str, Tensor] | None = None) -> Features:
    """What the model records for one input: shapes and widths are known before training starts.

    Args:
        model: A model that reads text or images.
        wanted: What to record.
        inputs: The input; None makes up 4 tokens or one image.

    Returns:
        The features, without gradients and mask. The model's mode and the caller's random state stay as they were.

    Raises:
        SettingError: See `Recorder`.
        UnsupportedModelError: See `Recorder`; or the model reads neither text nor images.
    """
    if inputs is None:
        inputs = random_inputs(model, 1, PROBE_TOKENS)
    with Recorder(model, [wanted]) as recorder, torch.no_grad(), eval_mode(model):
        dtypes = {True: model.dtype}  # pixels take the model's, ids stay whole numbers
        model(**{k: v.to(model.device, dtypes.get(v.is_floating_point())) for k, v in inputs.items()})
        return recorder.take()


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise SettingError(
            f"The {_family(model)} model has no module called {name!r}. model.named_modules() lists them."
        ) from None


def _find_layers(model: nn.Module, numbers: list[int]) -> dict[int, nn.Module]:
    if not numbers:
        return {}
    name, layers = layer_stack(model)
    wrong = [number for number in numbers if not 0 <= number < len(layers)]
    if wrong:
        raise SettingError(
            f"The {_family(model)} model has the layers 0..{len(layers) - 1} in {name!r}, got layer {wrong[0]}."
        )
    return {number: layers[number] for number in numbers}


def _family(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def _first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first in a tuple, list or model output."""
    if isinstance(value, Tensor):
        return value
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return next((item for item in values if isinstance(item, Tensor)), None)


def _switch_attention(model: Any, undo: ExitStack) -> None:
    """Let the model attend through the recording function; the last recorder of a config puts it back."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for number, config in configs.items():
        own, users = _SWITCHED.get(number, (config._attn_implementation, 0))
        _SWITCHED[number] = own, users + 1
        undo.callback(_put_back, config)
    kind = "sdpa" if model.config._attn_implementation in ("sdpa", "hfshrink_sdpa") else "eager"
    name = f"hfshrink_{kind}"
    AttentionInterface.register(name, partial(_record_and_attend, kind))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kind])
    model.set_attn_implementation({"": name})  # this model's own config; those of its parts stay as they are
    if model.config._attn_implementation != name:
        raise UnsupportedModelError(
            f"The attention of the family {_family(model)!r} can't be read: it does not go through transformers' "
            "AttentionInterface, as that of BERT, RoBERTa, DistilBERT, ELECTRA, ViT, GPT-2 and Llama does. Use "
            "HiddenLoss or LogitLoss."
        )


def _put_back(config: Any) -> None:
    own, users = _SWITCHED.pop(id(config))
    if users > 1:
        _SWITCHED[id(config)] = own, users - 1
    else:
        config._attn_implementation_internal = own


def _record_and_attend(kind: str, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    listener = _LISTENERS.get(module)
    if listener is not None:
        listener(_read_states(module, *args, **kwargs))
    attend = AttentionInterface()["sdpa"] if kind == "sdpa" else _eager_attention(module)
    return attend(module, *args, **kwargs)


def _read_states(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> AttentionStates:
    scaling = kwargs.get("scaling")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    pairs = None
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        pairs = attention_mask if attention_mask.dtype == torch.bool else attention_mask > FORBIDDEN
        pairs = pairs.any(1, keepdim=True)  # position biases make a mask for each head
    elif causal:  # sdpa leaves the mask of a causal model without padding to the kernel
        pairs = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()[None, None]
    return AttentionStates(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, pairs)


def _eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The plain attention of a family: each modeling file of transformers has one, under the same name."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise UnsupportedModelError(
        f"{type(module).__name__} has no eager_attention_forward beside it, which recording needs. Load the model "
        'with attn_implementation="sdpa".'
    )
