"""The training loop: AdamW, warmup and cosine, validation, checkpoints that resume exactly.

A run's directory holds the model as `save_pretrained` writes it with its tokenizer (so `--model DIR` takes it at any time),
`state.pt` (everything that resuming needs, written in one atomic step), `log.jsonl` and `loss.png`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgpt.config import GPTConfig, TokenIdError
from fastgpt.data import TokenStream
from fastgpt.files import atomic_write, write_text
from fastgpt.model import GPTModel
from fastgpt.tokenizer import Tokenizer

STATE = "state.pt"
LOG = "log.jsonl"
CURVE = "loss.png"


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Raises ValueError that names the field, what came and what was expected."""

    max_steps: int = 2000
    batch_size: int = 8  # rows of `context` tokens a step
    lr: float = 1e-3  # peak
    min_lr_ratio: float = 0.1  # the cosine ends at lr times this
    warmup_steps: int = 100
    weight_decay: float = 0.1  # of matrices and embeddings; biases and norms have none
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # global norm
    seed: int = 0
    dtype: str = "float32"  # of the matrix products: float32, or bfloat16 by autocast with fp32 parameters
    validate_every: int = 200
    validation_batches: int = 16
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        whole = ("max_steps", "batch_size", "validate_every", "validation_batches", "checkpoint_every")
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "grad_clip"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a number over 0, got {getattr(self, name)}")
        for name in ("warmup_steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must be a number from 0, got {self.weight_decay}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be from 0 to 1, got {self.min_lr_ratio}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to less than 1, got {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")

    def lr_at(self, step: int) -> float:
        """Linear warmup, then a cosine from lr to min_lr_ratio * lr at max_steps."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.max_steps - self.warmup_steps, 1)
        floor = self.lr * self.min_lr_ratio
        return floor + 0.5 * (self.lr - floor) * (1.0 + math.cos(math.pi * min(progress, 1.0)))


class NonFiniteLoss(ValueError):
    """The loss or the gradient became NaN or Inf; the last checkpoint is untouched."""


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """nanoGPT's rule: what has two or more dimensions decays, biases and norms don't."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


class Trainer:
    """One training run in one directory.

    Args:
        model: trained in place, on its device.
        tokenizer: saved with the model.
        data: training batches; batch i belongs to step i.
        validation: batches whose mean loss is reported.
        settings: see TrainSettings.
        directory: of the run; made when missing.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: Tokenizer,
        data: TokenStream,
        validation: TokenStream,
        settings: TrainSettings,
        directory: Path,
    ) -> None:
        self.model, self.tokenizer, self.data, self.validation = model, tokenizer, data, validation
        self.settings, self.directory, self.step = settings, directory, 0
        for name, stream in (("data", data), ("validation", validation)):
            # Here, once: on a GPU an id outside the embedding is a device assert that ends the process.
            if int(stream.tokens.min()) < 0 or int(stream.tokens.max()) >= model.config.vocab_size:
                raise TokenIdError(
                    f"{name} has token ids {stream.tokens.min()} to {stream.tokens.max()}, "
                    f"the model a vocabulary of {model.config.vocab_size}"
                )
        self.optimizer = torch.optim.AdamW(
            optimizer_groups(model, settings.weight_decay),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            fused=model.device.type in ("cuda", "cpu"),
        )
        directory.mkdir(parents=True, exist_ok=True)
        self.log: list[dict[str, Any]] = []

    def resume(self) -> None:
        """Continue from the directory's state.pt: weights, optimizer, step and random state."""
        path = self.directory / STATE
        if not path.is_file():
            raise FileNotFoundError(f"nothing to resume: {path} isn't there")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip and torch raise their own types for a damaged file
            raise ValueError(f"{path} is not a whole checkpoint: {error}") from error
        keys = {"model", "optimizer", "rng", "step", "config", "settings", "data"}
        if not isinstance(state, dict) or not keys <= set(state):
            raise ValueError(f"{path} is not a whole checkpoint: it must have {sorted(keys)}")
        mine = self._identity()
        changed = [
            f"{key}: {state[part].get(key)!r} in the checkpoint, {value!r} now"
            for part in mine
            for key, value in mine[part].items()
            if state[part].get(key) != value and key not in ("max_steps", "validate_every", "checkpoint_every")
        ]
        if changed:
            raise ValueError(f"{path} was made with other settings:\n  " + "\n  ".join(changed))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"], self.model.device)
        self.step = state["step"]
        self.log = []
        if (self.directory / LOG).is_file():
            lines = (self.directory / LOG).read_text(encoding="utf-8").splitlines()
            with contextlib.suppress(json.JSONDecodeError):  # a killed run may leave half a line, always the last
                for line in lines:
                    entry = json.loads(line)
                    if entry["step"] <= self.step:
                        self.log.append(entry)

    def run(self, report: Callable[[dict[str, Any]], None] = lambda entry: None) -> int | None:
        """Train to max_steps; `report` gets every log entry. Returns the signal that stopped it early, or None.

        SIGINT and SIGTERM end the run after the step in hand, with a whole checkpoint.
        """
        settings, device = self.settings, self.model.device
        self._write_log()
        with _stop_on_signals() as stopped, open(self.directory / LOG, "a", encoding="utf-8") as file:

            def note(**entry: Any) -> None:
                self.log.append(entry)
                file.write(json.dumps(entry) + "\n")
                file.flush()
                report(entry)

            while self.step < settings.max_steps and not stopped:
                started = time.perf_counter()
                loss, norm, lr = self._train_step()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise NonFiniteLoss(
                        f"step {self.step + 1}: loss {loss}, gradient norm {norm}; "
                        f"the last whole checkpoint is {self._last_checkpoint()}. "
                        "A lower learning rate or a longer warmup usually helps"
                    )
                self.step += 1
                rate = settings.batch_size * self.data.context / (time.perf_counter() - started)
                note(step=self.step, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=round(rate, 1))
                if self.step % settings.validate_every == 0 or self.step == settings.max_steps:
                    note(step=self.step, validation_loss=self.validate())
                if self.step % settings.checkpoint_every == 0 and self.step < settings.max_steps:
                    self.checkpoint()
            self.checkpoint()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return stopped[0] if stopped else None

    def _train_step(self) -> tuple[float, float, float]:
        lr = self.settings.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        inputs, targets = (t.to(self.model.device, non_blocking=True) for t in self.data.batch(self.step))
        with self._autocast():
            loss = self.model.loss(inputs, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        values = loss.item(), norm.item()
        if all(map(math.isfinite, values)):
            self.optimizer.step()
        return *values, lr

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss in nats over the first validation batches, always the same ones."""
        self.model.eval()
        total = 0.0
        for i in range(self.settings.validation_batches):
            inputs, targets = (t.to(self.model.device) for t in self.validation.batch(i))
            with self._autocast():
                total += self.model.loss(inputs, targets).item()
        return total / self.settings.validation_batches

    def checkpoint(self) -> None:
        """Write the model and its tokenizer for use, and state.pt for resuming."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            **self._identity(),
        }
        if self.model.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.model.device)
        self.model.save_pretrained(self.directory)
        self.tokenizer.save(self.directory)
        atomic_write(self.directory / STATE, lambda path: torch.save(state, path))

    def _identity(self) -> dict[str, dict[str, Any]]:
        """What has to be the same for a run to go on as if it had never stopped."""
        return {
            "config": self.model.config.to_dict(),
            "settings": dataclasses.asdict(self.settings),
            "data": {"tokens": len(self.data.tokens), "context": self.data.context},
        }

    def draw_curve(self) -> Path | None:
        """loss.png from the log; None where matplotlib isn't installed."""
        import importlib.util

        if importlib.util.find_spec("matplotlib") is None:
            return None
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
        for key, style in (
            ("loss", {"lw": 0.6, "alpha": 0.6}),
            ("validation_loss", {"lw": 1.6, "marker": "o", "ms": 3}),
        ):
            points = [(entry["step"], entry[key]) for entry in self.log if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
        if axes.lines:
            axes.legend()
        axes.grid(alpha=0.3)
        atomic_write(self.directory / CURVE, lambda path: figure.savefig(path, format="png", dpi=120))
        return self.directory / CURVE

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16)

    def _last_checkpoint(self) -> str:
        path = self.directory / STATE
        return str(path) if path.is_file() else "none yet"

    def _write_log(self) -> None:
        write_text(self.directory / LOG, "".join(json.dumps(entry) + "\n" for entry in self.log))


def new_model(config: GPTConfig, seed: int, device: torch.device) -> GPTModel:
    """A model with fresh weights drawn from `seed`."""
    torch.manual_seed(seed)
    return GPTModel(config).to(device)


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """The list gets the first SIGINT or SIGTERM that arrives inside; a second one interrupts at once."""
    stopped: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(signum)

    previous = {}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        previous = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
