"""What every greedy answer is compared with: plain transformers generation in float32, and the one tie rule.

A difference counts unless, at the first differing token, plain transformers' own gap between its two best logits is
below 1e-5 of the logits' standard deviation. Ties are counted; a test prints and bounds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoModelForCausalLM

TIE_GAP = 1e-5


class PlainModel:
    """A checkpoint as transformers runs it: one prompt at a time, its own cache, its own attention."""

    def __init__(self, directory: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        self._model = model.eval()
        #: differences that the tie rule excused
        self.num_ties = 0

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Exactly `num_tokens` greedy tokens after the prompt; end-of-sequence tokens are tokens like others."""
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = cast("Any", self._model).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                eos_token_id=[],
                pad_token_id=0,
            )
        return output[0, len(prompt) :].tolist()

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """float32 [len(tokens), vocab]: the logits after each token."""
        with torch.inference_mode():
            return self._model(torch.tensor([tokens]), use_cache=False).logits[0].float()

    def compare(self, prompt: list[int], ours: list[int]) -> Literal["equal", "tie"]:
        """Compare our greedy tokens with `generate`. Raises AssertionError on a difference that is no tie."""
        expected = self.generate(prompt, len(ours))
        if ours == expected:
            return "equal"
        first = next(i for i, (a, b) in enumerate(zip(ours, expected, strict=True)) if a != b)
        logits = self.logits(prompt + expected[:first])[-1]
        best, second = logits.topk(2).values.tolist()
        gap = (best - second) / logits.std().item()
        assert gap < TIE_GAP, (
            f"token {first} of {len(ours)} after a prompt of {len(prompt)}: ours {ours[first]}, "
            f"plain {expected[first]}; gap of the best two is {gap:.2g} standard deviations"
        )
        self.num_ties += 1
        return "tie"
