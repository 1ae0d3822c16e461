"""Parameter groups, learning-rate schedules and optimizers."""

from pretrain.optim.adamw import AdamW, flat_adamw
from pretrain.optim.build import build_optimizer, choose_update_kernels, initial_state
from pretrain.optim.groups import is_decayed, is_tensor_parallel, parameter_groups
from pretrain.optim.holdable import Holdable
from pretrain.optim.lamb import Lamb
from pretrain.optim.norms import squared_norm
from pretrain.optim.schedule import learning_rate

__all__ = [
    "AdamW",
    "Holdable",
    "Lamb",
    "build_optimizer",
    "choose_update_kernels",
    "flat_adamw",
    "initial_state",
    "is_decayed",
    "is_tensor_parallel",
    "learning_rate",
    "parameter_groups",
    "squared_norm",
]
