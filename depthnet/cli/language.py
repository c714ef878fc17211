"""depthnet train and depthnet generate: a language model of one's own."""

from __future__ import annotations

import argparse
import sys
import time

from depthnet.cli.terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    StopRequests,
    add_out,
    console,
    exponents_as_values,
    progress_bar,
)


def add_verbs(verbs) -> None:
    train = verbs.add_parser(
        "train",
        help="train a language model on text, with any depth",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.set_defaults(run=run_train)
    exponents_as_values(train)
    # The defaults themselves are those of training.language.LanguageSettings.
    add = train.add_argument
    add("source", nargs="?", default="text", metavar="SOURCE",
        help="text (the standard library), a text file, a folder of them, a file of tokens")  # fmt: skip
    add("--tokenizer", default="bpe:1024", metavar="NAME",
        help="bpe:N, bytes, or the path of a tokenizer.json; a file of tokens has its own")  # fmt: skip
    add("--width", type=int, default=128, metavar="N", help="a multiple of 64, the size of a head")
    add("--depth", type=int, default=8, metavar="L", help="layers of attention and MLP")
    add("--context", type=int, default=128, metavar="N", help="tokens that a model sees")
    add("--mlp", default="gelu", help="gelu, swiglu or abs")
    add("--norm", default="layer", help="layer or rms")
    add("--positions", default="rotary", help="rotary or learned")
    add("--parametrization", default="completep", metavar="NAME",
        help="a preset, or exponents as ALPHA,GAMMA")  # fmt: skip
    add("--steps", type=int, default=1000, metavar="N")
    add("--batch", type=int, default=16, metavar="N", help="sequences a step")
    add("--log2-lr", type=float, default=-8.0, metavar="X",
        help="of the learning rate at the base shape, width 128 and depth 8")  # fmt: skip
    add("--warmup", type=float, default=0.1, metavar="PART",
        help="of the steps, in which the learning rate rises; then it falls to a tenth")  # fmt: skip
    add("--weight-decay", type=float, default=0.1, metavar="X")
    add("--seed", type=int, default=0, metavar="N")
    add("--device", default="auto", help="a torch device; auto is an accelerator, if there is one")
    add("--autocast", action="store_true", help="compute in bfloat16")
    add("--compile", action="store_true", help="use torch.compile")
    add_out(train, "runs/language")

    generate = verbs.add_parser(
        "generate",
        help="have a model of depthnet train go on with a text",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    generate.set_defaults(run=run_generate)
    add = generate.add_argument
    add("folder", nargs="?", default="runs/language", metavar="DIR", help="of the trained model")
    add("--prompt", default="def ", metavar="TEXT", help="that the model goes on with")
    add("--tokens", type=int, default=200, metavar="N")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token")
    add("--top-k", type=int, default=40, metavar="K", help="draw from the K likeliest tokens only")
    add("--seed", type=int, default=0, metavar="N")
    add("--device", default="auto", help="a torch device; auto is an accelerator, if there is one")


def run_train(options: argparse.Namespace) -> int:
    from depthnet import data
    from depthnet.cli.terminal import settings
    from depthnet.sweep.study import versions
    from depthnet.training.language import Diverged, LanguageSettings, train
    from depthnet.training.memory import keep_freed_memory

    keep_freed_memory()
    options.device = _device(options.device)
    if options.tokenizer == "bytes" or options.source.endswith(".tokens"):
        options.tokenizer = None
    chosen = settings(LanguageSettings, options)
    terminal = console()
    terminal.print(f"reading {options.source}", style="dim", highlight=False, markup=False)
    tokens = data.tokens(chosen.source, chosen.tokenizer)
    terminal.print(
        f"{len(tokens)} tokens of {tokens.source['name']}, a vocabulary of {tokens.vocabulary} "
        f"({tokens.source['tokenizer']})",
        highlight=False,
        markup=False,
    )
    started, reported = time.monotonic(), -1
    with StopRequests() as stop, progress_bar(terminal) as bar:
        task = bar.add_task("", total=chosen.steps)

        def progress(at) -> None:
            nonlocal reported
            validation = (
                f", validation {at.validation_loss:.3f}" if at.validation_loss is not None else ""
            )
            words = f"loss {at.loss:.3f}{validation}, {at.tokens_per_second:.0f} tokens/s"
            bar.update(task, completed=at.step, description=words)
            if not terminal.is_terminal and 10 * at.step // chosen.steps > reported:
                reported = 10 * at.step // chosen.steps
                print(f"step {at.step}: {words}", flush=True)

        try:
            trainer = train(
                chosen, tokens, options.out, versions=versions(), progress=progress, stop=stop
            )
        except Diverged as error:
            bar.stop()
            print(f"diverged: {error}", file=sys.stderr)
            return EXIT_FAILED
    if not trainer.done:
        print(f"stopped; the same command goes on from {options.out}", file=sys.stderr)
        return EXIT_INTERRUPTED
    terminal.print(
        f"validation loss {trainer.validation_loss:.4f} after {trainer.step} steps; this call took "
        f"{time.monotonic() - started:.0f} s. Try: depthnet generate {options.out}",
        highlight=False,
        markup=False,
    )
    return 0


def run_generate(options: argparse.Namespace) -> int:
    from depthnet.training.language import continuation, load

    model, codec = load(options.folder, _device(options.device))
    pieces = continuation(
        model,
        codec,
        options.prompt,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    print(options.prompt + next(pieces), end="", flush=True)  # after what can be wrong
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return str(accelerator or "cpu")
