"""The schemes that quantport brings, and the table that they are looked up in."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from quantport.errors import ConfigError
from quantport.scheme import Quant, Scheme, Solver
from quantport.scheme.formats import FORMATS
from quantport.scheme.other_names import unknown_scheme
from quantport.scheme.scheme import OPTIONS, is_group_size

_REMEMBERED = 1024  # names with options; there are endless ways to spell one


class Schemes(Mapping[str, Scheme]):
    """A read-only table of schemes. Look-up understands aliases, upper and lower case, and options after
    colons (``mxfp4:floor``, ``nf4:double``, ``int8:NAME`` with the name of a solver); iteration gives
    canonical names only.

    Args:
        schemes: The schemes.
        solvers: The solvers that may be named as options.

    Raises:
        ConfigError: on look-up of an unknown name, and on construction when two schemes or two solvers claim
            one name, or a solver that of an option or of a scheme; or a name has a colon, or is none.
    """

    def __init__(self, schemes: Iterable[Scheme], solvers: Iterable[Solver] = ()) -> None:
        self._schemes: dict[str, Scheme] = {}
        self._alias: dict[str, str] = {}  # in lower case
        self._with_options: dict[str, Scheme] = {}  # of names that were looked up
        for scheme in schemes:
            for name in (scheme.name, *scheme.aliases):
                asked = f"scheme {scheme.name!r} under the name {name!r}"
                if not isinstance(name, str) or name.split() != [name]:
                    raise ConfigError(asked, "no name", "letters, digits, '_', '-' and '.'")
                if ":" in name:
                    raise ConfigError(asked, "a colon, after which options stand", "a name without one")
                if name.lower() in self._alias:
                    found = f"the name is taken by scheme {self._alias[name.lower()]!r}"
                    raise ConfigError(asked, found, "give the new scheme a name and aliases of its own")
                self._alias[name.lower()] = scheme.name
            self._schemes[scheme.name] = scheme
        self.solvers = _by_name(solvers, self._alias)

    def __getitem__(self, name: str | Scheme) -> Scheme:
        known = self._with_options.get(name) if isinstance(name, str) else None
        if known is not None:
            return known
        name = name.name if isinstance(name, Scheme) else name
        base, *options = name.split(":") if isinstance(name, str) else [name]
        canonical = self._alias.get(base.lower()) if isinstance(base, str) else None
        if canonical is None:
            raise unknown_scheme(name, self, self._alias)
        scheme = self._schemes[canonical]
        for option in options:
            solver = self.solvers.get(option)
            scheme = scheme.option(option) if solver is None else scheme.solved_by(solver)
        if len(self._with_options) < _REMEMBERED:
            self._with_options[name] = scheme
        return scheme

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and bool(self[name])
        except ConfigError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)


def _by_name(solvers: Iterable[Solver], schemes: Mapping[str, str]) -> Mapping[str, Solver]:
    by_name: dict[str, Solver] = {}
    for solver in solvers:
        nameless = not isinstance(solver.name, str) or solver.name.split() != [solver.name]
        others = {*OPTIONS, *by_name, *schemes}
        if nameless or ":" in solver.name or _is_taken(solver.name, others):
            raise ConfigError(
                f"solver {solver.name!r}",
                "the name is that of an option, of a scheme or of another solver, or has a colon or a space",
                "a name of its own",
            )
        by_name[solver.name] = solver
    return MappingProxyType(by_name)


def _is_taken(name: str, others: Container[str]) -> bool:
    return name in others or name.lower() in others or is_group_size(name)


def _fp8() -> tuple[Scheme, ...]:
    token = Quant("e4m3fn", (1, 0))
    return (
        Scheme(
            "fp8_per_tensor",
            Quant("e4m3fn", (0, 0)),
            token,
            "FP8 weights, one scale; per-token activations",
            ("fp8", "fp8_dynamic"),
        ),
        Scheme(
            "fp8_per_channel",
            Quant("e4m3fn", (1, 0)),
            token,
            "FP8 weights per output channel; per-token activations",
            ("ptpc_fp8", "fp8_per_token"),
        ),
        Scheme(
            "fp8_per_block",
            Quant("e4m3fn", (128, 128)),
            Quant("e4m3fn", (1, 128)),
            "FP8 weights per 128x128; activations per 1x128",
            ("per_block_fp8", "fp8_block"),
        ),
        Scheme(
            "fp8_weight_only",
            Quant("e4m3fn", (1, 0)),
            None,
            "FP8 weights per output channel; 16-bit activations",
            ("fp8_wo",),
        ),
        Scheme(
            "fp6",
            Quant("e3m2", (1, 512)),
            None,
            "FP6 e3m2 weights in groups of 512; 16-bit activations",
            ("deepspeedfp",),
        ),
    )


def _int() -> tuple[Scheme, ...]:
    token, group = Quant("int8", (1, 0)), Quant("int4", (1, 128), "bf16")
    offset = Quant("int4", (1, 64), "bf16", "mse", zero_point=True)
    return (
        Scheme(
            "int8",
            token,
            token,
            "INT8 weights per output channel; per-token activations",
            ("int8_w8a8", "w8a8", "int8_dynamic"),
        ),
        Scheme(
            "int8_weight_only",
            token,
            None,
            "INT8 weights per output channel; 16-bit activations",
            ("int8_wo", "int8_per_channel_weight_only", "w8a16"),
        ),
        Scheme(
            "int4_weight_only",
            group,
            None,
            "INT4 weights in groups of 128; 16-bit activations",
            ("int4_wo", "w4a16", "int4_per_group_128"),
        ),
        Scheme(
            "int4_weight_only_g32",
            Quant("int4", (1, 32), "bf16"),
            None,
            "INT4 weights in groups of 32; 16-bit activations",
            ("int4_g32", "int4_per_group_32"),
        ),
        Scheme(
            "int4_w4a8",
            group,
            token,
            "INT4 weights in groups of 128; INT8 per-token activations",
            ("w4a8", "w4a8_int8"),
        ),
        Scheme(
            "int4_mse",
            offset,
            None,
            "INT4 weights with offsets in groups of 64, least squared error; 16-bit activations",
            ("int4",),
        ),
        Scheme(
            "int4_hqq",
            Quant("int4", (1, 64), "bf16", "hqq", zero_point=True),
            None,
            "INT4 weights with offsets in groups of 64, half-quadratic solver; 16-bit activations",
            ("hqq",),
        ),
    )


def _mx() -> tuple[Scheme, ...]:
    def mx(name: str, rule: str = "even") -> Quant:
        return Quant(name, (1, 32), "e8m0", rule)

    fp8, fp4 = mx("e4m3fn", "even1"), mx("e2m1")
    # of activations, as Ascend's operator; weights are searched
    dual = Quant("e2m1", (1, 32), "e8m0", "floor", outer_block=(1, 512))
    nv = Quant("e2m1", (1, 16), "e4m3fn", outer_block=(0, 0))
    return (
        Scheme("mxfp8", fp8, fp8, "MXFP8 (e4m3fn) weights and activations, a power-of-two scale per 32"),
        Scheme("mxfp8_weight_only", fp8, None, "MXFP8 (e4m3fn) weights; 16-bit activations", ("mxfp8_wo",)),
        Scheme(
            "mxfp6_e2m3",
            mx("e2m3"),
            mx("e2m3"),
            "MXFP6 (e2m3) weights and activations, a power-of-two scale per 32",
            ("mxfp6",),
        ),
        Scheme(
            "mxfp6_e3m2",
            mx("e3m2"),
            mx("e3m2"),
            "MXFP6 (e3m2) weights and activations, a power-of-two scale per 32",
        ),
        Scheme("mxfp4", fp4, fp4, "MXFP4 (e2m1) weights and activations, a power-of-two scale per 32"),
        Scheme("mxfp4_weight_only", fp4, None, "MXFP4 (e2m1) weights; 16-bit activations", ("mxfp4_wo",)),
        Scheme("mxfp4_w4a8", fp4, fp8, "MXFP4 weights, MXFP8 activations", ("mxfp4_mxfp8", "w4a8_mx")),
        Scheme(
            "mxfp4_dualscale",
            replace(dual, rule="mse"),
            dual,
            "MXFP4 weights and activations with a second, fp32 scale per 512",
        ),
        Scheme(
            "nvfp4",
            nv,
            replace(nv, outer_block=(1, 0)),
            "NVFP4 weights and activations, an e4m3fn scale per 16",
        ),
        Scheme("nvfp4_weight_only", nv, None, "NVFP4 weights; 16-bit activations", ("nvfp4_wo", "nvfp4a16")),
    )


def _tables() -> tuple[Scheme, ...]:
    return (
        Scheme(
            "nf4",
            Quant("nf4", (1, 64)),
            None,
            "NF4 weights in groups of 64; 16-bit activations",
            ("bnb_nf4",),
        ),
        Scheme(
            "fp4",
            Quant("fp4", (1, 64)),
            None,
            "FP4 (bitsandbytes) weights in groups of 64; 16-bit activations",
            ("bnb_fp4",),
        ),
        *(
            Scheme(
                name,
                Quant(name, (1, FORMATS[name].block)),
                None,
                f"GGUF {name.upper()} weights; 16-bit activations, int8 with a8",
                aliases,
            )
            for name, aliases in (
                ("q4_0", ()),
                ("q4_1", ()),
                ("q5_0", ()),
                ("q5_1", ()),
                ("q8_0", ()),
                ("q2_k", ("q2_k_s",)),
                ("q3_k", ("q3_k_s",)),
                ("q4_k", ("q4_k_s",)),
                ("q5_k", ("q5_k_s",)),
                ("q6_k", ()),
            )
        ),
        Scheme(
            "bf16",
            Quant("bf16", (0, 0)),
            None,
            "not quantized: BF16 as stored, prepacked where that is faster",
            ("bfloat16",),
        ),
    )


BUILTIN = Schemes((*_fp8(), *_int(), *_mx(), *_tables()))
