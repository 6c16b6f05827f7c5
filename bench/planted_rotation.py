"""A model moved by a known rotation and put in a known order: both are found again from 200 texts.

The teacher is the student folded by a random rotation, its heads and neurons reordered, as our own
fold does it. Capture, matching and solve see both models and nothing else, in float32.

With noise: what is read of the teacher is disturbed by Gaussian noise of 2^-12 of its root mean
square, for caches of states are kept in half precision: rounding to float16 disturbs Gaussian
entries by 2^-12.2 of it (measured). Noise that is independent from row to row leaves an error of
sigma / sqrt(n (l_i + l_j)), l the eigenvalues of the second moment: that, not the method, decides
which noise keeps below the bar. Tied by layer, the final norm's rotation has the rows of one site
of seven alone, so its error may be sqrt(7) times as large, and has a bar of its own.

Other noise is shown beside this theory: larger; true rounding, which is the same for every copy of
a token and so does not average out; and rounding that the teacher itself computes on with.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from bench._report import Figure, options, print_table, verdict
from bench._tiny_models import VARIANTS, save_folder, tiny_model
from core.specs.transport import Capture, Permute, Rotate
from core.transport.capture import capture
from core.transport.fold_folders import fold_folder
from core.transport.fold_plans import FoldPlan
from core.transport.moments import Captured
from core.transport.pairs import Pair, pair
from core.transport.permutations import LayerPermutation
from core.transport.permute import LayerSums, match_layer
from core.transport.rotate import solve
from core.transport.rotations import Rotation
from core.transport.sites import Tie, groups
from core.transport.sliced import load_folded
from core.transport.streams import shape_of
from core.transport.tokens import encode, load_tokenizer

TEXTS, WORDS = 200, (9, 17)
WIDER = 48
BAR = 1e-5
SITES = 7
"""Of the student's three layers and its final norm."""
ROUNDING = 2.0**-12
"""Standard deviation of the noise that counts, in units of a state's root mean square."""
LARGER = (1e-3, 1e-2)
READ = ("input_layernorm", "post_attention_layernorm", "model.norm", "mlp.down_proj")
"""Modules whose input a capture reads; maps come out of the attention."""
SYLLABLES = (
    "ba",
    "ke",
    "lo",
    "mi",
    "nu",
    "ra",
    "se",
    "ti",
    "ža",
    "čo",
    "ði",
    "øy",
    "川",
    "道",
    "ду",
)


@dataclass(frozen=True)
class Planted:
    """A student, the teacher made of it, and what was done."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    pairs: list[Pair]
    rotation: Tensor
    """[d_s, d_t] float64."""
    orders: dict[int, LayerPermutation]


@dataclass(frozen=True)
class Noise:
    """What happens to the teacher's states, activations and maps where they are read."""

    size: float | None
    """Of Gaussian noise, in units of the root mean square; None: rounding to float16."""
    computed_on: bool = False
    """Whether the teacher goes on with it, or it is in what is read alone."""

    def __call__(self, stream: Tensor, random: torch.Generator) -> Tensor:
        """Return the stream [..., d] as it is read."""
        if self.size is None:
            return stream.half().to(stream.dtype)
        root = stream.square().mean(-1, keepdim=True).sqrt()
        return stream + self.size * root * torch.randn(stream.shape, generator=random)

    def __str__(self) -> str:
        what = "float16 rounding" if self.size is None else f"Gaussian {self.size:.3g}"
        return what + (", computed on" if self.computed_on else "")


@dataclass(frozen=True)
class Found:
    """How far off what was found is."""

    largest: float
    """max abs of R found - R planted, over all rotations."""
    rms: float
    """Root mean square of the same."""
    orders: float
    """Share of heads and neurons that were given back their place."""


def main() -> int:
    """Plant and recover in every variant, without noise and with it."""
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    found = []
    with TemporaryDirectory() as folder:
        for number, (variant, width, tie) in enumerate(_cases()):
            planted = _plant(Path(folder) / str(number), variant, width=width)
            noisy = _recover(planted, tie=tie, noise=Noise(ROUNDING))
            found.append((tie, _recover(planted, tie=tie), noisy))
        print_table(
            ["variant", "max abs error of R", "orders", "with noise", "orders"],
            [
                (f"{variant}, 32 to {width}, by {tie}", *_cells(exact), *_cells(noisy))
                for (variant, width, tie), (_, exact, noisy) in zip(_cases(), found, strict=True)
            ],
        )
        _show_noise(_plant(Path(folder) / "noisy", "llama", width=32))
    whole = [noisy for tie, _, noisy in found if tie == "global"]
    apart = [noisy for tie, _, noisy in found if tie == "layer"]
    return verdict(
        "planted_rotation",
        _most("max abs error of R", [exact for _, exact, _ in found], BAR),
        _most("with noise, one R", whole, BAR),
        _most("with noise, an R by layer", apart, BAR * SITES**0.5),
        _least("orders recovered", [exact for _, exact, _ in found]),
        _least("with noise, orders", whole + apart),
        check=args.check,
    )


def _cells(found: Found) -> tuple[float, float]:
    return found.largest, found.orders


def _most(name: str, found: list[Found], bar: float) -> Figure:
    return Figure(name, max(one.largest for one in found), bar, at_most=True)


def _least(name: str, found: list[Found]) -> Figure:
    return Figure(name, min(one.orders for one in found), 1.0)


def _cases() -> Iterator[tuple[str, int, Tie]]:
    for variant in VARIANTS:
        yield variant, 32, "global"
    yield "llama", WIDER, "global"
    yield "qwen3", WIDER, "global"
    yield "llama", 32, "layer"
    yield "qwen2", WIDER, "layer"


def _plant(folder: Path, variant: str, *, width: int) -> Planted:
    folder.mkdir()
    source = save_folder(tiny_model(variant), folder / "student")
    student = load_folded(source, attn_implementation="eager")
    shape = shape_of(student)
    random = np.random.default_rng(7)
    rotation = torch.from_numpy(_orthogonal(random, width)[: shape.width])
    orders = {layer: _order(random, layer, student) for layer in range(shape.layers)}
    plan = FoldPlan(shape, "global", {"global": rotation}, permutations=orders)
    fold_folder(source, folder / "teacher", plan)
    teacher = load_folded(folder / "teacher", attn_implementation="eager")
    tokenizer, capturing = load_tokenizer(source), Capture()
    cut = [encode(tokenizer, text, system_prompt="", max_tokens=512) for text in _texts(random)]
    return Planted(student, teacher, [pair(one, one, capturing) for one in cut], rotation, orders)


def _orthogonal(random: np.random.Generator, width: int) -> np.ndarray:
    Q, R = np.linalg.qr(random.standard_normal((width, width)))
    found: np.ndarray = Q * np.sign(np.diagonal(R))
    return found


def _order(random: np.random.Generator, layer: int, model: PreTrainedModel) -> LayerPermutation:
    shape = shape_of(model)
    per_group = shape.heads // shape.kv_heads
    kv_heads = random.permutation(shape.kv_heads).tolist()
    heads = [
        group * per_group + at
        for group in kv_heads
        for at in random.permutation(per_group).tolist()
    ]
    neurons = random.permutation(shape.neurons).tolist()
    return LayerPermutation(layer, tuple(kv_heads), tuple(heads), tuple(neurons))


def _texts(random: np.random.Generator) -> list[str]:
    """Sentences of made-up words, in several scripts."""
    texts = []
    for _ in range(TEXTS):
        words = [
            "".join(random.choice(SYLLABLES, size=random.integers(1, 4)))
            for _ in range(random.integers(*WORDS))
        ]
        texts.append(" ".join(words).capitalize() + ".")
    return texts


def _recover(planted: Planted, *, tie: Tie, noise: Noise | None = None) -> Found:
    """Capture both models, match and solve; compare with what was planted."""
    with _disturbed(planted.teacher, noise):
        sums = _captured(planted)
    shape, other = shape_of(planted.student), shape_of(planted.teacher)
    rotate = Rotate(tie=tie)
    gaps = []
    for group, sites in groups(shape, tie=tie, stage_layers=8).items():
        rotation, _ = solve({site: sums.sites[site] for site in sites}, rotate, group)
        assert isinstance(rotation, Rotation)
        gaps.append((rotation.full - planted.rotation).abs())
    places: list[bool] = []
    for layer, order in planted.orders.items():
        of = LayerSums(sums.neurons[layer], sums.heads[layer])
        matched, _ = match_layer(layer, of, student=shape, teacher=other)
        for name in ("kv_heads", "heads", "neurons"):
            places += _agree(getattr(matched, name), getattr(order, name))
    gap = torch.stack(gaps)
    return Found(float(gap.max()), float(gap.square().mean().sqrt()), float(np.mean(places)))


def _agree(found: Sequence[int], planted: Sequence[int]) -> list[bool]:
    return [mine == theirs for mine, theirs in zip(found, planted, strict=True)]


def _captured(planted: Planted) -> Captured:
    return capture(
        planted.student,
        planted.teacher,
        planted.pairs,
        options=Capture(drop_massive=None),
        layer_map=tuple(range(shape_of(planted.student).layers)),
        permute=Permute(),
        report=lambda done, total: None,
    )


@contextmanager
def _disturbed(teacher: PreTrainedModel, noise: Noise | None) -> Iterator[None]:
    """Disturb the teacher where a capture reads it: pre-norms, activations, attention maps.

    Our hooks come before a capture's. Where the teacher is not to go on with the noise, the module
    is computed once more, of what it was given.
    """
    if noise is None:
        yield
        return
    random = torch.Generator().manual_seed(11)
    given: dict[nn.Module, Tensor] = {}

    def disturb(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        given[module] = args[0]
        return (noise(args[0], random),)

    def restore(module: nn.Module, _: tuple[Tensor, ...], __: Tensor) -> Tensor:
        undisturbed: Tensor = module.forward(given.pop(module))
        return undisturbed

    def disturb_maps(
        _: nn.Module, __: object, gave: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return gave[0], noise(gave[1], random)

    with ExitStack() as stack:
        for name, module in teacher.named_modules():
            if name.endswith(READ):
                stack.callback(module.register_forward_pre_hook(disturb).remove)
                if not noise.computed_on:
                    stack.callback(module.register_forward_hook(restore).remove)
            elif name.endswith("self_attn"):
                stack.callback(module.register_forward_hook(disturb_maps).remove)
        yield


def _show_noise(planted: Planted) -> None:
    """Print the error beside what theory expects of noise that is independent of all else."""
    sums = _captured(planted)
    first, *others = sums.sites.values()
    whole = first
    for other in others:
        whole = whole + other
    values = torch.linalg.eigvalsh(whole.xx)  # n times l
    expected = float((values[:, None] + values[None]).reciprocal().mean().sqrt())
    rows: list[tuple[object, ...]] = []
    noises = [Noise(size) for size in (ROUNDING, *LARGER)]
    for noise in (*noises, Noise(None), Noise(None, computed_on=True)):
        found = _recover(planted, tie="global", noise=noise)
        theory = "" if noise.size is None else noise.size * expected
        rows.append((noise, found.largest, found.rms, theory, found.orders))
    print()
    print_table(["noise", "max abs error of R", "RMS", "RMS by theory", "orders"], rows)
    print(f"{int(whole.n)} rows of {SITES} sites\n")


if __name__ == "__main__":
    sys.exit(main())
