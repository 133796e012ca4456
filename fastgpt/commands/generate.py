"""`fastgpt generate`: continue a prompt, as streamed text or as one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fastgpt.commands import DONE
from fastgpt.commands.options import device_option, dtype_option, load_model, model_option, rounded_option
from fastgpt.config import OVERFLOWS, SAMPLERS
from fastgpt.text.documents import read_text

HELP = "Continue a prompt."
EXAMPLE = 'fastgpt generate "def main():" --temperature 0.7 --top-p 0.9 --seed 1'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="text; without it and without --prompt-file, standard input is read")
    parser.add_argument("--prompt-file", type=Path, help="read the prompt from a file")
    model_option(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="to add, at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely token")
    parser.add_argument("--top-k", type=int, help="keep the K most likely tokens; 0 keeps all")
    parser.add_argument("--top-p", type=float, help="keep the most likely tokens that sum to P")
    parser.add_argument(
        "--min-p", type=float, help="keep tokens at least this fraction as likely as the most likely one"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="divides the logits of tokens that came")
    parser.add_argument("--seed", type=int, help="same seed, same text; without one each run differs")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given more than once"
    )
    parser.add_argument("--overflow", choices=OVERFLOWS, default="crop", help="what to do past the context length")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, default="torch", help="draw as transformers does, or in Triton on a GPU"
    )
    parser.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="K",
        help="with --temperature 0: guess K tokens ahead from the text so far",
    )
    rounded_option(parser)
    parser.add_argument("--no-cache", action="store_true", help="recompute everything for each token")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, in ASCII, instead of streaming text"
    )
    dtype_option(parser)
    device_option(parser)


def run(arguments: argparse.Namespace) -> int:
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
    model, tokenizer = load_model(arguments)
    import torch

    from fastgpt import generate

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
        lookup=arguments.lookup,
        sampler=arguments.sampler,
        logprobs=arguments.json,
        stream=True,
    )
    out = sys.stdout
    if not arguments.json:
        out.write(text)
        out.flush()
    decoder, stops = tokenizer.stream(), StopText(arguments.stop)
    tokens: list[int] = []
    logprobs: list[float] = []
    pieces: list[str] = []
    reason = "length"
    for step in steps:
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
        print(json.dumps(record))
    else:
        out.write(pieces[-1] + "\n")
    return DONE


class StopText:
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
