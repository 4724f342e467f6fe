"""The form of `pq` that learns its codes: a full row an id, seen by the model as its nearest codewords.

    q = nearest codewords of W[x];  e = q, with the gradient of e passed on to W[x] and to the codewords alike

(straight-through: DPQ, Chen, Li and Sun, ICML 2020; van den Oord et al., arXiv 1711.00937). `penalty()`, the commitment
term, keeps rows near their codewords: add it to the loss.

The first epoch trains the rows alone, as a full table: codewords are worth choosing when there is something to choose
them for. They are then fitted to the rows, by k-means weighted by how often ids occur (and the rotation with them,
which stays). That is at the first `end_of_epoch`, lookup without gradients (evaluation) or `export`; from then on
training, evaluation and publishing see the same vectors. Codewords that no id chose in an epoch move to rows that are
far from theirs.

On Gowalla at 27x, 8 parts of 256 codes, validation nDCG@20 after 6 epochs is 0.0688. Weighted by the logarithm of how
often ids occur, as MEC does, it is 0.0657; that with a commitment of 1, 0.0560, and with a rotation 0.0654. Worth much
to a fit of given vectors, a rotation is worth little here: rows turn to the parts by themselves.

Takes 4 n D bytes more than what is published, while it trains.
"""

# Shapes: N ids, B of them in a batch, D embedding_dim, M parts, W = D / M columns of a part, S stages, K codes,
# C = S M columns of codes, R = C K rows of the codebooks.

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.schemes.base import SchemeConfig, normal
from embstore.schemes.parts.code_table import CodeTable, decode, nearest_codes
from embstore.schemes.parts.popularity import checked_frequencies
from embstore.schemes.parts.straight_through import straight_through

COMMITMENT = 0.25
ITERATIONS = 10
ROWS_FOR_DEAD_CODES = 4096


class PQLearner(CodeTable):
    """What `PQ.from_budget` gives: `export()` publishes the nearest codes of its rows."""

    def start(
        self,
        std: float,
        generator: torch.Generator | None,
        *,
        frequencies: Any = None,
        commitment: float | None = None,
    ) -> None:
        """frequencies: float [N], how often each id occurs; None: all alike. commitment: the weight of the commitment
        term, COMMITMENT unless given."""
        commitment = COMMITMENT if commitment is None else commitment
        if not commitment >= 0:
            raise ConfigError(f"commitment must be at least 0, got {commitment!r}")
        config = self.config
        self.commitment, self.generator = commitment, generator
        self.weight = normal((config.num_embeddings, config.embedding_dim), std, generator=generator)
        self.codebooks = self.initial_codebooks(std, generator)
        if config.rotation:
            self.register_buffer("rotation", torch.eye(config.embedding_dim))
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("used_R", torch.zeros(len(self.codebooks), dtype=torch.bool), persistent=False)
        weights_N = None if frequencies is None else checked_frequencies(frequencies, config.num_embeddings)
        self.register_buffer("weights_N", weights_N, persistent=False)
        self._batch: tuple[Tensor, Tensor] | None = None

    def networks(self) -> Iterable[nn.Parameter]:
        """None: the rotation is fitted, and stays orthogonal."""
        return ()

    def vectors(self, ids: Tensor) -> Tensor:
        """The rows' nearest codewords, with the gradient passed on to both; the rows themselves in the first epoch."""
        own = F.embedding(ids, self.weight, sparse=self.sparse)
        learning = self.training and torch.is_grad_enabled()
        self._batch = None
        if not self.get_buffer("fitted"):
            if learning:
                return own
            self.fit_codebooks()
        flat_BD = own.detach().reshape(-1, self.embedding_dim)
        if not learning:  # exactly what is published
            codes_BC = self.encode(flat_BD)
        else:
            with torch.no_grad():
                codes_BC = nearest_codes(self.config, self.codebooks, flat_BD, self.get_rotation())
            self.get_buffer("used_R")[codes_BC + self._first_rows()] = True
        codes = codes_BC.reshape(*ids.shape, self.config.num_columns)
        decoded = decode(self.config, self.tensors(), codes, self.rows)
        if learning:
            self._batch = own, decoded.detach()
        return straight_through(own, decoded)

    def penalty(self) -> Tensor:
        """commitment * the mean squared distance of the last batch's rows to their codewords."""
        if self._batch is None:
            return self.weight.new_zeros(())
        own, decoded = self._batch
        return self.commitment * (own - decoded).square().sum(dim=-1).mean()

    @torch.no_grad()
    def end_of_epoch(self, epoch: int) -> None:
        """Fit the codebooks after the first epoch; later, move the codewords that no id of the epoch chose."""
        if not self.get_buffer("fitted"):
            self.fit_codebooks()
            return
        if self.get_buffer("used_R").any():  # an epoch without a batch says nothing about codewords
            self._move_unused()
        self.get_buffer("used_R").zero_()

    @torch.no_grad()
    def fit_codebooks(self) -> None:
        """Codebooks (and rotation) fitted to the rows as they are."""
        from embstore.fitting.product import product_codes

        config, state = self.config, self.tensors()
        found = product_codes(
            self.weight.detach(),
            config.num_parts,
            config.num_codes,
            num_stages=config.num_stages,
            rotation=config.rotation,
            weights_N=state.get("weights_N"),
            iterations=ITERATIONS,
            generator=self.generator,
        )
        self.codebooks.copy_(found.codebooks)
        if found.rotation is not None:
            state["rotation"].copy_(found.rotation)
        state["fitted"].fill_(True)
        state["used_R"].zero_()

    def _move_unused(self) -> None:
        """Codewords without ids become what the rows that are worst off ask of them."""
        config = self.config
        unused_SMK = ~self.get_buffer("used_R").view(config.num_stages, config.num_parts, config.num_codes)
        if not unused_SMK.any():
            return
        drawn_B = torch.randperm(self.num_embeddings, generator=self.generator)[:ROWS_FOR_DEAD_CODES]
        rotation = self.get_rotation()
        rows_BD = self.weight[drawn_B.to(self.weight.device)]
        codes_BSM = nearest_codes(config, self.codebooks, rows_BD, rotation).view(-1, *unused_SMK.shape[:2])
        books_SMKW = self.codebooks.view(*unused_SMK.shape, -1)
        wanted_BMW = (rows_BD if rotation is None else rows_BD @ rotation.T).reshape(len(rows_BD), config.num_parts, -1)
        part_M = torch.arange(config.num_parts, device=rows_BD.device)
        for stage in range(config.num_stages):
            left_BMW = wanted_BMW - books_SMKW[stage, part_M, codes_BSM[:, stage]]
            for part in unused_SMK[stage].any(dim=1).nonzero().flatten().tolist():
                unused_k = unused_SMK[stage, part].nonzero().flatten()
                worst_k = left_BMW[:, part].square().sum(dim=1).topk(min(len(unused_k), len(drawn_B))).indices
                books_SMKW[stage, part, unused_k[: len(worst_k)]] = wanted_BMW[worst_k, part]
            wanted_BMW = left_BMW

    @torch.no_grad()
    def export(self) -> tuple[SchemeConfig, dict[str, Tensor]]:
        """The nearest codes of all rows, the codebooks, the rotation; DataError when rows are not finite."""
        config = self.config
        if self.weight.is_meta:  # sizes without numbers
            codes_NC = torch.empty((config.num_embeddings, config.num_columns), dtype=torch.uint8, device="meta")
        else:
            if not self.get_buffer("fitted"):
                self.fit_codebooks()
            codes_NC = self.encode(self.weight)
        rotation = self.get_rotation()
        more = {} if rotation is None else {"rotation": rotation}
        return config, {"codes": codes_NC, "codebooks": self.codebooks.detach(), **more}

    def _first_rows(self) -> Tensor:
        """The row of the codebooks that each column of codes starts at."""
        return torch.arange(self.config.num_columns, device=self.codebooks.device) * self.config.num_codes

    def __getstate__(self) -> dict[str, Any]:
        """Without the last batch: a copy has none."""
        return self.__dict__ | {"_batch": None}
