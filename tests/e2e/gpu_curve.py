"""A process that trains a small model on one device and prints losses, norms and peak memory.

python -m tests.e2e.gpu_curve '{"DEVICE": "cuda", ...}' STEPS     # one line of JSON, the last one
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from megatron.engine import start_distributed
from megatron.parallel.groups import make_groups
from megatron.training.build import documents_followed
from megatron.training.device import detect, prepare
from pretrain_gpt_alcf import build_engine
from tools.benchmarks.workload import Workload

EOD = 3
SMALL = {
    "NLAYERS": "2", "HIDDEN": "128", "HEADS": "4", "NUM_KV_HEAD": "2", "FFN_HIDDEN_SIZE": "256",
    "SEQ": "128", "VOCAB_SIZE": "500", "MICRO_BATCH": "2", "GRAD_ACC_STEPS": "2", "LR": "1e-3",
    "CLIP_GRAD": "0.5", "COMPILE": "0", "NGPU_PER_HOST": "1",
}  # fmt: skip


def curve(variables: Mapping[str, str], steps: int) -> dict[str, Any]:
    """Trains as a run of these variables does, on the samples of a benchmark."""
    own = {**SMALL, **variables}
    work = Workload(own, own.get("DTYPE", "fp32"))
    run = work.run()
    device = detect(0, run.train.dtype, run.launch.device)
    prepare(device, run.train.dtype)
    start_distributed(device.backend, 0, 1, device.index, "", 60)
    documents = documents_followed(run, EOD)
    engine = build_engine(run, make_groups(run.layout), device, documents=documents)
    batches, losses, norms = work.batches(), [], []
    for _ in range(steps):
        engine.set_learning_rate(run.optimizer.learning_rate)
        batch = [(with_ends(tokens), labels) for tokens, labels in next(batches)]
        losses.append(float(engine.train_batch(batch)))
        norms.append(float(engine.gradient_norm()))
    assert next(engine.module.parameters()).device.type == device.kind
    peak = torch.cuda.max_memory_allocated() if device.kind == "cuda" else 0
    return {"losses": losses, "norms": norms, "peak": peak, "scale": engine.loss_scale}


def with_ends(tokens: torch.Tensor) -> torch.Tensor:
    """The same tokens with a document's end every 37."""
    tokens = tokens.clone()
    tokens[:, 36::37] = EOD
    return tokens


if __name__ == "__main__":
    print(json.dumps(curve(json.loads(sys.argv[1]), int(sys.argv[2]))))
