"""Losses on preference pairs that need no reference model, as functions of log-probabilities.

Each takes the summed log-probabilities of the chosen and of the rejected answers and their numbers of tokens, all `(B,)`, and
gives the loss of each pair, `(B,)`, and figures of it for the log.
"""

import torch
import torch.nn.functional as F

Figures = dict[str, torch.Tensor]
LOWEST_ODDS = -1e-6
"""An answer's mean log-probability counts as no higher than this, where its odds would be infinite."""


def orpo(
    chosen: torch.Tensor, rejected: torch.Tensor, num_chosen: torch.Tensor, num_rejected: torch.Tensor, *, beta: float
) -> tuple[torch.Tensor, Figures]:
    """Odds ratio preference optimization: the chosen answer's loss, and the log odds ratio of the two answers.

    -log p(c) / |c|  -  beta * log sigmoid(log odds(c) - log odds(r)),  odds = p / (1 - p) of the geometric mean p of an answer's
    tokens. Hong, Lee and Thorne, 2024 (arXiv 2403.07691), eq. 6 and 7; beta is their lambda.
    """
    mean_chosen, mean_rejected = chosen / num_chosen, rejected / num_rejected
    log_odds = _log_odds(mean_chosen) - _log_odds(mean_rejected)
    ratio = F.logsigmoid(log_odds)
    figures = {
        "rewards/chosen": beta * mean_chosen,
        "rewards/rejected": beta * mean_rejected,
        "nll_loss": -mean_chosen,
        "log_odds_ratio": ratio,
        "log_odds_chosen": log_odds,
    }
    return -mean_chosen - beta * ratio, figures


def _log_odds(log_prob: torch.Tensor) -> torch.Tensor:
    log_prob = log_prob.clamp(max=LOWEST_ODDS)
    return log_prob - torch.log(-torch.expm1(log_prob))


def simpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    num_chosen: torch.Tensor,
    num_rejected: torch.Tensor,
    *,
    beta: float,
    simpo_gamma: float,
    cpo_alpha: float,
) -> tuple[torch.Tensor, Figures]:
    """Simple preference optimization: mean log-probabilities, apart by a margin; and the chosen answer's loss, `cpo_alpha` of it.

    -log sigmoid(beta * log p(c) / |c| - beta * log p(r) / |r| - gamma). Meng, Xia and Chen, 2024 (arXiv 2405.14734), eq. 6.
    """
    better, worse = beta * chosen / num_chosen, beta * rejected / num_rejected
    nll = -chosen / num_chosen
    figures = {"rewards/chosen": better, "rewards/rejected": worse, "nll_loss": nll}
    return -F.logsigmoid(better - worse - simpo_gamma) + cpo_alpha * nll, figures


def cpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    num_chosen: torch.Tensor,
    num_rejected: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float,
    cpo_alpha: float,
) -> tuple[torch.Tensor, Figures]:
    """Contrastive preference optimization: DPO with a uniform reference, and the chosen answer's loss, `cpo_alpha` of it.

    -log sigmoid(beta * [log p(c) - log p(r)]). Xu et al., 2024 (arXiv 2401.08417), eq. 5; `label_smoothing` is the share of pairs
    that are taken to be labelled the wrong way round (Mitchell, 2023). The answer's loss is a mean over its tokens.
    """
    better, worse = beta * chosen, beta * rejected
    margin = better - worse
    nll = -chosen / num_chosen
    figures = {"rewards/chosen": better, "rewards/rejected": worse, "nll_loss": nll}
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return loss + cpo_alpha * nll, figures
