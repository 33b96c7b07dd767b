"""Gossip topologies and their mixing matrices.

Every matrix is symmetric and doubly stochastic with Metropolis-Hastings weights
``W_ij = 1/(1 + max(deg_i, deg_j))`` on edges and the rest on the diagonal (Xiao, Boyd, "Fast linear
iterations for distributed averaging", 2004). The smaller its second-largest absolute eigenvalue, the
faster peers agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import torch
from torch import Tensor

from hansa.core.errors import InputError
from hansa.core.hub import spectral_gap

__all__ = ["Kind", "Topology", "spectral_gap"]

Kind = Literal["ring", "torus", "exponential", "regular", "complete"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Who talks to whom, and how often in a round.

    Attributes
    ----------
    kind: ``ring`` (i ± 1), ``torus`` (the most square wrapped grid), ``exponential`` (i ± 2^k),
        ``regular`` (random, of the given degree) or ``complete``.
    degree: neighbours of a peer in a ``regular`` graph.
    mixing_steps: Q, exchanges per round.
    seed: of a ``regular`` graph.
    """

    kind: Kind = "ring"
    degree: int = 4
    mixing_steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mixing_steps < 1:
            raise InputError(
                "topology.mixing_steps", self.mixing_steps, "peers would never talk", "use 1 or more"
            )

    def graph(self, peers: int) -> nx.Graph[int]:
        """The graph of ``peers`` nodes 0, 1, …

        Raises
        ------
        InputError
            When there is no connected graph of this kind on so many peers.
        """
        if peers < 2:
            raise InputError("partition.clients", peers, "gossip needs someone to talk to", "use 2 or more")
        match self.kind:
            case "ring":
                made: nx.Graph[int] = nx.cycle_graph(peers) if peers > 2 else nx.path_graph(2)
            case "complete":
                made = nx.complete_graph(peers)
            case "exponential":
                jumps = [2**k for k in range(max(1, math.ceil(math.log2(peers))))]
                made = nx.circulant_graph(peers, [jump for jump in jumps if jump <= peers // 2] or [1])
            case "torus":
                rows = next(r for r in range(math.isqrt(peers), 0, -1) if peers % r == 0)
                if rows < 3:
                    raise InputError(
                        "partition.clients",
                        peers,
                        "a torus needs sides of at least 3",
                        "use 9, 12, 16, 20, …",
                    )
                grid = nx.grid_2d_graph(rows, peers // rows, periodic=True)
                made = nx.convert_node_labels_to_integers(grid, ordering="sorted")
            case "regular":
                if not 2 <= self.degree < peers or self.degree * peers % 2:
                    raise InputError(
                        "topology.degree",
                        self.degree,
                        f"no connected graph of this degree on {peers} peers",
                        "use 2 or more, fewer than the peers, and an even product of the two",
                    )
                drawn = (nx.random_regular_graph(self.degree, peers, seed=self.seed + n) for n in range(100))
                made = next(graph for graph in drawn if nx.is_connected(graph))
        return made

    def mixing(self, peers: int) -> Tensor:
        """Metropolis-Hastings weights W [n, n], float64."""
        graph = self.graph(peers)
        i, j = torch.tensor(list(graph.edges)).T  # [edges] each
        degrees = torch.bincount(torch.cat([i, j]), minlength=peers).double()
        W = torch.zeros(peers, peers, dtype=torch.float64)
        W[i, j] = W[j, i] = 1.0 / (1 + torch.maximum(degrees[i], degrees[j]))
        return W + torch.diag(1.0 - W.sum(1))
