"""Training: a Trainer and its settings; how runs are cut short, resumed, spread over processes and reported.

Names resolve when they are first used, so that a command line's settings are read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgpt.training.loop import NonFiniteLoss, Trainer, new_model
    from fastgpt.training.lora import add_lora
    from fastgpt.training.optimizer import configure_optimizers
    from fastgpt.training.settings import RunSettings, TrainSettings

__all__ = ["NonFiniteLoss", "RunSettings", "TrainSettings", "Trainer", "add_lora", "configure_optimizers", "new_model"]

_HOMES = {
    "NonFiniteLoss": "loop",
    "RunSettings": "settings",
    "TrainSettings": "settings",
    "Trainer": "loop",
    "add_lora": "lora",
    "configure_optimizers": "optimizer",
    "new_model": "loop",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
