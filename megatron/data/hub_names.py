"""Names on the Hugging Face Hub: whether one can be fetched, asked without its library.

The library tries each file again and again for a minute where there is no network; here the answer
takes at most `WAIT_S`.
"""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from megatron.config.errors import ConfigError
from megatron.data.text_files import HUB, hub_parts

WAIT_S = 2.0
ENDPOINT = "https://huggingface.co"
_UNKNOWN = 404


def require_on_hub(kind: str, name: str, given: str, environ: Mapping[str, str]) -> None:
    """Refuse a name that the Hub does not know, or a Hub that cannot be reached.

    Args:
        kind: `models` or `datasets`.
        name: of the repository.
        given: what the user set, for messages.
        environ: HF_ENDPOINT, HF_HUB_OFFLINE and the variables of a proxy.

    Raises:
        ConfigError: it cannot be fetched.
    """
    what = "tokenizer" if kind == "models" else "data set"
    where = "" if kind == "datasets" else ", no such folder here"
    fetch = f"hf download {name}" + (" --repo-type dataset" if kind == "datasets" else "")
    fix = f"run `{fetch}` where there is a network, or give a path"
    if environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no"):
        problem = "HF_HUB_OFFLINE is set"
    else:
        endpoint = environ.get("HF_ENDPOINT") or ENDPOINT
        answer = _asked(f"{endpoint}/api/{kind}/{name}")
        if answer is None:
            return
        if answer == str(_UNKNOWN):
            raise ConfigError(f"{given}{where}, and {endpoint} knows no {what} {name}")
        problem = f"{endpoint} cannot be reached: {answer}"
    raise ConfigError(
        f"{given} cannot be loaded{where}: {name} is not in the Hugging Face cache, and {problem}. "
        f"{fix[0].upper()}{fix[1:]}"
    )


def _asked(url: str) -> str | None:
    """Why an address gives nothing; None where it answers. A name's look-up has no time limit."""
    answers: list[str | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=WAIT_S):
                answers.append(None)
        except urllib.error.HTTPError as error:
            private = error.code == 401  # whether a token opens it, the library finds out
            answers.append(None if private else str(error.code))
        except (OSError, ValueError) as error:
            answers.append(str(getattr(error, "reason", error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    return answers[0] if answers else f"no answer in {WAIT_S:g} s"


def require_data_set(given: str, environ: Mapping[str, str]) -> None:
    """Refuse `hub:NAME` that is neither in the cache nor can be fetched; passes over files.

    Raises:
        ConfigError: it cannot be fetched.
        DataError: it is not written as a name.
    """
    if given.startswith(HUB):
        name = hub_parts(given, "DATA")[0]
        if not data_set_is_cached(name, environ):
            require_on_hub("datasets", name, given, environ)


def data_set_is_cached(name: str, environ: Mapping[str, str]) -> bool:
    """Whether something of a data set is in the Hugging Face cache."""
    home = Path(environ.get("HOME") or "~").expanduser()
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    base = Path(environ.get("HF_HOME") or cache / "huggingface")
    hub = Path(environ.get("HF_HUB_CACHE") or base / "hub")
    prepared = Path(environ.get("HF_DATASETS_CACHE") or base / "datasets")
    return (hub / f"datasets--{name.replace('/', '--')}").is_dir() or (
        prepared / name.replace("/", "___")
    ).is_dir()
