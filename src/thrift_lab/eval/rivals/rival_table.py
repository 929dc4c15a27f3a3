"""The rivals by the name that a method spec takes, each with a line about it."""

from __future__ import annotations

from thrift_lab.eval.rivals.diagonal_band import DiagonalBand
from thrift_lab.eval.rivals.kivi import Kivi
from thrift_lab.eval.rivals.past_mean import PastMean
from thrift_lab.eval.rivals.peer import Peer
from thrift_lab.eval.rivals.rival import Rival
from thrift_lab.eval.rivals.rounded_kv import Fp8KV, Nvfp4KV
from thrift_lab.eval.rivals.share_of_mass import ShareOfMass
from thrift_lab.eval.rivals.turboquant import TurboQuant

RIVALS: dict[str, tuple[type[Rival], str]] = {
    "peer": (Peer, "what the paper's released kernels compute where they differ from its text"),
    "fp8kv": (Fp8KV, "K and V stored in e4m3, computed in 16 bits"),
    "nvfp4kv": (Nvfp4KV, "K and V stored in nvfp4 along the head dim; scales=best is Four Over Six"),
    "kivi": (Kivi, "K by channel and V by token in 2 or 4 bits, the newest 128 tokens in 16 (arXiv 2402.02750)"),
    "turboquant": (TurboQuant, "K and V rotated, then a codebook of 4 or 3 bits (arXiv 2504.19874)"),
    "diagonal": (DiagonalBand, "a band along the diagonal in MXFP8, NVFP4 elsewhere (arXiv 2604.03950)"),
    "past": (
        PastMean,
        "this package's form with the mean of earlier queries in place of all, so that it does not look ahead",
    ),
    "mass": (ShareOfMass, "this package's form with a budget by softmax mass (top-p) in place of a share of blocks"),
}


def name_of(rival: Rival) -> str:
    """The name of a rival's kind."""
    return next(name for name, (kind, _) in RIVALS.items() if type(rival) is kind)
