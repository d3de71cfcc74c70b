"""A policy small enough to enumerate: every completion, every expectation and every gradient exactly, in float64.

A policy is a table of logits [P, V], one row per prefix. A row index into `TabularSpace.tokens` names a completion.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DOUBLE = torch.float64

GroupLoss = Callable[[Tensor, Tensor], Tensor]
"""(policy_logprobs [K, T], rows [K]) -> [] the loss of one group, with the group as the whole minibatch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TabularSpace:
    """All S completions of at most T tokens from a vocabulary of V, and where each finds its log-probabilities."""

    tokens: Tensor
    """[S, T] int64; `end_token` after the first one."""
    loss_mask: Tensor
    """[S, T] bool, true up to and including the first end token."""
    prefixes: Tensor
    """[S, T] int64: the row of the table that token t is drawn from. Row 0 is the empty prefix; longer ones come later."""
    vocab_size: int

    @property
    def size(self) -> int:
        """S"""
        return len(self.tokens)

    @property
    def depths(self) -> Tensor:
        """[P] int64 number of tokens in each prefix."""
        return torch.cat([torch.full((self.vocab_size**t,), t) for t in range(self.tokens.shape[1])])

    def token_logprobs(self, logits: Tensor) -> Tensor:
        """[S, T] log-probability of each token under logits [P, V].

        Masked places hold those of further end tokens, from rows that no completion visits: a loss that counts them shows it by
        a gradient in these rows.
        """
        return logits.log_softmax(-1)[self.prefixes, self.tokens]

    def logps(self, logits: Tensor) -> Tensor:
        """[S] log-probability of each completion."""
        return torch.where(self.loss_mask, self.token_logprobs(logits), torch.zeros((), dtype=DOUBLE)).sum(-1)

    def random_logits(self, seed: int, scale: float = 1.0) -> Tensor:
        """[P, V] normal logits: a policy of full support."""
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(len(self.depths), self.vocab_size, generator=generator, dtype=DOUBLE)

    def logits_with(self, logps: Tensor) -> Tensor:
        """[P, V] logits of the policy with these completion log-probabilities [S] (normalised here)."""
        probs = logps.softmax(-1)[:, None].expand(self.loss_mask.shape)
        mass = torch.zeros(len(self.depths) * self.vocab_size, dtype=DOUBLE)
        mass.index_add_(0, (self.prefixes * self.vocab_size + self.tokens)[self.loss_mask], probs[self.loss_mask])
        # Prefixes that already ended are never visited: any row will do, but a row of -inf would be NaN.
        return torch.where(mass > 0, mass, torch.ones_like(mass)).log().reshape(-1, self.vocab_size)


def tabular_space(vocab_size: int = 8, length: int = 5, *, end_token: int | None = None) -> TabularSpace:
    """All vocab_size^length token sequences; with an end token, those that differ up to the first one."""
    tokens = torch.cartesian_prod(*[torch.arange(vocab_size)] * length).reshape(-1, length)
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    if end_token is not None:
        ended = ((tokens == end_token).cumsum(1) - (tokens == end_token).long()) > 0
        distinct = ((tokens == end_token) | ~ended).all(1)
        tokens, ended = tokens[distinct], ended[distinct]
    prefixes = torch.zeros_like(tokens)
    first_row, number = 0, torch.zeros_like(tokens[:, 0])
    for t in range(length):
        prefixes[:, t] = first_row + number
        first_row, number = first_row + vocab_size**t, number * vocab_size + tokens[:, t]
    return TabularSpace(tokens=tokens, loss_mask=~ended, prefixes=prefixes, vocab_size=vocab_size)


def kl(logps: Tensor, other: Tensor) -> Tensor:
    """[] exact KL(p || q) in nats from [S] log p and [S] log q."""
    return (logps.exp() * (logps - other)).sum()


def optimum(reference: Tensor, scores: Tensor, beta: float) -> Tensor:
    """[S] log pi*, where pi* ~ reference exp(score / beta) maximises E[score] - beta KL(pi || reference)."""
    return (reference + scores / beta).log_softmax(-1)


def plackett_luce(ranked: Tensor) -> Tensor:
    """[...] log-probability of the order best first: the product over places of exp(score) / sum over those not yet placed."""
    total = torch.zeros((), dtype=DOUBLE)
    for place in range(ranked.shape[-1]):
        total = total + ranked[..., place] - ranked[..., place:].exp().sum(-1).log()
    return total


def policy_gradient(space: TabularSpace, logits: Tensor, scores: Tensor, *, kl_coef: float, reference: Tensor) -> Tensor:
    """[P, V] exact gradient of E[score] - kl_coef KL(pi || reference [S]), by differentiating the sum over all completions."""

    def objective(table: Tensor) -> Tensor:
        logps = space.logps(table)
        return (logps.exp() * scores).sum() - kl_coef * kl(logps, reference)

    return gradient_of(objective, logits)


def all_groups(size: int, num: int) -> Tensor:
    """[size^num, num] every ordered group of `num` completions out of `size`, repetitions included."""
    return torch.cartesian_prod(*[torch.arange(size)] * num).reshape(-1, num)


def gradient_of(objective: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """[P, V] gradient of a scalar function of the table."""
    table = logits.detach().requires_grad_()
    return torch.autograd.grad(objective(table), table)[0]


def expected_step(space: TabularSpace, logits: Tensor, groups: Tensor, probs: Tensor, loss: GroupLoss) -> Tensor:
    """[P, V] minus the gradient of sum over the groups [G, K] of probs [G] times the loss of the group, each computed on its own."""

    def expected_loss(table: Tensor) -> Tensor:
        return (probs * torch.vmap(loss)(space.token_logprobs(table)[groups], groups)).sum()

    return -gradient_of(expected_loss, logits)


def minimise(space: TabularSpace, loss: Callable[[Tensor], Tensor], start: Tensor, *, max_steps: int) -> Tensor:
    """The table that L-BFGS reaches from `start`.

    A row at depth t moves a share V^-t of the completions; scaled by V^(t/2) all rows bend alike, and it converges 10 times faster.
    """
    scale = space.vocab_size ** (space.depths.to(DOUBLE)[:, None] / 2)
    scaled = (start / scale).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scaled], max_iter=max_steps, tolerance_grad=1e-12, tolerance_change=0, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(scaled * scale)
        value.backward()
        return value

    optimizer.step(closure)
    return (scaled * scale).detach()
