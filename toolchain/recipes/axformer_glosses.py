"""What ``axformer-glosses.toml`` judges a trial by: the losses of 200 glosses that accuracy is not measured on."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.models.blocks.glosses import JUDGED, call_of, held_out


def losses(module: nn.Module) -> Tensor:
    """The cross-entropy of each gloss (200,)."""
    glosses, classes = held_out()
    call = {key: torch.from_numpy(array) for key, array in call_of(glosses[JUDGED:]).items()}
    with torch.no_grad():
        return F.cross_entropy(module(**call), torch.from_numpy(np.asarray(classes[JUDGED:])), reduction="none")
