"""How biased the RLOO gradient is on stale data, exactly, for each form of the correction.

    python benchmarks/bias.py [--quick] [--json FILE]

Five tabular policies over all 8^5 completions of five tokens; the behavior policy is the same table with noise on its logits. Bias =
|E[gradient] - exact policy gradient| / |exact|, K = 2, at the first step of a batch (policy = proximal), kl_coef 0, clip 0.2, cap 2.
Nothing is sampled: the expectation is over every pair of completions. Prints the mean over the five policies; 1 is the bias of not
learning at all. The first lines say how stale the data is.
"""

from typing import Literal, get_args

import torch
from harness import command_line, finish, show
from torch import Tensor

from async_rlhf.losses import rloo_loss
from async_rlhf.losses.correction import Correction

VOCAB_SIZE, LENGTH = 8, 5
NUM_POLICIES = 5
NOISES = (0.1, 0.3, 0.6)
"""Standard deviation of the noise on the behavior policy's logits, in nats."""
CLIP_RANGE, CORRECTION_CAP = 0.2, 2.0
Ratio = Literal["sequence", "token"]
LABELS = {
    "kl_nats": "KL(behavior || policy), nats",
    "effective_share": "effective share of untruncated weights",
    "sequence/none": "none (sequence and token alike)",
}


def token_logprobs(table: Tensor, tokens: Tensor) -> Tensor:
    """[S, T] log-probability of each token of the completions [S, T] under logits [prefixes, V]; prefixes by length, then in order."""
    logprobs, columns = table.log_softmax(-1), []
    prefix, first_row = torch.zeros_like(tokens[:, 0]), 0
    for t in range(tokens.shape[1]):
        columns.append(logprobs[first_row + prefix, tokens[:, t]])
        first_row += table.shape[1] ** t
        prefix = prefix * table.shape[1] + tokens[:, t]
    return torch.stack(columns, 1)


def sibling_gaps(scores: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """[S] E[max(s_i - s_j, 0)] and [S] E[max(s_j - s_i, 0)] over a sibling j drawn with `probs`."""
    order = scores.argsort()
    share, sum_below = probs[order].cumsum(0), (probs * scores)[order].cumsum(0)
    ranked = scores[order]
    above, below = torch.empty_like(scores), torch.empty_like(scores)
    above[order] = ranked * share - sum_below
    below[order] = (sum_below[-1] - sum_below) - ranked * (1 - share)
    return above, below


def expected_gradient(table: Tensor, tokens: Tensor, behavior_logprobs: Tensor, scores: Tensor, ratio: Ratio, form: Correction) -> Tensor:
    """Minus the gradient of E[rloo_loss] over independent pairs of completions from the behavior policy.

    The loss is a sum over completions, positively homogeneous in each advantage and, for one sign of it, linear. So the pair's
    expectation needs each completion twice: with its mean advantage over the worse siblings, and over the better ones.
    """
    probs = behavior_logprobs.sum(-1).exp()
    above, below = sibling_gaps(scores, probs)
    table = table.detach().requires_grad_()
    policy = token_logprobs(table, tokens).repeat(2, 1)
    output = rloo_loss(
        policy,
        policy.detach(),
        behavior_logprobs.repeat(2, 1),
        torch.ones_like(policy, dtype=torch.bool),
        torch.cat([probs * above, -probs * below]),
        clip_range=CLIP_RANGE,
        ratio=ratio,
        correction=form,
        correction_cap=CORRECTION_CAP,
        denominator=1.0,
    )
    return -torch.autograd.grad(output.loss, table)[0]


def measure(seed: int, noise: float) -> dict[str, float]:
    """Biases by `ratio/correction`, and how stale the data is."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = torch.cartesian_prod(*[torch.arange(VOCAB_SIZE)] * LENGTH)
    num_prefixes = sum(VOCAB_SIZE**t for t in range(LENGTH))
    table, drift = normal(num_prefixes, VOCAB_SIZE), normal(num_prefixes, VOCAB_SIZE)
    worth = normal(LENGTH, VOCAB_SIZE)
    scores = worth[torch.arange(LENGTH), tokens].sum(1) + normal(len(tokens))
    behavior = token_logprobs(table + noise * drift, tokens)

    leaf = table.clone().requires_grad_()
    logps = token_logprobs(leaf, tokens).sum(-1)
    exact = torch.autograd.grad((logps.exp() * scores).sum(), leaf)[0]
    log_stale = logps.detach() - behavior.sum(-1)
    probs = behavior.sum(-1).exp()
    found = {"kl_nats": -(probs * log_stale).sum().item(), "effective_share": 1 / (probs * (2 * log_stale).exp()).sum().item()}
    for ratio in get_args(Ratio):
        for form in get_args(Correction):
            bias = expected_gradient(table, tokens, behavior, scores, ratio, form) - exact
            found[f"{ratio}/{form}"] = (bias.norm() / exact.norm()).item()
    return found


def main() -> None:
    """Measure, print one table, and write it where asked."""
    arguments = command_line(__doc__, quick=f"one policy instead of {NUM_POLICIES}").parse_args()
    num_policies = 1 if arguments.quick else NUM_POLICIES
    columns: dict[float, dict[str, float]] = {}
    for noise in NOISES:
        runs = [measure(seed, noise) for seed in range(num_policies)]
        columns[noise] = {name: sum(run[name] for run in runs) / num_policies for name in runs[0]}
    names = [name for name in columns[NOISES[0]] if name != "token/none"]
    rows = [[LABELS.get(name, name), *(f"{column[name]:.3f}" for column in columns.values())] for name in names]
    show("Bias of the RLOO gradient", ("noise on the logits of the behavior policy", *map(str, NOISES)), rows)
    finish(arguments, {f"{name}/noise_{noise}": value for noise, column in columns.items() for name, value in column.items()})


if __name__ == "__main__":
    main()
