"""What these tests share: resolving a few settings, and writing a small token file."""

import json
import struct
from pathlib import Path

from megatron.config.errors import ConfigError, DataError
from megatron.config.resolve import Resolved, Site, resolve
from megatron.config.schema import RunConfig
from megatron.launch import starts

AURORA = Site("aurora", True, 2, 12, {"GRAD_ACC_STEPS": "16", "MICRO_BATCH": "1"})


def resolved(*argv: str, site: Site | None = None, **environ: object) -> Resolved:
    """Resolve variables given as keywords and flags given as words, as a dry run."""
    texts = {"DRY_RUN": "1"} | {name: str(value) for name, value in environ.items()}
    return resolve(texts, argv, site or Site())


def configured(*argv: str, site: Site | None = None, **environ: object) -> RunConfig:
    """The configuration alone."""
    return resolved(*argv, site=site, **environ).run


def started(*argv: str, site: Site | None = None, **environ: object) -> RunConfig:
    """A run whose start was accepted."""
    found = resolved(*argv, site=site, **environ)
    # A real run is no dry run, which the tests' helper makes of all.
    found.sources["log.dry_run"] = "default"
    with starts.pending(found, {}) as config:
        record = json.loads(config.read_text())
        record["config"]["log"]["dry_run"] = False
        config.write_text(json.dumps(record))
        starts.accept(config, found.run.run_folder)
    return found.run


def refusal(*argv: str, site: Site | None = None, **environ: object) -> str:
    """The message of the error that real (not dry) settings end in."""
    texts = {name: str(value) for name, value in environ.items()}
    try:
        resolve(texts, argv, site or Site())
    except (ConfigError, DataError) as error:
        return str(error)
    raise AssertionError(f"{texts} {argv} were accepted")


def write_pair(prefix: Path, lengths: list[int], code: int = 8, item_bytes: int = 2) -> None:
    """A `.bin/.idx` pair of zeros with one document a sequence."""
    offsets = [sum(lengths[:place]) * item_bytes for place in range(len(lengths))]
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(lengths) + 1)
    index += struct.pack(f"<{len(lengths)}i", *lengths)
    index += struct.pack(f"<{len(lengths)}q", *offsets)
    index += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(bytes(sum(lengths) * item_bytes))
