"""WORD_EMBEDDING_INIT_STD scales the token embedding and nothing else."""

from __future__ import annotations

import pytest
import torch

from megatron.model.stack import Stack
from megatron.training.build import model_layers
from tests.config.helpers import configured

TINY = {"NLAYERS": 1, "HIDDEN": 64, "FFN_HIDDEN_SIZE": 96, "VOCAB_SIZE": 256,
        "TOKENIZER_TYPE": "NullTokenizer"}  # fmt: skip


@pytest.mark.parametrize("tied", [0, 1])
def test_the_embedding_alone(tied: int) -> None:
    plain, chosen = (
        dict(
            Stack(
                model_layers(configured(**TINY, TIE_EMBEDDINGS=tied, **more)), 0
            ).named_parameters()
        )
        for more in ({}, {"WORD_EMBEDDING_INIT_STD": 0.632})
    )
    embedding = "tied_modules.embedding.weight" if tied else "0.weight"
    factor = 0.632 / (2 / (5 * 64)) ** 0.5
    for name, weight in plain.items():
        expected = weight * factor if name == embedding else weight
        torch.testing.assert_close(chosen[name], expected, rtol=1e-6, atol=0)
    assert float(chosen[embedding].detach().std()) == pytest.approx(0.632, rel=0.02)
