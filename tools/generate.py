#!/usr/bin/env python3
"""Continues a prompt with any checkpoint, or a Hugging Face folder, in one process.

    python3 tools/generate.py RUN --prompt "def main(" [--max-new-tokens 200] [--temperature 0]
    python3 tools/generate.py RUN < prompts.txt          # a prompt a line; a terminal is asked

RUN is a run's folder or name, a checkpoint (checkpoints/step-N), or a Hugging Face folder. Any
layout may have written the checkpoint. Exit status: 0, 2 for a wrong setting, 4 for no checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.analysis.named_model import add_model, loaded, named, say
from megatron.config.errors import ConfigError, DataError, MissingCheckpoint

if TYPE_CHECKING:
    from megatron.data.prepare.tokenizer import Tokenizer
    from megatron.training.saved_model import SavedModel, WholeModel

SIGN = ">>> "


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model(parser)
    add = parser.add_argument
    add("--prompt", help="text to continue; without it, a prompt per line of the input")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    add("--temperature", type=float, default=0.8, metavar="T",
        help="below 1 likelier tokens, 0 always the likeliest; default 0.8")  # fmt: skip
    add("--top-k", type=int, default=40, metavar="K",
        help="draw among the K likeliest tokens; 0: all; default 40")  # fmt: skip
    add("--top-p", type=float, default=1.0, metavar="P",
        help="draw among the fewest likeliest with this chance together; default 1")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="of the draws; default 0")
    add("--no-cache", action="store_true", help="compute the whole text again for each token")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except (ConfigError, DataError, MissingCheckpoint) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Loads the model and continues each prompt."""
    check(options)
    from megatron.training.generate import Sampling, continued

    saved = named(options)
    model, tokenizer = loaded(saved, options, cached=not options.no_cache)
    if not model.caches and not options.no_cache:
        say("without a cache of keys and values: this model computes all of a text each time")
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    slides = _once(lambda kept: say(
        f"the text is longer than SEQ={model.shape.seq_length}: it goes on from its last "
        f"{kept} tokens"
    ))  # fmt: skip
    asked = sys.stdin.isatty() and options.prompt is None
    prompts: Iterable[str] = [options.prompt] if options.prompt is not None else _lines(asked)
    for prompt in prompts:
        try:
            ids = first_ids(prompt, saved, model, tokenizer)
        except (ConfigError, DataError) as error:
            if not asked:
                raise
            say(f"error: {error}")
            continue
        added = continued(
            model, ids, options.max_new_tokens, sampling, stop_at=tokenizer.eod, slides=slides
        )
        try:
            write(prompt, ids, added, tokenizer.decode)
        except KeyboardInterrupt:
            if not asked:
                raise
            print()
    return 0


def write(
    prompt: str, ids: Sequence[int], added: Iterable[int], decode: Callable[[Sequence[int]], str]
) -> None:
    """Prints a prompt and what follows it as it comes, and says how fast that was."""
    began, tokens = time.perf_counter(), 0
    print(prompt, end="", flush=True)
    text = Text(decode, ids)
    for token in added:
        tokens += 1
        print(text.grown(token), end="", flush=True)
    print(text.rest(), flush=True)
    seconds = time.perf_counter() - began
    say(f"[{tokens} tokens, {seconds:.1f} s, {tokens / seconds:.1f} tokens/s]")


def check(options: argparse.Namespace) -> None:
    """Refuses numbers that make no sense; raises ConfigError."""
    wrong = (
        ("--max-new-tokens", options.max_new_tokens, options.max_new_tokens >= 1, "1 or more"),
        ("--temperature", options.temperature, options.temperature >= 0, "0 or more"),
        ("--top-k", options.top_k, options.top_k >= 0, "0 (all tokens) or more"),
        ("--top-p", options.top_p, 0 < options.top_p <= 1, "above 0, and 1 at most"),
    )
    for name, value, fits, rule in wrong:
        if not fits:
            raise ConfigError(f"{name} {value:g}: must be {rule}")


def first_ids(prompt: str, saved: SavedModel, model: WholeModel, tokenizer: Tokenizer) -> list[int]:
    """What the model reads of a prompt; of an empty one, the end of the document before.

    Raises:
        ConfigError: it is longer than the model's sequences, or of other words than the model has.
    """
    from megatron.training.saved_model import text_begins

    ids = [*text_begins(saved, tokenizer), *tokenizer.encode(prompt)] or [tokenizer.eod]
    length, vocabulary = model.shape.seq_length, model.shape.vocab_size
    if len(ids) > length:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, and the model was made for SEQ={length}: shorten it"
        )
    if max(ids) >= vocabulary:
        raise ConfigError(
            f"the prompt has a token {max(ids)}, and the model's vocabulary ends at "
            f"{vocabulary - 1}: its tokenizer is another one"
        )
    return ids


class Text:
    """A text as its tokens come: some are but a part of a character.

    Args:
        decode: ids -> text.
        ids: those before.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> None:
        self._decode, self._ids = decode, list(ids[-8:])
        self._shown = decode(self._ids)

    def grown(self, token: int) -> str:
        """What a further token adds, empty while a character is not complete."""
        self._ids.append(token)
        now = self._decode(self._ids)
        if now.endswith("\ufffd"):
            return ""
        added = now[len(self._shown) :]
        self._ids = self._ids[-8:]  # a decoder looks at its neighbours only
        self._shown = self._decode(self._ids)
        return added

    def rest(self) -> str:
        """What an end within a character leaves."""
        return self._decode(self._ids)[len(self._shown) :]


def _lines(asked: bool) -> Iterator[str]:
    """Prompts of the standard input; on a terminal with a sign, until its end."""
    if asked:
        say("a prompt per line; Ctrl-D ends")
        import readline  # noqa: F401  # arrows and history in `input`
    while True:
        try:
            yield input(SIGN if asked else "")
        except EOFError:
            return


def _once(tell: Callable[[int], None]) -> Callable[[int], None]:
    told: list[int] = []

    def first(value: int) -> None:
        if not told:
            tell(value)
        told.append(value)

    return first


if __name__ == "__main__":
    sys.exit(main())
