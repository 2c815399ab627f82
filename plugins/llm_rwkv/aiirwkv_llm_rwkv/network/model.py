"""What the versions of RWKV share: sizes, states and their flat form, and the frame of the torch module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

__all__ = ["RWKV", "Block", "LayerState", "Layout", "Sizes", "State", "architecture", "version"]


class LayerState(NamedTuple):
    """What one layer remembers of a batch of B texts."""

    att: Tensor
    """[B, D]: the last token's input of the time mix."""
    wkv: Tensor
    """[B, H, N, N], float32, as in the `rwkv` package: value × key for RWKV-7, key × value for RWKV-6."""
    ffn: Tensor
    """[B, D]: the last token's input of the channel mix."""


State = tuple[LayerState, ...]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, all of them visible in the shapes of its tensors."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    hidden: int

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"its sizes are impossible: {self}")

    @property
    def head(self) -> int:
        return self.width // self.heads

    @classmethod
    def read(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """From names and shapes of a checkpoint. Raises ValueError when they are not those of this version."""
        raise NotImplementedError


@contextmanager
def reading() -> Iterator[None]:
    """Says which tensor is missing or has a wrong shape, while sizes are read."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"the tensor {error.args[0]} is missing") from None
    except (TypeError, IndexError):
        raise ValueError("a tensor has a wrong number of dimensions") from None


def count_layers(names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


class Layout:
    """
    How a state lies in one flat float32 vector per text: the form in which states are kept, copied and stored.

    First the `att` of all layers, then their `ffn`, then their `wkv`, here always key × value: `parts` are views.
    """

    def __init__(self, layers: int, width: int, heads: int, *, transposed: bool) -> None:
        """`transposed`: the wkv of a State is value × key."""
        self.layers, self.width, self.heads, self.head = layers, width, heads, width // heads
        self.transposed = transposed
        self.shifts = 2 * layers * width
        self.size = self.shifts + layers * width * self.head
        """Floats of one text's state."""

    def parts(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of [B, size]: att [B, L, D], ffn [B, L, D], wkv [B, L, H, N (key), N (value)]."""
        att, ffn, wkv = flat.tensor_split((self.shifts // 2, self.shifts), -1)
        shape, N = (len(flat), self.layers, self.width), self.head
        return att.view(shape), ffn.view(shape), wkv.view(len(flat), self.layers, self.heads, N, N)

    def flat(self, state: State) -> Tensor:
        """[B, size], a copy, on the state's device."""
        flat = torch.empty(len(state[0].att), self.size, device=state[0].wkv.device)
        att, ffn, wkv = self.parts(flat)
        for i, layer in enumerate(state):
            att[:, i], ffn[:, i], wkv[:, i] = layer.att, layer.ffn, self._turn(layer.wkv)
        return flat

    def state(self, flat: Tensor) -> State:
        """The state in [B, size]: views of it, to be read only."""
        att, ffn, wkv = self.parts(flat)
        return tuple(LayerState(att[:, i], self._turn(wkv[:, i]), ffn[:, i]) for i in range(self.layers))

    def _turn(self, wkv: Tensor) -> Tensor:
        return wkv.mT if self.transposed else wkv


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class Linear(nn.Linear):
    """Without a bias; zero at first, since random numbers that a checkpoint replaces cost seconds at loading."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class Embedding(nn.Embedding):
    """Zero at first, too."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def shift(x: Tensor, last: Tensor) -> Tensor:
    """Each token's predecessor; `last` [B, D] precedes the first. x [B, T, D]."""
    return torch.cat([last.unsqueeze(1).to(x.dtype), x[:, :-1]], 1)


class TimeMix(nn.Module):
    """What a token learns from the tokens before it, through the state."""

    time_state: nn.Parameter | None
    """[H, N, N], value × key for every version: the wkv state before the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("time_state", None)

    def forward(
        self, x: Tensor, last: Tensor, wkv: Tensor, first_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [B, T, D] → output [B, T, D], the new wkv state, and what layer 0 hands to the layers above."""
        raise NotImplementedError


class Block(nn.Module):
    """One layer."""

    def __init__(self, width: int, layer: int, att: TimeMix, ffn: nn.Module) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(width)
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.att = att
        self.ffn = ffn

    def forward(
        self, x: Tensor, state: LayerState, first_value: Tensor | None
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        att = self.ln1(x)
        y, wkv, first_value = self.att(att, state.att, state.wkv, first_value)
        x = x + y
        ffn = self.ln2(x)
        x = x + self.ffn(ffn, state.ffn)
        return x, LayerState(att[:, -1], wkv, ffn[:, -1]), first_value


class RWKV(nn.Module):
    """A model of any version, in the official names. A new one holds zeros: load or initialise it."""

    version: ClassVar[str]
    transposed: ClassVar[bool]
    """The official wkv state is value × key, not key × value."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.layout = Layout(sizes.layers, sizes.width, sizes.heads, transposed=self.transposed)
        self.emb = Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(map(self.block, range(sizes.layers)))
        self.ln_out = nn.LayerNorm(sizes.width)
        self.head = Linear(sizes.width, sizes.vocabulary)

    def block(self, layer: int) -> Block:
        """Make the layer of this number."""
        raise NotImplementedError

    @property
    def layers(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def add_time_state(self) -> list[nn.Parameter]:
        """Give every layer an initial wkv state of its own [H, N, N], zero at first: what state tuning learns."""
        sizes, states = self.sizes, []
        for block in self.layers:
            state = torch.zeros(sizes.heads, sizes.head, sizes.head, device=self.emb.weight.device)
            block.att.time_state = nn.Parameter(state)
            states.append(block.att.time_state)
        return states

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first token: zero, or the `time_state` of the checkpoint."""
        return self.state_of([block.att.time_state for block in self.layers], batch)

    def state_of(self, time_states: Sequence[Tensor | None], batch: int = 1) -> State:
        """The state that begins with a `time_state` [H, N, N] (value × key) in each layer; None is zero."""
        sizes, weight = self.sizes, self.emb.weight
        zero = torch.zeros(batch, sizes.width, dtype=weight.dtype, device=weight.device)
        shape = (batch, sizes.heads, sizes.head, sizes.head)
        nothing = torch.zeros(shape, dtype=torch.float32, device=weight.device)

        def wkv(time_state: Tensor | None) -> Tensor:
            if time_state is None:
                return nothing
            time_state = time_state.to(weight.device, torch.float32)
            return (time_state if self.transposed else time_state.mT).expand(shape)

        return tuple(LayerState(zero, wkv(time_state), zero) for time_state in time_states)

    def hidden(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens [B, T], T ≥ 1 → the normalised output of the last layer [B, T, D], and the new state."""
        state = state or self.initial_state(tokens.shape[0])
        x: Tensor = self.layers[0].ln0(self.emb(tokens))
        first_value: Tensor | None = None
        after = []
        for block, before in zip(self.layers, state, strict=True):
            x, layer, first_value = block(x, before, first_value)
            after.append(layer)
        return self.ln_out(x), tuple(after)

    def forward(self, tokens: Tensor, state: State | None = None, *, last: bool = False) -> tuple[Tensor, State]:
        """tokens [B, T] → logits [B, T, V] (with `last`, of the last token only: [B, 1, V]), and the new state."""
        x, state = self.hidden(tokens, state)
        return self.head(x[:, -1:] if last else x), state


def version(shapes: Mapping[str, Sequence[int]]) -> str:
    """rwkv4 … rwkv7, by the names of the tensors. Raises ValueError when they are no RWKV's."""
    if "blocks.0.att.r_k" in shapes:
        return "rwkv7"
    if any(".time_maa_" in name for name in shapes):
        return "rwkv6"
    if "blocks.0.att.time_decay" in shapes:
        return "rwkv5" if "blocks.0.att.ln_x.weight" in shapes else "rwkv4"
    raise ValueError("it holds no RWKV: neither blocks.0.att.r_k nor blocks.0.att.time_decay is in it")


def architecture(shapes: Mapping[str, Sequence[int]]) -> tuple[type[RWKV], Sizes]:
    """The class of module for a checkpoint, and its sizes. Raises ValueError when there is none."""
    from .rwkv6 import RWKV6, Sizes6
    from .rwkv7 import RWKV7, Sizes7

    found = version(shapes)
    if found == "rwkv6":
        return RWKV6, Sizes6.read(shapes)
    if found == "rwkv7":
        return RWKV7, Sizes7.read(shapes)
    raise ValueError(f"it holds an {found}, which this worker serves only through the `rwkv` package")
