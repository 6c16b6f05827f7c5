"""What each part of a transport holds in memory, in bytes, by shapes and options alone. Torch-free.

Each formula counts what is alive at the peak, beside what a process takes anyway; d_s and d_t are
the widths of student and teacher, d_r the larger of them. The API plans with these.
"""

from __future__ import annotations

from core.architectures.shape import ITEM_BYTES, ModelShape
from core.architectures.tables import Weight
from core.specs.transport import HELD_OUT_SHARES, Permute, Rotate
from core.transport.sites import sites

BLOCK_BYTES = 64 << 20
"""Of temporaries while a weight is made: rows read, their float64, the product, what is written."""
OUT_ROWS = 512
"""Most rows made at once of a weight that writes the residual stream."""
ALIGNED = 64
"""Where the parts of a stretch of memory begin, in bytes."""
BLOCK_LOGITS = 1 << 24
"""Logits held at once per model: a block of rows, not a batch, meets the vocabulary."""
CKA_ROWS = 2048
"""Paired rows by which layers are compared: their Gram matrices take 32 MiB each."""


def widened(student: ModelShape, teacher: ModelShape) -> int:
    """Return the width of the folded student: the larger of the two."""
    return max(student.width, teacher.width)


def permuted_layers(permute: Permute | None, layers: int) -> tuple[int, ...]:
    """Return the student's layers that may be permuted, rising; those the model has.

    Args:
        permute: None: none.
        layers: how many the student has.
    """
    if permute is None:
        return ()
    if permute.layers == "all":
        return tuple(range(layers))
    if permute.layers == "every_other":
        return tuple(range(0, layers, 2))
    return tuple(sorted({layer for layer in permute.layers if layer < layers}))


def permutable(
    student: ModelShape, teacher: ModelShape, permute: Permute | None
) -> tuple[bool, bool]:
    """Return whether statistics of neurons, and of heads, are kept.

    Only where both models have equally many, so that one can be put in the other's order; of heads
    also equally many KV heads.
    """
    if permute is None:
        return False, False
    alike = (student.heads, student.kv_heads) == (teacher.heads, teacher.kv_heads)
    return permute.neurons and student.neurons == teacher.neurons, permute.heads and alike


def pair_bytes(student: ModelShape, teacher: ModelShape) -> int:
    """Return what the moments of one pair of sites take, all float64."""
    s, t = student.width, teacher.width
    return 8 * (1 + s + t + s * s + t * t + s * t)


def statistics_bytes(student: ModelShape, teacher: ModelShape, permute: Permute | None) -> int:
    """Return what the statistics of permuted layers take, all float64.

    Per layer ``8 (1 + 4 M + M^2)`` for M neurons and ``8 (2 H + H^2)`` for H heads.
    """
    neurons, heads = permutable(student, teacher, permute)
    m, h = student.neurons, student.heads
    each = neurons * (1 + 4 * m + m * m) + heads * (2 * h + h * h)
    return 8 * each * len(permuted_layers(permute, student.layers))


def moments_bytes(student: ModelShape, teacher: ModelShape, permute: Permute | None = None) -> int:
    """Return what the sums of a capture take, in memory as in a chunk's file (beside its header).

    Per site of the student ``8 (1 + d_s + d_t + d_s^2 + d_t^2 + d_s d_t)``, and ``permute``'s
    statistics.
    """
    every = len(sites(student)) * pair_bytes(student, teacher)
    return every + statistics_bytes(student, teacher, permute)


def kept_bytes(
    student: ModelShape,
    teacher: ModelShape,
    permute: Permute | None,
    *,
    batch_tokens: int,
    max_tokens: int,
    dtype: str,
) -> int:
    """Return at most what one batch keeps of the student until the teacher has passed.

    Every site's rows and their lengths; of permuted layers the activations, and attention maps
    [H, T, T] of each text.

    Args:
        student: whose rows are kept.
        teacher: decides what can be permuted.
        permute: as of ``capture``.
        batch_tokens: at least a text's.
        max_tokens: of one text.
        dtype: that the student computes in.
    """
    item, tokens = ITEM_BYTES[dtype], max(batch_tokens, max_tokens)
    neurons, heads = permutable(student, teacher, permute)
    layers = len(permuted_layers(permute, student.layers))
    rows = len(sites(student)) * (student.width * item + 4)
    activations = neurons * layers * student.neurons * item
    maps = heads * layers * student.heads * max_tokens * item
    return tokens * (rows + activations + maps)


def products_bytes(
    student: ModelShape, teacher: ModelShape, permute: Permute | None, *, tokens: int
) -> int:
    """Return what adding one product takes: it in float32, widened to be added, and its rows.

    ``12 M^2`` for M neurons whose statistics are kept, else ``12 d_s d_t``.

    Args:
        student: whose rows are multiplied.
        teacher: with these.
        permute: as of ``capture``.
        tokens: of a batch.
    """
    neurons = permutable(student, teacher, permute)[0] * student.neurons
    numbers = max(student.width * teacher.width, neurons**2)
    return 12 * numbers + 8 * tokens * max(teacher.width, neurons)


def weights_bytes(shape: ModelShape, dtype: str) -> int:
    """Return what a loaded model takes.

    Args:
        shape: of the model.
        dtype: what it computes in; ``auto``: as stored. A CPU takes float32 for that, so of
            16-bit weights twice as much.
    """
    return shape.parameters * ITEM_BYTES[shape.dtype if dtype == "auto" else dtype]


def resident_bytes(shape: ModelShape, dtype: str) -> int:
    """Return what a model that is spread (``placement: spread``) needs of a device at least.

    Its largest part that accelerate does not split, a layer or the embedding: parts that rest in
    memory or on disk are brought over one at a time.
    """
    item = ITEM_BYTES[shape.dtype if dtype == "auto" else dtype]
    outside = shape.vocabulary * shape.width
    other = (1 if shape.tied else 2) * outside + shape.width
    return item * max(outside, (shape.parameters - other) // shape.layers)


def forward_bytes(
    shape: ModelShape, *, batch_tokens: int, max_tokens: int, dtype: str, maps: bool = False
) -> int:
    """Return what a forward pass without the head makes of a batch, beside the weights.

    The widest place is the MLP of a layer: gate, up and their product, beside the stream twice; or
    of attention maps (eager) the scores, their softmax in float32 and what is kept of it.

    Args:
        shape: of the model.
        batch_tokens: at least a text's.
        max_tokens: of one text.
        dtype: what it computes in.
        maps: whether attention maps are computed as such.
    """
    item = ITEM_BYTES[shape.dtype if dtype == "auto" else dtype]
    tokens = max(batch_tokens, max_tokens)
    stream = 3 * shape.width * max(4, item)
    heads = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim * item
    scores = maps * shape.heads * max_tokens * (2 * item + 4)
    return tokens * (stream + max(3 * shape.neurons * item, heads + scores))


def predictions_bytes(vocabulary: int, *, tokens: int) -> int:
    """Return what comparing two models' predictions takes: eight blocks of logits in float32.

    Both models' own, their logarithms, those of the ids that both have, and what KL makes of them.

    Args:
        vocabulary: the larger one.
        tokens: of a batch.
    """
    return 4 * 8 * min(max(BLOCK_LOGITS, vocabulary), tokens * vocabulary)


def solve_bytes(student: int, teacher: int, options: Rotate, *, sites: int) -> int:
    """Return what ``rotate.solve`` takes beside the moments that it is given.

    ``8 (d_s^2 + d_t^2 + d_r^2 + 2 d_s d_r)`` are the frames and both products between them, and
    either one SVD of them with its work space (7 n^2 of n by n) or the map in its parts and whole.
    Where something is pooled that takes a pair of sites more, of z-scores one more again.

    Args:
        student: d_s.
        teacher: d_t.
        options: how.
        sites: that share the rotation.
    """
    s, t, r, least = student, teacher, max(student, teacher), min(student, teacher)
    pair = s * s + t * t + s * t
    shared = s * s + t * t + r * r + 2 * s * r
    pooled = int(options.centre or options.whiten or sites > 1)
    trial = int(options.k == "held_out" and bool(pooled))
    held = (pooled + trial + int(options.whiten and sites > 1)) * pair
    turned = shared + held + max(_turn(s, r, k) for k in _tried(options, least))
    # Pooling itself: the sum, one site without its means, and the sum of both.
    apart = options.centre * ((3 if sites > 1 else 1) * pair + 2 * r * r)
    before = pooled * pair + s * s + t * t if options.k == "held_out" else 0
    return 8 * max(turned, apart + before)


def _tried(options: Rotate, most: int) -> tuple[int, ...]:
    if options.k is None:
        return (max(1, int(options.shrink * most)),)
    if options.k == "held_out":
        return tuple(max(1, round(share * most)) for share in HELD_OUT_SHARES)
    return (min(options.k, most),)


def _turn(s: int, r: int, k: int) -> int:
    """Numbers alive in one ``rotate._turn`` beside frames and products."""
    n, m = s - k, r - k
    core = 7 * k * k
    rest = 2 * k * k + n * m + 5 * n * n + m * m
    whole = 2 * k * k + n * n + m * m + 3 * s * r
    return max(core, rest, whole)


def rotation_bytes(student: int, teacher: int, options: Rotate) -> int:
    """Return what one rotation takes in memory and, beside its header, in a file: bases and maps.

    Args:
        student: d_s.
        teacher: d_t.
        options: of k; at most, where it is chosen.
    """
    k = max(_tried(options, min(student, teacher)))
    return 8 * (student * max(student, teacher) + k * (student + teacher) + k * k + k + 2 * teacher)


def refine_bytes(student: int, teacher: int, options: Rotate) -> int:
    """Return what ``refine.refine`` takes beside the rotation: ``8 (5 d_r^2 + d_s d_r)``.

    The cross-moment, R^T C and its eigenvectors with their work space; d_r^2 more where principal
    directions leave reflections something to gain, which takes widths that differ.
    """
    r = max(student, teacher)
    reflects = int(options.pca == "each" and student != teacher)
    return 8 * ((5 + reflects) * r * r + student * r)


def rotate_bytes(student: ModelShape, teacher: ModelShape, options: Rotate, *, sites: int) -> int:
    """Return what fitting one group takes: every site's moments, the solve or the refinement.

    With ``k: held_out`` the moments are there three times: of all texts, of those that fit and of
    those that choose.

    Args:
        student: its width counts.
        teacher: likewise.
        options: how.
        sites: that share the rotation.
    """
    s, t, pair = student.width, teacher.width, pair_bytes(student, teacher)
    solved = solve_bytes(s, t, options, sites=sites)
    fixed = options.model_copy(update={"k": None, "shrink": 1.0})
    after = rotation_bytes(s, t, fixed) + max(refine_bytes(s, t, options), 3 * pair)
    if options.k == "held_out":
        return sites * pair + max(2 * sites * pair + solved, after)
    return sites * pair + max(solved, after)


def match_bytes(student: ModelShape, teacher: ModelShape, permute: Permute | None) -> int:
    """Return what matching one layer takes: ``8 * 6 M^2`` for M neurons.

    The statistics, twice while they are added, then the correlations and their assignment's copies.
    """
    neurons, heads = permutable(student, teacher, permute)
    return 8 * 6 * max(neurons * student.neurons**2, heads * student.heads**2)


def fold_bytes(
    shape: ModelShape,
    *,
    width: int,
    maps: int,
    variant: str,
    dtype: str = "keep",
    permuted: tuple[bool, bool] = (False, False),
    adapters: bool = False,
) -> int:
    """Return the most that folding one file takes.

    ``8 maps d_s d_r + 8 (2 L + 1) d_s + max over the weights``, where one that reads the stream, or
    the embedding, takes BLOCK_BYTES (less where it is smaller; one row's temporaries at least), and
    one that writes it, [d_s, n], itself as stored, OUT_ROWS rows of the new one and BLOCK_BYTES.

    Args:
        shape: of the model that is folded.
        width: d_r, of what comes out.
        maps: how many rotations are held, [d_s, d_r] float64 each.
        variant: ``none`` mixes no rows.
        dtype: of the weights written; ``keep``: as they are.
        permuted: whether neurons, and heads, are reordered.
        adapters: whether skip adapters are written too.
    """
    kept = {*shape.tensors(), shape.table.head}
    stored = ITEM_BYTES[shape.dtype]
    written = stored if dtype == "keep" else ITEM_BYTES[dtype]
    most = max(
        _folded(shape, weight, width, (stored, written), variant, permuted)
        for name, _, weight in shape.table.weights(shape.layers)
        if name in kept
    )
    if adapters:
        most = max(most, OUT_ROWS * width * (8 + max(4, written)))
    return 8 * maps * shape.width * width + 8 * (2 * shape.layers + 1) * shape.width + most


def _folded(
    shape: ModelShape,
    weight: Weight,
    width: int,
    items: tuple[int, int],
    variant: str,
    permuted: tuple[bool, bool],
) -> int:
    old = tuple(shape.size(axis) for axis in weight.axes)
    new = tuple(width if axis == "residual" else shape.size(axis) for axis in weight.axes)
    mixed = variant != "none" and weight.axes[0] == "residual" and len(old) == 2
    moved = {"neurons": permuted[0], "queries": permuted[1]}.get(weight.axes[-1], False)
    return weight_bytes(old, new, items=items, mixed=mixed, permuted=moved)


def weight_bytes(
    old: tuple[int, ...],
    new: tuple[int, ...],
    *,
    items: tuple[int, int],
    mixed: bool,
    permuted: bool,
) -> int:
    """Return what making one weight takes.

    Args:
        old: shape as it is read.
        new: as it is written.
        items: bytes of a number, as read and as written.
        mixed: whether rows are mixed with each other (``Recipe.left``): then it is read whole.
        permuted: whether its columns are reordered.
    """
    rows, last = (1, old[0]) if len(old) == 1 else (old[0], old[1])
    item_in, item_out = items
    if mixed:
        made = min(OUT_ROWS, new[0])
        cost = column_cost(rows, made, item_in, permuted=permuted)
        held = rows * last * item_in + made * last * item_out
        return held + cost * at_once(cost, last) + 5 * ALIGNED
    cost = row_cost(last, new[-1], item_in, item_out, permuted=permuted)
    return cost * at_once(cost, rows) + 4 * ALIGNED


def row_cost(old: int, new: int, item_in: int, item_out: int, *, permuted: bool) -> int:
    """Bytes per row while rows are made: read, reordered, made, widened or (later) written."""
    return old * item_in * (2 if permuted else 1) + 8 * new + max(8 * old, item_out * new)


def column_cost(old: int, rows: int, item_in: int, *, permuted: bool) -> int:
    """Bytes per column while ``rows`` rows are made: reordered, widened, the product."""
    return old * (8 + (item_in if permuted else 0)) + 8 * rows


def at_once(cost: int, most: int) -> int:
    """Return how many of what costs so many bytes fit BLOCK_BYTES: 1 to ``most``."""
    return min(most, max(1, BLOCK_BYTES // cost))
