"""Arguments of a library's ``forward`` that engines have no input for, and why: so that none is left out in silence."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection

from torch import nn

from enginewright.sources.contract import LeftOut

TRAINING = (
    r"labels?(_mask)?$|^(start|end)_positions$|^is_impossible$|^cls_index$|^p_mask$|^targets?$|^future_|^sampled_neg"
)
REASONS = (
    (TRAINING, "it is for training: with it the model computes a loss"),
    (r"past_key_values|cache|^mems$|^state$", "it carries what earlier calls computed; every call stands for itself"),
    (r"position_ids$|^cache_position$", "the model counts positions itself"),
    (r"embeds$|^encoder_outputs$|embeddings$", "it stands in for what other inputs give"),
    (r"^encoder_(hidden_states|attention_mask)$", "only a decoder that reads an encoder uses it"),
    (r"^bool_masked_pos$|^mask_time_indices$", "it hides parts of the input, for pre-training"),
    (r"^head_mask$|^perm_mask$|^target_mapping$", "nothing is masked by hand"),
    (r"^token_type_ids$", "the model knows a single kind of segment"),
    (r"^global_attention_mask$", "which tokens see all others decides the shapes inside"),
    (r"^logits_to_keep$", "logits come for every position"),
)
"""Why an argument is left out, by its name; the first that fits."""
OTHERWISE = "nothing is known here to give it; the model does without"


def left_out(
    module: nn.Module, taken: Collection[str], reason: Callable[[str], str] | None = None
) -> tuple[LeftOut, ...]:
    """The arguments of ``forward`` that hold tensors and are not given.

    Args:
        module: the network.
        taken: arguments that are given.
        reason: from a name to why it is left out.
    """
    why = reason or reason_for
    return tuple(
        LeftOut(name=name, reason=why(name))
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if name not in taken and holds_tensors(parameter)
    )


def holds_tensors(parameter: inspect.Parameter) -> bool:
    """Whether an argument is for tensors, as far as its annotation says; without one, whether its name does."""
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return False
    if parameter.annotation is parameter.empty:
        return parameter.default is None and not re.match(r"output_|return_|use_", parameter.name)
    return re.search(r"Tensor|Cache", str(parameter.annotation)) is not None


def reason_for(name: str) -> str:
    """Why an argument is no input, by its name."""
    return next((reason for pattern, reason in REASONS if re.search(pattern, name)), OTHERWISE)
