"""How the next token is chosen, by the rules of RWKV, reproducibly for each request."""

from __future__ import annotations

import torch
from torch import Tensor

from .card import Sampling

__all__ = ["Sampler"]


class Sampler:
    """Chooses the tokens of one request. It has its own random numbers, and remembers what it chose."""

    def __init__(self, sampling: Sampling, seed: int | None = None, countless: frozenset[int] = frozenset()) -> None:
        self.sampling = sampling
        self._countless = countless
        self._counts: dict[int, float] = {}
        self._random = torch.Generator()
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed)

    def choose(self, logits: Tensor) -> int:
        """The next token, from the logits [V] of the last one."""
        logits = self._penalised(logits.float())
        if self.sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(self.distribution(logits), 1, generator=self._random))
        self._remember(token)
        return token

    def distribution(self, logits: Tensor) -> Tensor:
        """
        The probabilities to draw from.

        In the order of the `rwkv` package: softmax, top_p (the first token to reach it stays), top_k, and the
        temperature last; min_p (relative to the likeliest token) is our addition before it. Equals stay together.
        """
        sampling = self.sampling
        probabilities = torch.softmax(logits, -1)
        ordered = probabilities.sort(descending=True).values
        reached = int((ordered.cumsum(-1) < sampling.top_p).sum()) if sampling.top_p < 1 else len(ordered)
        least = ordered[min(reached, len(ordered) - 1)]
        if 0 < sampling.top_k < len(ordered):
            least = torch.maximum(least, ordered[sampling.top_k - 1])
        least = torch.maximum(least, ordered[0] * sampling.min_p)
        probabilities = torch.where(probabilities < least, 0.0, probabilities)
        probabilities = (probabilities / probabilities.max()) ** (1.0 / sampling.temperature)
        return probabilities / probabilities.sum()

    def _penalised(self, logits: Tensor) -> Tensor:
        if not self._counts or (self.sampling.presence == 0 and self.sampling.frequency == 0):
            return logits
        tokens = torch.tensor(list(self._counts), device=logits.device)
        counts = torch.tensor(list(self._counts.values()), device=logits.device)
        return logits.index_add(0, tokens, -(self.sampling.presence + counts * self.sampling.frequency))

    def _remember(self, token: int) -> None:
        for known in self._counts:
            self._counts[known] *= self.sampling.decay
        self._counts[token] = self._counts.get(token, 0.0) + (token not in self._countless)
