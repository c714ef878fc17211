"""How forward multipliers, initialisation and learning rates scale with width and depth."""

from __future__ import annotations

from dataclasses import dataclass

from depthnet._checks import integer, number, one_of
from depthnet.scaling.classification import Classification, classify

ROLES = ("input", "hidden", "output", "bias", "norm", "final_norm", "tied")
OPTIMIZERS = ("adamw", "adam", "sgd")
WIDTH_RULES = ("mup", "none")


@dataclass(frozen=True)
class Rule:
    """What a parametrization asks of one kind of tensor; scales are relative to the base shape.

    multiplier: factor of what the tensor gives in the forward pass: of its branch, of tied logits.
    init_std: standard deviation at initialisation (biases start at 0, norm gains at 1).
    update_scale: size of the tensor's update, which is the learning rate of an Adam-like optimizer.
    grad_scale: size of the tensor's gradient; Adam's eps follows it.
    decays: whether weight decay applies at all.
    """

    multiplier: float
    init_std: float
    update_scale: float
    grad_scale: float
    decays: bool = True

    def lr_scale(self, optimizer: str) -> float:
        """Adam's updates do not depend on the gradient's size; SGD's are proportional to it."""
        if one_of("optimizer", optimizer, OPTIMIZERS) == "sgd":
            return self.update_scale / self.grad_scale
        return self.update_scale

    def eps_scale(self) -> float:
        return self.grad_scale

    def weight_decay_scale(self, optimizer: str) -> float:
        """Keeps lr * weight_decay fixed.  Coupled decay joins the gradient, so it follows its size."""
        if not self.decays:
            return 0.0
        if one_of("optimizer", optimizer, OPTIMIZERS) == "adamw":
            return 1 / self.update_scale
        return self.grad_scale / self.update_scale


@dataclass(frozen=True)
class Parametrization:
    """Branch multiplier ∝ L^-alpha and Adam learning rate of the blocks ∝ L^-gamma.

    width_rule: `mup` (maximal update parametrization: learning rates of hidden and output weights
    ∝ 1/n) or `none`.  The classification of (alpha, gamma) is that of Tensor Programs VI, section 7.
    """

    alpha: float
    gamma: float
    width_rule: str = "mup"
    name: str = "custom"

    def __post_init__(self) -> None:
        for argument in ("alpha", "gamma"):
            number(argument, getattr(self, argument))
        one_of("width_rule", self.width_rule, WIDTH_RULES)

    def __str__(self) -> str:
        return f"{self.name} (alpha={self.alpha:g}, gamma={self.gamma:g})"

    @classmethod
    def of(cls, value: Parametrization | str | tuple[float, float]) -> Parametrization:
        """A preset by name, exponents as a pair or as the text "ALPHA,GAMMA", or itself.

        Raises:
            ValueError: no preset has that name (the nearest is suggested).
            TypeError: `value` is none of these.
        """
        if isinstance(value, cls):
            return value
        try:
            exponents = value.split(",") if isinstance(value, str) else value
            alpha, gamma = (float(exponent) for exponent in exponents)
        except ValueError:
            return PRESETS[one_of("parametrization", value, PRESETS)]
        except TypeError:
            raise TypeError(
                f"parametrization must be a preset's name, a pair (alpha, gamma) or a "
                f"Parametrization, got {value!r}"
            ) from None
        return cls(alpha, gamma, name=",".join(repr(x).removesuffix(".0") for x in (alpha, gamma)))

    def rule(
        self,
        role: str,
        *,
        fan_in: int,
        width: int,
        depth: int,
        base_width: int = 128,
        base_depth: int = 8,
        block_multiplier: float | None = None,
        input_std: float = 1.0,
        output_std: float = 0.0,
    ) -> Rule:
        """The rule for a tensor of a network of the given width n and depth L.

        With r_n = n / base_width (in rates and eps 1 without a width rule) and r_L = L / base_depth:

        | role | multiplier | init std | Adam lr | SGD lr | Adam eps |
        |---|---|---|---|---|---|
        | input | 1 | input_std fan_in^-1/2 | 1 | r_n | 1/r_n |
        | tied (input and output) | 1/r_n, of the logits | input_std fan_in^-1/2 | 1 | r_n | 1/r_n |
        | hidden | a r_L^-alpha | fan_in^-1/2 | 1/(r_n r_L^gamma) | r_L^(alpha-gamma) | 1/(r_n r_L^alpha) |
        | output | 1 | output_std/r_n, or /r_n^1/2 without a width rule | 1/r_n | 1/r_n | 1 |
        | bias, norm (of a block) | 1 | 0 | r_L^-gamma | r_n r_L^(alpha-gamma) | 1/(r_n r_L^alpha) |
        | final_norm (after the blocks) | 1 | 0 | 1 | r_n | 1/r_n |

        Weight decay times learning rate stays fixed; biases and norms do not decay.

        Args:
            role: input, hidden, output, bias, norm, final_norm or tied.
            fan_in: number of inputs of each unit that are not zero; of an embedding, 1.
            block_multiplier: a, the branch multiplier at the base depth; None means base_depth^-1/2,
                so that Depth-muP's multiplier is exactly depth^-1/2.
            input_std: standard deviation of input weights times fan_in^1/2.
            output_std: standard deviation of output weights at the base width.
        """
        one_of("role", role, ROLES)
        integer("width", width, 1)
        integer("fan_in", fan_in, 1)
        integer("depth", depth, 0)
        integer("base_width", base_width, 1)
        integer("base_depth", base_depth, 1)
        if block_multiplier is not None:
            number("block_multiplier", block_multiplier)
        for argument, std in (("input_std", input_std), ("output_std", output_std)):
            if number(argument, std) < 0:
                raise ValueError(f"{argument} must not be negative, got {std}")
        r_n = width / base_width if self.width_rule == "mup" else 1.0
        r_L = depth / base_depth if depth else 1.0
        block_grad = r_L**-self.alpha / r_n
        if role in ("input", "tied"):
            multiplier = 1.0 if role == "input" else 1 / r_n
            return Rule(multiplier, input_std * fan_in**-0.5, 1.0, 1 / r_n)
        if role == "hidden":
            if block_multiplier is None:  # one rounding: exactly depth^-1/2 for alpha = 1/2
                multiplier = (base_depth * r_L ** (2 * self.alpha)) ** -0.5
            else:
                multiplier = block_multiplier * r_L**-self.alpha
            return Rule(multiplier, fan_in**-0.5, r_L**-self.gamma / r_n, block_grad)
        if role == "output":
            std = output_std / (r_n if self.width_rule == "mup" else (width / base_width) ** 0.5)
            return Rule(1.0, std, 1 / r_n, 1.0)
        if role == "final_norm":
            return Rule(1.0, 0.0, 1.0, 1 / r_n, decays=False)
        return Rule(1.0, 0.0, r_L**-self.gamma, block_grad, decays=False)

    def attention_scale(self, head_size: int, base_head_size: int | None = None) -> float:
        """The factor of q.k in attention's softmax.

        Queries and keys of trained networks are aligned, so that q.k grows like the head size, not like
        its root: under the mup width rule the factor is base_head_size^1/2 / head_size.  It is the usual
        head_size^-1/2 at the base head size, and without a width rule.

        Args:
            base_head_size: the head size at the base width; None means the same.
        """
        integer("head_size", head_size, 1)
        base = head_size if base_head_size is None else integer("base_head_size", base_head_size, 1)
        return base**0.5 / head_size if self.width_rule == "mup" else head_size**-0.5

    def classify(self) -> Classification:
        """What this parametrization's limit of infinite width, then depth, is."""
        return classify(self.alpha, self.gamma)


PRESETS: dict[str, Parametrization] = {
    preset.name: preset
    for preset in (
        Parametrization(0.5, 0.5, name="depth_mup"),
        Parametrization(0.5, 0.0, name="half_zero"),
        Parametrization(1.0, 0.0, name="ode"),
        Parametrization(1.0, 0.0, name="completep"),
        Parametrization(0.0, 0.0, name="mup"),
        Parametrization(0.0, 0.0, width_rule="none", name="standard"),
    )
}
