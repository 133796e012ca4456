"""The command `fastgpt`, also `python -m fastgpt`: demo, generate, train, eval, info."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from fastgpt import __version__
from fastgpt.config import GPTConfig
from fastgpt.data import TokenStream, encode_documents, expand, read_text, split_validation
from fastgpt.evaluation import evaluate
from fastgpt.generation import OVERFLOWS, Step, generate
from fastgpt.model import GPTModel
from fastgpt.tokenizer import SymbolTokenizer, Tokenizer, load_tokenizer
from fastgpt.training import Trainer, TrainSettings, new_model
from fastgpt.weights import BUNDLED, HUB_NAMES


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Errors that a user can mend are one line on stderr and status 2."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of a pipe went away: `fastgpt generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        print(f"fastgpt {arguments.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastgpt", description="GPT-2-family models: generate, train, evaluate, look inside."
    )
    parser.add_argument("--version", action="version", version=f"fastgpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    demo = command(
        "demo",
        _demo,
        "Stream a continuation from the bundled model, then compare generation with and without the KV cache.",
    )
    demo.add_argument("--max-new-tokens", type=int, default=160, help="length of the continuation")
    demo.add_argument("--seed", type=int, default=0)
    _device(demo)

    gen = command("generate", _generate, "Continue a prompt.")
    gen.add_argument("prompt", nargs="?", help="text; without it and without --prompt-file, standard input is read")
    gen.add_argument("--prompt-file", type=Path, help="read the prompt from a file")
    _model(gen)
    gen.add_argument("--max-new-tokens", type=int, default=128)
    gen.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely token")
    gen.add_argument("--top-k", type=int, help="keep the K most likely tokens")
    gen.add_argument("--top-p", type=float, help="keep the most likely tokens that sum to P")
    gen.add_argument("--min-p", type=float, help="keep tokens at least this fraction as likely as the most likely one")
    gen.add_argument("--repetition-penalty", type=float, default=1.0)
    gen.add_argument("--seed", type=int, help="same seed, same text; without one each run differs")
    gen.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given more than once"
    )
    gen.add_argument("--overflow", choices=OVERFLOWS, default="crop", help="what to do past the context length")
    gen.add_argument("--no-cache", action="store_true", help="recompute everything for each token")
    gen.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    _device(gen)

    train = command("train", _train, "Train a model on text files; each file is a document.")
    train.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text files, or directories of them")
    train.add_argument("--out", type=Path, required=True, help="directory of the run")
    train.add_argument("--config", type=Path, help="TOML file with any of these options by name; flags win over it")
    train.add_argument(
        "--validation",
        nargs="+",
        default=[],
        metavar="FILE",
        help="held-out files; without them the last 2%% of the text",
    )
    train.add_argument(
        "--tokenizer", help="gpt2, char, word, bundled, a file or a directory; default: that of --init, else bundled"
    )
    train.add_argument("--init", help="start from this model instead of fresh weights")
    train.add_argument("--context", type=int, default=256, help="positions")
    train.add_argument("--layers", type=int, default=4)
    train.add_argument("--heads", type=int, default=4)
    train.add_argument("--width", type=int, default=256)
    train.add_argument("--dropout", type=float, default=0.0)
    for field in dataclasses.fields(TrainSettings):
        train.add_argument(
            "--" + field.name.replace("_", "-"), type=type(field.default), default=field.default, help=" "
        )
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    _device(train)

    evaluation = command("eval", _eval, "Bits per byte and perplexity of a model on text files.")
    evaluation.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text files, or directories of them")
    _model(evaluation)
    evaluation.add_argument("--stride", type=int, help="new tokens a window; default: half the context")
    evaluation.add_argument("--json", action="store_true")
    _device(evaluation)

    info = command("info", _info, "Parameters, memory, FLOPs and training cost of a model or preset.")
    info.add_argument("name", nargs="?", default="bundled", help="a preset, a model directory, or bundled")
    info.add_argument("--ops", action="store_true", help="which implementation each op uses here, and why")
    _device(info)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="bundled",
        help=f"a directory, a .safetensors file, {', '.join(HUB_NAMES)}, or the bundled model",
    )


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: cuda where there is one, else cpu")


def pick_device(name: str | None) -> torch.device:
    """The device of that name; by default CUDA where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch {torch.__version__} sees no CUDA device here")
    return device


def _load(arguments: argparse.Namespace) -> tuple[GPTModel, Tokenizer]:
    device = pick_device(arguments.device)
    model = GPTModel.from_pretrained(arguments.model, dtype=torch.bfloat16 if device.type == "cuda" else None).to(
        device
    )
    source = BUNDLED if arguments.model == "bundled" else arguments.model
    path = Path(source)
    tokenizer = load_tokenizer(path if path.is_dir() else path.parent if path.is_file() else "gpt2")
    return model, tokenizer


def _demo(arguments: argparse.Namespace) -> int:
    from fastgpt.demo import run

    return run(pick_device(arguments.device), arguments.max_new_tokens, arguments.seed)


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.prompt is not None and arguments.prompt_file is not None:
        raise ValueError("give the prompt as an argument or as --prompt-file, not both")
    if arguments.prompt_file is not None:
        text = read_text(arguments.prompt_file)
    elif arguments.prompt is not None:
        text = arguments.prompt
    else:
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8 at byte {error.start}") from None
    if "" in arguments.stop:
        raise ValueError("--stop must not be empty")
    model, tokenizer = _load(arguments)
    prompt = tokenizer.encode(text)
    if not prompt:
        if tokenizer.end_of_text is None:
            raise ValueError("the prompt is empty, and this tokenizer has no <|endoftext|> to start from")
        prompt = [tokenizer.end_of_text]
    generator = None
    if arguments.seed is not None:
        generator = torch.Generator(device=model.device).manual_seed(arguments.seed)
    steps = generate(
        model,
        [prompt],
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        stop_tokens=() if tokenizer.end_of_text is None else (tokenizer.end_of_text,),
        generator=generator,
        overflow=arguments.overflow,
        use_cache=not arguments.no_cache,
        logprobs=arguments.json,
        stream=True,
    )
    out = sys.stdout
    if not arguments.json:
        out.write(text)
        out.flush()
    decoder, stops = tokenizer.stream(), _StopText(arguments.stop)
    tokens: list[int] = []
    logprobs: list[float] = []
    pieces: list[str] = []
    reason = "length"
    for step in cast(Iterator[Step], steps):
        if step.tokens[0] is None:
            reason = step.finish_reasons[0] or reason
            continue
        tokens.append(step.tokens[0])
        if step.logprobs is not None and step.logprobs[0] is not None:
            logprobs.append(step.logprobs[0])
        reason = step.finish_reasons[0] or reason
        pieces.append("" if step.tokens[0] == tokenizer.end_of_text else stops.add(decoder.add(step.tokens[0])))
        if stops.met:
            reason = "stop"
        if not arguments.json:
            out.write(pieces[-1])
            out.flush()
        if stops.met:
            break
    pieces.append(stops.finish(decoder.finish()))
    if arguments.json:
        record = {
            "prompt": text,
            "text": "".join(pieces),
            "finish_reason": reason,
            "tokens": tokens,
            "logprobs": logprobs,
        }
        print(json.dumps(record, ensure_ascii=False))
    else:
        out.write(pieces[-1] + "\n")
    return 0


class _StopText:
    """Passes text through up to the first of the stop texts, holding back what may yet become one."""

    def __init__(self, stops: list[str]) -> None:
        self.stops, self.held, self.met = stops, "", False

    def add(self, text: str) -> str:
        if self.met:
            return ""
        self.held += text
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.met = True
            return self.held[: min(found)]
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return ready

    def finish(self, text: str) -> str:
        out = self.add(text)
        return out if self.met else out + self.held


def _train(arguments: argparse.Namespace) -> int:
    arguments = _with_config_file(arguments)
    device = pick_device(arguments.device)
    settings = TrainSettings(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(TrainSettings)})
    if (arguments.out / "state.pt").exists() and not arguments.resume:
        raise ValueError(f"{arguments.out} already holds a run; pass --resume to continue it, or another --out")
    documents = [read_text(file) for file in expand(arguments.files)]
    source = arguments.out if arguments.resume else arguments.tokenizer or arguments.init or "bundled"
    tokenizer = _tokenizer_for_training(source, documents)
    tokens = encode_documents(tokenizer, documents)
    if arguments.validation:
        held_out = encode_documents(tokenizer, [read_text(file) for file in expand(arguments.validation)])
    else:
        tokens, held_out = split_validation(tokens, 0.02, 2 * arguments.context + 1)
    if arguments.init:
        model = GPTModel.from_pretrained(arguments.init).to(device)
        if tokenizer.n_vocab > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.n_vocab} ids, the model a vocabulary of {model.config.vocab_size}"
            )
        torch.manual_seed(settings.seed)
    else:
        config = GPTConfig(
            tokenizer.n_vocab,
            arguments.context,
            arguments.width,
            arguments.heads,
            arguments.layers,
            arguments.dropout,
            qkv_bias=True,
            tie_weights=True,
            init="gpt2",
        )
        model = new_model(config, settings.seed, device)
    context = model.config.context_length
    data = TokenStream(tokens, context, settings.batch_size, settings.seed)
    validation = TokenStream(held_out, context, min(settings.batch_size, 8), seed=0)
    trainer = Trainer(model, tokenizer, data, validation, settings, arguments.out)
    if arguments.resume:
        trainer.resume()
    print(
        f"{model.config.num_parameters:,} parameters, {len(tokens):,} training tokens, {len(held_out):,} held out, "
        f"steps {trainer.step:,} to {settings.max_steps:,} of {settings.batch_size} x {context} tokens on {device}"
    )
    stopped = _run_with_progress(trainer)
    curve = trainer.draw_curve()
    print(
        f"model, tokenizer, log and state in {arguments.out}; loss curve {curve or 'not drawn (pip install matplotlib)'}"
    )
    if stopped == signal.SIGINT:
        print(f"interrupted at step {trainer.step:,}; continue with --resume", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _run_with_progress(trainer: Trainer) -> int | None:
    from tqdm import tqdm

    with tqdm(total=trainer.settings.max_steps, initial=trainer.step, unit="step", dynamic_ncols=True) as bar:

        def report(entry: dict[str, Any]) -> None:
            if "validation_loss" in entry:
                bar.write(f"step {entry['step']:>6,}  validation loss {entry['validation_loss']:.4f}")
            else:
                bar.update()
                bar.set_postfix_str(
                    f"loss {entry['loss']:.3f}, {entry['tokens_per_second']:,.0f} tokens/s", refresh=False
                )

        return trainer.run(report)


def _tokenizer_for_training(source: str | Path, documents: list[str]) -> Tokenizer:
    if source in ("char", "word"):
        return SymbolTokenizer.from_text(str(source), "".join(documents))
    return load_tokenizer(BUNDLED if source == "bundled" else source)


def _with_config_file(arguments: argparse.Namespace) -> argparse.Namespace:
    """Options of --config, where no flag said otherwise: defaults < file < flags."""
    if arguments.config is None:
        return arguments
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        options = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{arguments.config} is not TOML: {error}") from error
    defaults = _parser().parse_args(["train", "x", "--out", "x"])
    for name, value in options.items():
        key = name.replace("-", "_")
        if not hasattr(defaults, key) or key in ("run", "command", "files", "out", "config", "resume"):
            raise ValueError(f"{arguments.config}: unknown option {name!r}")
        default = getattr(defaults, key)
        if isinstance(default, float) and isinstance(value, int):
            value = float(value)
        if default is not None and type(value) is not type(default):
            raise ValueError(f"{arguments.config}: {name} must be {type(default).__name__}, got {value!r}")
        if getattr(arguments, key) == default:
            setattr(arguments, key, value)
    return arguments


def _eval(arguments: argparse.Namespace) -> int:
    documents = [read_text(file) for file in expand(arguments.files)]
    model, tokenizer = _load(arguments)
    result = evaluate(model, tokenizer, documents, arguments.stride)
    if arguments.json:
        print(json.dumps(result._asdict()))
    else:
        print(f"{result.bits_per_byte:.4f} bits per byte, perplexity {result.perplexity:.2f}")
        print(f"{result.bytes:,} bytes in {result.tokens:,} tokens, {result.bytes / result.tokens:.2f} bytes a token")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from fastgpt.info import ops_table, report

    print(ops_table(pick_device(arguments.device)) if arguments.ops else report(arguments.name))
    return 0
