"""What a run shows: its log, other people's trackers, the loss curve, MFU, the final report."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgpt.config import GPTConfig
from fastgpt.files import atomic_write, write_text
from fastgpt.training.settings import TrainSettings

LOG = "log.jsonl"
CURVE = "loss.png"
REPORT = "report.json"

# Dense bf16 TFLOP/s with fp32 sums, by what the name that torch gives a GPU has in it as whole words; the makers' data sheets.
# The first match counts. A laptop's or a cut-down chip of the same number is another one.
PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H20", 148.0),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("B100", 1750.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada Generation", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
OTHER_CHIPS = r"(?! (Ti|D|SUPER|Laptop|Max-Q)\b)"
MFU_CONVENTION = "(6 N + 6 L C T) FLOPs a token, N all parameters (llm.c's, causal), over the dense bf16 peak"


def flops_per_token(config: GPTConfig, context: int) -> float:
    """6 N + 6 L C T for rows of T = `context`: 2 N forward and 4 N backward, and attention over the causal half of T keys.

    llm.c's convention, https://github.com/karpathy/llm.c/blob/master/train_gpt2.cu (gpt2_estimate_mfu). PaLM's and nanoGPT's has
    12 L C T and leaves position embeddings out: 6.5% more for GPT-2 124M.
    """
    return 6.0 * config.num_parameters + 6.0 * config.n_layers * config.emb_dim * context


def peak_flops(settings: TrainSettings, gpu: str | None) -> float | None:
    """Of the GPU that torch calls `gpu`, in FLOP/s; None where it isn't known."""
    if settings.peak_tflops:
        return settings.peak_tflops * 1e12
    matches = (peak for name, peak in PEAK_TFLOPS if gpu and re.search(rf"\b{name}\b{OTHER_CHIPS}", gpu))
    peak = next(matches, None)
    return None if peak is None else peak * 1e12


class Log:
    """log.jsonl, a JSON object a line, and the trackers that settings ask for.

    ValueError names what isn't installed, before anything is written.
    """

    def __init__(self, directory: Path, settings: TrainSettings, name: str) -> None:
        for module, asked in (("tensorboard", settings.tensorboard), ("wandb", bool(settings.wandb))):
            if asked and importlib.util.find_spec(module) is None:
                raise ValueError(f"--{module} was asked for, but {module} isn't installed: pip install {module}")
        self.path, self.settings, self.name = directory / LOG, settings, name
        self.entries: list[dict[str, Any]] = []

    def read(self, step: int) -> None:
        """Take over an earlier run's entries up to `step`; what came after is to be trained again."""
        self.entries = []
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # a killed run may leave half a line, always the last
                break
            if entry["step"] <= step:
                self.entries.append(entry)

    def open(self) -> None:
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self.entries))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._trackers: list[tuple[Callable[[dict[str, Any]], None], Callable[[], None]]] = []
        if self.settings.tensorboard:
            self._trackers.append(_tensorboard(self.path.parent))
        if self.settings.wandb:
            self._trackers.append(_wandb(self.settings, self.path.parent, self.name))

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        line = (json.dumps(entry) + "\n").encode()
        if self._file.write(line) < len(line):  # what a disk does before it refuses
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        for log, _ in self._trackers:
            log(entry)

    def close(self) -> None:
        self._file.close()
        for _, close in self._trackers:
            close()


def _tensorboard(directory: Path) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(directory / "tensorboard"))

    def log(entry: dict[str, Any]) -> None:
        for key, value in entry.items():
            if isinstance(value, str):
                writer.add_text(key, value, entry["step"])
            elif key != "step":
                writer.add_scalar(key, value, entry["step"])

    return log, writer.close


def _wandb(
    settings: TrainSettings, directory: Path, name: str
) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    import dataclasses

    import wandb

    config = dataclasses.asdict(settings)
    run = wandb.init(project=settings.wandb, name=name, dir=str(directory), config=config)

    def log(entry: dict[str, Any]) -> None:
        run.log({key: value for key, value in entry.items() if key != "step"}, step=entry["step"])

    return log, run.finish


def draw_curve(directory: Path, entries: Sequence[Mapping[str, Any]]) -> Path | None:
    """loss.png from the log's entries; None where matplotlib isn't installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
    for key, style in (("loss", {"lw": 0.6, "alpha": 0.6}), ("validation_loss", {"lw": 1.6, "marker": "o", "ms": 3})):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    atomic_write(directory / CURVE, lambda path: figure.savefig(path, format="png", dpi=120))
    return directory / CURVE


def summary(entries: Sequence[Mapping[str, Any]], skipped: int = 2) -> dict[str, Any]:
    """The final report's numbers, from the log. Rates are medians, without the first `skipped` readings, which warm up."""
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    held_out = [(entry["validation_loss"], entry["step"]) for entry in entries if "validation_loss" in entry]
    found: dict[str, Any] = {"steps": len(losses)}
    if losses:
        found["loss_of_last_100_steps"] = sum(losses[-100:]) / len(losses[-100:])
    if held_out:
        found["validation_loss"], best = held_out[-1][0], min(held_out)
        found["best_validation_loss"], found["best_step"] = best
    for key in ("tokens_per_second", "mfu"):
        values = sorted([entry[key] for entry in entries if key in entry][skipped:])
        if values:
            found[key] = values[len(values) // 2]
    return found


def write_report(directory: Path, facts: Mapping[str, Any]) -> str:
    """Write report.json; returns it as text, a line a fact."""
    write_text(directory / REPORT, json.dumps(facts, indent=1) + "\n")
    lines = []
    for key, value in facts.items():
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        lines.append(f"  {key.replace('_', ' '):<24}{shown}")
    return "\n".join(lines)
