"""How the next token is chosen, by the rules of RWKV, reproducibly for each text."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch
from aiirwkv.errors import BadRequest, ServiceError
from numpy.typing import NDArray
from torch import Tensor

from ..card import Sampling

if TYPE_CHECKING:
    from .grammar import Grammar

__all__ = ["Sampler", "choose_all", "logprob"]

Row = NDArray[np.float32]
Ids = NDArray[np.int64]

_SMALLEST = np.finfo(np.float32).smallest_subnormal


class Sampler:
    """
    Chooses the tokens of one text. It has its own random numbers, and remembers what it chose.

    `bias` is added to the logits of the tokens that it names, those in `ban` are never chosen; raises BadRequest when
    one of them is not among the `rows` of the model's logits. `grammar` goes along with what is chosen.
    """

    def __init__(
        self,
        sampling: Sampling,
        seed: int | None = None,
        countless: frozenset[int] = frozenset(),
        *,
        bias: Mapping[int, float] | None = None,
        ban: Collection[int] = (),
        grammar: Grammar | None = None,
        rows: int = 1 << 30,
    ) -> None:
        self.sampling, self.grammar = sampling, grammar
        self._random = Random(seed if seed is None else seed % 2**64)
        self._repetition = Repetition(sampling, countless)
        self._bound = np.float32(0.25)
        for field, ids in (("logit_bias", bias or {}), ("ban", ban)):
            if wrong := [id for id in ids if not 0 <= id < rows]:
                raise BadRequest(f"generate: `{field}` names the token {wrong[0]}; the model's go from 0 to {rows - 1}")
        if not all(map(math.isfinite, (bias or {}).values())):
            raise BadRequest("generate: `logit_bias` must be finite; to forbid a token, use `ban`")
        edits = {**(bias or {}), **dict.fromkeys(ban, -math.inf)}
        self._edited = np.array(list(edits), np.int64)
        self._edits = np.array(list(edits.values()), np.float32)

    @property
    def finished(self) -> bool:
        """Nothing but the end of the text may be chosen any more."""
        return self.grammar is not None and self.grammar.finished

    def choose(self, logits: Tensor) -> int:
        """
        The next token, from the logits [V] of the last one, which are left as they are.

        Raises ServiceError when the logits are not numbers, and BadRequest when every token is forbidden.
        """
        return self.choose_row(logits.float().cpu().numpy())

    def distribution(self, logits: Tensor) -> Tensor:
        """
        The probabilities [V] to draw from.

        In the order of the `rwkv` package: penalties, softmax, top_p (the first token to reach it stays), top_k, and
        the temperature last; min_p (relative to the likeliest token) is our addition before it. Equals stay together.
        """
        row = logits.float().cpu().numpy()
        ids, weights = self._weights(self._edit(row), row)
        probabilities = torch.zeros(len(row))
        probabilities[torch.from_numpy(ids)] = torch.from_numpy(weights / weights.sum())
        return probabilities

    def choose_row(self, row: Row) -> int:
        """As `choose`, from an array."""
        logits = self._edit(row)
        if self.sampling.temperature == 0:
            token = int(logits.argmax())  # the first of equals; NaN counts as the greatest
            if not math.isfinite(logits[token]):
                raise _impossible(row)
        else:
            ids, weights = self._weights(logits, row)
            sums = weights.cumsum(dtype=np.float64)
            token = int(ids[sums.searchsorted((1 - self._random.random()) * sums[-1])])
        self._repetition.add(token)
        if self.grammar:
            self.grammar.accept(token)
        return token

    def _edit(self, row: Row) -> Row:
        """The logits with everything in them that was asked for; the row itself if that is nothing."""
        if not (len(self._edited) or self._repetition or self.grammar):
            return row
        with np.errstate(invalid="ignore"):  # infinities are found later
            logits = row + self.grammar.mask() if self.grammar else row.copy()
            logits[self._edited] += self._edits
            self._repetition.punish(logits)
        return logits

    def _weights(self, logits: Row, row: Row) -> tuple[Ids, Row]:
        """The tokens to draw from, in ascending order, and their weights: the likeliest has 1."""
        sampling = self.sampling
        probabilities: Row = torch.softmax(torch.from_numpy(logits), -1).numpy()
        best = probabilities.max()
        if not best > 0:
            raise _impossible(row)
        least = max(best * np.float32(sampling.min_p), _SMALLEST)
        ids = self._nucleus(probabilities, best) if sampling.top_p < 1 else np.flatnonzero(probabilities >= least)
        if sampling.min_p > 0 or 0 < sampling.top_k < len(ids):
            kept = probabilities[ids]
            if 0 < sampling.top_k < len(ids):
                least = max(least, np.partition(kept, -sampling.top_k)[-sampling.top_k])
            ids = ids[np.flatnonzero(kept >= least)]
        # As p^(1/T), up to a factor; a smaller temperature would differ in nothing but not fit a float.
        return ids, np.exp((logits[ids] - logits.max()) / max(sampling.temperature, 1e-6))

    def _nucleus(self, probabilities: Row, best: np.float32) -> Ids:
        """The tokens down to the one that reaches top_p, when the likeliest come first, and its equals; ascending."""
        top_p = self.sampling.top_p
        # To sort all tokens would take long, so first a bound below which none can be missing, from that of last time.
        least, enough = best * self._bound, np.float32((1 - top_p) / (2 * len(probabilities)))
        while least > enough and not _above(least, probabilities) > top_p * 1.0001:
            least /= 2
        ids = np.flatnonzero(probabilities >= least)
        kept = probabilities[ids]
        ordered = np.sort(kept)[::-1]
        last = ordered[min(int(ordered.cumsum(dtype=np.float64).searchsorted(top_p)), len(ordered) - 1)]
        self._bound = max(last / best * np.float32(0.8), np.float32(1e-9))
        found: Ids = ids[np.flatnonzero(kept >= last)]
        return found


def _above(bound: np.float32, probabilities: Row) -> float:
    """The probability of all tokens together that are likelier than this."""
    return float(torch.threshold(torch.from_numpy(probabilities), float(bound), 0.0).sum())


class Repetition:
    """What repetition costs: presence + frequency × count. Counts shrink with each token; some tokens have none."""

    def __init__(self, sampling: Sampling, countless: frozenset[int]) -> None:
        self._sampling, self._countless = sampling, countless
        self._on = sampling.presence != 0 or sampling.frequency != 0
        self._places: dict[int, int] = {}
        self._tokens, self._counts = np.empty(64, np.int64), np.empty(64)

    def __bool__(self) -> bool:
        return bool(self._places)

    def add(self, token: int) -> None:
        """A token was written."""
        if not self._on:
            return
        size = len(self._places)
        self._counts[:size] *= self._sampling.decay
        place = self._places.setdefault(token, size)
        if place == size:
            if size == len(self._tokens):
                self._tokens, self._counts = np.tile(self._tokens, 2), np.tile(self._counts, 2)
            self._tokens[place], self._counts[place] = token, 0
        self._counts[place] += token not in self._countless

    def punish(self, logits: Row) -> None:
        """Take the costs from the logits, in place."""
        size = len(self._places)
        costs = self._sampling.presence + self._counts[:size] * self._sampling.frequency
        logits[self._tokens[:size]] -= costs.astype(np.float32)


def choose_all(samplers: Sequence[Sampler], logits: Tensor) -> list[int | ServiceError]:
    """
    The next token of each text, from the logits [B, V] of its last one; an error where there can be none.

    A text's token does not depend on the others.
    """
    chosen: list[int | ServiceError] = []
    for sampler, row in zip(samplers, logits.float().cpu().numpy(), strict=True):
        try:
            chosen.append(sampler.choose_row(row))
        except ServiceError as error:
            chosen.append(error)
    return chosen


def logprob(logits: Tensor, token: int) -> float:
    """The model's own opinion of a token, before penalties and temperature: the logarithm of its probability."""
    return float(logits[token] - logits.float().logsumexp(-1))


def _impossible(row: Row) -> ServiceError:
    if math.isfinite(row.max()):
        return BadRequest("generate: `ban`, `logit_bias` and the grammar leave no token that could be chosen")
    return ServiceError(
        "generate: the model's logits are not finite: its weights, its state or its adapter are damaged, "
        "or too large for its precision"
    )
