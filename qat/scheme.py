"""Which tensors get which Format: ordered rules over paths, first match wins, nothing is left unsaid.

Every weight of two or more dimensions must be matched by a rule, either with formats or with a reason to skip it; a
rule that matches nothing is an error. `fused` names the layers that serving engines merge into one matrix: their
members share the per-tensor scale, and the quantized input, while training.
"""

import fnmatch
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from qat.config import Strict
from qat.fallback import Fallback
from qat.families import Sets
from qat.init.blocks import BlockStep
from qat.init.gptq import Gptq
from qat.init.hadamard import Hadamard
from qat.init.permute import Permute
from qat.init.progressive import Progressive
from qat.init.reconstruct import Reconstruct
from qat.init.rotate import Rotate
from qat.init.scales import ScaleSearch, Search
from qat.init.smooth import Smooth
from qat.init.step import InitStep
from qat.numbers.catalog import lookup, widened
from qat.observers import Observer
from qat.quantizer import Learn
from qat.sites import Role
from qat.training.activations import ActivationRule, llama_cpp_input
from qat.training.gradients import Estimator
from qat.training.half import RULE as HALF_RULE
from qat.training.npu import NPU_RULES, in_half, multiplies_codes
from qat.training.scales import parts_of

TiedPolicy = Literal["error", "share", "untie"]
_Step = Annotated[
    ScaleSearch | Gptq | Reconstruct | Smooth | Permute | Rotate | Progressive | Hadamard, Field(discriminator="kind")
]


def _by_name(step: Any) -> Any:
    """`scales` is short for `{kind: scales}`."""
    return {"kind": step} if isinstance(step, str) else step


Step = Annotated[_Step, BeforeValidator(_by_name)]


def _in_order(steps: tuple[InitStep, ...]) -> tuple[InitStep, ...]:
    """Channels that are rotated in groups can no longer be moved one by one, scales fit the weight they saw, and what
    goes block by block needs the weights as they were."""
    places = [place for place, step in enumerate(steps) if isinstance(step, Hadamard)]
    for place in places:
        before = [step.kind for step in steps[:place] if step.MAKES_SCALES]
        after = [step.kind for step in steps[place + 1 :] if step.WHOLE_MODEL and not isinstance(step, Progressive)]
        if before or after or len(places) > 1:
            wrong = f"`{before[0]}` before it" if before else f"`{after[0]}` after it" if after else "it twice"
            raise ValueError(
                f"hadamard stands once, after smooth, permute and rotate and before scales or gptq; init has {wrong}"
            )
    turns = [place for place, step in enumerate(steps) if isinstance(step, Rotate)]
    if len(turns) > 1:
        raise ValueError("rotate stands once; give it both sites: {kind: rotate, sites: [residual, values]}")
    if turns and steps[turns[0]].moves_stream and any(isinstance(step, Smooth) for step in steps[: turns[0]]):
        raise ValueError(
            "smooth before a rotation of the residual stream is undone by it, since norms lose their gains; put "
            "smooth after rotate"
        )
    walks = [place for place, step in enumerate(steps) if isinstance(step, BlockStep) and step.by_block]
    if walks and any(isinstance(step, Gptq) and not step.sequential for step in steps[: walks[-1]]):
        raise ValueError(
            f"gptq before {steps[walks[-1]].kind} must be {{kind: gptq, sequential: true}}: else the weights that the "
            "blocks are compared with would be gone"
        )
    return steps


Init = Annotated[tuple[Step, ...], AfterValidator(_in_order)]


class Rule(Strict):
    """One line of a scheme.

    Attributes:
        match: a shell pattern on the path (`*.self_attn.*_proj`), or a regular expression after `re:`. A weight's path
            is that of its module, followed by the parameter's name where that is not `weight` (`*.experts.*`).
        weight: format of the weight.
        input: format of what the weight is multiplied with.
        key, value: formats of the cached keys and values of attention modules.
        skip: the reason why nothing is quantized; the coverage report repeats it.
        init, learn: instead of the scheme's, for these weights; `smooth` concerns whole models and stands there only.
    """

    match: str
    weight: str | None = None
    input: str | None = None
    key: str | None = None
    value: str | None = None
    skip: str | None = None
    init: Init | None = None
    learn: Learn | None = None

    @model_validator(mode="after")
    def _check(self) -> "Rule":
        if (self.skip is None) == all(name is None for name in (self.weight, self.key, self.value)):
            raise ValueError(
                f"rule {self.match!r} needs exactly one of formats (`weight: FORMAT`, or `key` and `value`) and "
                "`skip: REASON`"
            )
        if self.input is not None and self.weight is None:
            raise ValueError(f"rule {self.match!r} has no `weight` format, so it takes no `input` format either")
        if (self.key is None) != (self.value is None):
            raise ValueError(f"rule {self.match!r} must give both `key` and `value` a format: caches hold both")
        for step in self.init or ():
            if step.WHOLE_MODEL:
                raise ValueError(f"rule {self.match!r}: {step.kind} concerns the whole model; put it into scheme.init")
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise ValueError(f"rule {self.match!r} is not a valid regular expression: {error}") from error
        for role in ("weight", "input", "key", "value"):
            name = getattr(self, role)
            if name is not None and lookup(name).block[0] > 1 and role != "weight":
                raise ValueError(f"rule {self.match!r}: {name} has 2-D blocks, which only weights can have")
        return self

    def matches(self, path: str) -> bool:
        """Whether this rule speaks of `path`."""
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], path) is not None
        return fnmatch.fnmatchcase(path, self.match)

    def speaks_of(self, role: Role) -> bool:
        """Whether it says anything about tensors of this role: a format, or that they are skipped."""
        return self.skip is not None or getattr(self, role) is not None


class Scheme(Strict):
    """Rules plus how weights and scales are initialised, whether scales are learned, and whose activation arithmetic is
    trained.

    Attributes:
        init: steps before the first one of training, in order: `smooth` and `permute` (see these files of `qat.init`),
            `rotate`, `progressive` and `hadamard` (see theirs), `scales` (a search for block scales) or `gptq` (that,
            and error-compensated rounding), and `reconstruct` (blocks fitted to their dense outputs); each by its name,
            or as a table with `kind`. An empty list leaves scales at the format's own rule (RTN). All but that need
            calibration.
        learn: "none" keeps the scales; "lsq" learns one scale per block; "dual_lsq" learns separate scales for
            rounding and for dequantizing (only the second is stored).
            "focus" is that with a divisor of its own for each eight values (formats with groups along the row);
            "refit" finds the best scale for the weights every few steps (`optim.refit_every`).
        learn_inputs: learn the ranges of static input formats (one scale per tensor) from where calibration put them.
        observer: how static activation ranges are found.
        activation_rule: whose arithmetic dynamic activations follow. `ascend_310p` makes the model an FP16 one.
        estimator: gradient of rounding for inputs; weights always pass straight through.
        fused: sets of layer names that engines merge; by default what is usual for the model (`qat.families`).
        tied: what to do when one tensor serves as embedding and head and the rules treat the two differently.
        round_bf16: round dequantized weights to BF16 in the forward pass, as a BF16 server does; see `rounds_bf16`.
        fallback: give the layers that suffer most other formats; decided once, before training, and recorded as rules.
    """

    rules: tuple[Rule, ...]
    init: Init = (ScaleSearch(),)
    learn: Learn = "dual_lsq"
    learn_inputs: bool = False
    observer: Observer = "minmax"
    activation_rule: ActivationRule = "vllm"
    estimator: Estimator = "clipped"
    fused: Sets | None = None
    tied: TiedPolicy = "error"
    round_bf16: bool = True
    fallback: Fallback | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_keys(cls, data: Any) -> Any:
        given = sorted(OLD_KEYS & data.keys()) if isinstance(data, dict) else []
        if given:
            steps = upgraded(data)["init"]
            raise ValueError(f"{', '.join(given)} became `init`, a list of steps; write init: {_as_yaml(steps)}")
        return data

    @model_validator(mode="after")
    def _in_order(self) -> "Scheme":
        made = [step.kind for step in self.init if step.MAKES_SCALES]
        first = next((index for index, step in enumerate(self.init) if step.MAKES_SCALES), len(self.init))
        late = [step.kind for step in self.init[first:] if step.WHOLE_MODEL]
        if late:
            raise ValueError(
                f"{', '.join(late)} in scheme.init comes after {made[0]}, whose scales would no longer fit; "
                f"put {made[0]} last"
            )
        return self

    @model_validator(mode="after")
    def _blocks_have_parts(self) -> "Scheme":
        for rule in self.rules:
            if rule.weight is not None and (rule.learn or self.learn) == "focus" and not parts_of(lookup(rule.weight)):
                raise ValueError(
                    f"learn: focus divides groups along the row into parts of 8, which {rule.weight} does not have; "
                    f"use `learn: dual_lsq` for {rule.match!r}"
                )
        return self

    @model_validator(mode="after")
    def _widths_exist(self) -> "Scheme":
        names = sorted({rule.weight for rule in self.rules if rule.weight is not None})
        for bits in {bits for step in self.init if isinstance(step, Progressive) for bits in step.bits}:
            if names and not any(widened(lookup(name), bits) for name in names):
                raise ValueError(
                    f"progressive: no weight format of the scheme is an integer format with fewer than {bits} bits, "
                    f"but {', '.join(names)}; leave the step out, or give it other `bits`"
                )
        return self

    @model_validator(mode="after")
    def _prompts_are_inputs(self) -> "Scheme":
        roles = ("weight", "key", "value")
        wrong = [name for rule in self.rules for role in roles if (name := getattr(rule, role)) and lookup(name).prompt]
        if wrong:
            raise ValueError(f"{wrong[0]} rounds prompts and answers differently, which only inputs of layers can")
        mixed = [rule.input for rule in self.rules if rule.input is not None and lookup(rule.input).prompt]
        if mixed and self.activation_rule != "ascend":
            raise ValueError(f"{mixed[0]} inputs need activation_rule: ascend, not {self.activation_rule}")
        return self

    @model_validator(mode="after")
    def _columns_are_cached(self) -> "Scheme":
        of_layers = [name for rule in self.rules for name in (rule.weight, rule.input) if name is not None]
        if wrong := [name for name in of_layers if lookup(name).is_columnwise]:
            raise ValueError(f"{wrong[0]} has a scale per column, which only the `key` and `value` of caches can have")
        cached = [name for rule in self.rules for name in (rule.key, rule.value) if name is not None]
        given = [name for name in cached if lookup(name).is_columnwise]
        if given and self.activation_rule != "ascend":
            raise ValueError(f"{given[0]} caches need activation_rule: ascend, not {self.activation_rule}")
        return self

    @model_validator(mode="after")
    def _inputs_are_llama_cpps(self) -> "Scheme":
        every: list[Rule | Fallback] = [*self.rules, *([self.fallback] if self.fallback else [])]
        for given in every if self.activation_rule == "llama_cpp" else ():
            if given.weight is None or given.input is None:
                continue
            wanted = llama_cpp_input(lookup(given.weight)).name
            if given.input != wanted:
                raise ValueError(
                    f"activation_rule: llama_cpp rounds the inputs of {given.weight} weights to {wanted}, not "
                    f"{given.input}; write `input: {wanted}` beside `weight: {given.weight}`, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _ranges_exist(self) -> "Scheme":
        inputs = sorted({rule.input for rule in self.rules if rule.input is not None})
        if self.learn_inputs and not any(lookup(name).is_static for name in inputs):
            raise ValueError(
                f"learn_inputs: no rule has an input format with one scale per tensor (fp8_tensor, int8_tensor), but "
                f"{', '.join(inputs) or 'none'}. Scales that follow the data are the engine's, which has no factor to "
                "learn; the per-tensor part of NVFP4 is a power of two that only places its block scales"
            )
        if self.learn_inputs and any(lookup(name).is_static and lookup(name).zero_point for name in inputs):
            raise ValueError(
                "learn_inputs: a range with a zero point has two ends, which one learned factor does not move well; "
                "use int8_tensor inputs, or leave learn_inputs out"
            )
        if self.activation_rule == HALF_RULE:
            self._check_half()
        if self.learn_inputs and self.activation_rule != "vllm":
            raise ValueError(f"learn_inputs needs activation_rule: vllm, not {self.activation_rule}")
        return self

    def _check_half(self) -> None:
        """An Ascend 310P multiplies INT8 codes, and knows no BF16."""
        pairs = [(rule.weight, rule.input) for rule in self.rules if rule.weight is not None]
        other = [
            f"{weight} with {input or 'dense'}" for weight, input in pairs if not input or not in_half(lookup(input))
        ]
        if other:
            raise ValueError(
                f"activation_rule: {HALF_RULE} has INT8 products alone, with int8_token, int8_tensor or "
                f"int8_tensor_asym inputs, but the scheme has {other[0]} inputs"
            )
        if cached := [name for rule in self.rules for name in (rule.key, rule.value) if name is not None]:
            raise ValueError(f"activation_rule: {HALF_RULE} has no quantized caches; leave {cached[0]} out")

    def rule_for(self, path: str, module: str = "", role: Role = "weight") -> Rule | None:
        """The first rule that speaks of a tensor, by its own path or its module's; or None."""
        matching = (rule for rule in self.rules if rule.matches(path) or (module and rule.matches(module)))
        return next((rule for rule in matching if rule.speaks_of(role)), None)

    def rounds_bf16(self, weight: str, input: str | None) -> bool:
        """Whether a weight is rounded to BF16 before products with such inputs: NPUs multiply integers as they are."""
        if self.activation_rule in NPU_RULES and input is not None and multiplies_codes(lookup(weight), lookup(input)):
            return False
        return self.round_bf16

    def init_of(self, path: str, module: str) -> tuple[InitStep, ...]:
        """The steps for one weight."""
        rule = self.rule_for(path, module)
        return self.init if rule is None or rule.init is None else rule.init

    def search_of(self, rule: Rule) -> Search:
        """How the scales of a rule's weights are searched; "amax" where they follow the format's own rule."""
        steps = self.init if rule.init is None else rule.init
        return next((getattr(step, "search", "amax") for step in steps if step.MAKES_SCALES), "amax")

    def rotation_of(self, path: str, module: str) -> int:
        """Size of the block Hadamard that the input of a weight meets once it is initialised; 0 without one."""
        rule = self.rule_for(path, module)
        steps = () if rule is None or rule.input is None else self.init_of(path, module)
        return next((step.size for step in steps if isinstance(step, Hadamard)), 0)

    @property
    def unties(self) -> bool:
        """Whether its initialisation needs a head that is not the embedding, and may make one."""
        return any(isinstance(step, Rotate) and step.moves_stream and step.untie for step in self.init)

    def rtn(self) -> "Scheme":
        """The same formats without any initialisation: round-to-nearest (RTN)."""
        rules = tuple(rule.model_copy(update={"init": None}) for rule in self.rules)
        return self.model_copy(update={"init": (), "rules": rules})


# --- schemes of earlier releases ------------------------------------------------------------------

OLD_KEYS = frozenset({"start", "weighted_start", "smooth", "compensate"})


def upgraded(scheme: dict[str, Any]) -> dict[str, Any]:
    """A scheme as earlier releases wrote it (in a run's job.yaml), with `init` for what went before it."""
    if not OLD_KEYS & scheme.keys():
        return scheme
    search, weighted = scheme.get("start", "auto"), scheme.get("weighted_start", True)
    steps: list[dict[str, Any]] = []
    if scheme.get("smooth"):
        steps.append({"kind": "smooth", "strength": scheme["smooth"]})
    if scheme.get("compensate", "none") != "none":
        steps.append({"kind": scheme["compensate"], "search": search, "weighted": weighted})
    elif search != "amax":
        steps.append({"kind": "scales", "search": search, "weighted": weighted})
    return {**{key: value for key, value in scheme.items() if key not in OLD_KEYS}, "init": steps}


def _as_yaml(steps: list[dict[str, Any]]) -> str:
    usual: dict[str, InitStep] = {"smooth": Smooth(), "scales": ScaleSearch(), "gptq": Gptq()}
    shown = []
    for step in steps:
        changed = {key: value for key, value in step.items() if value != getattr(usual[step["kind"]], key)}
        pairs = ", ".join(f"{key}: {str(value).lower()}" for key, value in {"kind": step["kind"], **changed}.items())
        shown.append(f"{{{pairs}}}" if changed else step["kind"])
    return f"[{', '.join(shown)}]"
