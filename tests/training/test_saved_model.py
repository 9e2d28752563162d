"""A whole model in one process: its texts and scores are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.config.errors import ConfigError, MissingCheckpoint
from megatron.training import saved_model
from megatron.training.generate import Sampling, continued
from megatron.training.saved_model import DTYPES, WholeModel, find
from tests.checkpoint.hugging_face_models import KINDS, hugging_face_model

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)
PROMPT = [5, 77, 130, 9, 5]
SCALED = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }
}  # fmt: skip


def text(folder: Path, dtype: str, cached: bool, count: int, prompt: list[int]) -> list[int]:
    model = WholeModel(find(str(folder)), CPU, DTYPES[dtype], cached=cached)
    assert bool(model.caches) == cached
    return list(continued(model, prompt, count, GREEDY))


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", [*KINDS, "scaled"])
def test_greedy_texts_are_those_of_transformers(kind: str, dtype: str, tmp_path: Path) -> None:
    """Up to the model's length, with the cache and without; in bf16 but for logits that are tied.

    Rounding decides between logits of random weights that bf16 cannot tell apart.
    """
    settings: dict[str, Any] = {"initializer_range": 0.2, **(SCALED if kind == "scaled" else {})}
    name = "qwen3" if kind == "scaled" else kind
    hugging_face_model(name, tmp_path, DTYPES[dtype], **settings)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=DTYPES[dtype])
    prompt = torch.tensor([PROMPT])
    want = theirs.generate(prompt, max_new_tokens=59, do_sample=False, use_cache=False)
    want = want[0, len(PROMPT) :].tolist()
    assert len(set(want)) > 3, "a text that tells nothing"
    for cached in (True, False):
        found = text(tmp_path, dtype, cached, 59, PROMPT)
        same = [ours == their for ours, their in zip(found, want, strict=True)]
        if dtype == "fp32":
            assert all(same)
        elif not all(same):
            first = same.index(False)
            with torch.no_grad():
                logits = theirs(torch.tensor([[*PROMPT, *want[:first]]])).logits[0, -1].float()
            assert logits.max() - logits[found[first]] <= 2**-6 * logits.max().abs()


def test_a_text_beyond_the_length_goes_on_from_its_last_half(tmp_path: Path) -> None:
    hugging_face_model("llama", tmp_path, initializer_range=0.2)
    model = WholeModel(find(str(tmp_path)), CPU, torch.float32, cached=True)
    told: list[int] = []
    found = list(continued(model, PROMPT, 150, GREEDY, slides=told.append))
    assert len(found) == 150 and told == [32]
    whole = [*PROMPT, *found]
    assert text(tmp_path, "fp32", False, 150, PROMPT) == found
    begun = text(tmp_path, "fp32", False, 1, whole[33:65])  # the first pass after the cut
    assert [whole[65]] == begun


def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    hugging_face_model("qwen3", tmp_path, initializer_range=0.2)
    samples = torch.randint(0, 200, (3, 33), generator=torch.Generator().manual_seed(2))
    losses, correct, counts = WholeModel(find(str(tmp_path)), CPU, torch.float32).score(samples)
    logits = AutoModelForCausalLM.from_pretrained(tmp_path)(samples[:, :-1]).logits.detach()
    labels = samples[:, 1:]
    want = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    torch.testing.assert_close(losses, want, atol=1e-5, rtol=0)
    assert torch.equal(correct, logits.argmax(-1) == labels) and counts.all()


def test_draws_follow_their_chances() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def shares(sampling: Sampling) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.tensor([sampling.draw(logits, generator) for _ in range(1500)])
        return [float((drawn == number).float().mean()) for number in range(4)]

    assert shares(Sampling(1.0, 0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.05)
    assert shares(Sampling(1.0, 2)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.05)
    assert shares(Sampling(1.0, 0, 0.6)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.05)
    assert shares(Sampling(1.0, 0, 0.1)) == [1, 0, 0, 0]
    assert shares(Sampling(0.5, 0))[0] == pytest.approx(0.25 / 0.365, abs=0.05)
    assert shares(Sampling(0.0)) == [1, 0, 0, 0]


def test_what_holds_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(MissingCheckpoint, match=r"holds no checkpoint, but x\.txt"):
        find(str(tmp_path))
    with pytest.raises(MissingCheckpoint, match="does not exist"):
        find(str(tmp_path / "gone"))
    hugging_face_model("llama", tmp_path, hidden_act="gelu")
    with pytest.raises(ConfigError, match="hidden_act=gelu"):
        find(str(tmp_path))
    with pytest.raises(ConfigError, match="has no tokenizer"):
        saved_model._tokenizer_in(tmp_path)
