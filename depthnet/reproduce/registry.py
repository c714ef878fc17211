"""The studies by name, and what the paper claims; a study's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from depthnet._checks import one_of
from depthnet.reproduce.study import Study


class Entry(NamedTuple):
    """path: "module:class" in depthnet.reproduce. claim: the paper's."""

    path: str
    claim: str

    def load(self) -> type[Study]:
        """The class.  Raises an ImportError where a package that it needs is missing."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(f"depthnet.reproduce.{module}"), name)


STUDIES = {
    "phase": Entry(
        "phase:Phase",
        "Training is stable and nontrivial for alpha >= 1/2, alpha + gamma = 1 only (figure 1).",
    ),
    "init": Entry(
        "initialization:Initialization",
        "Of infinite width and depth, features and gradients at initialization have sizes that solve a "
        "differential equation in depth (appendix E).",
    ),
    "first-step": Entry(
        "initialization:FirstStep",
        "The limit also gives what the first step of SGD changes (appendix E).",
    ),
    "fig8": Entry(
        "linear:Fig8",
        "As width grows, a linear network's features approach those computed for infinite width "
        "(figure 8).",
    ),
    "fig9": Entry(
        "linear:Fig9",
        "Infinitely wide linear networks converge as depth grows (figure 9, proposition 4.4).",
    ),
    "trajectory": Entry(
        "training:Training",
        "Nonlinear networks, too, have a limit that Definition E.1 describes, step by step.",
    ),
    "coord-check": Entry(
        "coord_check:CoordCheckStudy",
        "Under Depth-muP, nothing grows or vanishes as networks get deeper (claims 7.1 to 7.3).",
    ),
    "fig17": Entry(
        "diversity:Fig17",
        "Layers a part e of the depth apart differ by e^1/2 under Depth-muP, the most that is possible, "
        "by e under (1, 0) (claim 7.5, figure 17).",
    ),
    "fig18": Entry(
        "diversity:Fig18", "Layers differ by e^1/2 at every time of training (figure 18)."
    ),
    "fig19": Entry(
        "diversity:Fig19", "With |x|, layers follow e^1/2 more closely than with relu (figure 19)."
    ),
    "family": Entry(
        "family:Family",
        "Of all phi(h) = p max(h, 0) + q max(-h, 0), |h| has the most diverse gradients; it trains better "
        "than relu (section 8.3, figure 3).",
    ),
    "linearization": Entry(
        "linearization:LinearizationStudy",
        "With several layers a block every limit loses something: stability, feature diversity, or what "
        "layers of a block learn together (section 9).",
    ),
    "fig10": Entry(
        "learning_rates:Fig10",
        "Under Depth-muP the best learning rate stays and deeper is better; under (1/2, 0) and (0, 0) it "
        "moves, and under (0, 0) depth hurts (figure 10).",
    ),
    "fig10-hidden": Entry(
        "learning_rates:Fig10Hidden",
        "The same of the blocks' learning rate alone, as in the paper (figure 10).",
    ),
    "fig10-frozen": Entry(
        "learning_rates:Fig10Frozen",
        "The same where only blocks are trained, which is what the theory treats (figure 10).",
    ),
    "drift": Entry(
        "drift:Drift",
        "The best learning rate converges as depth grows (section 5): is what is left of its drift of "
        "finite depth, of finite width, or of the length of training?",
    ),
    "fig11": Entry(
        "learning_rates:Fig11",
        "Under (1, 0) the best learning rate rises with depth, and losses are above those of Depth-muP "
        "(figure 11).",
    ),
    "fig12": Entry(
        "learning_rates:Fig12",
        "With |x| and pre-LN, too, learning rates transfer under Depth-muP, not under (1/2, 0) "
        "(figure 12).",
    ),
    "fig13": Entry(
        "learning_rates:Fig13", "The best block multiplier converges as depth grows (figure 13)."
    ),
    "fig2": Entry(
        "learning_rates:Fig2",
        "Blocks W phi(x) gain nothing beyond 8 layers and are worse than phi(W x) (figure 2).",
    ),
    "fig3": Entry("learning_rates:Fig3", "At every depth |x| trains better than relu (figure 3)."),
    "fig4": Entry(
        "blocks:Fig4",
        "With relu, blocks of two layers are worse early in training than as many layers in blocks of "
        "one, and catch up (figure 4).",
    ),
    "fig5": Entry(
        "blocks:Fig5", "With |x| and pre-LN, blocks of two layers do not catch up (figure 5)."
    ),
    "fig6": Entry(
        "blocks:Fig6",
        "With blocks of two layers the best learning rate moves with depth, under Depth-muP too "
        "(figure 6).",
    ),
    "fig21": Entry(
        "blocks:Fig21",
        "With blocks of two layers the best learning rate moves at every time of training (figure 21).",
    ),
    "fig7": Entry(
        "blocks:Fig7",
        "With blocks of two layers, twice the learning rate goes with a quarter of the multiplier in "
        "shallow networks, with half of it in deep ones (figure 7).",
    ),
    "line": Entry(
        "blocks:Line",
        "With blocks of two layers no parametrization keeps all that Depth-muP keeps with one "
        "(section 9); does the best learning rate move under all with alpha + gamma = 1?",
    ),
    "fig14": Entry(
        "transformers:Fig14",
        "A transformer's loss hardly depends on the block multiplier (figure 14).",
    ),
    "fig15": Entry(
        "transformers:Fig15",
        "Deeper transformers are worse early in training and better at its end (figure 15).",
    ),
    "fig16": Entry(
        "transformers:Fig16",
        "A transformer's best learning rate does not depend on depth in the middle of training and falls "
        "as L^-1/2 at its end; the largest viable one falls as L^-1/2 at both times (figure 16).",
    ),
}


def study(name: str) -> type[Study]:
    """The class of a study.

    Raises:
        ValueError: there is no such study; the message names the nearest one.
        ImportError: a package that it needs is missing.
    """
    return STUDIES[one_of("study", name, STUDIES)].load()
