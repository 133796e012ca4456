"""Training: a Trainer and its settings; how runs are cut short, resumed, spread over processes and reported."""

from fastgpt.training.loop import NonFiniteLoss, Trainer, new_model
from fastgpt.training.lora import add_lora
from fastgpt.training.optimizer import configure_optimizers
from fastgpt.training.settings import RunSettings, TrainSettings

__all__ = ["NonFiniteLoss", "RunSettings", "TrainSettings", "Trainer", "add_lora", "configure_optimizers", "new_model"]
