"""The training loop: batches, dropout and schedule by the step's number, so that a run is the same however often it was stopped.

A run's directory holds the model as `save_pretrained` writes it with its tokenizer (so `--model DIR` takes it at any time),
`checkpoints/` (what resuming needs; fastgpt/training/checkpoint.py), `settings.toml`, `log.jsonl` and `loss.png`.

Before each step torch's generators are seeded from (seed, step, rank): dropout needs no state saved, and differs between ranks.
Rank r of n takes its own B / n rows of every batch, so n processes train as one does, but for dropout's draws.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from fastgpt.checkpoints import weights
from fastgpt.config import GPTConfig, TokenIdError
from fastgpt.files import write_text
from fastgpt.model import GPTModel
from fastgpt.text.data import IGNORED, TokenStream
from fastgpt.text.shards import Tokens
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.training import checkpoint, lora, progress
from fastgpt.training.capture import CapturedStep
from fastgpt.training.distributed import Engine, World, whole
from fastgpt.training.optimizer import Muon, Updater
from fastgpt.training.settings import TrainSettings, differences, to_toml
from fastgpt.transfer import uploaded

SETTINGS = "settings.toml"


class NonFiniteLoss(ValueError):
    """The loss or the gradient became NaN or Inf; the last checkpoint is untouched."""


class Trainer:
    """One training run in one directory.

    Args:
        model: trained in place, on its device.
        tokenizer: saved with the model.
        data: training batches of settings.batch_size rows; batch i belongs to step i.
        validation: batches whose mean loss is reported.
        settings: see TrainSettings.
        directory: of the run; made when missing.
        world: this process among others, each of which makes a Trainer of the same arguments; None for one process.

    Raises ValueError where settings, data, model and machine don't fit, before anything is changed or written.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: Tokenizer,
        data: TokenStream,
        validation: TokenStream,
        settings: TrainSettings,
        directory: Path,
        world: World | None = None,
    ) -> None:
        self.world = world = World(device=model.device) if world is None else world
        self.model, self.tokenizer, self.data, self.validation = model, tokenizer, data, validation
        self.settings, self.directory, self.step = settings, directory, 0
        cuda = model.device.type == "cuda"
        _check_vocabulary(model.config, data, "data")
        _check_vocabulary(model.config, validation, "validation")
        if data.batch_size != settings.batch_size:
            raise ValueError(
                f"data has batches of {data.batch_size} rows, settings.batch_size is {settings.batch_size}"
            )
        if settings.batch_size % (world.size * settings.accumulate):
            raise ValueError(
                f"batch_size must be a multiple of processes x accumulate, got {settings.batch_size} rows for "
                f"{world.size} x {settings.accumulate}"
            )
        if settings.cuda_graph and not (cuda and world.size == 1):
            raise ValueError(f"cuda_graph needs one process on a CUDA device, got {world.size} on {model.device}")
        wrong = {p.dtype for p in model.parameters()} - {torch.float32}
        if wrong:
            raise ValueError(
                f"parameters must be float32 when training begins, got {wrong}; settings.dtype says what to compute in"
            )
        pure = settings.dtype == "pure-bfloat16"
        if pure and world.size > 1 and settings.parallel == "ddp":
            raise ValueError("pure-bfloat16 on several processes needs --parallel fsdp, which sums gradients in fp32")
        muon = settings.optimizer == "muon"
        if muon and world.size > 1 and settings.parallel == "fsdp":
            raise ValueError("optimizer muon needs whole matrices, which --parallel fsdp shards; use --parallel ddp")
        self.logbook = progress.Log(directory, settings, directory.name)
        if settings.recompute:
            for block in model.trf_blocks:
                block.forward = _Recomputed(block.forward)
        self.engine = Engine(model, world, settings.parallel, half=pure)
        lr = torch.tensor(settings.lr, device=model.device) if settings.cuda_graph else settings.lr
        betas = (settings.beta1, settings.beta2)
        rate = (settings.muon_lr or settings.lr) / settings.lr
        how = Muon(rate, settings.muon_momentum) if muon else None
        self.updater = Updater(model, settings.weight_decay, betas, lr, pure and world.size == 1, how)
        if self.updater.masters is not None:
            model.to(torch.bfloat16)  # in place, after the copies were made of what had not been rounded
        self.graph = CapturedStep(self._train_on, model.device) if settings.cuda_graph else None
        self.log_every = settings.log_every or (10 if cuda else 1)
        gpu = torch.cuda.get_device_name(model.device) if cuda else None
        self._peak = progress.peak_flops(settings, gpu)
        self._pending: list[tuple[int, float, Tensor]] = []

    @property
    def log(self) -> list[dict[str, Any]]:
        """Every entry of log.jsonl."""
        return self.logbook.entries

    def resume(self) -> None:
        """Continue from the directory's newest checkpoint, made by any number of processes."""
        manifest = checkpoint.read_manifest(self.directory)
        place = checkpoint.place(self.directory, manifest["step"])
        changed = differences(manifest["settings"], self.settings)
        facts = self._facts()
        for part in ("config", "data"):
            for key, value in facts[part].items():
                if manifest[part].get(key) != value:
                    changed.append(f"{key}: {manifest[part].get(key)!r} in the checkpoint, {value!r} now")
        if changed:
            raise ValueError(
                f"{place} was made with other settings:\n  "
                + "\n  ".join(changed)
                + f"\nTo go on from its weights with these, begin a new run: --init {self.directory} --out ANOTHER"
            )
        if self.settings.max_steps < manifest["step"]:
            raise ValueError(
                f"max_steps must be at least the {manifest['step']:,} steps that {self.directory} has made, "
                f"got {self.settings.max_steps:,}"
            )
        checkpoint.load(self.directory, manifest["step"], self._tensors(), self.world)
        self.updater.round()
        self.step = manifest["step"]
        self.logbook.read(self.step)

    def run(self, report: Callable[[dict[str, Any]], None] = lambda entry: None) -> int | None:
        """Train to max_steps; on the first rank `report` gets every log entry. Returns the signal that stopped it early, or None.

        SIGINT and SIGTERM end the run after the step in hand (after `log_every` steps among several processes), with a whole
        checkpoint. Raises NonFiniteLoss, and CheckpointError where the disk refuses one.
        """
        settings, first = self.settings, self.world.first
        if first:
            self.directory.mkdir(parents=True, exist_ok=True)
            checkpoint.clear_leftovers(self.directory)
            write_text(self.directory / SETTINGS, to_toml(settings))
            self.tokenizer.save(self.directory)  # before any checkpoint: resuming needs it
            self.logbook.open()

        def note(**entry: Any) -> None:
            if first:
                try:
                    self.logbook.add(entry)
                except OSError as error:
                    where = checkpoint.last(self.directory)
                    raise OSError(f"the log can't be written: {error}; the last whole checkpoint is {where}") from error
                report(entry)

        with (
            _stop_on_signals() as stopped,
            _matmul_precision(settings, self.model.device),
            contextlib.ExitStack() as end,
        ):
            if first:
                end.callback(self.logbook.close)
            stop, alone = False, self.world.size == 1
            self._clock = time.perf_counter()
            while self.step < settings.max_steps and not stop and not (alone and stopped):
                self._train_step(bool(stopped))
                done = self.step == settings.max_steps
                validate = self.step % settings.validate_every == 0 or done
                sample = settings.sample_every > 0 and self.step % settings.sample_every == 0
                save = self.step % settings.checkpoint_every == 0 and not done
                if validate or sample or save or self.step % self.log_every == 0:
                    stop = self._read(note)
                if validate:
                    note(step=self.step, validation_loss=self.validate())
                if save and not stop:  # before the sample: whatever happens to a text, the steps are kept
                    self.checkpoint()
                if sample:
                    note(step=self.step, sample=self.sample())
                if validate or sample or save:
                    self._clock = time.perf_counter()
            self._read(note)
            self.checkpoint()
        if stopped:
            return stopped[0]
        return signal.SIGTERM if stop else None  # another rank got the signal

    def _train_step(self, stopping: bool) -> None:
        """One update. Loss, norm and whether any rank is stopping stay on the device until `_read`."""
        settings, step = self.settings, self.step
        lr = settings.lr_at(step)
        self.updater.set_lr(lr)
        _seed(settings.seed, step, self.world.rank)
        count = settings.batch_size // self.world.size
        inputs, targets, *starts = self.data.rows(step, self.world.rank * count, (self.world.rank + 1) * count)
        _check_ids(self.model.config, inputs, targets, f"step {step + 1}")
        shape = (settings.accumulate, count // settings.accumulate, self.data.context)
        batch = [inputs.view(shape), targets.view(shape), self._shares(targets.view(shape))]
        batch = [uploaded(part, self.model.device) for part in (*batch, *(part.view(shape) for part in starts))]
        self.model.train()
        if self.graph is not None:
            values = self.graph(batch)
        else:
            values = self._gradient(*batch)
            if self.world.size > 1:
                total = self.world.sum(torch.stack([values[0], torch.full_like(values[0], float(stopping))]))
                values = torch.stack([total[0] / self.world.size, values[1], total[1]])
            if self.log_every == 1:
                self._check(step, *values[:2].tolist())  # read before the update, the weights are still good
            self.updater.step()
        self._pending.append((step, lr, values))
        self.step += 1

    def _train_on(self, *batch: Tensor) -> Tensor:
        values = self._gradient(*batch)
        self.updater.step()
        return values

    def _gradient(self, inputs: Tensor, targets: Tensor, shares: Tensor, starts: Tensor | None = None) -> Tensor:
        """Leaves the clipped gradient of this rank's micro-batches [A, B, T]; returns [loss, norm before clipping]."""
        self.updater.zero_grad()
        total = torch.zeros((), device=inputs.device)
        for index in range(len(inputs)):
            with self.engine.micro_batch(last=index == len(inputs) - 1):
                with self._autocast():
                    documents = None if starts is None else starts[index]
                    loss = self.engine.loss(inputs[index], targets[index], starts=documents) * shares[index]
                loss.backward()
            self.updater.collect()
            total += loss.detach()
        return torch.stack([total, self.updater.clip(self.settings.grad_clip)])

    def _shares(self, targets: Tensor) -> Tensor:
        """What each micro-batch's mean loss counts [A], so that every target of the whole step counts the same.

        The engines average gradients over ranks, hence the factor world.size where targets are counted.
        """
        if not self.data.separate:
            return torch.full((len(targets),), 1.0 / len(targets))
        counts = (targets != IGNORED).sum(dim=(1, 2)).float()
        total = counts.sum()
        if self.world.size > 1:
            total = self.world.sum(total.to(self.world.device)).cpu()
        return counts * self.world.size / total

    def _read(self, note: Callable[..., None]) -> bool:
        """Log what is pending; whether a rank of several is stopping."""
        if not self._pending:
            return False
        values = torch.stack([reading for _, _, reading in self._pending]).tolist()
        seconds = (time.perf_counter() - self._clock) / len(values)
        rate = self.settings.batch_size * self.data.context / seconds
        speed = {"tokens_per_second": round(rate, 1)}
        if self._peak:
            flops = progress.flops_per_token(self.model.config, self.data.context)
            speed["mfu"] = round(rate * flops / (self._peak * self.world.size), 4)
        for (step, lr, _), (loss, norm, *_) in zip(self._pending, values, strict=True):
            self._check(step, loss, norm)
            note(step=step + 1, loss=loss, lr=lr, grad_norm=norm, **speed)
        self._pending = []
        self._clock = time.perf_counter()
        return len(values[-1]) > 2 and any(row[2] > 0 for row in values)

    def _check(self, step: int, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLoss(
                f"step {step + 1}: loss {loss}, gradient norm {norm}; "
                f"the last whole checkpoint is {checkpoint.last(self.directory)}. "
                "A lower learning rate or a longer warmup usually helps"
            )

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss in nats over the first validation batches, always the same ones; the ranks share them out."""
        self.model.eval()
        count, world, device = self.settings.validation_batches, self.world, self.model.device
        losses: list[Tensor] = []
        counted: list[int] = []
        for first in range(0, count, world.size):
            index = first + world.rank
            inputs, targets, *starts = self.validation.batch(min(index, count - 1))
            _check_ids(self.model.config, inputs, targets, f"validation batch {index}")
            targets_counted = int((targets != IGNORED).sum()) if index < count else 0
            with self._autocast():
                documents = uploaded(starts[0], device) if starts else None
                loss = self.engine.loss(uploaded(inputs, device), uploaded(targets, device), starts=documents)
            losses.append(loss)
            counted.append(targets_counted)
        nats = sum(loss * targets for loss, targets in zip(torch.stack(losses).tolist(), counted, strict=True))
        own = torch.tensor([nats, sum(counted)], dtype=torch.float64, device=device if world.size > 1 else "cpu")
        total, targets_in_all = world.sum(own).tolist()
        return total / targets_in_all

    def sample(self) -> str:
        """A text by the model as it is, always from the same seed; on all ranks, since FSDP needs them all."""
        prompt = self.tokenizer.encode(self.settings.sample_prompt)
        if not prompt:
            prompt = [0 if self.tokenizer.end_of_text is None else self.tokenizer.end_of_text]
        device = self.model.device
        generator = torch.Generator(device).manual_seed(self.settings.seed)
        self.model.eval()
        with self._autocast():
            ids = self.model.generate(
                torch.tensor([prompt]),
                self.settings.sample_tokens,
                temperature=0.8,
                top_k=min(200, self.model.config.vocab_size),
                generator=generator,
            )
        return self.settings.sample_prompt + self.tokenizer.decode(ids[0, len(prompt) :].tolist())

    def checkpoint(self) -> None:
        """Write what resuming needs, then the model and its tokenizer for use."""
        sharded, keep = self.engine.sharded, self.settings.keep
        checkpoint.save(self.directory, self.step, self._tensors(), self._facts(), keep, self.world, sharded)
        self.export()

    def export(self) -> None:
        """The model as one safetensors file, adapters merged, with its tokenizer; on all ranks together."""
        state = lora.merged_state_dict(self.model)
        state = {name: whole(tensor) for name, tensor in state.items()}
        error: BaseException | None = None
        if self.world.first:
            try:
                weights.save_pretrained(self.model.config, state, self.directory, tokenizer=self.tokenizer)
            except Exception as cause:
                error = checkpoint.CheckpointError(
                    f"the model could not be written: {cause}; the last whole checkpoint is {checkpoint.last(self.directory)}"
                )
                error.__cause__ = cause
        self.world.together(error)

    def draw_curve(self) -> Path | None:
        """loss.png from the log; None where matplotlib isn't installed."""
        return progress.draw_curve(self.directory, self.log)

    def _tensors(self) -> dict[str, Tensor]:
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {f"model.{name}": tensor.detach() for name, tensor in named.items()} | self.updater.tensors()

    def _facts(self) -> dict[str, Any]:
        """What has to be the same for a run to go on as if it had never stopped (of the settings, those that aren't free)."""
        separate = "packed" if self.data.separate else False  # True in checkpoints of rows of one document each
        data = {"tokens": len(self.data.tokens), "context": self.data.context, "separate": separate}
        config, settings = self.model.config.to_dict(), dataclasses.asdict(self.settings)
        return {"config": config, "settings": settings, "data": data}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.dtype != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16)


def new_model(config: GPTConfig, seed: int, device: torch.device) -> GPTModel:
    """A model with fresh weights drawn from `seed`."""
    torch.manual_seed(seed)
    return GPTModel(config).to(device)


class _Recomputed:
    """A block's forward that keeps its input alone; the backward pass runs it again with the same dropout.

    In place of the method and not around the module, so that hooks, which FSDP2 is made of, run once.
    """

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward

    def __call__(self, *args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self.forward(*args)
        return cast(Tensor, recomputed(self.forward, *args, use_reentrant=False))


def _seed(seed: int, step: int, rank: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def _check_vocabulary(config: GPTConfig, stream: TokenStream, name: str) -> None:
    """What can be known of all ids without reading a file of billions; `_check_ids` looks at each batch."""
    tokens = stream.tokens
    if isinstance(tokens, Tokens):
        low, high = 0, max((shard.vocab_size or 1 for shard in tokens.shards), default=1) - 1
    elif isinstance(tokens, np.memmap):
        return
    else:
        low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise TokenIdError(f"{name} has token ids {low} to {high}, the model a vocabulary of {config.vocab_size}")


def _check_ids(config: GPTConfig, inputs: Tensor, targets: Tensor, where: str) -> None:
    # On the CPU, before they are sent: on a GPU an id outside the embedding is a device assert that ends the process.
    high = max(int(inputs.max()), int(targets.max()))
    if int(inputs.min()) < 0 or high >= config.vocab_size:
        raise TokenIdError(f"{where} has token ids up to {high}, the model a vocabulary of {config.vocab_size}")


@contextlib.contextmanager
def _matmul_precision(settings: TrainSettings, device: torch.device) -> Iterator[None]:
    """The TF32 policy while training on a GPU; a CPU computes fp32 products in fp32.

    By the newest of torch's three ways to set it, which follows the others: reading those raises once a process has used it.
    """
    if device.type != "cuda":
        yield
        return
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32" if settings.tf32 else "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


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
