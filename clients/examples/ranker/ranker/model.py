"""The model that ranks, and the one way to rank with it: training, evaluation and the service all come through here."""

# Shapes: C candidates, D embedding_dim, H hidden units.

from __future__ import annotations

import torch
from torch import Tensor, nn


class Scorer(nn.Module):
    """How well each candidate suits a user: their dot product, and a correction that is learned.

    Untrained, the correction is zero: the order is then that of the dot products.
    """

    def __init__(self, embedding_dim: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * embedding_dim, hidden)
        self.correction = nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.correction.weight)

    def forward(self, user_D: Tensor, items_CD: Tensor) -> Tensor:
        """Scores [C] of a user [D] and candidates [C, D]; leading dimensions are batches."""
        products_CD = user_D.unsqueeze(-2) * items_CD
        hidden_CH = torch.relu(self.hidden(torch.cat([products_CD, items_CD], dim=-1)))
        correction_C: Tensor = self.correction(hidden_CH).squeeze(-1)
        return products_CD.sum(dim=-1) + correction_C


@torch.inference_mode()
def rank(scorer: Scorer, user_D: Tensor, items_CD: Tensor, top: int) -> tuple[list[int], list[float]]:
    """Places and scores of the best `top` candidates, best first; candidates of one score keep their order.

    One user at a time, as the service does it: sums of another shape round otherwise.
    """
    scores_C = scorer(user_D, items_CD)
    order_C = torch.argsort(scores_C, descending=True, stable=True)[:top]
    return order_C.tolist(), scores_C[order_C].tolist()
